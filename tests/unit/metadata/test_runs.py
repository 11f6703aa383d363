"""Runs of L2 entries: the short way says what the long way says, for runs with anything in between."""

import random

import numpy as np
import pytest

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.format.entries import OFLAG_COMPRESSED, OFLAG_COPIED, OFLAG_ZERO
from qcowlib.metadata import mapping as mapping_module
from qcowlib.metadata.mapping import ClusterMapping
from qcowlib.metadata.regions import MetadataRegions, RegionKind
from qcowlib.metadata.runs import find_runs
from qcowlib.metadata.tables import EntryRules, TableCache
from qcowlib.storage.buffer import BytesStorage

GEOMETRY = Geometry(12)
SIZE = GEOMETRY.cluster_size
CLUSTERS = 1200  # of the file; the L2 tables are the first ones
METADATA = 700


def rules(*, has_data_file: bool = False) -> EntryRules:
    regions = MetadataRegions(GEOMETRY.cluster_bits)
    regions.build([(RegionKind.REFCOUNT_BLOCK, np.array([METADATA * SIZE]), SIZE)])
    storage = BytesStorage(bytes(CLUSTERS * SIZE))
    return EntryRules(GEOMETRY, 3, storage, has_data_file, None if has_data_file else regions)


def run_of(first: int, count: int, flags: int = OFLAG_COPIED) -> list[int]:
    return [(first + number) * SIZE | flags for number in range(count)]


def entries(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64).astype(">u8")


def test_runs_are_found() -> None:
    table = [0] * 20 + run_of(10, 40) + run_of(100, 30, 0) + [0] * 10
    found = find_runs(entries(table), rules())
    assert found is not None
    assert found[0].tolist() == [0, 20, 60, 90]
    assert found[1].tolist() == [-1, 10 * SIZE, 100 * SIZE, -1]


@pytest.mark.parametrize(
    "table",
    [
        run_of(CLUSTERS - 31, 32),  # the last cluster begins at the end of the file
        run_of(METADATA - 31, 32),  # a refcount block in its midst
        [0, *run_of(1, 31)],  # the step from "unallocated" to cluster 1 is that of a run
        [OFLAG_ZERO, *[SIZE * number | OFLAG_ZERO for number in range(1, 32)]],
        run_of(10, 32, OFLAG_ZERO),
        run_of(10, 32, OFLAG_COMPRESSED),
        [entry + 512 for entry in run_of(10, 32)],
        run_of(10, 32, 1 << 60),
        [OFLAG_COPIED, *run_of(1, 31)],  # offset 0 is a cluster with an external data file only
        [0, 5 * SIZE] * 16,
    ],
)
def test_what_is_not_plain_is_left_to_the_long_way(table: list[int]) -> None:
    found = find_runs(entries(table), rules())
    if found is not None:  # a short run before the long one is told apart, and right
        heads, hosts = found
        assert heads.tolist() == [0, 1]
        assert hosts.tolist() == [-1, SIZE]


def test_offset_zero_of_a_data_file() -> None:
    found = find_runs(entries(run_of(0, 32)), rules(has_data_file=True))
    assert found is not None
    assert found[1].tolist() == [0]


@pytest.mark.parametrize("seed", range(30))
def test_both_ways_say_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    judged = rules()
    storage = judged.data_storage
    assert isinstance(storage, BytesStorage)
    l1 = np.zeros(3, dtype=">u8")
    odd = [OFLAG_ZERO, 5 * SIZE | OFLAG_ZERO, 3 * SIZE + 512, 2000 * SIZE, METADATA * SIZE, OFLAG_COMPRESSED | 5000]
    for index in range(3):
        values: list[int] = []
        while len(values) < GEOMETRY.l2_entries:
            count = chance.choice([1, 40, 100, 300])
            kind = chance.random()
            if kind < 0.1 and seed % 3:
                values += [chance.choice(odd[: 2 if seed % 3 == 1 else None])]
            elif kind < 0.4:
                values += [0] * count
            else:
                values += run_of(chance.choice([10, 300, 690, 1100 - count]), count)
        storage.pwrite(entries(values[: GEOMETRY.l2_entries]).tobytes(), (2 + index) * SIZE)
        l1[index] = (2 + index) * SIZE
    mapping = ClusterMapping(storage, TableCache(storage, GEOMETRY), judged, l1)
    end = 3 * GEOMETRY.l2_coverage
    ranges = [(0, end), *(sorted((chance.randrange(end), chance.randrange(end))) for _ in range(20))]
    short = [rows(mapping, start, stop) for start, stop in ranges]
    monkeypatch.setattr(mapping_module, "find_runs", lambda *_: None)
    assert short == [rows(mapping, start, stop) for start, stop in ranges]


def rows(mapping: ClusterMapping, start: int, stop: int) -> object:
    if start == stop:
        return None
    try:
        return [row for table in mapping.extents(start, stop - start) for row in table.rows()]
    except CorruptMetadata as error:
        return str(error)
