"""The census of small drawn images: what is counted, what is called damage, and what hostile ones cost."""

import struct
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from qcowlib.format.header import parse_header
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.comparison import Comparison
from qcowlib.metadata.ledger import Overlap
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.storage.buffer import BytesStorage
from tests.unit.metadata.sketch import COMPRESSED, COPIED, Sketch

SIZE = 512


def references(found: Census, clusters: int) -> list[int]:
    return found.references.at(np.arange(clusters, dtype=np.int64)).tolist()


def texts(found: Census) -> list[str]:
    return [finding.text for finding in found.findings]


def differences(found: Census, sketch: Sketch) -> list[tuple[int, int, int]]:
    rows = Comparison(found, sketch.header().geometry).differences()
    return [row for part in rows for row in zip(*(column.tolist() for column in part[:3]), strict=True)]


def plain(**changes: Any) -> Sketch:
    """Two L2 tables (clusters 4 and 5) that map clusters 6 to 9."""
    tables = {
        4: [6 * SIZE | COPIED, 0, 7 * SIZE | COPIED],
        5: [0] * 9 + [8 * SIZE | COPIED | 1, 9 * SIZE | COPIED],
    }
    return Sketch(**{"clusters": 10, "l1": [4 * SIZE | COPIED, 0, 5 * SIZE | COPIED], "tables": tables, **changes})


def test_every_cluster_of_a_sound_image_is_counted_once() -> None:
    sketch = plain()
    found = census(sketch.state())
    assert references(found, 11) == [1] * 10 + [0]
    assert found.findings == []
    assert found.overlaps == []
    assert not found.mapping_damaged
    assert not found.refcounts_damaged
    assert found.stopped is None
    assert found.clusters == 10
    assert (found.mapping.allocated, found.mapping.compressed, found.mapping.fragmented) == (4, 0, 0)
    assert found.mapping.tables.host_offset.tolist() == [4 * SIZE, 5 * SIZE]
    assert found.mapping.tables.uses.tolist() == found.mapping.tables.active_uses.tolist() == [1, 1]
    assert differences(found, sketch) == []


def test_a_table_named_three_times_counts_three_times() -> None:
    sketch = plain(l1=[4 * SIZE] * 3)
    found = census(sketch.state())
    assert references(found, 10) == [1, 1, 1, 1, 3, 0, 3, 3, 0, 0]
    assert found.mapping.tables.uses.tolist() == [3]
    assert found.mapping.allocated == 6
    assert found.mapping.fragmented == 0
    assert differences(found, sketch) == [(4, 1, 3), (5, 1, 0), (6, 1, 3), (7, 1, 3), (8, 1, 0), (9, 1, 0)]
    assert not found.mapping_damaged


def test_a_compressed_cluster_counts_every_host_cluster_that_it_touches() -> None:
    sectors = 2  # two more than the first: with 512-byte clusters they reach into a third one
    entry = COMPRESSED | (sectors - 1) << (70 - 9) | 6 * SIZE + 100
    sketch = plain(tables={4: [entry, COMPRESSED | 6 * SIZE]}, l1=[4 * SIZE | COPIED])
    found = census(sketch.state())
    assert references(found, 9) == [1, 1, 1, 1, 1, 0, 2, 1, 0]
    assert (found.mapping.allocated, found.mapping.compressed, found.mapping.fragmented) == (2, 2, 2)


def snapshot_table(*l1_tables: tuple[int, int]) -> bytes:
    """A snapshot table: (cluster, entries) of each snapshot's L1 table."""
    entries = b""
    for number, (cluster, size) in enumerate(l1_tables):
        extra = struct.pack(">QQ", 0, 4096)
        entries += struct.pack(">QIHHIIQII", cluster * SIZE, size, 1, 2, 0, 0, 0, 0, len(extra)) + extra
        entries += b"%ds%d" % (number + 1, number)
        entries += bytes(-len(entries) % 8)
    return entries


def test_what_snapshots_share_is_read_once_and_counted_for_each() -> None:
    sketch = plain(
        clusters=13,
        tables={**plain().tables, 10: [4 * SIZE, 0, 5 * SIZE], 11: [4 * SIZE]},
        raw={12: snapshot_table((10, 3), (11, 1))},
        snapshots=(2, 12 * SIZE),
        refcounts={4: 3, 5: 2, 6: 3, 7: 3, 8: 2, 9: 2},
    )
    found = census(sketch.state())
    assert references(found, 13) == [1, 1, 1, 1, 3, 2, 3, 3, 2, 2, 1, 1, 1]
    assert found.mapping.tables.active_uses.tolist() == [1, 1]
    assert found.mapping.tables.uses.tolist() == [3, 2]
    assert found.mapping.allocated == 4
    assert texts(found) == []
    assert differences(found, sketch) == []


@pytest.mark.parametrize(
    ("snapshot", "text"),
    [
        (
            (10, 1 << 23),
            "ERROR snapshot 1 (s0) l1_size=0x800000: L1 table is too large; snapshot table entry corrupted",
        ),
        ((1 << 40, 3), "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "),
    ],
)
def test_a_snapshot_whose_l1_table_cannot_be_followed_is_damage(snapshot: tuple[int, int], text: str) -> None:
    sketch = plain(clusters=13, raw={12: snapshot_table(snapshot)}, snapshots=(1, 12 * SIZE))
    found = census(sketch.state())
    assert texts(found)[0].startswith(text)
    assert found.mapping_damaged
    assert found.stopped is None


def test_a_snapshot_table_that_cannot_be_read_stops_the_census() -> None:
    entry = struct.pack(">QIHHIIQII", 10 * SIZE, 3, 0, 0, 0, 0, 0, 0, 1 << 30)
    found = census(plain(clusters=13, raw={12: entry}, snapshots=(1, 12 * SIZE)).state())
    assert found.stopped == "File too large"
    assert found.mapping_damaged
    assert [finding.code for finding in found.findings] == ["snapshot-table-unreadable"]


@pytest.mark.parametrize(
    ("changes", "overlap"),
    [
        ({"tables": {4: [3 * SIZE | COPIED]}}, Overlap(3, "active L1 table", "guest data")),
        ({"tables": {4: [1 * SIZE | COPIED]}}, Overlap(1, "refcount table", "guest data")),
        ({"tables": {4: [2 * SIZE | COPIED]}}, Overlap(2, "refcount block", "guest data")),
        ({"tables": {4: [4 * SIZE | COPIED]}}, Overlap(4, "L2 table", "guest data")),
        ({"tables": {4: [COMPRESSED | 40]}}, Overlap(0, "header", "guest data")),
        ({"l1": [3 * SIZE | COPIED]}, Overlap(3, "L2 table", "active L1 table")),
        ({"l1": [COPIED]}, Overlap(0, "header", "L2 table")),
        ({"refcount_table": [2 * SIZE, 2 * SIZE]}, Overlap(2, "refcount block", "refcount block")),
    ],
)
def test_overlaps_are_found(changes: dict[str, Any], overlap: Overlap) -> None:
    found = census(plain(**{"l1": [4 * SIZE | COPIED], "tables": {4: []}, **changes}).state())
    assert overlap in found.overlaps
    assert found.mapping_damaged


def test_a_damaged_entry_in_a_shared_table_is_told_for_each_use() -> None:
    bad = 6 * SIZE | 1 << 57
    sketch = plain(
        clusters=13,
        l1=[4 * SIZE, 4 * SIZE],
        tables={4: [bad], 10: [0, 4 * SIZE]},
        raw={12: snapshot_table((10, 2))},
        snapshots=(1, 12 * SIZE),
    )
    found = census(sketch.state())
    assert texts(found) == [f"ERROR found l2 entry with reserved bits set: {bad:x}"] * 3
    assert [finding.guest_offset for finding in found.findings] == [0, 64 * SIZE, None]
    assert {finding.host_offset for finding in found.findings} == {4 * SIZE}


def test_damage_is_told_in_the_order_of_the_tables() -> None:
    sketch = plain(
        l1=[4 * SIZE | 1 << 57, 1 << 40, 5 * SIZE],
        tables={4: [0, 1 << 41], 5: [1 << 58, 6 * SIZE | 1 << 60]},
    )
    assert texts(census(sketch.state())) == [
        f"ERROR found L1 entry with reserved bits set: {4 * SIZE | 1 << 57:x}",
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
        "offset 0x20000000000 size 0x200",
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
        "offset 0x10000000000 size 0x200",
        f"ERROR found l2 entry with reserved bits set: {1 << 58:x}",
        f"ERROR found l2 entry with reserved bits set: {6 * SIZE | 1 << 60:x}",
    ]


def test_references_that_the_width_cannot_hold_are_told_one_by_one() -> None:
    sketch = plain(refcount_order=0, l1=[4 * SIZE], tables={4: [6 * SIZE] * 3})
    found = census(sketch.state())
    assert [finding.code for finding in found.findings] == ["refcount-overflow"] * 2
    assert references(found, 7)[6] == 3
    assert found.mapping_damaged
    assert (6, 1, 1) not in differences(found, sketch)  # as far as the width goes the refcount is right


@pytest.mark.parametrize("order", range(7))
def test_refcounts_of_every_width_are_compared(order: int) -> None:
    sketch = plain(refcount_order=order, refcounts={9: 0, 5: (1 << (1 << order)) - 1})
    found = census(sketch.state())
    expected = [(9, 0, 1)] if order == 0 else [(5, (1 << (1 << order)) - 1, 1), (9, 0, 1)]
    assert differences(found, sketch) == expected
    stored = found.stored.at(np.array([5, 9, 6, 10_000_000, 200_000_000], dtype=np.int64))
    assert stored.tolist() == [(1 << (1 << order)) - 1, 0, 1, 0, 0]


def test_refcounts_beyond_the_end_of_the_file_are_left_out_of_a_comparison() -> None:
    sketch = plain(refcounts={10: 1, 11: 3})
    found = census(sketch.state())
    assert differences(found, sketch) == []
    assert Comparison(found, sketch.header().geometry).highest_cluster() == 9


def test_refcount_blocks_that_cannot_be_used_are_damage() -> None:
    table = [2 * SIZE, 2 * SIZE + 1, 1 << 50, 1 << 63, 2 * SIZE]
    found = census(plain(refcount_table=table).state())
    assert texts(found) == [
        "ERROR refcount table entry 1 has reserved bits set",
        "ERROR refcount block 2 is outside image",
        "ERROR refcount block 3 is outside image",
        "ERROR refcount block 4 refcount=2",
    ]
    assert found.refcounts_damaged


def test_the_stored_refcounts_of_a_window_are_put_together_from_its_blocks() -> None:
    sketch = plain(refcount_table=[2 * SIZE, 0, 4 * SIZE], raw={4: (7).to_bytes(2, "big") * 256})
    state = sketch.state()
    stored = StoredRefcounts(state.storage, state.header)
    window = stored.window(0, 1 << 20)
    assert window.dtype == np.uint16
    assert Counter(window.tolist()) == {1: 10, 7: 256, 0: (1 << 20) - 266}
    assert window[512:768].tolist() == [7] * 256
    assert stored.used_windows(20, 1 << 30) == [0]
    assert not stored.window(1 << 20, 1 << 20).any()


def hostile(l1: np.ndarray, cluster_bits: int, others: dict[int, bytes], size: int) -> Qcow2State:
    """An image with a large L1 table at cluster 3 and other structures by host offset."""
    sketch = Sketch(clusters=4, l1=[0], cluster_bits=cluster_bits)
    data = bytearray(sketch.build())
    data[36:40] = len(l1).to_bytes(4, "big")
    data[24:32] = (1 << (2 * cluster_bits - 3)).to_bytes(8, "big")
    data += bytes(max(0, size - len(data)))
    start = 3 << cluster_bits
    data[start : start + l1.nbytes] = l1.tobytes()
    for offset, content in others.items():
        data[offset : offset + len(content)] = content
    return Qcow2State(BytesStorage(bytes(data)), parse_header(bytes(data), len(data)))


def test_one_table_named_a_million_times_is_read_once() -> None:
    l1 = np.full(1 << 20, 9 << 20, dtype=">u8")
    table = np.array([(10 << 20) + index * 4096 for index in range(512)], dtype=">u8").tobytes()
    state = hostile(l1, 12, {9 << 20: table}, 13 << 20)
    started = time.process_time()
    found = census(state)
    assert time.process_time() - started < 3
    assert references(found, 0x901)[0x900] == 1 << 20
    assert references(found, 0xC00)[0xA00:] == [1 << 20] * 512
    assert found.mapping.allocated == 512 << 20


def test_billions_of_equal_problems_are_counted_not_listed() -> None:
    l1 = np.full(1 << 20, 9 << 20, dtype=">u8")
    state = hostile(l1, 12, {9 << 20: np.full(512, 1 << 57, dtype=">u8").tobytes()}, 10 << 20)
    started = time.process_time()
    found = census(state)
    assert time.process_time() - started < 6
    bad = [finding for finding in found.findings if finding.code == "l2-entry-reserved-bits"]
    assert sum(finding.count for finding in bad) == 512 << 20
    assert len(found.findings) < 110_000


def test_random_l1_entries_end() -> None:
    l1 = np.random.default_rng(1).integers(0, 1 << 64, 1 << 20, dtype=np.uint64).astype(">u8")
    found = census(hostile(l1, 12, {}, 10 << 20))
    beyond = sum(finding.count for finding in found.findings if finding.code == "reference-beyond-end")
    assert beyond >= int(((l1.astype(np.uint64) & np.uint64(0x00FF_FFFF_FFFF_FE00)) >= 10 << 20).sum())
    assert found.mapping_damaged
