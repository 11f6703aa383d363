"""Entries of the L1, L2 and refcount tables, one at a time (plain integers) and as whole arrays.

Tables stay big-endian ('>u8') as they are on disk. This module is the only place that takes entries apart: after
masking, offsets are native int64, since numpy turns uint64 mixed with int64 into float64.
Scalar and vector forms of the same rule stand side by side; a property test holds them together.

Source: qcow2.txt, "L1 table entry", "L2 table entry", "Extended L2 Entries", "Refcount table entry".
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.errors import FormatError
from qcowlib.format.constants import COMPRESSED_SECTOR_SIZE, MAX_HOST_OFFSET

Entries = npt.NDArray[np.uint64]
"""Table entries, '>u8' or native uint64, of any shape."""
Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

ENTRY_DTYPE = np.dtype(">u8")

OFLAG_COPIED = 1 << 63
OFLAG_COMPRESSED = 1 << 62
OFLAG_ZERO = 1

L1_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L2_RESERVED = 0x3F00_0000_0000_01FE  # of a standard cluster; bit 0 depends on the version, see `reserved_bits`
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED = 0x1FF

SUBCLUSTERS_ALLOCATED = 0x0000_0000_FFFF_FFFF  # bit x: subcluster x is allocated
SUBCLUSTERS_ZERO = 0xFFFF_FFFF_0000_0000  # bit 32+x: subcluster x reads as zeroes


class ClusterType(IntEnum):
    """What an L2 entry says about its cluster.

    With extended L2 entries only UNALLOCATED, NORMAL and COMPRESSED occur; zeroes are in the subcluster bitmap.
    """

    UNALLOCATED = 0
    ZERO_PLAIN = 1
    ZERO_ALLOC = 2
    NORMAL = 3
    COMPRESSED = 4


def offsets(entries: Entries, mask: int = L2_OFFSET_MASK) -> Int64Array:
    """Host offsets in standard L2 entries or L1 entries (or in others, by `mask`) as int64, shape of `entries`.

    A refcount table entry of 2^63 and more comes out negative: outside of every file.
    """
    # The ufunc's result is native, whatever the order of `entries`; only then may its bits be seen as int64.
    return np.bitwise_and(entries, np.uint64(mask), dtype=np.uint64).view(np.int64)


def flagged(entries: Entries, flag: int) -> BoolArray:
    """Which entries have any bit of `flag`."""
    return np.bitwise_and(entries, np.uint64(flag), dtype=np.uint64).astype(np.bool_)


def classify_one(entry: int, extended_l2: bool = False, has_data_file: bool = False) -> ClusterType:
    """The type of the cluster that one L2 entry (its first 64 bits) describes.

    Source: qcow2.txt, "Standard Cluster Descriptor". In an external data file offset 0 is a valid cluster; the
    COPIED flag, always set for allocated clusters there, tells it from an unallocated one.
    """
    if entry & OFLAG_COMPRESSED:
        return ClusterType.COMPRESSED
    if entry & OFLAG_ZERO and not extended_l2:
        return ClusterType.ZERO_ALLOC if entry & L2_OFFSET_MASK else ClusterType.ZERO_PLAIN
    if entry & L2_OFFSET_MASK or (has_data_file and entry & OFLAG_COPIED):
        return ClusterType.NORMAL
    return ClusterType.UNALLOCATED


def _classification(extended_l2: bool, has_data_file: bool) -> Uint8Array:
    """`classify_one` for the 16 combinations of (has offset: 1, zero: 2, compressed: 4, copied: 8)."""
    bits = (1 << 16, OFLAG_ZERO, OFLAG_COMPRESSED, OFLAG_COPIED)
    samples = (sum(bit for n, bit in enumerate(bits) if index >> n & 1) for index in range(16))
    return np.array([classify_one(entry, extended_l2, has_data_file) for entry in samples], dtype=np.uint8)


_CLASSIFICATION = {(ext, data): _classification(ext, data) for ext in (False, True) for data in (False, True)}


def classify_many(entries: Entries, extended_l2: bool = False, has_data_file: bool = False) -> Uint8Array:
    """`classify_one` for an array of L2 entries: `ClusterType` values, same shape."""
    native = entries.astype(np.uint64)
    index = (native >> np.uint64(60)).astype(np.uint8)
    index &= 12
    index |= (native.astype(np.uint8) & OFLAG_ZERO) << 1
    native &= np.uint64(L2_OFFSET_MASK)
    index |= native.astype(np.bool_)
    return _CLASSIFICATION[bool(extended_l2), bool(has_data_file)].take(index)


def reserved_bits(entry: int, geometry: Geometry, version: int) -> int:
    """The bits of an L2 entry that must be zero but are not.

    Bit 0 is reserved in version 2 and with extended L2 entries; of a compressed entry, the offset's bits from 56 on.
    """
    if entry & OFLAG_COMPRESSED:
        return entry & _compressed_reserved(geometry.cluster_bits)
    return entry & _standard_reserved(geometry, version)


def reserved_bits_many(entries: Entries, geometry: Geometry, version: int) -> BoolArray:
    """Which L2 entries have a reserved bit set (see `reserved_bits`)."""
    compressed = flagged(entries, OFLAG_COMPRESSED)
    standard = flagged(entries, _standard_reserved(geometry, version))
    return np.where(compressed, flagged(entries, _compressed_reserved(geometry.cluster_bits)), standard)


def _standard_reserved(geometry: Geometry, version: int) -> int:
    return L2_RESERVED | (OFLAG_ZERO if version < 3 or geometry.extended_l2 else 0)


def _compressed_reserved(cluster_bits: int) -> int:
    return _compressed_offset_mask(cluster_bits) & ~MAX_HOST_OFFSET


def invalid_bitmap(kind: int, bitmap: int) -> bool:
    """Whether a subcluster bitmap contradicts itself or its L2 entry.

    A subcluster cannot be allocated and zero at once, nor allocated without a cluster. A compressed cluster's bitmap
    is reserved; QEMU ignores it when reading, so it is not called invalid here.
    """
    if kind == ClusterType.NORMAL:
        return bool(bitmap >> 32 & bitmap & SUBCLUSTERS_ALLOCATED)
    return kind != ClusterType.COMPRESSED and bool(bitmap & SUBCLUSTERS_ALLOCATED)


def invalid_bitmaps(kinds: Uint8Array, bitmaps: Entries) -> BoolArray:
    """`invalid_bitmap` for arrays of equal shape (`ClusterType` values and subcluster bitmaps)."""
    native = bitmaps.astype(np.uint64)
    allocated = native & np.uint64(SUBCLUSTERS_ALLOCATED)
    contradiction = ((native >> np.uint64(32)) & allocated).astype(np.bool_)
    invalid: BoolArray = np.where(kinds == ClusterType.NORMAL, contradiction, allocated.astype(np.bool_))
    invalid &= kinds != ClusterType.COMPRESSED
    return invalid


def _compressed_shift(cluster_bits: int) -> int:
    """x of the specification: the first bit of the sector count."""
    return 62 - (cluster_bits - 8)


def _compressed_offset_mask(cluster_bits: int) -> int:
    return (1 << _compressed_shift(cluster_bits)) - 1


def _compressed_count_mask(cluster_bits: int) -> int:
    return (1 << (cluster_bits - 8)) - 1


def compressed_location(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and length in bytes of a compressed cluster's data.

    The length is an upper bound: up to the end of the last 512-byte sector.
    Source: qcow2.txt, "Compressed Clusters Descriptor".
    """
    start = entry & _compressed_offset_mask(cluster_bits)
    sectors = (entry >> _compressed_shift(cluster_bits) & _compressed_count_mask(cluster_bits)) + 1
    return start, sectors * COMPRESSED_SECTOR_SIZE - start % COMPRESSED_SECTOR_SIZE


def compressed_locations(entries: Entries, cluster_bits: int) -> tuple[Int64Array, Int64Array]:
    """`compressed_location` for an array of entries: host offsets and lengths in bytes, both int64."""
    native = entries.astype(np.uint64)
    start = offsets(native, _compressed_offset_mask(cluster_bits))
    sectors = (native >> np.uint64(_compressed_shift(cluster_bits))).astype(np.int64)
    sectors &= _compressed_count_mask(cluster_bits)
    return start, (sectors + 1) * COMPRESSED_SECTOR_SIZE - start % COMPRESSED_SECTOR_SIZE


def compressed_entry(offset: int, nbytes: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster.

    Args:
        offset: host offset of the compressed data in bytes, any alignment.
        nbytes: length of the compressed data in bytes, at least 1.

    Raises:
        FormatError: the offset or the number of sectors does not fit into the entry.
    """
    sectors = (offset + nbytes - 1) // COMPRESSED_SECTOR_SIZE - offset // COMPRESSED_SECTOR_SIZE
    if offset > min(_compressed_offset_mask(cluster_bits), MAX_HOST_OFFSET):
        raise FormatError("compressed cluster", offset, "lies behind the largest offset that an L2 entry can hold")
    if nbytes < 1 or sectors > _compressed_count_mask(cluster_bits):
        raise FormatError("compressed cluster", offset, f"its {nbytes} bytes do not fit into a cluster")
    return OFLAG_COMPRESSED | sectors << _compressed_shift(cluster_bits) | offset
