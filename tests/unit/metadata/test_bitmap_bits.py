"""The bits of a bitmap against a plain set of numbers."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import qcowlib
from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.format.bitmap_directory import BitmapEntry
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.bitmap_bits import BitmapBits, read_bitmap_table
from qcowlib.storage.buffer import BytesStorage

CLUSTER, BIT = 512, 512
PER_CLUSTER = CLUSTER * 8  # bits in a cluster


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WritableQcow2Image]:
    """An image whose clusters hold few bits; bits are put into it, and nothing is committed."""
    path = tmp_path_factory.mktemp("bits") / "image.qcow2"
    qcowlib.create_image(path, 1 << 20, cluster_size=CLUSTER)
    opened = qcowlib.open_image(path, writable=True)
    assert isinstance(opened, WritableQcow2Image)
    yield opened
    opened.transaction.failed = True
    opened.close()


def empty(image: WritableQcow2Image, bits: int) -> BitmapBits:
    return BitmapBits(image.state.storage, image.state.geometry, 9, bits * BIT)


def numbers(bits: BitmapBits) -> set[int]:
    """The set bits, by the runs; these are sorted, and neither overlap nor touch."""
    found: set[int] = set()
    end = -1
    for first, last in bits.runs():
        assert len(first)
        assert (first < last).all()
        assert first[0] > end
        assert (first[1:] > last[:-1]).all()
        end = int(last[-1])
        found.update(*(range(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)))
    return found


SIZE = 5 * PER_CLUSTER + 1234
places = st.one_of(
    st.integers(0, SIZE),
    st.builds(lambda cluster, by: min(SIZE, max(0, cluster * PER_CLUSTER + by)), st.integers(0, 5), st.integers(-9, 9)),
)
ranges = st.tuples(places, places).map(sorted).filter(lambda pair: pair[0] < pair[1])
steps = st.one_of(
    st.tuples(st.just("set"), ranges),
    st.tuples(st.just("set_many"), st.lists(places, min_size=2, max_size=400, unique=True)),
    st.tuples(st.sampled_from(["spill", "fetch", "clear"]), st.none()),
    st.tuples(st.just("resize"), st.integers(1, SIZE)),
)


@hypothesis.given(program=st.lists(steps, max_size=12))
@hypothesis.settings(max_examples=150, suppress_health_check=list(hypothesis.HealthCheck))
def test_like_a_set(image: WritableQcow2Image, program: list[tuple[str, list[int] | int | None]]) -> None:
    bits, model = empty(image, SIZE), set[int]()
    for kind, value in program:
        if kind == "set" and isinstance(value, list):
            first, last = (min(each, bits.size) for each in value)
            if first < last:
                bits.set(first, last)
                model.update(range(first, last))
        elif kind == "set_many" and isinstance(value, list):
            chosen = sorted(each for each in value if each < bits.size)
            chosen = chosen[: len(chosen) // 2 * 2]
            bits.set_many(np.array(chosen[0::2], dtype=np.int64), np.array(chosen[1::2], dtype=np.int64))
            model.update(*(range(a, b) for a, b in zip(chosen[0::2], chosen[1::2], strict=True)))
        elif kind == "resize" and isinstance(value, int):
            bits = bits.resized(value * BIT)
            model = {bit for bit in model if bit < value}
        elif kind == "clear":
            bits.clear()
            model.clear()
        elif kind == "fetch":
            bits.fetch()
        else:
            bits.spill(image.transaction)
            assert not bits.changed
        assert numbers(bits) == model
    bits.spill(image.transaction)
    assert numbers(bits) == model
    # What stands in the file is all there is: nothing behind the last bit, whole clusters in the table alone.
    again = BitmapBits(image.state.storage, image.state.geometry, 9, bits.disk_size, bits.table)
    assert numbers(again) == model
    for index, entry in enumerate(bits.table.tolist()):
        inside = {bit for bit in model if bit // PER_CLUSTER == index}
        assert (entry == 1) == (len(inside) == PER_CLUSTER)
        assert (entry == 0) == (not inside)


def test_runs_across_batches(image: WritableQcow2Image) -> None:
    """Bits are looked at in pieces: a run that goes on in the next piece is one run; so is one to the last bit."""
    bits = empty(image, 3000 * PER_CLUSTER + 5)
    bits.set(7, 2999 * PER_CLUSTER + 9)
    bits.set(bits.size - 1, bits.size)
    found = [(int(a), int(b)) for first, last in bits.runs() for a, b in zip(first, last, strict=True)]
    assert found == [(7, 2999 * PER_CLUSTER + 9), (bits.size - 1, bits.size)]


def test_every_second_bit(image: WritableQcow2Image) -> None:
    bits = empty(image, 2 * PER_CLUSTER)
    chosen = np.arange(0, 2 * PER_CLUSTER, 2, dtype=np.int64)
    bits.set_many(chosen, chosen + 1)
    assert numbers(bits) == set(chosen.tolist())


def test_bits_behind_the_end_do_not_count() -> None:
    """A damaged bitmap: its last cluster is all set in the table, or has bits where there is no disk."""
    storage = BytesStorage(bytes(CLUSTER) * 4 + b"\xff" * CLUSTER)
    for entry in (1, 4 * CLUSTER):
        bits = BitmapBits(storage, Geometry(9), 9, 13 * BIT, np.array([entry], dtype=">u8"))
        assert numbers(bits) == set(range(13))


def test_damaged_tables() -> None:
    table = np.array([0, 1, 4 * CLUSTER], dtype=">u8")

    def read(*entries: int) -> None:
        data = bytes(4 * CLUSTER) + np.array([*table.tolist(), *entries], dtype=">u8").tobytes()
        entry = BitmapEntry(4 * CLUSTER, 3 + len(entries), 0, 1, 9, "b")
        read_bitmap_table(BytesStorage(data.ljust(6 * CLUSTER, b"\0")), entry, CLUSTER)

    read()
    for entry in (2, 1 << 56, 1 << 63, 4 * CLUSTER + 1, 5 * CLUSTER + 4):
        with pytest.raises(CorruptMetadata, match="entry 3 is invalid"):
            read(entry)
    for entry in (6 * CLUSTER, 1 << 55):
        with pytest.raises(CorruptMetadata, match="entry 3 names bits beyond the end"):
            read(entry)
    with pytest.raises(CorruptMetadata, match="beyond the end of the file"):
        read_bitmap_table(BytesStorage(bytes(5 * CLUSTER)), BitmapEntry(4 * CLUSTER, 65, 0, 1, 9, "b"), CLUSTER)
