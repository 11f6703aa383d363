"""Compact: a new file with all states of an image and without what nothing needs.

    count what the mapping, snapshots and bitmaps refer to     leaked and preallocated clusters are not counted
    read the data clusters                                     those that are all zero become zero flags
    place what is kept together                                in the old order, so that sharing and layout stay
    copy, then write the tables with the new places            L2, L1, snapshot table, bitmaps, refcounts, the header

Snapshots with their vm states, bitmaps, compressed clusters, encryption and the backing file stay what they are. The
image itself is only read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ImageStateError, OptionError
from qcowlib.format import constants as k
from qcowlib.format.bitmap_directory import BITMAP_TABLE_OFFSET_MASK, build_bitmap_directory
from qcowlib.format.entries import (
    ENTRY_DTYPE,
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
)
from qcowlib.format.features import Autoclear, Incompatible
from qcowlib.format.refcount_block import encode_refcounts, refcount_dtype
from qcowlib.format.snapshot_table import build_snapshot_table
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.mapping_census import L2Tables
from qcowlib.metadata.reference_counts import ReferenceCounts, distinct
from qcowlib.metadata.references import empty_words, read_tables, split_words
from qcowlib.metadata.relocation import ClusterSet, Relocation
from qcowlib.metadata.state import load_l1
from qcowlib.operations.unfinished import UnfinishedFile
from qcowlib.storage.helpers import read_padded
from qcowlib.storage.local import open_local
from qcowlib.storage.protocol import Storage

_PIECE = 4 << 20  # bytes that are copied, or tables that are changed, at a time
_KNOWN_AUTOCLEAR = Autoclear.BITMAPS | Autoclear.RAW_EXTERNAL

Progress = Callable[[int, int], None]


def compact_image(image: Qcow2Image, path: str, *, progress: Progress | None = None) -> None:
    """Write a compact copy of an image under another name.

        with qcowlib.open_image("disk.qcow2", open_backing=False) as image:
            qcowlib.compact_image(image, "smaller.qcow2")

    Args:
        image: a qcow2 image without external data file; an encrypted one opened with its passphrase. Its backing file
            is not looked at; the copy names the same one, so that a relative name must fit the copy's directory.
        path: the new file; an existing one is replaced. Until all is durable it is called `path` and
            ".qcow-incomplete"; a run that was cut off is simply done again.
        progress: called with (bytes done, bytes to do).

    Raises:
        ImageStateError: a check of the image finds errors (leaks are no error); nothing was written.
        OptionError: what cannot be compacted; nothing was written.
        StorageError: a file cannot be read or written; the target is not there.
    """
    _require_same_names(image, path)
    compaction = _Compaction(image, progress)
    unfinished = UnfinishedFile(path)
    try:
        with open_local(unfinished.name, writable=True, create=True) as target:
            target.truncate(0)
            compaction.write(target)
    except BaseException as error:
        unfinished.give_up(error)
        raise
    unfinished.finish(durable=True)


def compact_size(image: Qcow2Image) -> int:
    """Bytes of the file that `compact_image` would write; data clusters are read, to find those that are all zero.

    Raises:
        ImageStateError, OptionError, StorageError: as `compact_image`.
    """
    compaction = _Compaction(image, None)
    blocks, tables = compaction.refcount_clusters()
    return compaction.relocation.clusters + blocks + tables << compaction.bits


def _require_same_names(image: Qcow2Image, path: str) -> None:
    """A relative backing file name must mean the same file in the copy."""
    backing = image.header.backing_file
    if backing is None or os.path.isabs(backing) or backing.startswith("json:"):
        return
    directories = (os.path.realpath(os.path.dirname(name) or ".") for name in (image.name, path))
    if len(set(directories)) > 1:
        raise OptionError(
            f"the backing file name '{backing}' is relative, and would mean another file beside '{path}': "
            "compact into the directory of the image"
        )


def _require_compactable(image: Qcow2Image) -> Census:
    """The census of an image in which nothing is in doubt.

    Raises:
        ImageStateError, OptionError: it cannot be compacted.
    """
    if image.header.has_data_file:
        raise OptionError(f"the data of '{image.name}' is in an external data file: there is nothing to compact")
    if image.header.crypt_method == k.CRYPT_LUKS and image.cipher is None:
        raise OptionError(
            f"the passphrase of '{image.name}' is needed: encrypted data depends on its place in the file"
        )
    found = census(image.state)
    reason = found.stopped
    if reason is None and (found.mapping_damaged or found.overlaps):
        reason = found.findings[0].text if found.findings else f"a cluster is used twice: {found.overlaps[0]}"
    if reason is not None:
        raise ImageStateError(f"'{image.name}' is damaged, check it: {reason}")
    return found


class _Compaction:
    """What is kept, and where it goes; `write` can be called more than once."""

    def __init__(self, image: Qcow2Image, progress: Progress | None) -> None:
        found = _require_compactable(image)
        self.image = image
        self.state = image.state
        self.header = image.header
        self.geometry = image.state.geometry
        self.bits = self.geometry.cluster_bits
        self.progress = progress
        self.done = self.total = 0
        self.snapshots = self.state.snapshots
        self.bitmaps = self.state.bitmaps
        self.tables: L2Tables = found.mapping.tables
        # An empty table says what an L1 entry without a table says.
        self.kept_tables = np.flatnonzero((self.tables.host_offset != 0) & ~self.tables.empty)
        self.data = ReferenceCounts(self.geometry.refcount_block_bits)
        self.compressed = ReferenceCounts(self.geometry.refcount_block_bits)
        for batch, words in self._table_batches():
            self._count_entries(words, self.tables.uses[batch])
        self.zero = ClusterSet(self.data.chunk_bits)
        self.data_only = ClusterSet.counted(self.data)
        # What is encrypted is not zero; version 2 cannot hide a backing file behind a zero flag.
        if image.cipher is None and (self.header.version >= 3 or self.header.backing_file is None):
            self.total = self.data_only.clusters << self.bits
            self._find_zeroes()
        self.counts = self._all_counts()
        self.relocation = Relocation(self.counts, self.zero, self.bits)
        self.total += self.relocation.clusters << self.bits

    # -- what is kept

    def _table_batches(self) -> Iterator[tuple[Int64Array, Entries]]:
        """Indices into `tables`, and the words of those tables, some MiB at a time."""
        per_batch = max(1, _PIECE >> self.bits)
        for start in range(0, len(self.kept_tables), per_batch):
            batch = self.kept_tables[start : start + per_batch]
            words = empty_words(len(batch), self.geometry)
            read_tables(self.state.storage, self.geometry, self.tables.host_offset[batch], words)
            yield batch, words

    def _count_entries(self, words: Entries, uses: Int64Array) -> None:
        for times in distinct(uses).tolist():
            kinds, entries, bitmaps = self._classified(words[uses == times])
            needed = self._holds_data(kinds, bitmaps)
            self.data.add(offsets(entries[needed]) >> self.bits, times)
            start, length = compressed_locations(entries[kinds == ClusterType.COMPRESSED], self.bits)
            first, last = start >> self.bits, (start + length - 1) >> self.bits
            for more in range(3):  # compressed data touches so many clusters at the most
                self.compressed.add((first + more)[first + more <= last], times)

    def _classified(self, words: Entries) -> tuple[npt.NDArray[np.uint8], Entries, Entries | None]:
        entries, bitmaps = split_words(words, self.geometry)
        return classify_many(entries, self.geometry.extended_l2), entries, bitmaps

    def _holds_data(self, kinds: npt.NDArray[np.uint8], bitmaps: Entries | None) -> npt.NDArray[np.bool_]:
        """Which entries need their host cluster: not those that are only allocated."""
        normal: npt.NDArray[np.bool_] = kinds == ClusterType.NORMAL
        return normal if bitmaps is None else normal & flagged(bitmaps, SUBCLUSTERS_ALLOCATED)

    def _find_zeroes(self) -> None:
        per_piece = max(1, _PIECE >> self.bits)
        for index in self.data.chunks():
            chunk = self.data.chunk(index)
            assert chunk is not None
            base = index << self.data.chunk_bits
            edges = np.flatnonzero(np.diff((chunk != 0).astype(np.int8), prepend=np.int8(0), append=np.int8(0)))
            for first, stop in zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True):
                for start in range(first, stop, per_piece):
                    count = min(per_piece, stop - start)
                    data = read_padded(self.state.storage, base + start << self.bits, count << self.bits)
                    filled = np.frombuffer(data, dtype=np.uint64).reshape(count, -1).any(axis=1)
                    self.zero.add(base + start + np.flatnonzero(~filled))
                    self._report(count << self.bits)

    def _all_counts(self) -> ReferenceCounts:
        """References of everything that is kept but the refcount structures, which are made anew."""
        counts = self.data
        for index in self.compressed.chunks():
            chunk = self.compressed.chunk(index)
            assert chunk is not None
            counts.add_counts(index << counts.chunk_bits, chunk.astype(np.int64))
        counts.add_run(0, 1)
        for times in distinct(self.tables.uses[self.kept_tables]).tolist():
            chosen = self.kept_tables[self.tables.uses[self.kept_tables] == times]
            counts.add(self.tables.host_offset[chosen] >> self.bits, times)
        for offset, length in self._ranges():
            counts.add_run(offset >> self.bits, (offset + length - 1 >> self.bits) + 1)
        for table in self._bitmap_tables().values():
            host = offsets(table, BITMAP_TABLE_OFFSET_MASK)
            counts.add(host[host != 0] >> self.bits)
        return counts

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Host ranges in bytes of the structures that are found through the header."""
        header = self.header
        l1s = [(header.l1_table_offset, header.l1_size)]
        l1s += [(entry.l1_table_offset, entry.l1_size) for entry in self.snapshots]
        found = [(offset, 8 * entries) for offset, entries in l1s]
        if self.snapshots:
            found.append((header.snapshots_offset, len(build_snapshot_table(self.snapshots))))
        crypto, extension = header.crypto_header, header.bitmaps_extension
        if crypto is not None:
            found.append((crypto.offset, crypto.length))
        if extension is not None:
            found.append((extension.directory_offset, extension.directory_size))
            found += [(entry.table_offset, 8 * entry.table_size) for entry in self.bitmaps]
        return ((offset, length) for offset, length in found if length)

    def _bitmap_tables(self) -> dict[int, Entries]:
        """The tables of the bitmaps by their host offset."""
        return {
            entry.table_offset: np.frombuffer(
                bytearray(read_padded(self.state.storage, entry.table_offset, 8 * entry.table_size)), dtype=ENTRY_DTYPE
            )
            for entry in self.bitmaps
        }

    # -- the new file

    def write(self, target: Storage) -> None:
        """Write all of it. The header comes last: until then the file is no image."""
        size = self.geometry.cluster_size
        for old, new, count in self.relocation.runs(max(1, _PIECE >> self.bits)):
            data = read_padded(self.state.storage, old << self.bits, count << self.bits)
            if old == 0:
                data = bytes(size) + data[size:]
            target.pwrite(self._recoded(data, old, new), new << self.bits)
            self._report(count << self.bits)
        for batch, words in self._table_batches():
            self._move_entries(words)
            places = self.relocation.moved(self.tables.host_offset[batch])
            for row, place in zip(words, places.tolist(), strict=True):
                target.pwrite(row.tobytes(), place)
        self._write_l1_tables(target)
        self._write_bitmaps(target)
        header = self._write_refcounts(target)
        target.flush()
        target.pwrite(header, 0)
        target.flush()

    def _recoded(self, data: bytes, old: int, new: int) -> bytes:
        """Data clusters encrypted for their new place, where that matters: LUKS takes the host offset into account."""
        cipher = self.image.cipher
        if cipher is None or cipher.by_guest_offset or old == new:
            return data
        changed = bytearray(data)
        size = self.geometry.cluster_size
        clusters = np.arange(old, old + len(data) // size, dtype=np.int64)
        holds = np.zeros(len(clusters) + 2, dtype=np.int8)
        holds[1:-1] = self.data_only.contains(clusters)
        edges = np.flatnonzero(np.diff(holds))
        for first, stop in zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True):
            part = slice(first * size, stop * size)
            plain = cipher.decrypt(data[part], old + first << self.bits)
            changed[part] = cipher.encrypt(plain, new + first << self.bits)
        return bytes(changed)

    def _move_entries(self, words: Entries) -> None:
        """Give the entries of L2 tables their new places, in place."""
        kinds, entries, bitmaps = self._classified(words)
        host = offsets(entries)
        needed = self._holds_data(kinds, bitmaps)
        zero = np.zeros(needed.shape, dtype=np.bool_)
        zero[needed] = self.zero.contains(host[needed] >> self.bits)
        kept = needed & ~zero
        compressed = kinds == ClusterType.COMPRESSED
        if compressed.any():
            start, _ = compressed_locations(entries[compressed], self.bits)
            entries[compressed] += (self.relocation.moved(start) - start).astype(np.uint64)
        copied = np.where(self.counts.at(host[kept] >> self.bits) == 1, np.uint64(OFLAG_COPIED), np.uint64(0))
        entries[kept] = self.relocation.moved(host[kept]).astype(np.uint64) | copied
        gone = ~kept & ~compressed
        if bitmaps is not None:
            allocated = bitmaps[zero] & np.uint64(SUBCLUSTERS_ALLOCATED)
            bitmaps[zero] = bitmaps[zero] & np.uint64(SUBCLUSTERS_ZERO) | allocated << np.uint64(32)
            entries[gone] = 0
        else:
            reads_zero = zero | (kinds == ClusterType.ZERO_ALLOC) | (kinds == ClusterType.ZERO_PLAIN)
            flag = OFLAG_ZERO if self.header.version >= 3 else 0
            entries[gone] = np.where(reads_zero[gone], np.uint64(flag), np.uint64(0))

    def _write_l1_tables(self, target: Storage) -> None:
        kept = self.tables.host_offset[self.kept_tables]
        places = {(self.header.l1_table_offset, self.header.l1_size)}
        places |= {(entry.l1_table_offset, entry.l1_size) for entry in self.snapshots}
        for offset, entries in sorted(places):
            l1 = load_l1(self.state.storage, offset, entries, "L1 table")
            host = offsets(l1)
            named = np.isin(host, kept)
            copied = np.where(self.counts.at(host[named] >> self.bits) == 1, np.uint64(OFLAG_COPIED), np.uint64(0))
            l1[:] = 0
            l1[named] = self.relocation.moved(host[named]).astype(np.uint64) | copied
            if entries:
                target.pwrite(l1.tobytes(), self.relocation.moved_one(offset))
        if self.snapshots:
            moved = [
                replace(entry, l1_table_offset=self.relocation.moved_one(entry.l1_table_offset) if entry.l1_size else 0)
                for entry in self.snapshots
            ]
            target.pwrite(build_snapshot_table(moved), self.relocation.moved_one(self.header.snapshots_offset))

    def _write_bitmaps(self, target: Storage) -> None:
        for offset, table in self._bitmap_tables().items():
            host = offsets(table, BITMAP_TABLE_OFFSET_MASK)
            used = host != 0
            flags = table[used] & np.uint64(~BITMAP_TABLE_OFFSET_MASK & (1 << 64) - 1)
            table[used] = self.relocation.moved(host[used]).astype(np.uint64) | flags
            target.pwrite(table.tobytes(), self.relocation.moved_one(offset))
        extension = self.header.bitmaps_extension
        if extension is not None:
            moved = [
                replace(entry, table_offset=self.relocation.moved_one(entry.table_offset)) for entry in self.bitmaps
            ]
            target.pwrite(build_bitmap_directory(moved), self.relocation.moved_one(extension.directory_offset))

    def refcount_clusters(self) -> tuple[int, int]:
        """Clusters of the refcount blocks and of the refcount table, which count themselves."""
        blocks = tables = 1
        while True:
            total = self.relocation.clusters + blocks + tables
            needed = -(-total // self.geometry.refcount_block_entries)
            if (needed, self.geometry.clusters_for(8 * needed)) == (blocks, tables):
                return blocks, tables
            blocks, tables = needed, self.geometry.clusters_for(8 * needed)

    def _write_refcounts(self, target: Storage) -> bytes:
        """Refcount blocks and table behind everything else; returns the header."""
        geometry, kept = self.geometry, self.relocation.clusters
        per_block = geometry.refcount_block_entries
        blocks, tables = self.refcount_clusters()
        total = kept + blocks + tables
        for number in range(blocks):
            counts = np.zeros(per_block, dtype=refcount_dtype(geometry.refcount_order))
            first = number * per_block
            old = self.relocation.old_clusters(first, per_block)
            counts[: len(old)] = self.counts.at(old)
            counts[len(old) : max(len(old), min(per_block, total - first))] = 1
            target.pwrite(encode_refcounts(counts, geometry.refcount_order), kept + number << self.bits)
        table = np.zeros(tables << self.bits - 3, dtype=ENTRY_DTYPE)
        table[:blocks] = np.arange(kept, kept + blocks, dtype=np.uint64) << np.uint64(self.bits)
        target.pwrite(table.tobytes(), kept + blocks << self.bits)
        return self._header(kept + blocks << self.bits, tables)

    def _header(self, refcount_table: int, table_clusters: int) -> bytes:
        header, moved = self.header, self.relocation.moved_one
        crypto, bitmaps = header.crypto_header, header.bitmaps_extension
        if crypto is not None:
            place = crypto._replace(offset=moved(crypto.offset)).build()
            header = replace(header, extensions=header.with_extension(place.magic, place))
        pointer = None  # bitmaps that count no more are left behind, and so is the way to them
        if bitmaps is not None:
            pointer = replace(bitmaps, directory_offset=moved(bitmaps.directory_offset)).build()
        header = replace(header, extensions=header.with_extension(k.EXTENSION_BITMAPS, pointer))
        return replace(
            header,
            l1_table_offset=moved(header.l1_table_offset) if header.l1_size else header.l1_table_offset,
            snapshots_offset=moved(header.snapshots_offset) if self.snapshots else 0,
            refcount_table_offset=refcount_table,
            refcount_table_clusters=table_clusters,
            incompatible_features=header.incompatible_features & ~Incompatible.DIRTY,
            autoclear_features=header.autoclear_features & _KNOWN_AUTOCLEAR,
        ).build()

    def _report(self, done: int) -> None:
        self.done += done
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
