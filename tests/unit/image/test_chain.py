"""Layers laid over each other, against a model that looks at one block at a time."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.errors import CorruptMetadata
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.image.chain import clip, concatenate, merge_adjacent, overlay, resolve
from qcowlib.image.reader import ReadableImage, read_pieces, read_range

BLOCK = 16
DATA, ZERO, UNALLOCATED, COMPRESSED = (int(kind) for kind in ExtentKind)


class ModelLayer(ReadableImage):
    """A layer of blocks: for each block a kind, and a host block for data. Damaged blocks raise when asked."""

    format = "model"
    cluster_size = BLOCK

    def __init__(
        self,
        blocks: list[tuple[int, int]],
        backing: ReadableImage | None = None,
        number: int = 0,
        damaged: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(backing)
        self.blocks = blocks
        self.number = number
        self.damaged = damaged
        self.asked = 0

    @property
    def size(self) -> int:
        return len(self.blocks) * BLOCK

    @property
    def name(self) -> str:
        return f"layer {self.number}"

    def byte(self, host: int) -> int:
        return (host * 7 + self.number * 50 + 1) % 251 + 1

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        self.asked += 1
        rows = []
        end = offset + length
        for index in range(offset // BLOCK, -(-end // BLOCK)):
            if index in self.damaged:
                raise CorruptMetadata("L2 table", index, "damaged on purpose")
            start, stop = max(offset, index * BLOCK), min(end, (index + 1) * BLOCK)
            kind, host, _ = self.lookup(start)
            stored = {DATA: stop - start, COMPRESSED: 5}.get(kind, 0)
            rows.append((start, stop - start, kind, host, stored, 0))
        # Batches of three rows: results must not depend on where batches end.
        for first in range(0, len(rows), 3):
            yield ExtentTable.from_rows(rows[first : first + 3])

    def lookup(self, offset: int) -> tuple[int, int, int]:
        index, inside = divmod(offset, BLOCK)
        if index in self.damaged:
            raise CorruptMetadata("L2 table", index, "damaged on purpose")
        kind, host = self.blocks[index]
        if kind == COMPRESSED:
            return kind, host * BLOCK, BLOCK - inside
        return kind, host * BLOCK + inside if kind == DATA else -1, BLOCK - inside

    def read_data(self, guest: int, host: int, view: memoryview) -> None:
        view[:] = bytes(self.byte(host + i) for i in range(len(view)))

    def read_compressed(self, guest: int, host: int, host_length: int, view: memoryview) -> None:
        view[:] = bytes(self.byte(host + guest % BLOCK + i) for i in range(len(view)))

    def model(self) -> list[tuple[int, int, int, int]]:
        """For each byte (value, kind, host, layer), found one block at a time."""
        below = self.backing.model() if isinstance(self.backing, ModelLayer) else []
        result = []
        for guest in range(self.size):
            kind, host, _ = self.lookup(guest)
            if kind == UNALLOCATED and guest < len(below):
                value, kind, host, layer = below[guest]
                result.append((value, kind, host, layer + 1))
            else:
                value = 0
                if kind == DATA:
                    value = self.byte(host)
                elif kind == COMPRESSED:
                    value = self.byte(host + guest % BLOCK)
                result.append((value, kind, host, 0))
        return result


blocks = st.lists(st.tuples(st.sampled_from([DATA, ZERO, UNALLOCATED, COMPRESSED]), st.integers(0, 40)), max_size=40)
holey = st.lists(st.tuples(st.sampled_from([DATA, UNALLOCATED]), st.integers(0, 40)), min_size=34, max_size=60)


@st.composite
def chains(draw: st.DrawFn) -> ModelLayer:
    top: ModelLayer | None = None
    for number in range(draw(st.integers(1, 4))):
        top = ModelLayer(draw(st.one_of(blocks, holey)), top, number)
    assert top is not None
    return top


def bytes_of(tables: Iterator[ExtentTable], offset: int = 0) -> list[tuple[int, int, int]]:
    """(kind, host, layer) of each byte; checks that rows have no gaps and sound lengths."""
    result: list[tuple[int, int, int]] = []
    for table in tables:
        assert len(table)
        assert (table.start.dtype, table.kind.dtype, table.layer.dtype) == (np.int64, np.uint8, np.uint16)
        for start, length, kind, host, host_length, layer in table.rows():
            assert start == offset + len(result)
            assert length > 0
            assert host_length == {DATA: length, COMPRESSED: 5}.get(kind, 0)
            step = 1 if kind == DATA else 0
            result.extend((kind, host + step * i, layer) for i in range(length))
    return result


@given(chains(), st.data())
def test_resolved_rows_and_reads_agree_with_the_model(top: ModelLayer, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, top.size))
    length = data.draw(st.integers(0, top.size - offset))
    model = top.model()[offset : offset + length]
    rows = bytes_of(top.extents(offset, length), offset)
    assert rows == [(kind, host, layer) for _, kind, host, layer in model]

    expected = bytes(value for value, *_ in model)
    for read in (read_range, read_pieces):
        dirty = bytearray(b"\xee" * length)
        if length:
            read(top, offset, memoryview(dirty))
        assert dirty == expected
    assert top.read(offset, length) == expected


@given(chains())
def test_extents_of_a_chain_have_no_mergeable_neighbours_in_one_table(top: ModelLayer) -> None:
    for table in top.extents():
        assert len(merge_adjacent(table)) == len(table)


def test_many_runs_are_asked_at_once() -> None:
    base = ModelLayer([(DATA, 3)] * 400)
    top = ModelLayer([(DATA if i % 2 else UNALLOCATED, i % 50) for i in range(400)], base, 1)
    top.layer_extents = lambda offset, length: iter(  # type: ignore[method-assign]
        [concatenate(list(ModelLayer.layer_extents(top, offset, length)))]
    )
    rows = bytes_of(top.extents())
    assert [layer for _, _, layer in rows[::BLOCK]] == [1, 0] * 200
    assert base.asked == 1


def test_damage_below_hurts_only_where_it_is_needed() -> None:
    """40 runs are asked as one span; a damaged block under data of the layer above must not matter."""
    base = ModelLayer([(DATA, 3)] * 80, damaged=frozenset({1}))
    top = ModelLayer([(DATA if i % 2 else UNALLOCATED, 7) for i in range(80)], base, 1)
    whole = concatenate(list(ModelLayer.layer_extents(top, 0, top.size)))
    top.layer_extents = lambda offset, length: iter([clip(whole, offset, offset + length)])  # type: ignore[method-assign]
    rows = bytes_of(top.extents())
    assert [layer for _, _, layer in rows[::BLOCK]] == [1, 0] * 40
    needed = ModelLayer([(UNALLOCATED, 0)] * 80, base, 2)
    with pytest.raises(CorruptMetadata):
        list(needed.extents())
    with pytest.raises(CorruptMetadata):
        needed.read(0, 80 * BLOCK)
    assert len(needed.read(2 * BLOCK, 78 * BLOCK)) == 78 * BLOCK


def test_a_range_behind_a_short_backing_file_belongs_to_the_layer_above() -> None:
    base = ModelLayer([(DATA, 0)] * 2)
    middle = ModelLayer([(UNALLOCATED, 0)] * 4, base, 1)
    top = ModelLayer([(UNALLOCATED, 0)] * 6, middle, 2)
    table = concatenate(list(resolve(top, 0, top.size)))
    assert [(row.start // BLOCK, row.kind, row.layer) for row in table] == [
        (0, DATA, 2),
        (1, DATA, 2),
        (2, UNALLOCATED, 1),
        (3, UNALLOCATED, 1),
        (4, UNALLOCATED, 0),
        (5, UNALLOCATED, 0),
    ]
    assert [(row.start // BLOCK, row.layer) for row in merge_adjacent(table)] == [(0, 2), (1, 2), (2, 1), (4, 0)]


def test_overlay_and_clip_keep_compressed_rows_whole() -> None:
    upper = ExtentTable.from_rows([(0, 64, UNALLOCATED, -1, 0, 0), (64, 64, COMPRESSED, 1000, 9, 0)])
    lower = ExtentTable.from_rows([(16, 32, DATA, 500, 32, 1), (48, 48, ZERO, 700, 0, 1)])
    assert list(overlay(upper, lower).rows()) == [
        (16, 32, DATA, 500, 32, 1),
        (48, 16, ZERO, 700, 0, 1),
        (64, 32, COMPRESSED, 1000, 9, 0),
    ]
    assert list(clip(lower, 20, 60).rows()) == [(20, 28, DATA, 504, 28, 1), (48, 12, ZERO, 700, 0, 1)]
    assert len(clip(lower, 200, 300)) == 0
