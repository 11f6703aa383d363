"""L1, L2 and refcount table entries: bit layouts by hand, and the traps of numpy's integers."""

import numpy as np
import pytest

from qcowlib.addresses import Geometry
from qcowlib.errors import FormatError
from qcowlib.format.entries import (
    ENTRY_DTYPE,
    L1_OFFSET_MASK,
    L1_RESERVED,
    L2_OFFSET_MASK,
    L2_RESERVED,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    ClusterType,
    classify_many,
    classify_one,
    compressed_entry,
    compressed_location,
    compressed_locations,
    flagged,
    invalid_bitmap,
    invalid_bitmaps,
    offsets,
    reserved_bits,
    reserved_bits_many,
)

ORDERS = [">u8", "<u8"]


def bits(first: int, last: int) -> int:
    return sum(1 << bit for bit in range(first, last + 1))


def test_masks_are_those_of_the_specification() -> None:
    assert bits(9, 55) == L1_OFFSET_MASK
    assert bits(0, 8) | bits(56, 62) == L1_RESERVED
    assert bits(9, 55) == L2_OFFSET_MASK
    assert bits(1, 8) | bits(56, 61) == L2_RESERVED
    assert bits(9, 63) == REFCOUNT_TABLE_OFFSET_MASK
    assert bits(0, 8) == REFCOUNT_TABLE_RESERVED
    assert (OFLAG_COPIED, OFLAG_COMPRESSED, OFLAG_ZERO) == (1 << 63, 1 << 62, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_offsets_are_native_int64(order: str) -> None:
    """uint64 mixed with int64 becomes float64, and a '>u8' array seen as native integers is another number."""
    host = (1 << 56) - 512  # no float64 holds its neighbours
    entries = np.array([host | OFLAG_COPIED, 0, OFLAG_COPIED | 0x10000 | 0x1FF], dtype=order)
    found = offsets(entries)
    assert found.dtype == np.dtype(np.int64)
    assert found.dtype.isnative
    assert found.tolist() == [host, 0, 0x10000]
    assert (found + 512).tolist() == [1 << 56, 512, 0x10200]
    assert (found + np.int64(1)).dtype == np.dtype(np.int64)
    assert entries.tolist() == [host | OFLAG_COPIED, 0, OFLAG_COPIED | 0x101FF]  # untouched


@pytest.mark.parametrize("order", ORDERS)
def test_offsets_keep_the_shape_and_are_a_copy(order: str) -> None:
    entries = np.zeros((2, 3), dtype=order)
    found = offsets(entries)
    found[0, 0] = 5
    assert found.shape == (2, 3)
    assert entries[0, 0] == 0
    # Every second word, as the entries of an extended L2 table lie.
    assert offsets(np.arange(0, 8192, 512, dtype=order)[::2]).tolist() == list(range(0, 8192, 1024))


def test_a_refcount_table_entry_beyond_every_file_is_negative() -> None:
    entries = np.array([1 << 63, (1 << 62) | 0x200], dtype=ENTRY_DTYPE)
    assert offsets(entries, REFCOUNT_TABLE_OFFSET_MASK).tolist() == [-(1 << 63), (1 << 62) | 0x200]


# Entry, and its type: plain, with extended L2 entries, with an external data file, with both.
U, P, A, N, C = (
    ClusterType.UNALLOCATED,
    ClusterType.ZERO_PLAIN,
    ClusterType.ZERO_ALLOC,
    ClusterType.NORMAL,
    ClusterType.COMPRESSED,
)
CLASSES = [
    (0, U, U, U, U),
    (OFLAG_COPIED, U, U, N, N),
    (OFLAG_ZERO, P, U, P, U),
    (OFLAG_ZERO | OFLAG_COPIED, P, U, P, N),
    (0x50000, N, N, N, N),
    (0x50000 | OFLAG_COPIED, N, N, N, N),
    (0x50000 | OFLAG_ZERO, A, N, A, N),
    (0x50000 | OFLAG_ZERO | OFLAG_COPIED, A, N, A, N),
    (OFLAG_COMPRESSED, C, C, C, C),
    (OFLAG_COMPRESSED | 0x50001, C, C, C, C),
    (OFLAG_COMPRESSED | OFLAG_COPIED | 1, C, C, C, C),
    (bits(56, 61) | bits(1, 8), U, U, U, U),  # reserved bits say nothing
]


@pytest.mark.parametrize("order", ORDERS)
def test_cluster_types(order: str) -> None:
    entries = np.array([row[0] for row in CLASSES], dtype=order)
    for column, (extended, data_file) in enumerate([(False, False), (True, False), (False, True), (True, True)], 1):
        expected = [row[column] for row in CLASSES]
        assert [classify_one(row[0], extended, data_file) for row in CLASSES] == expected
        found = classify_many(entries, extended, data_file)
        assert found.dtype == np.uint8
        assert found.tolist() == expected


@pytest.mark.parametrize("bit", range(64))
def test_reserved_bits_one_by_one(bit: int) -> None:
    entry = 1 << bit
    expected = {
        (3, False): bit in range(1, 9) or bit in range(56, 62),
        (3, True): bit in range(9) or bit in range(56, 62),
        (2, False): bit in range(9) or bit in range(56, 62),
    }
    array = np.array([entry], dtype=ENTRY_DTYPE)
    for (version, extended), reserved in expected.items():
        geometry = Geometry(16, extended_l2=extended)
        assert bool(reserved_bits(entry, geometry, version)) == reserved
        assert reserved_bits_many(array, geometry, version).tolist() == [reserved]


@pytest.mark.parametrize(("cluster_bits", "reserved"), [(9, range(56, 61)), (13, range(56, 57)), (14, ()), (21, ())])
def test_reserved_bits_of_compressed_entries(cluster_bits: int, reserved: range) -> None:
    geometry = Geometry(cluster_bits)
    for bit in range(62):
        entry = OFLAG_COMPRESSED | 1 << bit
        assert bool(reserved_bits(entry, geometry, 3)) == (bit in reserved)
        assert reserved_bits_many(np.array([entry], dtype=">u8"), geometry, 3).tolist() == [bit in reserved]


def test_compressed_locations_by_hand() -> None:
    # 64 KiB clusters: the sector count starts at bit 54.
    assert compressed_location(OFLAG_COMPRESSED | 0x50000, 16) == (0x50000, 512)
    assert compressed_location(OFLAG_COMPRESSED | 0x501FF, 16) == (0x501FF, 1)
    assert compressed_location(OFLAG_COMPRESSED | 3 << 54 | 0x50010, 16) == (0x50010, 4 * 512 - 16)
    assert compressed_location(OFLAG_COMPRESSED | 255 << 54, 16) == (0, 256 * 512)
    # 512 byte clusters: one bit of sector count, 61 bits of offset.
    assert compressed_location(OFLAG_COMPRESSED | 1 << 61 | (1 << 60) + 7, 9) == ((1 << 60) + 7, 1017)
    # 2 MiB clusters: 13 bits of sector count, 49 bits of offset.
    assert compressed_location(OFLAG_COMPRESSED | 0x1FFF << 49 | (1 << 49) - 1, 21) == ((1 << 49) - 1, 8191 * 512 + 1)


def test_compressed_locations_are_int64() -> None:
    starts, lengths = compressed_locations(np.array([bits(0, 63)], dtype=">u8"), 9)
    assert starts.dtype == lengths.dtype == np.dtype(np.int64)
    assert starts.tolist() == [(1 << 61) - 1]


def test_compressed_entries_by_hand() -> None:
    assert compressed_entry(0x50000, 512, 16) == OFLAG_COMPRESSED | 0x50000
    assert compressed_entry(0x50000, 513, 16) == OFLAG_COMPRESSED | 1 << 54 | 0x50000
    assert compressed_entry(0x501FF, 2, 16) == OFLAG_COMPRESSED | 1 << 54 | 0x501FF
    assert compressed_entry(0x501FF, 1, 16) == OFLAG_COMPRESSED | 0x501FF


@pytest.mark.parametrize(
    ("offset", "nbytes", "cluster_bits"),
    [
        (0x10000, 0, 16),
        (0x10000, 65536 * 2 + 1, 16),
        (1 << 54, 1, 16),
        (1 << 56, 1, 9),
        (1 << 49, 1, 21),
        (511, 1024, 9),
    ],
)
def test_what_a_compressed_entry_cannot_hold(offset: int, nbytes: int, cluster_bits: int) -> None:
    with pytest.raises(FormatError):
        compressed_entry(offset, nbytes, cluster_bits)


BITMAPS = [
    (N, 0, False),
    (N, 1, False),
    (N, 1 << 32, False),
    (N, 1 << 32 | 1, True),
    (N, 1 << 63 | 1 << 31, True),
    (N, 1 << 63 | 1 << 30, False),
    (U, 0, False),
    (U, 1 << 40, False),
    (U, 1, True),
    (C, bits(0, 63), False),
]


def test_subcluster_bitmaps() -> None:
    for kind, bitmap, invalid in BITMAPS:
        assert invalid_bitmap(kind, bitmap) == invalid, (kind, hex(bitmap))
    kinds = np.array([row[0] for row in BITMAPS], dtype=np.uint8)
    bitmaps = np.array([row[1] for row in BITMAPS], dtype=">u8")
    assert invalid_bitmaps(kinds, bitmaps).tolist() == [row[2] for row in BITMAPS]


def test_flagged() -> None:
    entries = np.array([0, 1, OFLAG_COPIED, 256], dtype=">u8")
    assert flagged(entries, OFLAG_COPIED | 1).tolist() == [False, True, True, False]
    assert flagged(entries, 256).tolist() == [False, False, False, True]  # not cut to a byte
