"""The COPIED flags of the active layer against refcounts: set if and only if the refcount is exactly 1.

A table that maps one contiguous run (the census knows it) needs no second reading: its flags are all equal, and so
must be the refcounts of its clusters. Nor are the entries of a table that maps few runs looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.format.entries import OFLAG_COPIED, ClusterType, Entries, Int64Array, classify_many, flagged, offsets
from qcowlib.format.header import Header
from qcowlib.metadata.l2_scan import ScanRules, few_pieces
from qcowlib.metadata.mapping_census import SCAN_BYTES, MappingCount
from qcowlib.metadata.reference_counts import ReferenceCounts
from qcowlib.metadata.references import empty_words, read_tables, split_words
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.storage.protocol import ReadStorage

BoolArray = npt.NDArray[np.bool_]


class Ones:
    """Which clusters have a refcount of exactly 1.

    Args:
        window_bits: log2 of the clusters in a window.
        windows: indices of the windows that will be set.
        stored: where to look up the few clusters outside of these windows; None when there are none.
    """

    def __init__(self, window_bits: int, windows: list[int], stored: StoredRefcounts | None = None) -> None:
        self._bits = window_bits
        self._stored = stored
        self._slots = np.full(max(windows, default=0) + 1, -1, dtype=np.int64)
        self._slots[windows] = np.arange(len(windows))
        self._ones: BoolArray = np.zeros((max(1, len(windows)), 1 << window_bits), dtype=np.bool_)

    @staticmethod
    def expected(references: ReferenceCounts) -> Ones:
        """Which clusters are referred to exactly once."""
        ones = Ones(references.chunk_bits, references.chunks())
        for window in references.chunks():
            counts = references.chunk(window)
            if counts is not None:
                ones.set_window(window, counts == 1)
        return ones

    def set_window(self, window: int, ones: BoolArray) -> None:
        """Set the values of one window."""
        self._ones[self._slots[window]] = ones

    def run_is(self, first: int, stop: int, value: bool) -> bool:
        """Whether all of the consecutive clusters lie in windows and have this value."""
        while first < stop:
            window = first >> self._bits
            if window >= len(self._slots) or self._slots[window] < 0:
                return False
            base = window << self._bits
            end = min(stop, base + (1 << self._bits))
            piece = self._ones[self._slots[window], first - base : end - base]
            if not (piece.all() if value else not piece.any()):
                return False
            first = end
        return True

    def readable(self, clusters: Int64Array) -> BoolArray:
        """For which single clusters the refcount can be read."""
        if self._stored is None or not self._stored.unreadable.any():
            return np.ones(len(clusters), dtype=np.bool_)
        return self._stored.readable(clusters)

    def at(self, clusters: Int64Array) -> tuple[BoolArray, BoolArray]:
        """The values for single clusters, and for which of them the refcount can be read."""
        window = clusters >> self._bits
        inside = window < len(self._slots)
        slot = self._slots[np.where(inside, window, 0)]
        inside &= slot >= 0
        ones = self._ones[np.where(inside, slot, 0), clusters & ((1 << self._bits) - 1)] & inside
        known = self.readable(clusters)
        if self._stored is not None:
            outside = np.flatnonzero(~inside & known)
            if len(outside):
                distinct, inverse = np.unique(clusters[outside], return_inverse=True)
                ones[outside] = (self._stored.at(distinct) == 1)[inverse]
        return ones, known


class WrongTables(NamedTuple):
    """Some L2 tables of the active layer with wrong COPIED flags.

    Attributes:
        host_offset: of the tables in bytes (int64, n).
        words: the tables as on disk, '>u8' (n, words of a cluster).
        entries: their L2 entries, a view into `words`.
        wrong: whose flag is wrong (n, l2_entries).
    """

    host_offset: Int64Array
    words: Entries
    entries: Entries
    wrong: BoolArray


def wrong_l1_entries(header: Header, mapping: MappingCount, ones: Ones) -> BoolArray:
    """Which entries of the active L1 table have a wrong COPIED flag."""
    host = offsets(mapping.l1)
    used = np.flatnonzero(host)
    one, known = ones.at(host[used] >> header.cluster_bits)
    wrong = np.zeros(len(host), dtype=np.bool_)
    wrong[used] = known & (one != flagged(mapping.l1[used], OFLAG_COPIED))
    return wrong


def wrong_l2_tables(storage: ReadStorage, header: Header, mapping: MappingCount, ones: Ones) -> Iterator[WrongTables]:
    """The L2 tables of the active layer that have wrong COPIED flags, ascending by host offset."""
    geometry = header.geometry
    rules = ScanRules(geometry, header.version, header.has_data_file, storage.size() + 511 & -512)
    suspects = _suspects(header, mapping, ones)
    per_batch = max(1, SCAN_BYTES >> geometry.cluster_bits)
    for start in range(0, len(suspects), per_batch):
        host = mapping.tables.host_offset[suspects[start : start + per_batch]]
        words = empty_words(len(host), geometry)
        read_tables(storage, geometry, host, words)
        entries, bitmaps = split_words(words, geometry)
        rest = np.flatnonzero(~_right_by_runs(entries, rules, ones)) if bitmaps is None else np.arange(len(host))
        wrong = _wrong_entries(entries[rest], header, ones)
        some = wrong.any(axis=1)
        if some.any():
            rows = rest[some]
            words = words[rows]
            yield WrongTables(host[rows], words, split_words(words, geometry)[0], wrong[some])


def _suspects(header: Header, mapping: MappingCount, ones: Ones) -> Int64Array:
    """Tables of the active layer that are not known to be right."""
    tables = mapping.tables
    suspect = (tables.active_uses > 0) & ~tables.empty & (tables.host_offset != 0)
    # As in QEMU, a table whose own refcount cannot be read is not looked into.
    suspect &= ones.readable(tables.host_offset >> header.cluster_bits)
    runs = np.flatnonzero(suspect & (tables.run_first >= 0))
    if header.has_data_file:
        suspect[runs] = ~tables.run_copied[runs]
    else:
        length = header.geometry.l2_entries
        columns = (runs.tolist(), tables.run_first[runs].tolist(), tables.run_copied[runs].tolist())
        for place, first, copied in zip(*columns, strict=True):
            suspect[place] = not ones.run_is(first, first + length, copied)
    return np.flatnonzero(suspect)


def _right_by_runs(entries: Entries, rules: ScanRules, ones: Ones) -> BoolArray:
    """Tables that map few runs, with the right flag on each of these."""
    right, *pieces = few_pieces(entries, rules)
    if not rules.has_data_file:  # else the flags are all set, or it would be no such table
        for row, first, length, copied in zip(*(column.tolist() for column in pieces), strict=True):
            if right[row] and not ones.run_is(first, first + length, copied):
                right[row] = False
    return right


def _wrong_entries(entries: Entries, header: Header, ones: Ones) -> BoolArray:
    wrong = np.zeros(entries.shape, dtype=np.bool_)
    row, index = np.nonzero(entries)
    entry = entries[row, index].astype(np.uint64)
    kind = classify_many(entry, header.extended_l2, header.has_data_file)
    own = np.flatnonzero((kind == ClusterType.NORMAL) | (kind == ClusterType.ZERO_ALLOC))
    copied = flagged(entry[own], OFLAG_COPIED)
    if header.has_data_file:
        bad = ~copied
    else:
        one, known = ones.at(offsets(entry[own]) >> header.cluster_bits)
        bad = known & (one != copied)
    wrong[row[own[bad]], index[own[bad]]] = True
    return wrong
