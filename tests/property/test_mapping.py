"""The scalar and the vectorised path of the mapping say the same of every byte, for any tables."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.extents import ExtentKind
from qcowlib.format.entries import OFLAG_COMPRESSED, OFLAG_COPIED, OFLAG_ZERO, compressed_entry
from qcowlib.metadata.mapping import ClusterMapping
from qcowlib.metadata.tables import EntryRules, TableCache
from qcowlib.storage.buffer import BytesStorage

GEOMETRIES = [Geometry(9), Geometry(10), Geometry(14, extended_l2=True)]
L1_ENTRIES = 4


@st.composite
def entries(draw: st.DrawFn, geometry: Geometry, sound: bool) -> tuple[int, int]:
    """One L2 entry and its subcluster bitmap; `sound` leaves out what cannot be followed."""
    size = geometry.cluster_size
    host = draw(st.integers(1, 40)) * size
    kind = draw(st.sampled_from(["empty", "data", "data", "zero", "zero-allocated", "compressed", "wild"]))
    if kind == "wild" and not sound:
        return draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**64 - 1))
    if kind == "compressed":
        start = host + draw(st.integers(0, size - 1))
        return compressed_entry(start, draw(st.integers(1, size)), geometry.cluster_bits), 0
    if geometry.extended_l2:
        allocated = draw(st.integers(0, 2**32 - 1)) if kind.startswith("data") else 0
        zero = draw(st.integers(0, 2**32 - 1)) & ~allocated
        placed = kind in ("data", "zero-allocated")
        return (host | OFLAG_COPIED if placed else 0), zero << 32 | allocated
    return {
        "data": host | OFLAG_COPIED,
        "zero": OFLAG_ZERO,
        "zero-allocated": host | OFLAG_ZERO,
    }.get(kind, 0), 0


def build(geometry: Geometry, tables: list[list[tuple[int, int]] | None]) -> ClusterMapping:
    """A mapping whose L1 table names the given L2 tables (None: no table); the rest of each table is empty."""
    size = geometry.cluster_size
    storage = BytesStorage(bytes(100 * size))
    l1 = np.zeros(len(tables), dtype=">u8")
    for index, table in enumerate(tables):
        if table is None:
            continue
        l1[index] = (50 + index) * size | OFLAG_COPIED
        words = np.zeros(size // 8, dtype=">u8")
        for at, (entry, bitmap) in enumerate(table):
            if geometry.extended_l2:
                words[2 * at], words[2 * at + 1] = np.uint64(entry), np.uint64(bitmap)
            else:
                words[at] = np.uint64(entry)
        storage.pwrite(words.tobytes(), (50 + index) * size)
    rules = EntryRules(geometry, 3, storage, False, None)
    return ClusterMapping(storage, TableCache(storage, geometry), rules, l1)


@st.composite
def mappings(draw: st.DrawFn, sound: bool = True) -> ClusterMapping:
    geometry = draw(st.sampled_from(GEOMETRIES))
    table = st.lists(entries(geometry, sound), max_size=12)
    return build(geometry, draw(st.lists(st.none() | table, min_size=1, max_size=L1_ENTRIES)))


def by_lookup(mapping: ClusterMapping, start: int, stop: int) -> list[tuple[int, int, int, int]]:
    """(start, length, kind, host offset) pieces of a range, one look-up at a time."""
    pieces = []
    while start < stop:
        kind, host, run = mapping.lookup(start)
        run = min(run, stop - start)
        pieces.append((start, run, kind, host))
        start += run
    return pieces


@given(mappings(), st.data())
def test_lookup_and_extents_agree(mapping: ClusterMapping, data: st.DataObject) -> None:
    coverage = mapping._geometry.l2_coverage
    # Most of a table is empty: look near the start of one, where its entries are.
    base = data.draw(st.integers(0, len(mapping.l1))) * coverage
    start = base + data.draw(st.integers(0, 14 * mapping._geometry.cluster_size))
    stop = start + data.draw(st.integers(1, 14 * mapping._geometry.cluster_size))
    rows = [row for table in mapping.extents(start, stop - start) for row in table.rows()]
    assert rows[0][0] == start
    assert sum(row[1] for row in rows) == stop - start
    assert all(a[0] + a[1] == b[0] for a, b in pairwise(rows))
    pieces = iter(by_lookup(mapping, start, stop))
    for row_start, length, kind, host, host_length, layer in rows:
        assert layer == 0
        covered = 0
        while covered < length:
            piece_start, piece, piece_kind, piece_host = next(pieces)
            assert (piece_start, piece_kind) == (row_start + covered, kind)
            moved = covered if host >= 0 and kind != ExtentKind.COMPRESSED else 0
            assert piece_host == (host + moved if host >= 0 else -1)
            covered += piece
        assert covered == length
        if kind == ExtentKind.DATA:
            assert host_length == length
        elif kind == ExtentKind.COMPRESSED:
            assert host_length == mapping.compressed_size(row_start)
        else:
            assert host_length == 0


@given(mappings(sound=False))
def test_damage_raises_in_both_paths_for_the_same_clusters(mapping: ClusterMapping) -> None:
    geometry = mapping._geometry
    for l1_index in range(len(mapping.l1)):
        for index in range(12):
            guest = l1_index * geometry.l2_coverage + index * geometry.cluster_size
            try:
                mapping.lookup(guest)
                damaged = False
            except CorruptMetadata:
                damaged = True
            if damaged:
                with pytest.raises(CorruptMetadata):
                    list(mapping.extents(guest, geometry.cluster_size))
            else:
                list(mapping.extents(guest, geometry.cluster_size))


def test_two_clusters_with_one_compressed_payload_stay_two_rows() -> None:
    geometry = Geometry(9)
    entry = compressed_entry(5 * 512, 100, 9)
    mapping = build(geometry, [[(entry, 0), (entry, 0)]])
    (table,) = mapping.extents(0, 1024)
    assert list(table.rows()) == [(0, 512, 3, 2560, 512, 0), (512, 512, 3, 2560, 512, 0)]


def test_a_range_behind_the_l1_table_is_unallocated() -> None:
    mapping = build(Geometry(9), [[(512 * 7 | OFLAG_COPIED, 0)]])
    coverage = Geometry(9).l2_coverage
    rows = [row for table in mapping.extents(0, 3 * coverage) for row in table.rows()]
    assert rows[0] == (0, 512, 0, 3584, 512, 0)
    assert [row[2] for row in rows[1:]] == [2] * len(rows[1:])
    assert mapping.lookup(coverage) == (2, -1, 512)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (512 * 7 + 0, None),
        (512 * 200, "beyond the end"),
        (OFLAG_COMPRESSED | 512 * 300, "beyond the end"),
    ],
)
def test_an_entry_beyond_the_end_of_the_file(entry: int, rule: str | None) -> None:
    mapping = build(Geometry(9), [[(entry, 0)]])
    if rule is None:
        assert mapping.lookup(0)[:2] == (0, 3584)
        return
    with pytest.raises(CorruptMetadata, match=rule):
        mapping.lookup(0)
    with pytest.raises(CorruptMetadata, match=rule):
        list(mapping.extents(0, 1))
    assert mapping.lookup(512)[0] == ExtentKind.UNALLOCATED
