"""L2 tables of one open image: read once, judged once, kept within a byte budget.

A table is judged when it is loaded, as a whole: the entries that cannot be followed are remembered with the table, so
that a read pays nothing for the check and yet never returns bytes through a damaged entry.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.format.entries import (
    ENTRY_DTYPE,
    OFLAG_ZERO,
    ClusterType,
    Entries,
    classify_many,
    compressed_locations,
    flagged,
    invalid_bitmaps,
    offsets,
)
from qcowlib.metadata.regions import MetadataRegions
from qcowlib.storage.protocol import ReadStorage

DEFAULT_BUDGET = 32 << 20


@dataclass(slots=True)
class L2Table:
    """One L2 table in memory.

    Attributes:
        host_offset: where it lies, in bytes.
        words: the whole cluster as '>u8'.
        entries: the L2 entries (a view of `words`).
        bitmaps: the subcluster bitmaps (a view of `words`), None without extended L2 entries.
        damaged: the rule that an entry breaks, by index; None when all can be followed.
    """

    host_offset: int
    words: Entries
    entries: Entries
    bitmaps: Entries | None
    damaged: dict[int, str] | None = None


@dataclass(frozen=True)
class EntryRules:
    """What an L2 entry must satisfy to be followed.

    Attributes:
        geometry: of the image.
        version: of the header; version 2 has no zero flag.
        data_storage: the file that holds guest clusters; nothing may lie behind its end.
        has_data_file: whether that is an external data file.
        regions: the metadata of the image; None with an external data file.
        is_metadata: a second opinion on a cluster that `regions` knows; None trusts `regions`.
    """

    geometry: Geometry
    version: int
    data_storage: ReadStorage
    has_data_file: bool
    regions: MetadataRegions | None
    is_metadata: Callable[[int], bool] | None = None

    def damage(self, entries: Entries, bitmaps: Entries | None) -> npt.NDArray[np.bool_] | None:
        """Which of the entries (any shape) cannot be followed; None when all can."""
        geometry, data_size = self.geometry, self.data_storage.size()
        kinds = classify_many(entries, geometry.extended_l2, self.has_data_file)
        host = offsets(entries)
        normal = kinds == ClusterType.NORMAL
        placed = normal | (kinds == ClusterType.ZERO_ALLOC)
        compressed = kinds == ClusterType.COMPRESSED
        bad: npt.NDArray[np.bool_] = placed & ((host & (geometry.cluster_size - 1)) != 0)
        used = normal
        if bitmaps is not None:
            used = normal & flagged(bitmaps, 0xFFFF_FFFF)
            bad |= invalid_bitmaps(kinds, bitmaps)
        bad |= used & (host >= data_size)
        if compressed.any():
            start, _ = compressed_locations(entries, geometry.cluster_bits)
            bad |= compressed & ((start >= data_size) | self.has_data_file)
        if self.version < 3:
            bad |= ~compressed & flagged(entries, OFLAG_ZERO)
        if self.regions is not None:
            clusters = host[used] >> geometry.cluster_bits
            hits = self.regions.hits(clusters)
            if hits is not None:
                bad[used] |= hits & np.isin(clusters, self._confirmed(np.unique(clusters[hits])))
        return bad if bad.any() else None

    def _confirmed(self, clusters: npt.NDArray[np.int64]) -> list[int]:
        """Those of some clusters in the map of metadata that the caller's doubts do not remove from it."""
        if self.is_metadata is None:
            return [int(cluster) for cluster in clusters]
        return [cluster for cluster in clusters.tolist() if self.is_metadata(cluster)]

    def explain(self, entry: int, bitmap: int) -> str:
        """The rule that a damaged entry breaks."""
        geometry = self.geometry
        kind = int(classify_many(np.array([entry], dtype=np.uint64), geometry.extended_l2, self.has_data_file)[0])
        host = int(offsets(np.array([entry], dtype=np.uint64))[0])
        if kind == ClusterType.COMPRESSED:
            return (
                "compressed data beyond the end of the file"
                if not self.has_data_file
                else "compressed cluster in a data file"
            )
        if self.version < 3 and entry & OFLAG_ZERO:
            return "zero flag in a version 2 image"
        if host & (geometry.cluster_size - 1):
            return f"cluster offset {host:#x} is not aligned"
        if geometry.extended_l2 and (bitmap >> 32) & bitmap & 0xFFFF_FFFF:
            return "a subcluster is both allocated and zero"
        if geometry.extended_l2 and kind == ClusterType.UNALLOCATED:
            return "a subcluster is allocated without a cluster"
        if host >= self.data_storage.size():
            return f"cluster offset {host:#x} lies beyond the end of the file"
        found = self.regions.kind_of(host >> geometry.cluster_bits) if self.regions else None
        return f"cluster offset {host:#x} holds the {found.label}" if found else "entry cannot be followed"


class TableCache:
    """L2 tables by host offset.

    Thread-safe for readers. Tables that a transaction has changed are pinned until it is committed.

    Args:
        storage: the host file with the tables.
        geometry: of the image.
        budget: bytes of unpinned tables to keep.
    """

    def __init__(self, storage: ReadStorage, geometry: Geometry, *, budget: int = DEFAULT_BUDGET) -> None:
        self._storage = storage
        self._geometry = geometry
        self._capacity = max(4, budget >> geometry.cluster_bits)
        self._tables: dict[int, L2Table] = {}
        self._lock = threading.Lock()
        self.pinned: set[int] = set()

    def peek(self, host_offset: int) -> L2Table | None:
        """The table if it is in memory."""
        return self._tables.get(host_offset)

    def load(self, host_offset: int, rules: EntryRules) -> L2Table:
        """The table at a host offset (bytes), read and judged if it is not in memory.

        Raises:
            CorruptMetadata: the table is not wholly inside the file.
        """
        with self._lock:
            table = self._tables.get(host_offset)
            if table is None:
                table = self._read(host_offset, rules)
                self._make_room()
                self._tables[host_offset] = table
            return table

    def insert(self, table: L2Table) -> None:
        """Put a new table in memory, pinned."""
        with self._lock:
            self._make_room()
            self._tables[table.host_offset] = table
            self.pinned.add(table.host_offset)

    def clear(self) -> None:
        """Forget all tables; none may be pinned."""
        with self._lock:
            self._tables = {}
            self.pinned = set()

    def new_table(self, host_offset: int) -> L2Table:
        """An empty table that is to lie at a host offset (bytes)."""
        words = np.zeros(self._geometry.cluster_size // 8, dtype=ENTRY_DTYPE)
        return self.table_of(host_offset, words)

    def table_of(self, host_offset: int, words: Entries) -> L2Table:
        """A table over a cluster's words."""
        if self._geometry.extended_l2:
            return L2Table(host_offset, words, words[0::2], words[1::2])
        return L2Table(host_offset, words, words, None)

    def _read(self, host_offset: int, rules: EntryRules) -> L2Table:
        data = self._storage.pread(self._geometry.cluster_size, host_offset)
        if len(data) < self._geometry.cluster_size:
            raise CorruptMetadata("L2 table", host_offset, "lies beyond the end of the file")
        table = self.table_of(host_offset, np.frombuffer(bytearray(data), dtype=ENTRY_DTYPE))
        bad = rules.damage(table.entries, table.bitmaps)
        if bad is not None:
            table.damaged = {
                index: rules.explain(
                    table.entries.item(index), table.bitmaps.item(index) if table.bitmaps is not None else 0
                )
                for index in np.flatnonzero(bad).tolist()
            }
        return table

    def _make_room(self) -> None:
        while len(self._tables) - len(self.pinned) >= self._capacity:
            victim = next(offset for offset in self._tables if offset not in self.pinned)
            del self._tables[victim]
