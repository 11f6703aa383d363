"""Where the bytes of a qcow2 file are: what each state holds alone, what states share, metadata, bitmaps, leaks.

    census of all references   --.
    references of one state    --'--> cluster by cluster: all references are the state's --> it holds the cluster alone
                                                          more than that                 --> shared with others
    stored refcounts - census  -----> leaked, free

From metadata alone. Sizes are whole host clusters: a cluster with compressed data of two states is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qcowlib.errors import CorruptMetadata, ImageStateError
from qcowlib.format.entries import L1_OFFSET_MASK, Entries, Int64Array, offsets
from qcowlib.format.snapshot_table import SnapshotEntry, build_snapshot_table
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.reference_counts import ReferenceCounts, distinct
from qcowlib.metadata.state import Qcow2State, load_l1
from qcowlib.metadata.trees import count_tree


@dataclass(frozen=True)
class StateSpace:
    """The space of one state, in bytes of whole host clusters.

    Attributes:
        snapshot: the snapshot; None for the active layer.
        exclusive: only this state refers to it: what deleting the snapshot frees.
        shared: other states refer to it as well.
        tables: of both together, the state's L1 and L2 tables.
        vmstate: of both together, data and tables of the saved memory.
        damage: why the state's own numbers cannot be told (they are 0 then); None otherwise.
    """

    snapshot: SnapshotEntry | None
    exclusive: int = 0
    shared: int = 0
    tables: int = 0
    vmstate: int = 0
    damage: str | None = None


@dataclass(frozen=True)
class ImageSpace:
    """The space of an image file, in bytes; all but `file_length` are whole host clusters.

    Attributes:
        file_length: length of the host file.
        states: the active layer, then the snapshots in the order of the table.
        mapped: what the states refer to, each cluster once.
        refcounts: refcount table and refcount blocks.
        other_metadata: header, snapshot table, encryption header.
        bitmaps: persistent bitmaps: directory, tables and data.
        leaked: clusters with a refcount that nothing refers to.
        free: clusters inside the file that are neither referred to nor have a refcount.
    """

    file_length: int
    states: list[StateSpace] = field(default_factory=list)
    mapped: int = 0
    refcounts: int = 0
    other_metadata: int = 0
    bitmaps: int = 0
    leaked: int = 0
    free: int = 0


def image_space(image: Qcow2Image, *, progress: Callable[[int, int], None] | None = None) -> ImageSpace:
    """Where the bytes of an image file are.

        with qcowlib.open_image("disk.qcow2", open_backing=False) as image:
            for state in qcowlib.image_space(image).states:
                print(state.snapshot.name if state.snapshot else "now", state.exclusive, state.shared)

    Args:
        image: its backing file and data file are not looked at. With an external data file guest clusters are in that
            one, at their guest offsets; the numbers are those of the qcow2 file alone.
        progress: called with (states done, states in all).

    Raises:
        ImageStateError: the image is damaged such that nothing can be counted; a check tells more.
        FormatError: the snapshot table is damaged.
        StorageError: the file cannot be read.
    """
    state = image.state
    size = state.geometry.cluster_size
    everything = census(state)
    if everything.stopped is not None:
        raise ImageStateError(f"the references of '{image.name}' cannot be counted: {everything.stopped}")
    counter = _StateCounter(state, everything)
    snapshots = image.snapshots
    states = []
    for number, entry in enumerate((None, *snapshots)):
        states.append(counter.count(entry))
        if progress is not None:
            progress(number + 1, len(snapshots) + 1)
    metadata = _Metadata(state, snapshots, everything)
    used, leaked, inside = _totals(everything)
    return ImageSpace(
        file_length=state.storage.size(),
        states=states,
        mapped=(used - metadata.clusters) * size,
        refcounts=metadata.refcounts * size,
        other_metadata=metadata.other * size,
        bitmaps=metadata.bitmaps * size,
        leaked=leaked * size,
        free=max(0, inside - used - leaked) * size,
    )


class _StateCounter:
    """Counts states against the census; snapshots that share all their tables are counted once."""

    def __init__(self, state: Qcow2State, counted: Census) -> None:
        self._state = state
        self._references = counted.references
        self._tables = counted.mapping.tables
        self._known: dict[bytes, ReferenceCounts] = {}

    def count(self, entry: SnapshotEntry | None) -> StateSpace:
        """The numbers of one state."""
        state, bits = self._state, self._state.geometry.cluster_bits
        try:
            if entry is None:
                place, l1, disk_size = state.header.l1_table_offset, state.l1, state.header.size
            else:
                place, disk_size = entry.l1_table_offset, entry.disk_size or state.header.size
                l1 = load_l1(state.storage, place, entry.l1_size, "snapshot L1 table")
            disk_entries = state.geometry.l1_entries_for(disk_size)
            disk, memory = self._tree(l1[:disk_entries]), self._tree(l1[disk_entries:])
        except CorruptMetadata as error:
            return StateSpace(entry, damage=str(error))
        own = ReferenceCounts(state.geometry.refcount_block_bits)
        first = place >> bits
        stop = first + state.geometry.clusters_for(l1.nbytes)
        own.add_run(first, stop)
        exclusive, shared = self._compare([own, disk, memory])
        tables = stop - first + len(distinct(offsets(l1[l1 != 0], L1_OFFSET_MASK)))
        return StateSpace(entry, exclusive << bits, shared << bits, tables << bits, sum(_used(memory)) << bits)

    def _tree(self, l1: Entries) -> ReferenceCounts:
        """What the tree under an L1 table, or a part of it, refers to."""
        named = offsets(l1, L1_OFFSET_MASK)
        key = named[named != 0].tobytes()
        if key not in self._known:
            if len(self._known) > 1:
                self._known.clear()  # those of one state (disk and memory): neighbours in the table are alike
            self._known[key] = self._count_tree(l1, named)
        return self._known[key]

    def _count_tree(self, l1: Entries, named: Int64Array) -> ReferenceCounts:
        # The census has seen which tables map one run of clusters: they need not be read again.
        run_first = np.full(len(named), -1, dtype=np.int64)
        if named.any():
            place = np.minimum(np.searchsorted(self._tables.host_offset, named), len(self._tables.host_offset) - 1)
            known = (named != 0) & (self._tables.host_offset[place] == named)
            run_first[known] = self._tables.run_first[place[known]]
        in_runs = run_first >= 0
        counts = count_tree(self._state, l1[~in_runs])
        counts.add(named[in_runs] >> self._state.geometry.cluster_bits)
        if not self._state.header.has_data_file:
            for first in run_first[in_runs].tolist():
                counts.add_run(first, first + self._state.geometry.l2_entries)
        return counts

    def _compare(self, parts: list[ReferenceCounts]) -> tuple[int, int]:
        """Clusters that the state holds alone, and those that it shares."""
        exclusive = shared = 0
        for index in sorted({index for part in parts for index in part.chunks()}):
            chunks = [chunk for part in parts if (chunk := part.chunk(index)) is not None]
            total = self._references.chunk(index)
            mine = chunks[0] if len(chunks) == 1 else np.sum(chunks, axis=0, dtype=np.int64)
            held = mine != 0
            alone = int((held & (mine == total)).sum()) if total is not None else 0
            exclusive += alone
            shared += int(np.count_nonzero(held)) - alone
        return exclusive, shared


class _Metadata:
    """Numbers of clusters that belong to no state."""

    def __init__(self, state: Qcow2State, snapshots: list[SnapshotEntry], counted: Census) -> None:
        header, geometry = state.header, state.geometry
        blocks = distinct(counted.stored.block_offsets[counted.stored.block_offsets > 0])
        self.refcounts = header.refcount_table_clusters + len(blocks)
        crypto = header.crypto_header
        self.other = 1 + geometry.clusters_for(len(build_snapshot_table(snapshots)) if snapshots else 0)
        self.other += geometry.clusters_for(crypto.length) if crypto is not None else 0
        extension = header.bitmaps_extension
        self.bitmaps = 0
        if extension is not None:
            self.bitmaps += geometry.clusters_for(extension.directory_size)
            for bitmap in state.bitmaps:
                table = np.frombuffer(state.storage.pread(bitmap.table_size * 8, bitmap.table_offset), dtype=">u8")
                self.bitmaps += geometry.clusters_for(bitmap.table_size * 8)
                self.bitmaps += int(np.count_nonzero(offsets(table, L1_OFFSET_MASK)))

    @property
    def clusters(self) -> int:
        """All of them."""
        return self.refcounts + self.other + self.bitmaps


def _used(counts: ReferenceCounts) -> list[int]:
    """Distinct clusters in each chunk."""
    return [int(np.count_nonzero(chunk)) for index in counts.chunks() if (chunk := counts.chunk(index)) is not None]


def _totals(counted: Census) -> tuple[int, int, int]:
    """Clusters that are referred to, leaked ones, and clusters of the file."""
    references = counted.references
    leaked = 0
    windows = {*references.chunks(), *counted.stored.used_windows(references.chunk_bits, counted.clusters)}
    for index in sorted(windows):
        chunk = references.chunk(index)
        stored = counted.stored.window(index << references.chunk_bits, references.chunk_size)
        inside = min(references.chunk_size, counted.clusters - (index << references.chunk_bits))
        unused = stored[:inside] != 0
        leaked += int(np.count_nonzero(unused if chunk is None else unused & (chunk[:inside] == 0)))
    return sum(_used(references)), leaked, counted.clusters
