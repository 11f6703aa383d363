"""Internal snapshots: create, apply (revert to), delete, give a vm state.

    create   FILL  copy of the L1 table, +1 on its tree, COPIED cleared, new snapshot table
             LINK  header                                   RELEASE  old snapshot table
    apply    FILL  +1 on what the snapshot's tree has more, new active L1 table
             LINK  header                                   RELEASE  what the old tree had more
    delete   FILL  new snapshot table
             LINK  header                                   RELEASE  the snapshot's tree, COPIED set

One write of the header's first sector is the moment at which each takes effect. Everything is checked before anything
is written, so an operation that is refused leaves the image as it was.

Source: qcow2.txt, "Snapshots"; QEMU's rules for ids and names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import EFBIG, ENOTSUP

import numpy as np

from qcowlib.errors import CorruptMetadata, FormatError, ImageStateError, SnapshotError
from qcowlib.format.constants import MAX_SNAPSHOT_STRING, MAX_SNAPSHOT_TABLE_SIZE, MAX_SNAPSHOTS
from qcowlib.format.entries import ENTRY_DTYPE, L1_OFFSET_MASK, OFLAG_COPIED, Entries, offsets
from qcowlib.format.snapshot_table import SnapshotEntry, build_snapshot_table
from qcowlib.image.interface import BlockImage
from qcowlib.image.qcow2 import find_snapshot
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.metadata.trees import (
    add_references,
    clear_copied,
    count_tree,
    difference,
    release_tree,
    require_room,
    set_copied,
    write_active_l1,
)
from qcowlib.metadata.vmstate import ByteStream, store_vmstate

_MAX_ID_DIGITS = 20
_UNCOPIED = np.uint64(~OFLAG_COPIED & (1 << 64) - 1)


def create_snapshot(
    image: BlockImage,
    name: str,
    *,
    date_ns: int | None = None,
    vm_clock_ns: int = 0,
    icount: int | None = 0,
    vmstate: ByteStream | None = None,
    snapshot_id: str | None = None,
) -> SnapshotEntry:
    """Take an internal snapshot of the active layer.

        with qcowlib.open_image("vm.qcow2", writable=True) as image:
            qcowlib.create_snapshot(image, "before-upgrade")

    The id is one more than the largest number among the ids; several snapshots may have one name, as in QEMU.

    Args:
        name: the snapshot's name (QEMU: tag).
        date_ns: when it was taken, in nanoseconds since 1970; None means now.
        vm_clock_ns: the guest's clock in nanoseconds.
        icount: instructions executed; None where nobody has counted them.
        vmstate: a file object with the vm state to keep (a QEMU migration stream); it is read to its end.
        snapshot_id: the id, which no other snapshot has; None means the one described above.

    Returns: the new entry of the snapshot table.

    Raises:
        ImageStateError: the image was opened for reading.
        SnapshotError: external data file, too many snapshots, or the refcount width cannot hold another reference.
        CorruptMetadata: the mapping is damaged. In both cases nothing was changed.
    """
    with _session(image) as (target, transaction):
        state = target.state
        _require_possible(target)
        if snapshot_id is not None and (not snapshot_id or any(snapshot_id == one.id for one in state.snapshots)):
            raise SnapshotError(f"the id '{snapshot_id}' cannot be used: it is empty, or another snapshot has it")
        moment = time.time_ns() if date_ns is None else date_ns
        entry = SnapshotEntry(
            l1_table_offset=0,
            l1_size=0,
            id=_next_id(state.snapshots) if snapshot_id is None else snapshot_id,
            name=name,
            date_sec=moment // 10**9,
            date_nsec=moment % 10**9,
            vm_clock_nsec=vm_clock_ns,
            vm_state_size=0,
            disk_size=state.header.size,
            icount=icount,
        )
        _require_fits([*state.snapshots, entry])
        # What lies behind the disk is the vm state of a snapshot that was applied once. As in QEMU it is kept, unless
        # this snapshot has a vm state of its own there.
        kept = state.l1 if vmstate is None else state.l1[: state.geometry.l1_entries_for(state.header.size)]
        counts = count_tree(state, kept)
        require_room(transaction.refcounts, counts)
        transaction.require_space(
            state.geometry.clusters_for(len(kept) * 8), _table_clusters(state, [*state.snapshots, entry])
        )
        with transaction.direct_writes():
            l1 = kept & _UNCOPIED
            if vmstate is not None:
                extra, length = store_vmstate(transaction, vmstate, state.header.size, target.store)
                l1, entry = np.concatenate((l1, extra)), replace(entry, vm_state_size=length)
            entry = replace(entry, l1_table_offset=_write_l1_copy(transaction, l1), l1_size=len(l1))
            write_snapshot_table(transaction, [*state.snapshots, entry])
            add_references(transaction.refcounts, counts)
            clear_copied(state, transaction.storage, kept)
            write_active_l1(transaction)
        transaction.commit()
        state.snapshots = [*state.snapshots, entry]
        return entry


def apply_snapshot(image: BlockImage, snapshot: str | SnapshotEntry) -> None:
    """Make the active layer what a snapshot holds, its disk size included. What was there is given up.

    Args:
        snapshot: id, or else name; or an entry of `image.snapshots`.

    Raises:
        NoSuchSnapshot: there is none.
        SnapshotError: the image has bitmaps, which would no longer describe what changed (QEMU refuses as well).
        CorruptMetadata: a mapping is damaged, or a refcount too low: it cannot be told what to free. In all cases
            nothing was changed.
    """
    with _session(image) as (target, transaction):
        state, geometry = target.state, target.state.geometry
        entry = _find(target, snapshot)
        if target.bitmaps:
            raise SnapshotError("Device has active dirty bitmaps")
        size = state.header.size if entry.disk_size is None else entry.disk_size
        entries = geometry.l1_entries_for(size)
        saved = state.snapshot_mapping(entry).l1
        if len(saved) < entries:
            rule = f"its {len(saved)} entries are too few for a disk of {size} bytes"
            raise CorruptMetadata("snapshot L1 table", entry.l1_table_offset, rule)
        require_enough_refcounts(state)
        wanted = saved & _UNCOPIED
        # An L1 entry that both have keeps its number of references: the tree under it is left alone.
        same = _common(state.l1, wanted)
        gained, lost = _without(wanted, same), _without(state.l1, same)
        gained_counts, lost_counts = count_tree(state, gained), count_tree(state, lost)
        more, less = difference(gained_counts, lost_counts, geometry.refcount_block_bits)
        require_room(transaction.refcounts, more)
        transaction.require_space(geometry.clusters_for(max(len(wanted), 1) * 8))
        with transaction.direct_writes():
            add_references(transaction.refcounts, more)
            clear_copied(state, transaction.storage, gained.copy())
            transaction.replace_l1(wanted.astype(ENTRY_DTYPE))
            transaction.change_header(size=size)
        transaction.commit()
        with transaction.direct_writes():
            release_tree(transaction, less)
            state.refresh_regions()


def delete_snapshot(image: BlockImage, snapshot: str | SnapshotEntry) -> None:
    """Delete a snapshot; what nothing else refers to is freed.

    Args:
        snapshot: id, or else name; or an entry of `image.snapshots`.

    Raises:
        NoSuchSnapshot: there is none.
        CorruptMetadata: a mapping is damaged, or a refcount too low: it cannot be told what to free. Nothing was
            changed.
    """
    with _session(image) as (target, transaction):
        state = target.state
        entry = _find(target, snapshot)
        rest = [other for other in state.snapshots if other is not entry]
        l1 = state.snapshot_mapping(entry).l1
        require_enough_refcounts(state)
        counts = count_tree(state, l1)
        if entry.l1_size:
            first = entry.l1_table_offset >> state.geometry.cluster_bits
            counts.add_run(first, first + state.geometry.clusters_for(entry.l1_size * 8))
        transaction.require_space(_table_clusters(state, rest))
        with transaction.direct_writes():
            write_snapshot_table(transaction, rest)
        transaction.commit()
        state.snapshots = rest
        with transaction.direct_writes():
            release_tree(transaction, counts)
            set_copied(state, transaction.storage, transaction.refcounts, state.l1)
            write_active_l1(transaction)


def attach_vmstate(image: BlockImage, snapshot: str | SnapshotEntry, vmstate: ByteStream) -> SnapshotEntry:
    """Give a snapshot that has no vm state one.

    Args:
        snapshot: id, or else name; or an entry of `image.snapshots`.
        vmstate: a file object with the vm state (a QEMU migration stream); it is read to its end.

    Returns: the changed entry of the snapshot table.

    Raises:
        NoSuchSnapshot: there is none.
        SnapshotError: it has a vm state already, or the vm state is too large. Nothing was changed.
    """
    with _session(image) as (target, transaction):
        state, bits = target.state, target.state.geometry.cluster_bits
        entry = _find(target, snapshot)
        if entry.vm_state_size:
            raise SnapshotError(f"the snapshot '{entry.name}' has a vm state already")
        old = state.snapshot_mapping(entry).l1
        size = state.header.size if entry.disk_size is None else entry.disk_size
        disk = np.zeros(state.geometry.l1_entries_for(size), dtype=ENTRY_DTYPE)
        disk[: len(old)] = old[: len(disk)]
        # QEMU leaves the tables of an earlier vm state in the active layer, and so in the snapshots taken from it.
        leftover = old.copy()
        leftover[: len(disk)] = 0
        if leftover.any():
            require_enough_refcounts(state)
        counts = count_tree(state, leftover)
        with transaction.direct_writes():
            extra, length = store_vmstate(transaction, vmstate, size, target.store)
            l1 = np.concatenate((disk, extra))
            offset = _write_l1_copy(transaction, l1)
            new = replace(
                entry,
                l1_table_offset=offset,
                l1_size=len(l1),
                vm_state_size=length,
                disk_size=size,
                vm_state_size_32=None,
            )
            rest = [new if other is entry else other for other in state.snapshots]
            write_snapshot_table(transaction, rest)
            if len(old):
                transaction.release(entry.l1_table_offset >> bits, state.geometry.clusters_for(len(old) * 8))
        transaction.commit()
        state.snapshots = rest
        if leftover.any():
            with transaction.direct_writes():
                release_tree(transaction, counts)
                set_copied(state, transaction.storage, transaction.refcounts, state.l1)
                write_active_l1(transaction)
        return new


@contextmanager
def _session(image: BlockImage) -> Iterator[tuple[WritableQcow2Image, MetadataTransaction]]:
    """The image, if its snapshots can be changed, and its transaction; nobody else uses it meanwhile."""
    if image.format != "qcow2":
        raise SnapshotError(f"'{image.name}' is a {image.format} image: it cannot have internal snapshots")
    if not isinstance(image, WritableQcow2Image):
        raise ImageStateError(f"'{image.name}' is not open for writing")
    with image.exclusive() as transaction:
        yield image, transaction


def _require_possible(target: WritableQcow2Image) -> None:
    if target.header.has_data_file:
        raise SnapshotError("images with an external data file cannot have internal snapshots", errno=ENOTSUP)
    if target.header.nb_snapshots >= MAX_SNAPSHOTS:  # asked before the table is read: it may not be all there
        raise SnapshotError(f"the image has {MAX_SNAPSHOTS} snapshots already", errno=EFBIG)


def _require_fits(snapshots: list[SnapshotEntry]) -> None:
    new = snapshots[-1]
    if len(new.name.encode("utf-8", "surrogateescape")) > MAX_SNAPSHOT_STRING:
        raise SnapshotError("the snapshot's name is too long")
    try:
        length = len(build_snapshot_table(snapshots))
    except FormatError as error:
        raise SnapshotError(str(error), errno=error.errno) from error
    if length > MAX_SNAPSHOT_TABLE_SIZE:
        raise SnapshotError("the snapshot table would become too large", errno=EFBIG)


def _find(target: WritableQcow2Image, snapshot: str | SnapshotEntry) -> SnapshotEntry:
    if isinstance(snapshot, str):
        return find_snapshot(target.state.snapshots, snapshot)
    return next(entry for entry in target.state.snapshots if entry is snapshot or entry == snapshot)


def _next_id(snapshots: list[SnapshotEntry]) -> str:
    # An id can have 65,535 digits; one that is not a number of 64 bits is a name like any other.
    ids = [entry.id for entry in snapshots if len(entry.id) <= _MAX_ID_DIGITS]
    numbers = [int(number) for number in ids if number.isascii() and number.isdigit()]
    return str(max(numbers, default=0) + 1)


def _write_l1_copy(transaction: MetadataTransaction, l1: Entries) -> int:
    """Write an L1 table into new clusters; its host offset in bytes (0 for an empty table)."""
    geometry = transaction.state.geometry
    if not len(l1):
        return 0
    clusters = geometry.clusters_for(len(l1) * 8)
    first, _ = transaction.allocate(clusters, clusters)
    offset = first << geometry.cluster_bits
    transaction.storage.pwrite(l1.astype(ENTRY_DTYPE).tobytes(), offset)
    return offset


def write_snapshot_table(transaction: MetadataTransaction, snapshots: list[SnapshotEntry]) -> None:
    """Write the snapshot table into new clusters; LINK swings the header to it, RELEASE frees the old one."""
    state, bits = transaction.state, transaction.state.geometry.cluster_bits
    offset = 0
    if snapshots:
        table = build_snapshot_table(snapshots)
        clusters = state.geometry.clusters_for(len(table))
        first, _ = transaction.allocate(clusters, clusters)
        offset = first << bits
        transaction.storage.pwrite(table, offset)
    if state.header.nb_snapshots:
        old = len(build_snapshot_table(state.snapshots))
        transaction.release(state.header.snapshots_offset >> bits, state.geometry.clusters_for(old))
    transaction.change_header(nb_snapshots=len(snapshots), snapshots_offset=offset)


def _table_clusters(state: Qcow2State, snapshots: list[SnapshotEntry]) -> int:
    return state.geometry.clusters_for(len(build_snapshot_table(snapshots)))


def _common(one: Entries, other: Entries) -> Entries:
    """Offsets of the L2 tables that both L1 tables name at the same index (0 where they differ)."""
    length = min(len(one), len(other))
    first, second = offsets(one[:length], L1_OFFSET_MASK), offsets(other[:length], L1_OFFSET_MASK)
    return np.where(first == second, first, 0).astype(np.uint64)


def _without(l1: Entries, same: Entries) -> Entries:
    """The L1 table less the entries that are in `same`."""
    rest = l1.copy()
    rest[: len(same)][same != 0] = 0
    return rest
