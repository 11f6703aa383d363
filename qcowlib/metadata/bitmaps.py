"""The persistent dirty bitmaps of one writable image: their directory, and the recording of guest writes.

    guest write -> BitmapRecorder.mark -> bits in memory          IN_USE stands in the directory since before the first
    close       -> BitmapRecorder.store -> bits, tables, directory (FILL) -> header (LINK) -> old ones freed (RELEASE)

A directory is replaced by one swing of the header's pointer (`bitmap_pointer`), with tables and bits that are new. Only
the IN_USE flags are set in place: whichever of them a crash leaves set, no guest write has begun then.

Source: qcow2.txt, "Bitmaps": the flags in_use and auto.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from qcowlib.errors import CorruptMetadata, ImageStateError
from qcowlib.format.bitmap_directory import (
    BITMAP_TABLE_OFFSET_MASK,
    BitmapEntry,
    BitmapFlags,
    build_bitmap_directory,
    check_bitmap_entry,
)
from qcowlib.format.constants import EXTENSION_BITMAPS
from qcowlib.format.entries import Entries, offsets
from qcowlib.format.extensions import BitmapsExtension
from qcowlib.format.features import KNOWN_AUTOCLEAR
from qcowlib.metadata.bitmap_bits import BitmapBits, read_bitmap_table
from qcowlib.metadata.bitmap_pointer import swing_bitmap_pointer
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.refcounts import cluster_runs
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.transaction import MetadataTransaction

# Bits in memory at which they are put into the file, for all bitmaps of an image together.
_SPILL_BYTES = 16 << 20
# Entries of the tables of all bitmaps that are held in memory together: 64 MiB.
_MAX_TABLE_ENTRIES = 8 << 20


def sound_bitmaps(state: Qcow2State) -> list[BitmapEntry]:
    """The directory entries, judged.

    Raises:
        FormatError: the directory is damaged, or an entry breaks a rule.
    """
    for entry in state.bitmaps:
        check_bitmap_entry(entry, state.geometry.cluster_size, state.header.virtual_size)
    return state.bitmaps


def load_bits(state: Qcow2State, entry: BitmapEntry) -> BitmapBits:
    """The bits of a bitmap that is not in use.

    Raises:
        CorruptMetadata: its table is damaged.
    """
    table = read_bitmap_table(state.storage, entry, state.geometry.cluster_size)
    return BitmapBits(state.storage, state.geometry, entry.granularity_bits, state.header.virtual_size, table)


def is_inconsistent(entry: BitmapEntry) -> bool:
    """Whether changes may be missing in it: it was in use when a session ended without storing it."""
    return bool(entry.flags & BitmapFlags.IN_USE)


def is_recording(entry: BitmapEntry) -> bool:
    """Whether guest writes are to be recorded in it."""
    return bool(entry.flags & BitmapFlags.AUTO) and not is_inconsistent(entry)


class BitmapRecorder:
    """Records guest writes in the bitmaps that want them, for the time between two stores.

    Args:
        transaction: of the image; nothing is pending in it.
        chosen: the bitmaps to hold in memory.

    Raises:
        FormatError: the directory or a bitmap is damaged.
        StorageError: the host file failed. In both cases no guest write may be done.
    """

    def __init__(self, transaction: MetadataTransaction, chosen: Iterable[BitmapEntry]) -> None:
        self._transaction = transaction
        self._state = transaction.state
        self._bits: dict[str, BitmapBits] = {}
        self._start(list(chosen))

    def _start(self, chosen: list[BitmapEntry]) -> None:
        if not chosen:
            return
        if sum(entry.table_size for entry in chosen) > _MAX_TABLE_ENTRIES:
            raise ImageStateError("the bitmaps that record writes are too large to be held in memory together")
        # What is replaced is freed: no cluster of a bitmap may be anything else as well.
        require_enough_refcounts(self._state)
        self._bits = {entry.name: load_bits(self._state, entry) for entry in chosen}
        marked = [
            replace(entry, flags=entry.flags | BitmapFlags.IN_USE) if entry.name in self._bits else entry
            for entry in self._state.bitmaps
        ]
        self._write_flags(marked)

    def _write_flags(self, entries: list[BitmapEntry]) -> None:
        """Write the directory in place; it differs in flags alone. Durable on return."""
        extension = self._state.header.bitmaps_extension
        data = build_bitmap_directory(entries)
        assert extension is not None
        if len(data) != extension.directory_size:
            raise CorruptMetadata("bitmap directory", extension.directory_offset, "its padding is not as it should be")
        self._state.regions.guard(extension.directory_offset, len(data), None)
        self._transaction.storage.pwrite(data, extension.directory_offset)
        self._transaction.storage.flush()
        self._state.bitmaps = entries

    def mark(self, offset: int, length: int) -> None:
        """Guest bytes are about to change."""
        if not length:
            return
        for bits in self._bits.values():
            shift = bits.granularity_bits
            bits.set(offset >> shift, min((offset + length - 1 >> shift) + 1, bits.size))
        if sum(bits.changed_bytes for bits in self._bits.values()) > _SPILL_BYTES:
            for bits in self._bits.values():
                bits.spill(self._transaction)

    def store(self, disk_size: int | None = None) -> None:
        """Write what was recorded, and the flags without IN_USE; committed on return.

        Args:
            disk_size: bytes of the disk, when it is another one since.
        """
        if not self._bits:
            return
        if disk_size is not None:
            self._bits = {name: bits.resized(disk_size) for name, bits in self._bits.items()}
        with self._transaction.direct_writes():
            write_bitmap_directory(self._transaction, [self._stored(entry) for entry in self._state.bitmaps])
        self._bits = {}

    def _stored(self, entry: BitmapEntry) -> BitmapEntry:
        bits = self._bits.get(entry.name)
        if bits is None:
            return entry
        return put_bits(self._transaction, replace(entry, flags=entry.flags & ~BitmapFlags.IN_USE), bits)


def drop_stale_pointer(transaction: MetadataTransaction) -> None:
    """Forget bitmaps that a program without support for them has made stale; as QEMU does when it opens for writing."""
    state = transaction.state
    stale = state.header.bitmaps_extension is None and state.header.extension_place(EXTENSION_BITMAPS) is not None
    if stale and state.header.version >= 3:
        state.header = swing_bitmap_pointer(transaction.storage, state.header, None)


def start_recording(transaction: MetadataTransaction) -> BitmapRecorder:
    """Before the first guest write: mark the bitmaps that record writes, and hold them in memory.

    Raises: as `BitmapRecorder`.
    """
    state = transaction.state
    if state.header.autoclear_features & ~KNOWN_AUTOCLEAR:
        transaction.mark_dirty()  # a structure that is not known here is out of date from now on: clears its bit
    drop_stale_pointer(transaction)
    chosen = [entry for entry in sound_bitmaps(state) if is_recording(entry)]
    if chosen:
        transaction.commit()
    return BitmapRecorder(transaction, chosen)


def put_bits(
    transaction: MetadataTransaction, entry: BitmapEntry, bits: BitmapBits, *, anew: bool = False
) -> BitmapEntry:
    """Phase FILL: write bits and table of a bitmap into new clusters; what they replace is freed in RELEASE.

    Args:
        transaction: of the image.
        entry: the bitmap's entry; its table on disk is the one that is replaced (none where `table_offset` is 0).
        bits: the bits as they shall be.
        anew: write all of it, also what has not changed.

    Returns: the entry with its new table.
    """
    geometry, storage = transaction.state.geometry, transaction.storage
    if anew:
        bits.fetch()
    bits.spill(transaction)
    release_abandoned(transaction, bits)
    if entry.table_offset:
        old = read_bitmap_table(storage, entry, geometry.cluster_size)
        if np.array_equal(old, bits.table) and not anew:
            return entry
        kept = min(len(old), len(bits.table))
        gone = old.copy()
        gone[:kept][old[:kept] == bits.table[:kept]] = 0
        release_clusters(transaction, gone)
        transaction.release(entry.table_offset >> geometry.cluster_bits, geometry.clusters_for(old.nbytes))
    clusters = geometry.clusters_for(bits.table.nbytes)
    first, _ = transaction.allocate(clusters, clusters)
    storage.pwrite(bits.table.tobytes(), first << geometry.cluster_bits)
    return replace(entry, table_offset=first << geometry.cluster_bits, table_size=len(bits.table))


def release_bits(transaction: MetadataTransaction, entry: BitmapEntry) -> None:
    """The bitmap is about to vanish from the directory: free its table and its bits in RELEASE.

    Raises:
        CorruptMetadata: the table is damaged: it cannot be told what to free.
    """
    geometry = transaction.state.geometry
    release_clusters(transaction, read_bitmap_table(transaction.storage, entry, geometry.cluster_size))
    transaction.release(entry.table_offset >> geometry.cluster_bits, geometry.clusters_for(entry.table_size * 8))


def release_abandoned(transaction: MetadataTransaction, bits: BitmapBits) -> None:
    """Free, in RELEASE, what was spilled for these bits and is not a part of them any more."""
    for first, count in cluster_runs(bits.abandoned()):
        transaction.release(first, count)


def release_clusters(transaction: MetadataTransaction, table: Entries) -> None:
    """Free the clusters that table entries name, in RELEASE."""
    named = offsets(table, BITMAP_TABLE_OFFSET_MASK)
    for first, count in cluster_runs(named[named != 0] >> transaction.state.geometry.cluster_bits):
        transaction.release(first, count)


def write_bitmap_directory(
    transaction: MetadataTransaction, entries: list[BitmapEntry], *, freeing: bool = True
) -> None:
    """Make `entries` the bitmaps of the image, and commit.

    Args:
        transaction: of the image.
        entries: the bitmaps; their tables are in the file.
        freeing: free the clusters of the old directory.

    Raises:
        FormatError: too many bitmaps, or names too long.
    """
    state, bits = transaction.state, transaction.state.geometry.cluster_bits
    extension, old = None, state.header.bitmaps_extension
    if entries:
        data = build_bitmap_directory(entries)
        clusters = state.geometry.clusters_for(len(data))
        first, _ = transaction.allocate(clusters, clusters)
        transaction.storage.pwrite(data, first << bits)
        extension = BitmapsExtension(len(entries), len(data), first << bits)
    if old is not None and freeing:
        transaction.release(old.directory_offset >> bits, state.geometry.clusters_for(old.directory_size))
    transaction.swing_bitmaps(extension)
    transaction.commit()
    state.bitmaps = entries
