"""What a damaged entry of an L1, L2 or bitmap table is replaced by: pure functions from arrays to arrays.

    reserved bits                     cleared; what the entry refers to stays
    unaligned, beyond the end         dropped: reads as zeroes (version 2: as unallocated), the guest range is lost
    a subcluster allocated and zero   zero; the subcluster is lost
    COPIED on a compressed cluster    cleared
    a bitmap's data cluster           "all dirty": the next backup copies too much, never too little

The rules are those by which the census calls an entry damaged, so that a mended table has no finding left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.format.bitmap_directory import (
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TABLE_OFFSET_MASK,
    invalid_bitmap_table_entries,
)
from qcowlib.format.entries import (
    ENTRY_DTYPE,
    L1_OFFSET_MASK,
    L1_RESERVED,
    L2_RESERVED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    SUBCLUSTERS_ALLOCATED,
    SUBCLUSTERS_ZERO,
    ClusterType,
    Entries,
    Int64Array,
    classify_many,
    compressed_locations,
    flagged,
    offsets,
    reserved_bits_many,
)
from qcowlib.metadata.l2_scan import ScanRules

MAX_LOST_RANGES = 100_000
BoolArray = npt.NDArray[np.bool_]

_ALL = (1 << 64) - 1


class Mended(NamedTuple):
    """A table as it should be.

    Attributes:
        words: its words, '>u8'.
        lost: entries (by index) whose guest data cannot be reached any more, though they had some.
    """

    words: Entries
    lost: BoolArray


def mend_l1(entries: Entries, geometry: Geometry, file_end: int) -> Mended:
    """An L1 table without damaged entries.

    Args:
        entries: the table.
        geometry: sizes of the image.
        file_end: length of the file in bytes, rounded up to 512.
    """
    native = entries.astype(np.uint64) & np.uint64(~L1_RESERVED & _ALL)
    host = offsets(native, L1_OFFSET_MASK)
    lost = ((host & (geometry.cluster_size - 1)) != 0) | (host >= file_end)
    native[lost | (host == 0)] = 0  # flags without a table mean nothing
    return Mended(native.astype(ENTRY_DTYPE), lost)


def mend_l2(words: Entries, rules: ScanRules) -> Mended:
    """An L2 table without damaged entries.

    Args:
        words: the table as on disk, one-dimensional.
        rules: what its entries are measured by.
    """
    native = words.astype(np.uint64)
    extended = rules.geometry.extended_l2
    entries = native[0::2] if extended else native
    compressed = classify_many(entries, extended, rules.has_data_file) == ClusterType.COMPRESSED
    _clear(entries, ~compressed & reserved_bits_many(entries, rules.geometry, rules.version), _reserved(rules))
    _clear(entries, compressed, OFLAG_COPIED)
    kind = classify_many(entries, extended, rules.has_data_file)
    misplaced = _misplaced(entries, kind, rules)
    if extended:
        lost = _mend_bitmaps(entries, native[1::2], kind, misplaced)
    else:
        lost = misplaced & (kind != ClusterType.ZERO_ALLOC)
        entries[misplaced] = OFLAG_ZERO if rules.version >= 3 else 0
    return Mended(native.astype(ENTRY_DTYPE), lost)


def mend_bitmap_table(entries: Entries, cluster_size: int, file_end: int) -> Entries:
    """A bitmap table whose damaged entries say that all is dirty."""
    native = entries.astype(np.uint64)
    host = offsets(native, BITMAP_TABLE_OFFSET_MASK)
    native[invalid_bitmap_table_entries(native, cluster_size) | (host >= file_end)] = BITMAP_TABLE_ALL_ONES
    return native.astype(ENTRY_DTYPE)


def _reserved(rules: ScanRules) -> int:
    return L2_RESERVED | (OFLAG_ZERO if rules.version < 3 or rules.geometry.extended_l2 else 0)


def _clear(entries: Entries, chosen: BoolArray, bits: int) -> None:
    entries[chosen] &= np.uint64(~bits & _ALL)


def _misplaced(entries: Entries, kind: npt.NDArray[np.uint8], rules: ScanRules) -> BoolArray:
    """Entries whose clusters cannot be where they say."""
    size = rules.geometry.cluster_size
    host = offsets(entries)
    standard = (kind == ClusterType.NORMAL) | (kind == ClusterType.ZERO_ALLOC)
    wrong: BoolArray = standard & ((host & (size - 1)) != 0)
    compressed = np.flatnonzero(kind == ClusterType.COMPRESSED)
    if rules.has_data_file:
        wrong[compressed] = True
        return wrong
    wrong |= standard & (host >= rules.file_end)
    start, length = compressed_locations(entries[compressed], rules.geometry.cluster_bits)
    wrong[compressed] = start + length - rules.file_end >= size
    return wrong


def _mend_bitmaps(entries: Entries, bitmaps: Entries, kind: npt.NDArray[np.uint8], misplaced: BoolArray) -> BoolArray:
    """Mend the subcluster bitmaps (and the entries that are misplaced) in place; which clusters lose something."""
    allocated = bitmaps & np.uint64(SUBCLUSTERS_ALLOCATED)
    compressed = kind == ClusterType.COMPRESSED
    # Without a cluster, nothing can be allocated; with one, what is said to be zero is.
    gone = np.where(misplaced | (kind == ClusterType.UNALLOCATED), allocated, allocated & (bitmaps >> np.uint64(32)))
    gone[compressed] = 0
    bitmaps[:] = (bitmaps | gone << np.uint64(32)) & ~gone
    bitmaps[compressed] = 0  # reserved there, and ignored by every reader
    entries[misplaced] = 0
    whole = misplaced & compressed
    bitmaps[whole] = SUBCLUSTERS_ZERO
    lost: BoolArray = (gone != 0) | whole
    return lost


def changed_spans(old: Entries, new: Entries) -> list[tuple[int, int]]:
    """(first, last exclusive) of the runs of words in which two tables differ."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flagged(old ^ new, _ALL), [False])).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


class LostRange(NamedTuple):
    """A guest range that cannot be reached any more: `layer` in words, start and length in bytes."""

    layer: str
    start: int
    length: int


@dataclass
class LostRanges:
    """The guest ranges that a repair drops: at most 100,000, and how many more there are."""

    ranges: list[LostRange] = field(default_factory=list)
    more: int = 0

    def add(self, layer: str, indices: Int64Array, unit: int) -> None:
        """Note ranges of a layer by index, ascending, `unit` bytes each; neighbours become one."""
        starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(indices))
        room = max(0, MAX_LOST_RANGES - len(self.ranges))
        self.more += max(0, len(starts) - room)
        for start, length in zip(starts[:room].tolist(), lengths[:room].tolist(), strict=True):
            self.ranges.append(LostRange(layer, int(indices[start]) * unit, length * unit))
