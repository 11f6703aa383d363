"""From guest offsets to host offsets: one L1 table and the L2 tables under it.

Two paths that a property test holds together: `lookup` for one guest offset, with plain integers, and `extents` for
ranges, with arrays over many L2 tables at a time. Both look at this layer alone. An entry that cannot be followed
raises when a range that needs it is asked, never before, and never gives a wrong offset.

Source: qcow2.txt, "Cluster mapping", "Extended L2 Entries".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcowlib.errors import CorruptMetadata
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.format.entries import (
    L1_OFFSET_MASK,
    L2_OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    ClusterType,
    Entries,
    Int64Array,
    classify_many,
    compressed_location,
    compressed_locations,
    offsets,
)
from qcowlib.metadata.references import empty_words, read_tables, split_words
from qcowlib.metadata.runs import find_runs
from qcowlib.metadata.tables import EntryRules, L2Table, TableCache
from qcowlib.storage.protocol import ReadStorage

# Subclusters of one batch of `extents`: some tens of MiB of temporaries at most.
_BATCH = 1 << 18

_DATA, _ZERO = int(ExtentKind.DATA), int(ExtentKind.ZERO)
_UNALLOCATED, _COMPRESSED = int(ExtentKind.UNALLOCATED), int(ExtentKind.COMPRESSED)
_KIND_OF_TYPE = np.array([_UNALLOCATED, _ZERO, _ZERO, _DATA, _COMPRESSED], dtype=np.uint8)

Lookup = tuple[int, int, int]


class ClusterMapping:
    """The mapping of one L1 table.

    Args:
        storage: the file that holds the tables.
        tables: the image's L2 tables in memory.
        rules: what an entry must satisfy to be followed.
        l1: the L1 table, '>u8'; a writer changes it in place.
    """

    def __init__(self, storage: ReadStorage, tables: TableCache, rules: EntryRules, l1: Entries) -> None:
        geometry = rules.geometry
        self._storage = storage
        self._tables = tables
        self._rules = rules
        self._geometry = geometry
        self._l1_shift = geometry.l2_bits + geometry.cluster_bits
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_size - 1
        self._l2_mask = geometry.l2_entries - 1
        self._data_file = rules.has_data_file
        self.l1 = l1

    def lookup(self, guest: int) -> Lookup:
        """Where the byte at a guest offset is.

        Returns:
            (kind, host offset or -1, run): an `ExtentKind` value; the host offset of this byte (for COMPRESSED: of the
            first byte of the compressed data); bytes from `guest` on, inside this cluster, of which the same is true.

        Raises:
            CorruptMetadata: the L1 or L2 entry cannot be followed.
        """
        l1_index = guest >> self._l1_shift
        inside = guest & self._cluster_mask
        if l1_index >= len(self.l1):
            return _UNALLOCATED, -1, self._cluster_size - inside
        table_offset = self.l1.item(l1_index) & L1_OFFSET_MASK
        if not table_offset:
            return _UNALLOCATED, -1, self._cluster_size - inside
        table = self._tables.peek(table_offset) or self.table(l1_index)
        index = guest >> self._cluster_bits & self._l2_mask
        if table.damaged is not None and index in table.damaged:
            raise self._damage(table, index)
        entry = table.entries.item(index)
        if table.bitmaps is not None and not entry & OFLAG_COMPRESSED:
            return self._lookup_subcluster(entry, table.bitmaps.item(index), inside)
        host = entry & L2_OFFSET_MASK
        if entry & (OFLAG_COMPRESSED | OFLAG_ZERO):
            if entry & OFLAG_COMPRESSED:
                return _COMPRESSED, compressed_location(entry, self._cluster_bits)[0], self._cluster_size - inside
            return _ZERO, host + inside if host else -1, self._cluster_size - inside
        if host or (self._data_file and entry & OFLAG_COPIED):
            return _DATA, host + inside, self._cluster_size - inside
        return _UNALLOCATED, -1, self._cluster_size - inside

    def compressed_size(self, guest: int) -> int:
        """Host bytes of the compressed cluster at a guest offset: up to the end of its last 512-byte sector."""
        table = self.table(guest >> self._l1_shift)
        entry = table.entries.item(guest >> self._cluster_bits & self._l2_mask)
        return compressed_location(entry, self._cluster_bits)[1]

    def table(self, l1_index: int) -> L2Table:
        """The L2 table that an L1 entry names.

        Raises:
            CorruptMetadata: the entry is unaligned, points at other metadata or beyond the end of the file.
        """
        offset = self.l1.item(l1_index) & L1_OFFSET_MASK
        table = self._tables.peek(offset)
        if table is not None:
            return table
        self._require_table(offset, l1_index)
        return self._tables.load(offset, self._rules)

    def extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """The guest range (bytes) as extents of this layer, in batches; rows that continue each other are one row.

        Raises:
            CorruptMetadata: an L1 or L2 entry of the range cannot be followed.
        """
        end = offset + length
        while offset < end:
            stop, batch = self._batch(offset, end)
            yield batch
            offset = stop

    def _lookup_subcluster(self, entry: int, bitmap: int, inside: int) -> Lookup:
        size = self._geometry.subcluster_size
        first = inside // size
        host = entry & L2_OFFSET_MASK
        placed = host or (self._data_file and entry & OFLAG_COPIED)
        state = bitmap >> first & 0x1_0000_0001
        last = first + 1
        while last < 32 and bitmap >> last & 0x1_0000_0001 == state:
            last += 1
        kind = _DATA if state & 1 else _ZERO if state else _UNALLOCATED
        return kind, host + inside if placed else -1, last * size - inside

    def _batch(self, offset: int, end: int) -> tuple[int, ExtentTable]:
        """The next extents from `offset`, and where they stop."""
        first = offset >> self._l1_shift
        wanted = min((end - 1 >> self._l1_shift) + 1, len(self.l1))
        if first >= wanted:
            return end, _empty_range(offset, end)
        per_table = self._geometry.l2_entries * self._geometry.subclusters_per_cluster
        last = min(wanted, first + max(1, _BATCH // per_table))
        host = offsets(self.l1[first:wanted], L1_OFFSET_MASK)
        if not host[0]:
            used = np.flatnonzero(host)
            stop = first + int(used[0]) if len(used) else wanted
            return self._clip(stop, end), _empty_range(offset, self._clip(stop, end))
        gap = np.flatnonzero(host[: last - first] == 0)
        if len(gap):
            last = first + int(gap[0])
        stop = self._clip(last, end)
        return stop, self._table_extents(first, host[: last - first], offset, stop)

    def _clip(self, l1_index: int, end: int) -> int:
        """The guest offset where an L1 index begins; all that is behind the L1 table belongs to its last entry."""
        return end if l1_index >= len(self.l1) else min(l1_index << self._l1_shift, end)

    def _table_extents(self, first: int, host: Int64Array, start: int, stop: int) -> ExtentTable:
        """Extents of [start, stop), which the consecutive L1 entries from `first` on (tables at `host`) map."""
        words = self._gather(first, host)
        entries, bitmaps = split_words(words, self._geometry)
        base = first << self._l1_shift
        low = start - base >> self._cluster_bits
        # A range that ends behind the L1 table: what no table maps is one more row at the end.
        mapped_stop = min(stop, base + (len(host) << self._l1_shift))
        high = mapped_stop - base + self._cluster_mask >> self._cluster_bits
        entries = entries.reshape(-1)[low:high]
        bitmaps = bitmaps.reshape(-1)[low:high] if bitmaps is not None else None
        rows = self._run_rows(entries, base + (low << self._cluster_bits), start, mapped_stop, bitmaps is None)
        if rows is None:
            rows = self._entry_rows(host, entries, bitmaps, base, low, start, mapped_stop)
        if mapped_stop < stop:
            tail = _empty_range(mapped_stop, stop)
            rows = ExtentTable(*(np.concatenate(pair) for pair in zip(_columns(rows), _columns(tail), strict=True)))
        return rows

    def _run_rows(self, entries: Entries, base: int, start: int, stop: int, plain: bool) -> ExtentTable | None:
        """Rows of [start, stop) where the entries, from guest offset `base` on, are few runs; else None."""
        runs = find_runs(entries, self._rules) if plain else None
        if runs is None:
            return None
        heads, hosts = runs
        kinds = np.where(hosts < 0, np.uint8(_UNALLOCATED), np.uint8(_DATA))
        row_start = base + heads * self._cluster_size
        row_stop = np.append(row_start[1:], base + len(entries) * self._cluster_size)
        return _cut_rows(row_start, row_stop, kinds, hosts, np.zeros(len(heads), dtype=np.int64), start, stop)

    def _entry_rows(
        self,
        host: Int64Array,
        entries: Entries,
        bitmaps: Entries | None,
        base: int,
        low: int,
        start: int,
        stop: int,
    ) -> ExtentTable:
        """Rows of [start, stop) from entries of any kind; the first one is number `low` of the tables at `host`."""
        bad = self._rules.damage(entries, bitmaps)
        if bad is not None:
            index = int(np.argmax(bad))
            table = int(host[low + index >> self._geometry.l2_bits])
            rule = self._rules.explain(entries.item(index), bitmaps.item(index) if bitmaps is not None else 0)
            guest = base + (low + index << self._cluster_bits)
            raise CorruptMetadata("L2 table", table, f"entry for guest offset {guest:#x}: {rule}")
        kinds, hosts, lengths = self._classify(entries, bitmaps)
        return self._merged(kinds, hosts, lengths, base + (low << self._cluster_bits), start, stop)

    def _gather(self, first: int, host: Int64Array) -> Entries:
        """The words of consecutive L2 tables, from memory where a table is there (it may be newer than the file)."""
        for index, offset in enumerate(host.tolist()):
            self._require_table(offset, first + index)
        known = {index: table for index, offset in enumerate(host.tolist()) if (table := self._tables.peek(offset))}
        if len(known) == 1 == len(host):
            return known[0].words.reshape(1, -1)
        words = empty_words(len(host), self._geometry)
        missing = np.array([index for index in range(len(host)) if index not in known], dtype=np.int64)
        if len(missing) == len(host):
            read_tables(self._storage, self._geometry, host, words)
        elif len(missing):
            fresh = empty_words(len(missing), self._geometry)
            read_tables(self._storage, self._geometry, host[missing], fresh)
            words[missing] = fresh
        for index, table in known.items():
            words[index] = table.words
        return words

    def _require_table(self, offset: int, l1_index: int) -> None:
        if self._tables.peek(offset):
            return
        if offset & self._cluster_mask:
            raise CorruptMetadata("L1 table", None, f"entry {l1_index} has the unaligned offset {offset:#x}")
        if offset + self._cluster_size > self._storage.size():
            raise CorruptMetadata("L2 table", offset, f"lies beyond the end of the file (L1 entry {l1_index})")
        regions = self._rules.regions
        found = regions.kind_of(offset >> self._cluster_bits) if regions is not None else None
        if found is not None and found.name != "L2_TABLE":
            raise CorruptMetadata("L2 table", offset, f"overlaps the {found.label} (L1 entry {l1_index})")

    def _classify(
        self, entries: Entries, bitmaps: Entries | None
    ) -> tuple[npt.NDArray[np.uint8], Int64Array, Int64Array]:
        """Kind, host offset (-1: none) and host length of every (sub)cluster."""
        types = classify_many(entries, bitmaps is not None, self._data_file)
        hosts = offsets(entries)
        lengths = np.zeros(len(entries), dtype=np.int64)
        compressed = types == ClusterType.COMPRESSED
        if compressed.any():
            start, size = compressed_locations(entries[compressed], self._cluster_bits)
            hosts[compressed] = start
            lengths[compressed] = size
        hosts[(types == ClusterType.UNALLOCATED) | (types == ClusterType.ZERO_PLAIN)] = -1
        kinds = _KIND_OF_TYPE[types]
        if bitmaps is None:
            return kinds, hosts, lengths
        return self._classify_subclusters(kinds, hosts, lengths, bitmaps)

    def _classify_subclusters(
        self, kinds: npt.NDArray[np.uint8], hosts: Int64Array, lengths: Int64Array, bitmaps: Entries
    ) -> tuple[npt.NDArray[np.uint8], Int64Array, Int64Array]:
        bits = np.unpackbits(bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        allocated, zero = bits[:, :32], bits[:, 32:]
        fine = np.full(allocated.shape, _UNALLOCATED, dtype=np.uint8)
        fine[zero != 0] = _ZERO
        fine[allocated != 0] = _DATA
        compressed = kinds == _COMPRESSED
        fine[compressed] = _COMPRESSED
        step = np.arange(32, dtype=np.int64) * self._geometry.subcluster_size
        fine_hosts = hosts[:, None] + np.where((hosts >= 0)[:, None] & ~compressed[:, None], step, 0)
        return fine.reshape(-1), fine_hosts.reshape(-1), np.repeat(lengths, 32)

    def _merged(
        self, kinds: npt.NDArray[np.uint8], hosts: Int64Array, lengths: Int64Array, base: int, start: int, stop: int
    ) -> ExtentTable:
        """Rows for (sub)clusters from guest offset `base` on, joined where kind and host go on, cut to the range."""
        unit, per_cluster = self._geometry.subcluster_size, self._geometry.subclusters_per_cluster
        expected = np.where(hosts[:-1] >= 0, hosts[:-1] + unit, -1)
        same = (kinds[1:] == kinds[:-1]) & (hosts[1:] == expected) & (kinds[1:] != _COMPRESSED)
        if per_cluster > 1 and _COMPRESSED in kinds:
            inside = np.arange(1, len(kinds)) % per_cluster != 0
            same |= inside & (kinds[1:] == _COMPRESSED)
        heads = np.concatenate(([0], np.flatnonzero(~same) + 1))
        row_start = base + heads * unit
        row_stop = np.concatenate((row_start[1:], [base + len(kinds) * unit]))
        return _cut_rows(row_start, row_stop, kinds[heads], hosts[heads], lengths[heads], start, stop)

    def _damage(self, table: L2Table, index: int) -> CorruptMetadata:
        assert table.damaged is not None
        return CorruptMetadata("L2 table", table.host_offset, f"entry {index}: {table.damaged[index]}")


def _columns(table: ExtentTable) -> tuple[npt.NDArray[np.generic], ...]:
    return table.start, table.length, table.kind, table.host_offset, table.host_length, table.layer


def _empty_range(start: int, stop: int) -> ExtentTable:
    return ExtentTable.from_rows([(start, stop - start, _UNALLOCATED, -1, 0, 0)])


def _cut_rows(
    row_start: Int64Array,
    row_stop: Int64Array,
    kind: npt.NDArray[np.uint8],
    host: Int64Array,
    stored: Int64Array,
    start: int,
    stop: int,
) -> ExtentTable:
    """Rows cut to [start, stop), which may begin inside the first cluster, even behind its first rows.

    Args:
        stored: bytes of compressed data, for rows of that kind.
    """
    moves = (row_start < start) & (host >= 0) & (kind != _COMPRESSED)
    host = np.where(moves, host + start - row_start, host)
    row_start, row_stop = np.maximum(row_start, start), np.minimum(row_stop, stop)
    keep = row_stop > row_start
    length, kind = (row_stop - row_start)[keep], kind[keep]
    host_length = np.where(kind == _COMPRESSED, stored[keep], np.where(kind == _DATA, length, 0))
    return ExtentTable(row_start[keep], length, kind, host[keep], host_length, np.zeros(len(kind), dtype=np.uint16))
