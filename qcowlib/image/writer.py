"""Writing guest clusters: in place where the cluster is ours alone, else into new clusters with copy-on-write.

    write        first cluster (partial) | whole clusters, vectorised | last cluster (partial)
    each piece   in place: COPIED data                  -> one write to the host
                 elsewhere: new clusters (FILL)         -> data with head and tail copied, L2 entries, old ones released
    zeroes       whole (sub)clusters become zero entries, the rest is written

Data goes to the host at once; what refers to it waits in the transaction.

Source: qcow2.txt, "Cluster mapping", "Extended L2 Entries"; QEMU's treatment of write-zeroes and discard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata, StorageError
from qcowlib.format.entries import (
    L2_OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    SUBCLUSTERS_ALLOCATED,
    SUBCLUSTERS_ZERO,
    ClusterType,
    Entries,
    classify_many,
    classify_one,
    compressed_locations,
    flagged,
    offsets,
)
from qcowlib.metadata.refcounts import cluster_runs
from qcowlib.metadata.tables import L2Table
from qcowlib.metadata.transaction import MetadataTransaction

_IN_PLACE, _REUSE, _ALLOCATE = 0, 1, 2


class GuestAccess(NamedTuple):
    """How the writer reaches guest bytes.

    Attributes:
        read: guest bytes (offset, length) as they are now, through the chain; zeroes behind the end of the disk.
        store: write (host offset, guest offset, bytes) to the file with guest clusters, encrypted if need be.
        alignment: unit of `store` in bytes: 512 for encrypted images, else 1.
        has_backing: whether unallocated clusters read from a backing file.
    """

    read: Callable[[int, int], bytes]
    store: Callable[[int, int, bytes | memoryview], None]
    alignment: int
    has_backing: bool


class ClusterWriter:
    """Writes to one image.

    Args:
        transaction: takes the metadata changes.
        guest: reads and stores guest bytes.
    """

    def __init__(self, transaction: MetadataTransaction, guest: GuestAccess) -> None:
        self._transaction = transaction
        self._state = transaction.state
        self._geometry: Geometry = transaction.state.geometry
        self._guest = guest
        self._data_file = transaction.state.header.has_data_file
        self._version = transaction.state.header.version

    def write(self, offset: int, data: memoryview) -> None:
        """Write guest bytes; the range lies inside the L1 table."""
        size = self._geometry.cluster_size
        for start, stop in self._table_pieces(offset, offset + len(data)):
            table = self._transaction.writable_table(self._geometry.l1_index(start))
            position = start
            while position < stop:
                whole = (stop - position) & -size if position % size == 0 else 0
                piece_stop = position + whole if whole else min(stop, self._geometry.cluster_end(position + 1))
                piece = data[position - offset : piece_stop - offset]
                if whole:
                    self._write_clusters(table, position, piece)
                else:
                    self._write_inside(table, position, piece)
                position = piece_stop

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make guest bytes zero: whole (sub)clusters by their entries, the rest by writing."""
        unit = self._geometry.subcluster_size
        end = offset + length
        low = -(-offset // unit) * unit
        high = end if end == self._state.header.size else end // unit * unit
        if self._version < 3 and self._guest.has_backing:
            low = high = end  # no zero flag, and an unallocated cluster would show the backing file
        if low >= high:
            self._write_zero_bytes(offset, end)
            return
        self._write_zero_bytes(offset, low)
        self._write_zero_bytes(high, end)
        self.zero_units(low, high)

    def zero_units(self, low: int, high: int) -> None:
        """Zero whole (sub)clusters by their entries, also behind the end of the disk.

        Args:
            low: guest offset, aligned to a subcluster.
            high: as well, or the end of the disk.
        """
        size = self._geometry.cluster_size
        first, last = -(-low // size) * size, high if high == self._state.header.size else high // size * size
        if first > last:  # all inside one cluster
            self._zero_subclusters(low, high)
            return
        if low < first:
            self._zero_subclusters(low, first)
        if first < last:
            self._zero_clusters(first, last, everywhere=True)
        if last < high:
            self._zero_subclusters(last, high)

    def forget(self, start: int, l1_index: int) -> None:
        """Drop what an L2 table has from a guest offset on (aligned to clusters), also behind the end of the disk."""
        if not self._state.l1.item(l1_index) & L2_OFFSET_MASK:
            return
        first = max(start, l1_index * self._geometry.l2_coverage) - l1_index * self._geometry.l2_coverage
        first >>= self._geometry.cluster_bits
        found = self._state.mapping.table(l1_index)
        if not found.entries[first:].any() and (found.bitmaps is None or not found.bitmaps[first:].any()):
            return
        table = self._transaction.writable_table(l1_index)
        self._require_sound(table, first, len(table.entries))
        self._release(table.entries[first:])
        table.entries[first:] = 0
        if table.bitmaps is not None:
            table.bitmaps[first:] = 0
        self._transaction.table_changed(table, first, len(table.entries))

    def store(self, host: int, guest: int, data: bytes) -> None:
        """Store guest bytes at a host offset that nothing names yet."""
        self._guest.store(host, guest, data)

    def preallocate(self, guest: int, host: int, count: int, *, zero: bool, full: bool) -> None:
        """Let clusters be at consecutive host clusters whose content is right: zeroes, if they had nothing.

        Args:
            guest: guest offset of the first, aligned to clusters; all lie in one L2 table.
            host: host offset of the first.
            count: clusters.
            zero: a backing file has bytes there: say that they are zero.
            full: all subclusters are allocated; else they are to be written first.
        """
        table = self._transaction.writable_table(self._geometry.l1_index(guest))
        first = self._geometry.l2_index(guest)
        entries = np.arange(count, dtype=np.uint64) * np.uint64(self._geometry.cluster_size)
        entries += np.uint64(host | OFLAG_COPIED)
        self._require_sound(table, first, first + count)
        self._release(table.entries[first : first + count])
        if zero and not full and table.bitmaps is None:
            entries |= np.uint64(OFLAG_ZERO)
        table.entries[first : first + count] = entries
        if table.bitmaps is not None:
            table.bitmaps[first : first + count] = SUBCLUSTERS_ALLOCATED if full else SUBCLUSTERS_ZERO if zero else 0
        self._transaction.table_changed(table, first, first + count)

    def discard(self, offset: int, length: int) -> None:
        """Give whole clusters back; they then read as zeroes. Parts of clusters stay as they are.

        Version 2 cannot express that above a backing file: nothing is done there.
        """
        size = self._geometry.cluster_size
        end = offset + length
        first, last = -(-offset // size) * size, end if end == self._state.header.size else end // size * size
        if first < last and (self._version >= 3 or not self._guest.has_backing):
            self._zero_clusters(first, last, everywhere=False)

    def link_compressed(self, guest: int, entry: int) -> None:
        """Let the cluster at a guest offset be the compressed one that an L2 entry describes."""
        table = self._transaction.writable_table(self._geometry.l1_index(guest))
        index = self._geometry.l2_index(guest)
        self._require_sound(table, index, index + 1)
        self._release(table.entries[index : index + 1])
        self._set(table, index, entry, 0)

    def expect_backing(self) -> None:
        """Unallocated clusters read from a backing file, or are going to: zeroes need entries that say so."""
        self._guest = self._guest._replace(has_backing=True)

    def is_empty(self, offset: int, length: int) -> bool:
        """Whether no cluster that a range touches has an entry."""
        return all(
            not self._state.l1.item(self._geometry.l1_index(start)) & L2_OFFSET_MASK
            or _are_empty(*self._entries(start, stop))
            for start, stop in self._table_pieces(offset, offset + length)
        )

    def place(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Give the clusters of a range, none of which has an entry, new places without writing them.

        Returns: (guest offset, host offset, bytes) of each run.
        """
        runs = []
        for start, stop in self._table_pieces(offset, offset + length):
            table = self._transaction.writable_table(self._geometry.l1_index(start))
            guest = start
            while guest < stop:
                host, count = self._take(guest, self._geometry.clusters_for(stop - guest))
                self._set_new(table, self._geometry.l2_index(guest), count, host)
                size = min(count * self._geometry.cluster_size, stop - guest)
                runs.append((guest, host, size))
                guest += size
        return runs

    def _entries(self, start: int, stop: int) -> tuple[Entries, Entries | None]:
        """The entries, and the bitmaps, of a range that one L2 table maps."""
        table = self._state.mapping.table(self._geometry.l1_index(start))
        first = self._geometry.l2_index(start)
        last = first + self._geometry.clusters_for(stop - start)
        return table.entries[first:last], None if table.bitmaps is None else table.bitmaps[first:last]

    def _table_pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The range cut at the borders of L2 tables."""
        while start < stop:
            border = (start // self._geometry.l2_coverage + 1) * self._geometry.l2_coverage
            yield start, min(stop, border)
            start = border

    # One cluster, wholly or in part.

    def _write_inside(self, table: L2Table, start: int, data: memoryview) -> None:
        """Write inside one cluster."""
        geometry = self._geometry
        index = geometry.l2_index(start)
        self._require_sound(table, index, index + 1)
        start, data = self._aligned(start, data, self._guest.alignment)
        entry = table.entries.item(index)
        kind = classify_one(entry, geometry.extended_l2, self._data_file)
        base = geometry.cluster_start(start)
        if entry & OFLAG_COPIED and kind == ClusterType.NORMAL:
            self._write_into_own(table, index, start, data)
            return
        own = entry & OFLAG_COPIED and kind == ClusterType.ZERO_ALLOC
        sparse = geometry.extended_l2 and kind == ClusterType.UNALLOCATED
        start, data = self._aligned(start, data, geometry.subcluster_size if sparse else geometry.cluster_size)
        if own:
            self._guest.store((entry & L2_OFFSET_MASK) + start - base, start, data)
            self._set(table, index, entry & ~OFLAG_ZERO, 0)
            return
        host, count = self._take(base, 1)
        self._store_new(host, count, host + start - base, start, data)
        bitmap = 0
        if table.bitmaps is not None:
            touched = self._touched(start, len(data))
            bitmap = table.bitmaps.item(index) & ~(touched << 32) | touched if sparse else SUBCLUSTERS_ALLOCATED
        self._release(table.entries[index : index + 1])
        self._set(table, index, host | OFLAG_COPIED, bitmap)

    def _write_into_own(self, table: L2Table, index: int, start: int, data: memoryview) -> None:
        """Write into an allocated cluster that nobody shares; subclusters that were not allocated become so."""
        host = table.entries.item(index) & L2_OFFSET_MASK
        if table.bitmaps is not None:
            bitmap = table.bitmaps.item(index)
            touched = self._touched(start, len(data))
            if bitmap & touched != touched:
                start, data = self._aligned(start, data, self._geometry.subcluster_size)
                self._guest.store(host + self._geometry.in_cluster(start), start, data)
                self._set(table, index, table.entries.item(index), bitmap & ~(touched << 32) | touched)
                return
        self._guest.store(host + self._geometry.in_cluster(start), start, data)

    def _aligned(self, start: int, data: memoryview, unit: int) -> tuple[int, memoryview]:
        """The data widened to whole units with what the guest range holds now (copy-on-write)."""
        end = start + len(data)
        low, high = start // unit * unit, -(-end // unit) * unit
        if (low, high) == (start, end):
            return start, data
        head, tail = self._guest.read(low, start - low), self._guest.read(end, high - end)
        return low, memoryview(b"".join((head, data, tail)))

    def _touched(self, start: int, length: int) -> int:
        """Allocation bits of the subclusters in a range inside one cluster."""
        size = self._geometry.subcluster_size
        inside = self._geometry.in_cluster(start)
        first, last = inside // size, (inside + length - 1) // size + 1
        return (1 << last) - (1 << first)

    # Whole clusters of one L2 table.

    def _write_clusters(self, table: L2Table, start: int, data: memoryview) -> None:
        size = self._geometry.cluster_size
        first = self._geometry.l2_index(start)
        last = first + len(data) // size
        self._require_sound(table, first, last)
        entries = table.entries[first:last]
        if _are_empty(entries, None if table.bitmaps is None else table.bitmaps[first:last]):
            self._write_new(table, first, last, start, data)
            return
        kinds = classify_many(entries, self._geometry.extended_l2, self._data_file)
        ways = np.full(len(kinds), _ALLOCATE, dtype=np.uint8)
        copied = flagged(entries, OFLAG_COPIED)
        ways[copied & (kinds == ClusterType.NORMAL)] = _IN_PLACE
        ways[copied & (kinds == ClusterType.ZERO_ALLOC)] = _REUSE
        hosts = offsets(entries)
        jump = (ways[1:] != ways[:-1]) | ((ways[1:] != _ALLOCATE) & (np.diff(hosts) != size))
        bounds = [0, *(np.flatnonzero(jump) + 1).tolist(), len(ways)]
        for low, high in pairwise(bounds):
            guest, piece = start + low * size, data[low * size : high * size]
            if ways[low] == _ALLOCATE:
                self._write_new(table, first + low, first + high, guest, piece)
                continue
            self._guest.store(int(hosts[low]), guest, piece)
            if ways[low] == _REUSE:
                self._set_range(
                    table, first + low, first + high, entries[low:high] & np.uint64(~OFLAG_ZERO & (1 << 64) - 1)
                )
            elif (
                table.bitmaps is not None and (table.bitmaps[first + low : first + high] != SUBCLUSTERS_ALLOCATED).any()
            ):
                self._set_range(table, first + low, first + high, entries[low:high])

    def _write_new(self, table: L2Table, first: int, last: int, guest: int, data: memoryview) -> None:
        """Write whole clusters into new host clusters, as few runs as there are."""
        size = self._geometry.cluster_size
        while first < last:
            host, count = self._take(guest, last - first)
            self._store_new(host, count, host, guest, data[: count * size])
            self._release(table.entries[first : first + count])
            self._set_new(table, first, count, host)
            first, guest, data = first + count, guest + count * size, data[count * size :]

    def _set_new(self, table: L2Table, first: int, count: int, host: int) -> None:
        """Let `count` entries from `first` on name new clusters of their own from `host` on."""
        new = np.arange(count, dtype=np.uint64) * np.uint64(self._geometry.cluster_size)
        self._set_range(table, first, first + count, new + np.uint64(host | OFLAG_COPIED))

    # Zeroes.

    def _write_zero_bytes(self, start: int, stop: int) -> None:
        step = 1 << 20
        for position in range(start, stop, step):
            self.write(position, memoryview(bytes(min(step, stop - position))))

    def _zero_clusters(self, start: int, stop: int, *, everywhere: bool) -> None:
        """Zero whole clusters by their entries; `stop` may be the end of the disk inside a cluster.

        Args:
            everywhere: also say so where nothing is allocated and no backing file shows (version 3).
        """
        geometry = self._geometry
        for low, high in self._table_pieces(start, stop):
            l1_index = geometry.l1_index(low)
            everywhere = self._guest.has_backing or (everywhere and self._version >= 3)
            if not self._state.l1.item(l1_index) & L2_OFFSET_MASK and not everywhere:
                continue
            table = self._transaction.writable_table(l1_index)
            first = geometry.l2_index(low)
            last = first + geometry.clusters_for(high - low)
            self._require_sound(table, first, last)
            if self._data_file:
                self._zero_in_data_file(table, first, last, geometry.cluster_start(low))
                continue
            entries = table.entries[first:last]
            kinds = classify_many(entries, geometry.extended_l2, False)
            change = (kinds != ClusterType.UNALLOCATED) | everywhere
            if table.bitmaps is not None:
                change |= table.bitmaps[first:last] != 0
            self._release(entries[change])
            zero = OFLAG_ZERO if self._version >= 3 and not geometry.extended_l2 else 0
            new = np.where(change, np.uint64(zero), entries.astype(np.uint64))
            table.entries[first:last] = new
            if table.bitmaps is not None:
                table.bitmaps[first:last][change] = SUBCLUSTERS_ZERO
            self._transaction.table_changed(table, first, last)

    def _zero_in_data_file(self, table: L2Table, first: int, last: int, guest: int) -> None:
        """With an external data file clusters keep their place there; the file gets the zeroes as well."""
        length = min((last - first) << self._geometry.cluster_bits, self._state.header.size - guest)
        if length > 0:
            self._transaction.data_storage.write_zeroes(guest, length)
        entries = table.entries[first:last].astype(np.uint64)
        if table.bitmaps is not None:
            table.bitmaps[first:last] = SUBCLUSTERS_ZERO
        else:
            table.entries[first:last] = entries | np.uint64(OFLAG_ZERO)
        self._transaction.table_changed(table, first, last)

    def _zero_subclusters(self, start: int, stop: int) -> None:
        """Zero whole subclusters inside one cluster."""
        table = self._transaction.writable_table(self._geometry.l1_index(start))
        index = self._geometry.l2_index(start)
        self._require_sound(table, index, index + 1)
        entry = table.entries.item(index)
        if entry & OFLAG_COMPRESSED or table.bitmaps is None:
            self._write_zero_bytes(start, stop)
            return
        if self._data_file:
            self._transaction.data_storage.write_zeroes(start, stop - start)
        touched = self._touched(start, stop - start)
        self._set(table, index, entry, table.bitmaps.item(index) & ~touched | touched << 32)

    # Entries and host clusters.

    def _take(self, guest: int, want: int) -> tuple[int, int]:
        """New clusters for guest clusters from `guest` on: (host offset, count)."""
        if self._data_file:
            return guest, want
        first, count = self._transaction.allocate(want)
        return first << self._geometry.cluster_bits, count

    def _store_new(self, cluster: int, count: int, host: int, guest: int, data: memoryview) -> None:
        """Store into clusters that were just taken; they go back when the host fails."""
        try:
            self._guest.store(host, guest, data)
        except StorageError:
            if not self._data_file:
                self._transaction.give_back(cluster >> self._geometry.cluster_bits, count)
            raise

    def _release(self, entries: Entries) -> None:
        """The references of these L2 entries are about to vanish."""
        if self._data_file or not entries.any():
            return
        kinds = classify_many(entries, self._geometry.extended_l2, False)
        bits = self._geometry.cluster_bits
        placed = (kinds == ClusterType.NORMAL) | (kinds == ClusterType.ZERO_ALLOC)
        copied = flagged(entries, OFLAG_COPIED)
        for chosen, shared in ((placed & copied, False), (placed & ~copied, True)):
            # In guest order, not sorted: an entry may occur twice in a damaged image, and each counts.
            for first, count in cluster_runs(offsets(entries[chosen]) >> bits):
                self._transaction.release(first, count, shared=shared)
        compressed = kinds == ClusterType.COMPRESSED
        if compressed.any():
            start, length = compressed_locations(entries[compressed], bits)
            firsts, lasts = start >> bits, start + length - 1 >> bits
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                self._transaction.release(first, last - first + 1)

    def _set(self, table: L2Table, index: int, entry: int, bitmap: int) -> None:
        table.entries[index] = entry
        if table.bitmaps is not None:
            table.bitmaps[index] = bitmap
        self._transaction.table_changed(table, index, index + 1)

    def _set_range(self, table: L2Table, first: int, last: int, entries: Entries) -> None:
        """Set entries of wholly allocated clusters."""
        table.entries[first:last] = entries
        if table.bitmaps is not None:
            table.bitmaps[first:last] = SUBCLUSTERS_ALLOCATED
        self._transaction.table_changed(table, first, last)

    def _require_sound(self, table: L2Table, first: int, last: int) -> None:
        for index in table.damaged or ():
            if first <= index < last:
                assert table.damaged is not None
                rule = table.damaged[index]
                raise CorruptMetadata("L2 table", table.host_offset, f"entry {index}: {rule}; it is not overwritten")


def _are_empty(entries: Entries, bitmaps: Entries | None) -> bool:
    return not entries.any() and (bitmaps is None or not bitmaps.any())
