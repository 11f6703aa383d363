"""The bits of one persistent dirty bitmap: its table, and those clusters of bits that differ from the file.

    table entry   0: all clear, 1: all set, host offset: a cluster of bits
    changed       clusters of bits in memory; `spill` moves them to clusters of their own in the file

Clusters that the image had before are never written: a bitmap changes by being replaced. So nothing that a damaged
table names is overwritten, and a crash leaves the old bits.

Source: qcow2.txt, "Bitmap table", "Bitmap data": bit n is bit n % 8 of byte n // 8.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.format.bitmap_directory import (
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TABLE_OFFSET_MASK,
    BitmapCluster,
    BitmapEntry,
    bitmap_table_entries,
    classify_bitmap_table,
    invalid_bitmap_table_entries,
)
from qcowlib.format.entries import ENTRY_DTYPE, BoolArray, Entries, Int64Array, Uint8Array, offsets
from qcowlib.metadata.references import empty_words, read_tables
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.storage.helpers import read_exact
from qcowlib.storage.protocol import ReadStorage

_PIECE = 256 << 10  # bytes of bits that are looked at together
_FEW = 64  # ranges in a cluster that are set one by one


class BitmapBits:
    """The bits of one bitmap.

    Args:
        storage: the qcow2 file.
        geometry: of the image.
        granularity_bits: log2 of the guest bytes that a bit stands for.
        disk_size: bytes of the disk.
        table: the bitmap table ('>u8'); None for a new bitmap without a set bit.

    Attributes:
        table: the table as it would be written now, but for `changed`.
        changed: clusters of bits that are in memory, by index into the table.
        size: number of bits.
    """

    def __init__(
        self,
        storage: ReadStorage,
        geometry: Geometry,
        granularity_bits: int,
        disk_size: int,
        table: Entries | None = None,
    ) -> None:
        self._storage = storage
        self._geometry = geometry
        self.granularity_bits = granularity_bits
        self.disk_size = disk_size
        self.size = bits_for(disk_size, granularity_bits)
        self._per_cluster = geometry.cluster_size * 8
        entries = bitmap_table_entries(disk_size, granularity_bits, geometry.cluster_size)
        self.table: Entries = np.zeros(entries, dtype=ENTRY_DTYPE) if table is None else table
        self.changed: dict[int, Uint8Array] = {}
        self._own: set[int] = set()  # host clusters that were taken for this bitmap by `spill`

    @property
    def changed_bytes(self) -> int:
        """Memory that `changed` takes."""
        return len(self.changed) * self._geometry.cluster_size

    # -- reading

    def runs(self) -> Iterator[tuple[Int64Array, Int64Array]]:
        """The set bits as runs (first, behind the last): sorted, maximal, in batches of bounded size."""
        level, pending = False, -1
        for found in self._edges():
            edges = np.concatenate((np.array([pending] if level else [], dtype=np.int64), found))
            level = bool(len(edges) % 2)
            pending = int(edges[-1]) if level else -1
            pairs = len(edges) // 2 * 2
            if pairs:
                yield edges[0:pairs:2], edges[1:pairs:2]
        if level:
            yield np.array([pending], dtype=np.int64), np.array([self.size], dtype=np.int64)

    def _edges(self) -> Iterator[Int64Array]:
        """Numbers of the bits that differ from the bit before them; bit -1 is clear."""
        size = self._geometry.cluster_size
        step = max(1, _PIECE // size)
        level = 0
        for first in range(0, len(self.table), step):
            last = min(first + step, len(self.table))
            if not level and not self.table[first:last].any() and not self._changed_in(first, last):
                continue
            data = self._clusters(first, last)
            for start in range(0, len(data), _PIECE):
                words = data[start : start + _PIECE].view("<u8").astype(np.uint64)
                before = np.concatenate((np.array([level], dtype=np.uint64), words[:-1] >> np.uint64(63)))
                toggles = words ^ (words << np.uint64(1) | before)
                level = int(words[-1] >> np.uint64(63))
                yield _bit_numbers(toggles) + (first * size + start) * 8

    def _clusters(self, first: int, last: int) -> Uint8Array:
        """The bytes of the bits of consecutive table entries; those behind the last bit are 0."""
        size = self._geometry.cluster_size
        rows = np.zeros((last - first, size), dtype=np.uint8)
        kinds = classify_bitmap_table(self.table[first:last])
        rows[kinds == BitmapCluster.ONES] = 0xFF
        stored = np.flatnonzero(kinds == BitmapCluster.DATA)
        if len(stored):
            words = empty_words(len(stored), self._geometry)
            hosts = offsets(self.table[first:last][stored], BITMAP_TABLE_OFFSET_MASK)
            read_tables(self._storage, self._geometry, hosts, words)
            rows[stored] = words.view(np.uint8).reshape(len(stored), size)
        for index in self._changed_in(first, last):
            rows[index - first] = self.changed[index]
        data = rows.reshape(-1)
        behind = self.size - first * self._per_cluster
        if behind < len(data) * 8:
            data[-(-behind // 8) :] = 0
            if behind % 8:
                data[behind // 8] &= (1 << behind % 8) - 1
        return data

    def _changed_in(self, first: int, last: int) -> list[int]:
        if len(self.changed) < last - first:
            return [index for index in self.changed if first <= index < last]
        return [index for index in range(first, last) if index in self.changed]

    # -- changing

    def set(self, first: int, last: int) -> None:
        """Set the bits from `first` to `last` (exclusive)."""
        per = self._per_cluster
        low, high = first // per, (last - 1) // per
        if low == high:
            self._set_inside(low, first - low * per, last - low * per)
            return
        if first % per:
            self._set_inside(low, first % per, per)
            low += 1
        # The last cluster is never said to be all set: bits behind the end of the disk are to be clear.
        stop = high + 1 if last % per == 0 else high
        if low < stop:
            for index in self._changed_in(low, stop):
                del self.changed[index]
            self.table[low:stop] = BITMAP_TABLE_ALL_ONES
        if stop == high:
            self._set_inside(high, 0, last - high * per)

    def set_many(self, firsts: Int64Array, lasts: Int64Array) -> None:
        """Set ranges of bits that are sorted, and neither overlap nor touch each other."""
        per = self._per_cluster
        low, high = firsts // per, (lasts - 1) // per
        wide = low != high
        for first, last in zip(firsts[wide].tolist(), lasts[wide].tolist(), strict=True):
            self.set(first, last)
        firsts, lasts, low = firsts[~wide], lasts[~wide], low[~wide]
        if not len(low):
            return
        owners, starts = np.unique(low, return_index=True)
        for index, start, stop in zip(owners.tolist(), starts.tolist(), [*starts[1:].tolist(), len(low)], strict=True):
            inside = slice(start, stop)
            self._set_group(index, firsts[inside] - index * per, lasts[inside] - index * per)

    def _set_group(self, index: int, firsts: Int64Array, lasts: Int64Array) -> None:
        if len(firsts) <= _FEW:
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                self._set_inside(index, first, last)
            return
        steps = np.zeros(self._per_cluster + 1, dtype=np.int8)
        steps[firsts] = 1
        steps[lasts] = -1
        np.cumsum(steps, out=steps)
        self._bytes_of(index)[:] |= np.packbits(steps[:-1].view(np.bool_), bitorder="little")

    def _set_inside(self, index: int, first: int, last: int) -> None:
        """Set bits of one cluster."""
        if self.table.item(index) == BITMAP_TABLE_ALL_ONES and index not in self.changed:
            return
        data = self._bytes_of(index)
        low, high = first >> 3, last >> 3
        head, tail = 0xFF << (first & 7) & 0xFF, (1 << (last & 7)) - 1
        if low == high:
            data[low] |= head & tail
            return
        data[low] |= head
        data[low + 1 : high] = 0xFF
        if tail:
            data[high] |= tail

    def _bytes_of(self, index: int) -> Uint8Array:
        """The bits of one cluster, to be changed."""
        data = self.changed.get(index)
        if data is None:
            data = self.changed[index] = self._clusters(index, index + 1)
        return data

    @property
    def stored_bytes(self) -> int:
        """Bytes of bits in the file."""
        return int(np.count_nonzero(self._stored())) * self._geometry.cluster_size

    def fetch(self) -> None:
        """Hold all bits in memory, to be written to other clusters."""
        for index in np.flatnonzero(self._stored()).tolist():
            self._bytes_of(index)

    def _stored(self) -> BoolArray:
        kinds: BoolArray = classify_bitmap_table(self.table) == BitmapCluster.DATA
        return kinds

    def clear(self) -> None:
        """Clear all bits."""
        self.changed.clear()
        self.table = np.zeros(len(self.table), dtype=ENTRY_DTYPE)

    def resized(self, disk_size: int) -> BitmapBits:
        """The same bits for another disk size: new ones are clear, those behind the end are gone."""
        new = BitmapBits(self._storage, self._geometry, self.granularity_bits, disk_size)
        kept = min(len(self.table), len(new.table))
        new.table[:kept] = self.table[:kept]
        new.changed = {index: data for index, data in self.changed.items() if index < kept}
        new._own = self._own
        border = min(self.size, new.size)
        if border % self._per_cluster:
            # What lies behind the border in its cluster: clear, or to be cleared.
            index = border // self._per_cluster
            if self.table.item(index) or index in self.changed:
                data = self._clusters(index, index + 1)
                data[-(-(border - index * self._per_cluster) // 8) :] = 0
                if border % 8:
                    data[(border - index * self._per_cluster) // 8] &= (1 << border % 8) - 1
                new.changed[index] = data
        return new

    # -- writing

    def spill(self, transaction: MetadataTransaction) -> None:
        """Phase FILL: put the clusters in memory into the file; uniform ones need no cluster there."""
        bits, placed = self._geometry.cluster_bits, []
        for index, data in sorted(self.changed.items()):
            value = self._uniform(index, data)
            if value is not None:
                self.table[index] = value
            elif self.table.item(index) >> bits in self._own:
                self._write(transaction, index, data)
            else:
                placed.append(index)
        while placed:
            first, count = transaction.allocate(len(placed))
            for number, index in enumerate(placed[:count]):
                self._own.add(first + number)
                self.table[index] = first + number << bits
                self._write(transaction, index, self.changed[index])
            placed = placed[count:]
        self.changed.clear()

    def _uniform(self, index: int, data: Uint8Array) -> int | None:
        if not data.any():
            return 0
        whole = (index + 1) * self._per_cluster <= self.size
        return BITMAP_TABLE_ALL_ONES if whole and (data == 0xFF).all() else None

    def _write(self, transaction: MetadataTransaction, index: int, data: Uint8Array) -> None:
        transaction.storage.pwrite(data.data, self.table.item(index))

    def abandoned(self) -> Int64Array:
        """Host clusters that were taken for this bitmap and that its table does not name any more."""
        named = offsets(self.table, BITMAP_TABLE_OFFSET_MASK) >> self._geometry.cluster_bits
        return np.setdiff1d(np.array(sorted(self._own), dtype=np.int64), named)


def bits_for(disk_size: int, granularity_bits: int) -> int:
    """Bits of a bitmap for a disk of `disk_size` bytes."""
    return (disk_size + (1 << granularity_bits) - 1) >> granularity_bits


def read_bitmap_table(storage: ReadStorage, entry: BitmapEntry, cluster_size: int) -> Entries:
    """The table of a bitmap ('>u8', a copy); `check_bitmap_entry` has capped its size.

    Raises:
        CorruptMetadata: the table, or a cluster that it names, is not wholly inside the file, or an entry is invalid.
    """
    where = f"table of bitmap '{entry.name}'"
    stock = f"Could not read bitmap_table table from image for bitmap '{entry.name}': Invalid argument"
    data = read_exact(storage, entry.table_offset, entry.table_size * 8, where)
    table = np.frombuffer(bytearray(data), dtype=ENTRY_DTYPE)
    wrong = np.flatnonzero(invalid_bitmap_table_entries(table, cluster_size))
    if len(wrong):
        raise CorruptMetadata(where, entry.table_offset, f"entry {wrong[0]} is invalid", stock=stock)
    outside = np.flatnonzero(offsets(table, BITMAP_TABLE_OFFSET_MASK) + cluster_size > storage.size())
    if len(outside):
        raise CorruptMetadata(where, entry.table_offset, f"entry {outside[0]} names bits beyond the end of the file")
    return table


def _bit_numbers(words: Entries) -> Int64Array:
    """Numbers of the set bits of 64-bit words (native), ascending."""
    used = np.flatnonzero(words)
    bits = np.unpackbits(words[used].astype("<u8").view(np.uint8), bitorder="little")
    at = np.flatnonzero(bits)
    numbers: Int64Array = (used[at >> 6] << 6) + (at & 63)
    return numbers
