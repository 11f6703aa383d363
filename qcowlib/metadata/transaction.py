"""The write transaction of one image: metadata changes, collected in memory and written in four phases.

    FILL     new L2 tables and L1 tables, refcount increments, new refcount blocks     nothing refers to them yet
    GROW     refcount table entries, or the header pointer to a new refcount table
    LINK     L2 entries, L1 entries, one write of the header's first sector            references appear and vanish
    RELEASE  refcount decrements, discards                                             references are gone

Guest data for new clusters is written by the caller before the commit: it belongs to FILL. A barrier stands between
phases that wrote something. Released clusters keep their refcount, and so are not handed out again, until RELEASE.

Around the whole, version 3 images carry the dirty bit: set before the first FILL of a session, cleared when the image
is closed. After a crash the next writable open (QEMU's as well) counts again and frees what leaked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from qcowlib.errors import ImageStateError, StorageError
from qcowlib.format.entries import L1_OFFSET_MASK, OFLAG_COPIED, Entries
from qcowlib.format.extensions import BitmapsExtension
from qcowlib.format.features import KNOWN_AUTOCLEAR, Incompatible
from qcowlib.format.header import Header
from qcowlib.metadata.bitmap_pointer import swing_bitmap_pointer
from qcowlib.metadata.refcounts import RefcountStructure
from qcowlib.metadata.regions import RegionKind
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.tables import L2Table
from qcowlib.storage.protocol import Storage

# Changed metadata in memory at which a writer commits by itself.
_PRESSURE = 16 << 20
_SECTOR = 512


class MetadataTransaction:
    """Changes to the metadata of one writable image; one after the other for as long as the image is open.

    Not thread-safe: the image serialises its writers.

    Args:
        state: the image's metadata.
        storage: the qcow2 file.
        data_storage: the file that holds guest clusters.

    Attributes:
        refcounts: the refcount structure; `allocate` and `release` here wrap it.
        failed: a phase could not be written; the session cannot go on.
        releases: commits so far that released clusters, which may be in use again since.
    """

    def __init__(self, state: Qcow2State, storage: Storage, data_storage: Storage) -> None:
        self.state = state
        self.storage = storage
        self.data_storage = data_storage
        self.refcounts = RefcountStructure(storage, state.header, state.regions)
        self.failed = False
        self._fresh: dict[int, L2Table] = {}
        self._changed: dict[int, tuple[L2Table, int, int]] = {}
        self._l1_changed: set[int] = set()
        self._l1_fresh = False
        self._header_changes: dict[str, Any] = {}
        self._bitmaps: tuple[BitmapsExtension | None] | None = None
        self._released: list[tuple[int, int, bool]] = []  # (first cluster, clusters, shared)
        self._filled = False
        self._marked_dirty = False
        self.releases = 0

    @property
    def pressure(self) -> bool:
        """Whether so much is pending that the writer should commit."""
        tables = (len(self._fresh) + len(self._changed)) << self.state.geometry.cluster_bits
        return tables + self.refcounts.dirty_bytes + len(self._released) * 128 > _PRESSURE

    def allocate(self, want: int, minimum: int = 1) -> tuple[int, int]:
        """Take free host clusters: (first cluster, count between `minimum` and `want`)."""
        self.require_usable()
        self._filled = True
        return self.refcounts.allocate(want, minimum)

    def require_space(self, *runs: int) -> None:
        """Make sure that runs of that many clusters can be allocated, before an operation writes anything.

        Raises:
            CorruptMetadata: the refcounts call a cluster free that holds metadata, or cannot be used.
        """
        taken = []
        try:
            for count in filter(None, runs):
                taken.append(self.refcounts.allocate(count, count))
        finally:
            for first, count in taken:
                self.refcounts.give_back(first, count)

    def allocate_shared(self, cluster: int) -> None:
        """Count one more reference to an allocated cluster (compressed clusters share host clusters)."""
        self.require_usable()
        self._filled = True
        self.refcounts.add(cluster, 1, 1)

    def release(self, first: int, count: int = 1, *, shared: bool = False) -> None:
        """One reference to each of these clusters is gone with LINK; lower their refcounts in RELEASE.

        The host space of those that nothing refers to any more is given back.

        Args:
            first: first host cluster.
            count: consecutive clusters.
            shared: the reference had COPIED clear: it was not the only one.
        """
        self._released.append((first, count, shared))

    def give_back(self, first: int, count: int) -> None:
        """Undo an allocation whose data the host did not take; its space may be what the commit needs."""
        self.refcounts.give_back(first, count)
        bits = self.state.geometry.cluster_bits
        for start, length in _zero_runs(self.refcounts.window(first, count) == 0):
            with suppress(StorageError):
                self.storage.discard(first + start << bits, length << bits)

    def writable_table(self, l1_index: int) -> L2Table:
        """The L2 table for an L1 entry, ready to be changed: a new one, or a copy if a snapshot shares it."""
        self.require_usable()
        state = self.state
        entry = state.l1.item(l1_index)
        if not entry & L1_OFFSET_MASK:
            return self._new_table(l1_index, None)
        table = state.mapping.table(l1_index)
        if entry & OFLAG_COPIED:
            return table
        copy = self._new_table(l1_index, table.words)
        copy.damaged = table.damaged
        state.regions.remove(table.host_offset, state.geometry.cluster_size)
        self.release(table.host_offset >> state.geometry.cluster_bits, shared=True)
        return copy

    def table_changed(self, table: L2Table, first: int, last: int) -> None:
        """Entries `first` to `last` (exclusive) of an L2 table differ from the file: write them in LINK."""
        if table.host_offset in self._fresh:
            return
        _, low, high = self._changed.get(table.host_offset, (table, first, last))
        self._changed[table.host_offset] = (table, min(low, first), max(high, last))
        self.state.tables.pinned.add(table.host_offset)

    def replace_l1(self, l1: Entries) -> None:
        """Make `l1` ('>u8') the active L1 table, in clusters of its own; refcounts of its trees are the caller's.

        Once in a transaction.
        """
        state, size = self.state, self.state.geometry.cluster_size
        clusters = state.geometry.clusters_for(max(len(l1), 1) * 8)
        first, _ = self.allocate(clusters, clusters)
        old_offset, old_entries = state.header.l1_table_offset, state.header.l1_size
        if old_entries:
            state.regions.remove(old_offset, old_entries * 8)
            self.release(old_offset // size, state.geometry.clusters_for(old_entries * 8))
        state.regions.add(RegionKind.L1_TABLE, first * size, clusters * size)
        self.change_header(l1_table_offset=first * size, l1_size=len(l1))
        self._l1_fresh = True
        state.l1 = l1
        state.mapping.l1 = l1

    def change_header(self, **changes: Any) -> None:  # noqa: ANN401 - the types are those of Header's fields
        """Set header fields in LINK; only fields in the first sector."""
        self._header_changes.update(changes)

    def swing_bitmaps(self, extension: BitmapsExtension | None) -> None:
        """Let the header name another bitmap directory in LINK; None: no bitmaps any more."""
        self._bitmaps = (extension,)

    def commit(self) -> None:
        """Write everything in the four phases; afterwards all of it is durable, except decrements and discards.

        Raises:
            StorageError: the host file failed. The image on disk is as before or as after, with leaks at worst.
        """
        self.require_usable()
        linked = self._changed or self._fresh or self._header_changes or self._l1_changed or self._bitmaps
        if not (self._filled or linked):
            self._release_phase()
            return
        self.failed = True  # until all phases are through
        self.mark_dirty()
        self._fill_phase()
        self._grow_phase()
        self._link_phase()
        self._release_phase()
        self.failed = False

    def close(self) -> None:
        """Commit and clear the dirty bit."""
        self.commit()
        if self._marked_dirty:
            self.flush()  # decrements before the bit that vouches for them
            bits = self.state.header.incompatible_features & ~Incompatible.DIRTY
            self.write_header(incompatible_features=int(bits))
            self.storage.flush()
            self._marked_dirty = False

    @contextmanager
    def direct_writes(self) -> Iterator[None]:
        """For whole-tree operations, which write tables in place in phase FILL or RELEASE: marks the image dirty.

        When the body raises, the session cannot go on: the next writable open counts again.
        """
        self.require_usable()
        try:
            self.mark_dirty()
            yield
        except BaseException:
            self.failed = True
            raise

    def flush(self) -> None:
        """Barrier on the files of the image."""
        if self.data_storage is not self.storage:
            self.data_storage.flush()
        self.storage.flush()

    def require_usable(self) -> None:
        """Raise when an earlier commit failed."""
        if self.failed:
            raise ImageStateError("an earlier write to the image failed; open it again")

    def trim(self) -> None:
        """End the file behind the last cluster in use, and give up refcount blocks that count nothing else.

        Nothing may be pending. What a crash leaves is space that the next writable open frees.
        """
        with self.direct_writes():
            dropped = self.refcounts.drop_unused_blocks()
            self.storage.flush()  # no refcount may be lost with a block that the table still names
            for cluster in dropped:
                self.refcounts.subtract(cluster, 1, 1)
            self.refcounts.write_blocks()
            self.refcounts.rescan()
            end = self.refcounts.used_clusters() << self.state.geometry.cluster_bits
            if end < self.storage.size() and not getattr(self.storage, "is_block_device", False):
                self.flush()
                self.storage.truncate(end)

    def mark_dirty(self) -> None:
        """Set the dirty bit (version 3), and clear autoclear bits that this library does not maintain."""
        header = self.state.header
        if self._marked_dirty or header.version < 3:
            return
        bits = header.incompatible_features | Incompatible.DIRTY
        autoclear = header.autoclear_features & KNOWN_AUTOCLEAR
        self.write_header(incompatible_features=int(bits), autoclear_features=int(autoclear))
        self.storage.flush()
        self._marked_dirty = True

    def write_header(self, **changes: Any) -> None:  # noqa: ANN401
        """Write changed header fields at once, in one write of the first sector (assumed to be atomic)."""
        header: Header = replace(self.state.header, **changes)
        self.storage.pwrite(header.build()[:_SECTOR], 0)
        self.state.header = header

    def _new_table(self, l1_index: int, words: Entries | None) -> L2Table:
        state, size = self.state, self.state.geometry.cluster_size
        cluster, _ = self.allocate(1)
        offset = cluster * size
        table = state.tables.new_table(offset) if words is None else state.tables.table_of(offset, words.copy())
        state.tables.insert(table)
        state.regions.add(RegionKind.L2_TABLE, offset, size)
        self._fresh[offset] = table
        state.l1[l1_index] = offset | OFLAG_COPIED
        self._l1_changed.add(l1_index)
        return table

    def _fill_phase(self) -> None:
        regions = self.state.regions
        for offset in sorted(self._fresh):
            regions.guard(offset, self.state.geometry.cluster_size, RegionKind.L2_TABLE)
            self.storage.pwrite(self._fresh[offset].words.tobytes(), offset)
        if self._l1_fresh:
            offset = self._header_changes["l1_table_offset"]
            regions.guard(offset, self.state.l1.nbytes or 1, RegionKind.L1_TABLE)
            self.storage.pwrite(self.state.l1.tobytes(), offset)
            self._l1_changed.clear()
        self.refcounts.write_blocks()
        if self._filled or self.data_storage is not self.storage:
            self.flush()  # nothing may refer to what is not there yet

    def _grow_phase(self) -> None:
        if not self.refcounts.has_growth:
            return
        old_tables = self.refcounts.write_growth()
        if old_tables:
            offset, clusters = self.refcounts.table_location
            self.write_header(refcount_table_offset=offset, refcount_table_clusters=clusters)
        self.storage.flush()  # a reference to a cluster needs its refcount block to be found
        bits = self.state.geometry.cluster_bits
        for offset, length in old_tables:
            self.state.regions.remove(offset, length)
            self.release(offset >> bits, length >> bits)

    def _link_phase(self) -> None:
        regions = self.state.regions
        for offset in sorted(self._changed):
            table, first, last = self._changed[offset]
            step = 2 if table.bitmaps is not None else 1
            regions.guard(offset, self.state.geometry.cluster_size, RegionKind.L2_TABLE)
            self.storage.pwrite(table.words[first * step : last * step].tobytes(), offset + first * step * 8)
        for first, last in _ranges(sorted(self._l1_changed)):
            offset = self.state.header.l1_table_offset + first * 8
            regions.guard(offset, (last - first) * 8, RegionKind.L1_TABLE)
            self.storage.pwrite(self.state.l1[first:last].tobytes(), offset)
        if self._header_changes:
            self.write_header(**self._header_changes)
        if self._bitmaps:
            self.state.header = swing_bitmap_pointer(self.storage, self.state.header, *self._bitmaps)
        self.flush()  # references must be gone before their clusters are free
        self.state.tables.pinned.clear()
        self._fresh.clear()
        self._changed.clear()
        self._l1_changed.clear()
        self._l1_fresh = False
        self._header_changes = {}
        self._bitmaps = None
        self._filled = False

    def _release_phase(self) -> None:
        if not self._released:
            return
        released, self._released = self._released, []
        self.releases += 1
        bits = self.state.geometry.cluster_bits
        for first, count, shared in released:
            self.refcounts.subtract(first, 1, count, shared=shared)
        self.refcounts.write_blocks()
        for first, count, _ in released:
            for start, length in _zero_runs(self.refcounts.window(first, count) == 0):
                self.storage.discard(first + start << bits, length << bits)
        self.refcounts.rescan()


def _ranges(indices: list[int]) -> list[tuple[int, int]]:
    """Sorted indices as (first, last exclusive) ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges


def _zero_runs(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    """(start, length) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
