"""The scan of L2 tables against the rules applied entry by entry."""

import random
from collections import Counter

import numpy as np
import pytest

from qcowlib.addresses import Geometry
from qcowlib.format.entries import ClusterType, classify_one, compressed_location, reserved_bits
from qcowlib.metadata.l2_scan import ScanRules, TableScanner, beyond_text, scan_tables
from qcowlib.metadata.reference_counts import ReferenceCounts
from tests.unit.metadata.sketch import COMPRESSED, COPIED

OFFSET = 0x00FF_FFFF_FFFF_FE00
BITS = (COPIED, COMPRESSED, 1, 1 << 57, 1 << 3, 1 << 9)


def slow_scan(table: list[tuple[int, int]], rules: ScanRules) -> tuple[Counter[int], tuple[int, int, int], list[str]]:
    """References, (allocated, compressed, fragmented) and texts of one table."""
    size = rules.geometry.cluster_size
    references: Counter[int] = Counter()
    texts: list[str] = []
    allocated = compressed = fragmented = 0
    following = None
    for index, (entry, bitmap) in enumerate(table):
        kind = classify_one(entry, rules.geometry.extended_l2, rules.has_data_file)
        if kind != ClusterType.COMPRESSED and reserved_bits(entry, rules.geometry, rules.version):
            texts.append(f"ERROR found l2 entry with reserved bits set: {entry:x}")
        where, length = entry & OFFSET, size
        if kind == ClusterType.COMPRESSED:
            where, length = compressed_location(entry, rules.geometry.cluster_bits)
            if entry & COPIED:
                texts.append(f"ERROR: coffset=0x{where:x}: copied flag must never be set for compressed clusters")
            if rules.has_data_file:
                texts.append(f"ERROR compressed cluster {index} with data file, entry=0x{entry & ~COPIED:x}")
                continue
            if bitmap:
                texts.append(
                    f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, "
                    f"entry=0x{entry & ~COPIED:x}"
                )
                continue
            allocated, compressed, fragmented = allocated + 1, compressed + 1, fragmented + 1
        elif kind in (ClusterType.NORMAL, ClusterType.ZERO_ALLOC):
            if bitmap >> 32 & bitmap:
                texts.append(f"ERROR offset={where:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            if where % size:
                data = bitmap & 0xFFFF_FFFF if rules.geometry.extended_l2 else not entry & 1
                what = "Data" if data else "Preallocated"
                texts.append(f"ERROR offset={where:x}: {what} cluster is not properly aligned; L2 entry corrupted.")
            allocated += 1
            fragmented += following is not None and where != following
            following = where + size
            if rules.has_data_file:
                continue
        else:
            if kind == ClusterType.UNALLOCATED and bitmap & 0xFFFF_FFFF:
                texts.append("ERROR: Unallocated cluster has non-zero subcluster allocation map")
            continue
        if where + length - rules.file_end >= size:
            texts.append(beyond_text(where, length))
        else:
            references.update(range(where // size, (where + length - 1) // size + 1))
    return references, (allocated, compressed, fragmented), texts


def random_table(choose: random.Random, geometry: Geometry) -> list[tuple[int, int]]:
    """A table: empty, one run, several, a run with some entries changed, or scattered."""
    size = geometry.cluster_size
    flags = choose.choice((0, COPIED, COPIED, 1))
    start = choose.randrange(4, 60) * size
    table = [(start + index * size | flags, 0xFFFF_FFFF) for index in range(geometry.l2_entries)]
    kind = choose.randrange(8)
    if kind == 0:
        table = [(0, 0)] * geometry.l2_entries
    if kind == 1:
        table = [(choose.randrange(100) * size | flags, choose.getrandbits(64)) for _ in table]
    if kind == 2:
        start = choose.randrange(4, 100) * 512
        table = [(start + index * size | flags, 0) for index in range(geometry.l2_entries)]
    if kind >= 5:
        table = []
        while len(table) < geometry.l2_entries:
            first, step = choose.choice(((0, 0), (1, 0), (choose.randrange(1, 60) * size | flags, size)))
            length = choose.randrange(1, geometry.l2_entries // 2)
            table += [(first + index * step, 0) for index in range(length)]
        del table[geometry.l2_entries :]
    for _ in range(choose.choice((0, 0, 1, 5, 30))):
        index = choose.randrange(geometry.l2_entries)
        entry, bitmap = table[index]
        change = choose.randrange(4)
        if change == 0:
            entry ^= choose.choice(BITS)
        elif change == 1:
            entry = choose.getrandbits(64)
        elif change == 2:
            entry = COMPRESSED | choose.getrandbits(18) | choose.randrange(8) << (70 - geometry.cluster_bits)
        else:
            entry, bitmap = 0, choose.choice((0, bitmap))
        table[index] = entry, choose.choice((bitmap, 0, choose.getrandbits(64)))
    return table


@pytest.mark.parametrize(
    ("geometry", "version", "has_data_file"),
    [
        (Geometry(9), 3, False),
        (Geometry(9), 2, False),
        (Geometry(9), 3, True),
        (Geometry(12), 3, False),
        (Geometry(14, extended_l2=True), 3, False),
        (Geometry(14, extended_l2=True), 3, True),
    ],
)
def test_tables_are_scanned_as_entry_by_entry(
    geometry: Geometry, version: int, has_data_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcowlib.metadata.l2_scan._ENTRIES_PER_PIECE", 8)
    choose = random.Random(geometry.cluster_bits * 10 + version + has_data_file)
    rules = ScanRules(geometry, version, has_data_file, (geometry.l2_entries + 50) * geometry.cluster_size)
    scanner = TableScanner(rules, 4)
    runs = pieces = problems = 0
    for _ in range(100):
        tables = [random_table(choose, geometry) for _ in range(choose.randrange(1, 5))]
        words = np.array(
            [[word for pair in table for word in (pair if geometry.extended_l2 else pair[:1])] for table in tables],
            dtype=np.uint64,
        )
        if not geometry.extended_l2:
            tables = [[(entry, 0) for entry, _ in table] for table in tables]
        scan = scanner.scan(words, 1 << 30)
        counts = ReferenceCounts()
        if has_data_file:
            assert not len(scan.clusters) + len(scan.piece_first)
        else:
            scan.count_in(counts, geometry.l2_entries, 1)
        clusters, times = counts.above(0)
        references = Counter(dict(zip(clusters.tolist(), times.tolist(), strict=True)))
        expected = [slow_scan(table, rules) for table in tables]
        assert references == sum((result[0] for result in expected), Counter())
        numbers = zip(scan.allocated.tolist(), scan.compressed.tolist(), scan.fragmented.tolist(), strict=True)
        assert list(numbers) == [result[1] for result in expected]
        for row, (_, _, texts) in enumerate(expected):
            assert [problem.text for problem in scan.problems if problem.row == row] == texts
            assert sum(n for (_, at), n in scan.problem_counts.items() if at == row) == len(texts)
        for row in scan.run_rows.tolist():
            assert expected[row][2] == []
            assert expected[row][1] == (geometry.l2_entries, 0, 0)
        empty = {row for row, table in enumerate(tables) if not any(entry or bitmap for entry, bitmap in table)}
        assert {*scan.run_rows.tolist(), *scan.other_rows.tolist()} == set(range(len(tables))) - empty
        runs += len(scan.run_rows)
        pieces += len(scan.piece_first)
        problems += len(scan.problems)
    assert runs > 10
    assert pieces > 10 or geometry.extended_l2 or has_data_file
    assert problems > 100


def test_details_are_limited_and_numbers_are_not() -> None:
    rules = ScanRules(Geometry(9), 3, False, 1 << 20)
    words = np.full((2, 64), 1 << 57, dtype=np.uint64)
    scan = scan_tables(words, rules, 5)
    assert len(scan.problems) == 5
    assert scan.problem_counts == {("l2-entry-reserved-bits", 0): 64, ("l2-entry-reserved-bits", 1): 64}
