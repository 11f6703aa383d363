"""Tables that a damaged reference has lost: searched for among the clusters that nothing refers to.

An entry of an L1 or L2 table leaves few of its 64 bits free (reserved, alignment, the length of the file), so that
other data does not pass for a table. A search answers with every place that fits, with none where there are too many
clusters to look at; only the caller can say whether one is enough. Clusters are looked at whose refcount says that they
are in use; all, where the refcounts are damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qcowlib.format.entries import (
    ENTRY_DTYPE,
    L1_OFFSET_MASK,
    L1_RESERVED,
    ClusterType,
    Entries,
    Int64Array,
    classify_many,
    flagged,
    offsets,
)
from qcowlib.format.header import Header
from qcowlib.metadata.census import Census
from qcowlib.metadata.l2_scan import ScanRules
from qcowlib.metadata.mapping_census import SCAN_BYTES
from qcowlib.metadata.mending import mend_l2
from qcowlib.metadata.references import empty_words, read_tables, split_words
from qcowlib.metadata.snapshot_rescue import rescue_snapshots
from qcowlib.storage.helpers import read_padded
from qcowlib.storage.protocol import ReadStorage

BoolArray = npt.NDArray[np.bool_]

MAX_SEARCHED = 1 << 18  # clusters: 16 GiB of the usual size; more of them would take minutes
_MAX_TABLES = 256  # L2 tables of a candidate that are looked into


class LostTables:
    """A search in one image.

    Args:
        storage: the qcow2 file, or an overlay.
        header: its header.
        rules: what L2 entries are measured by.
        found: the census, with the refcount structure.
    """

    def __init__(self, storage: ReadStorage, header: Header, rules: ScanRules, found: Census) -> None:
        self.storage = storage
        self.header = header
        self.geometry = header.geometry
        self.rules = rules
        self.found = found
        self._complete = True  # the last search has seen every cluster
        self.known_refcounts = not found.refcounts_damaged and bool(len(found.stored.table))

    def l1_tables(self, entries: int) -> list[int]:
        """Host offsets where an L1 table of that many entries may lie, with L2 tables under it."""
        places = []
        for clusters, words in self._unreferenced():
            first = words[:, : min(entries, words.shape[1])].astype(np.uint64)
            likely = self._are_l1_entries(first)
            likely &= ~words[:, first.shape[1] :].any(axis=1)
            for cluster in clusters[likely].tolist():
                offset = cluster << self.geometry.cluster_bits
                if self._is_l1_table(offset, entries):
                    places.append(offset)
        return places if self._complete else []

    def l2_tables(self) -> list[int]:
        """Host offsets where an L2 table may lie that nothing names."""
        places = []
        for clusters, words in self._unreferenced():
            likely = self._are_l2_tables(words)
            places += (clusters[likely] << self.geometry.cluster_bits).tolist()
        return places if self._complete else []

    def lacking(self, places: list[int]) -> list[int]:
        """Those of some host offsets whose cluster has a higher refcount than it has references."""
        clusters = np.array(places, dtype=np.int64) >> self.geometry.cluster_bits
        header = self.found.stored.at(np.zeros(1, dtype=np.int64))[0]
        if not len(clusters) or header != 1 or not self.found.stored.readable(clusters).all():
            return []  # nothing that these refcounts say is to be believed
        more = self.found.stored.at(clusters) > self.found.references.at(clusters).astype(np.uint64)
        return [place for place, chosen in zip(places, more.tolist(), strict=True) if chosen]

    def snapshot_tables(self) -> list[int]:
        """Host offsets where the snapshot table may lie: with as many sound entries as the header says."""
        places = []
        for clusters, words in self._unreferenced():
            l1_offset = words[:, 0].astype(np.uint64)
            likely = (l1_offset != 0) & (l1_offset % np.uint64(self.header.cluster_size) == 0)
            likely &= l1_offset < np.uint64(self.rules.file_end)
            for cluster in clusters[likely].tolist():
                offset = cluster << self.geometry.cluster_bits
                header = replace(self.header, snapshots_offset=offset)
                rescued = rescue_snapshots(self.storage, header, self.rules.file_end)
                if rescued is not None and not rescued.repairs and all(e.id.isdigit() for e in rescued.entries):
                    places.append(offset)
        return places if self._complete else []

    def is_all_referenced(self) -> bool:
        """Whether there is no cluster with content that nothing refers to."""
        return not any(words.any() for _, words in self._unreferenced(every=True)) and self._complete

    def _unreferenced(self, *, every: bool = False) -> Iterator[tuple[Int64Array, Entries]]:
        """(clusters, their words) of clusters inside the file that nothing refers to, in batches."""
        self._complete = True
        searched = 0
        per_batch = max(1, SCAN_BYTES >> self.geometry.cluster_bits)
        bits = self.found.references.chunk_bits
        inside = self.rules.file_end + self.geometry.cluster_size - 1 >> self.geometry.cluster_bits
        for window in range((inside + (1 << bits) - 1) >> bits):
            counts = self.found.references.chunk(window)
            free: BoolArray = np.ones(1 << bits, dtype=np.bool_) if counts is None else counts == 0
            if self.known_refcounts and not every:
                free &= self.found.stored.window(window << bits, 1 << bits) != 0
            clusters = np.flatnonzero(free[: inside - (window << bits)]) + (window << bits)
            for start in range(0, len(clusters), per_batch):
                if searched >= MAX_SEARCHED:
                    self._complete = False
                    return
                part = clusters[start : start + per_batch]
                searched += len(part)
                words = empty_words(len(part), self.geometry)
                read_tables(self.storage, self.geometry, part << self.geometry.cluster_bits, words)
                yield part, words

    def _are_l1_entries(self, entries: Entries) -> BoolArray:
        """Which rows can be (the first part of) an L1 table that is not empty."""
        host = offsets(entries, L1_OFFSET_MASK)
        wrong = flagged(entries, L1_RESERVED) | ((host & (self.geometry.cluster_size - 1)) != 0)
        wrong |= (host >= self.rules.file_end) | ((host == 0) & (entries != 0))
        possible: BoolArray = ~wrong.any(axis=1) & (host != 0).any(axis=1)
        return possible

    def _is_l1_table(self, offset: int, entries: int) -> bool:
        """Whether all of a table can be L1 entries, each naming an L2 table of its own, and one of them names data."""
        table = np.frombuffer(read_padded(self.storage, offset, entries * 8), dtype=ENTRY_DTYPE)
        host = offsets(table, L1_OFFSET_MASK)
        host = host[host != 0]
        if not self._are_l1_entries(table.reshape(1, -1))[0] or len(np.unique(host)) != len(host):
            return False
        host = np.sort(host)[:_MAX_TABLES]
        words = empty_words(len(host), self.geometry)
        read_tables(self.storage, self.geometry, host, words)
        likely = self._are_l2_tables(words)
        return bool(likely.any() and (likely | ~words.any(axis=1)).all())

    def _are_l2_tables(self, words: Entries) -> BoolArray:
        """Which rows can be L2 tables that name data."""
        mended = mend_l2(words.reshape(-1), self.rules).words.reshape(words.shape)
        entries, _ = split_words(words, self.geometry)
        kinds = classify_many(entries, self.geometry.extended_l2, self.header.has_data_file)
        names_data = ((kinds == ClusterType.NORMAL) | (kinds == ClusterType.COMPRESSED)).any(axis=1)
        likely: BoolArray = (mended == words).all(axis=1) & names_data
        return likely


def is_no_l2_table(storage: ReadStorage, cluster: int, rules: ScanRules) -> bool:
    """Whether most of what should be entries of an L2 table, in a host cluster, cannot be entries."""
    size = rules.geometry.cluster_size
    words = np.frombuffer(read_padded(storage, cluster << rules.geometry.cluster_bits, size), dtype=ENTRY_DTYPE)
    wrong = words != mend_l2(words, rules).words
    return 2 * int(wrong.sum()) > int((words != 0).sum())
