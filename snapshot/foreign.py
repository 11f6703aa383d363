"""Snapshots that lie in the qcow2 files and that the catalog does not know: made by QEMU, libvirt or qemu-img."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import qcowlib
from snapshot.domain import DiskFacts, DomainFacts, StoredSnapshot, backing_file
from snapshot.model import (
    Consistency,
    DiskMode,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
)


@dataclass(frozen=True)
class _Found:
    """An entry of the snapshot table of a file of one disk."""

    file: str
    entry: StoredSnapshot


def found_in_files(facts: DomainFacts, known: Sequence[DomainSnapshot]) -> list[DomainSnapshot]:
    """The snapshots in the domain's files that are none of the known ones, as far as the files tell.

    Looked into are the active layers, what they are based on, and the files that known snapshots name. Snapshots of the
    same name on several disks are taken for one. Where a disk has a name twice, the first ones are one snapshot and the
    second ones another.

    Args:
        facts: the domain's state.
        known: the catalog's snapshots.

    Returns: oldest first, each marked as foreign.
    """
    ours = {
        (os.path.realpath(disk.file), disk.internal_name)
        for snapshot in known
        for disk in snapshot.disks
        if disk.internal_name is not None
    }
    groups: dict[tuple[str, int], dict[str, _Found]] = {}
    for disk in facts.disks:
        times: dict[str, int] = {}
        for found in _entries(disk, known):
            name = found.entry.name
            if (os.path.realpath(found.file), name) in ours:
                continue
            times[name] = times.get(name, 0) + 1
            groups.setdefault((name, times[name]), {})[disk.disk.target] = found
    snapshots = [_snapshot(facts, name, group) for (name, _), group in groups.items()]
    return sorted(snapshots, key=lambda snapshot: (snapshot.creation_time, snapshot.name))


def _entries(disk: DiskFacts, known: Iterable[DomainSnapshot]) -> Iterator[_Found]:
    """The entries in all files of a disk, the active layer's first; each file once, however it is named."""
    for entry in disk.snapshots:
        yield _Found(disk.disk.path, entry)
    mine = [each for snapshot in known for each in snapshot.disks if each.target == disk.disk.target]
    others = [*_qcow2_below(disk), *(each.overlay for each in mine if each.overlay is not None)]
    others += [each.file for each in mine if each.format == "qcow2"]
    seen = {os.path.realpath(disk.disk.path)}
    for path in others:
        if os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            for entry in stored_in(path):
                yield _Found(path, entry)


def _qcow2_below(disk: DiskFacts) -> Iterator[str]:
    """The files below an active layer, down to the one that is said to be raw: its content is its guest's."""
    above = disk.disk.path
    for path in disk.disk.backing_chain:
        stated = backing_file(above)
        if stated is not None and stated.format == "raw":
            return
        yield path
        above = path


def stored_in(path: str) -> list[StoredSnapshot]:
    """The snapshot table of a file; empty for one that has none or cannot be read."""
    try:
        with qcowlib.open_image(path, format="qcow2", open_backing=False, force_share=True) as image:
            return [
                StoredSnapshot(one.id, one.name, one.vm_state_size, one.date_sec * 10**9 + one.date_nsec)
                for one in image.snapshots
            ]
    except qcowlib.QcowError:
        return []


def _snapshot(facts: DomainFacts, name: str, group: dict[str, _Found]) -> DomainSnapshot:
    memory = MemorySnapshot(MemoryMode.NO)
    for found in group.values():
        if found.entry.vm_state_size and memory.mode is MemoryMode.NO:
            memory = MemorySnapshot(MemoryMode.INTERNAL, file=found.file, size=found.entry.vm_state_size)
    complete = all(disk.disk.target in group for disk in facts.disks if not disk.disk.read_only)
    has_memory = memory.mode is not MemoryMode.NO
    return DomainSnapshot(
        name=name,
        domain=facts.name,
        creation_time=min(found.entry.date_ns for found in group.values()),
        # The file does not say whether the guest was running; without memory it does not matter.
        state=DomainState.RUNNING if has_memory else DomainState.DISK_SNAPSHOT,
        # Nobody has recorded what the disks are worth: the least that is certain.
        consistency=Consistency.CHECKPOINT if complete and has_memory else Consistency.CRASH_CONSISTENT,
        memory=memory,
        disks=tuple(_disk(disk, group.get(disk.disk.target)) for disk in facts.disks),
        foreign=True,
    )


def _disk(disk: DiskFacts, found: _Found | None) -> DiskSnapshot:
    if found is None:
        return DiskSnapshot(disk.disk.target, DiskMode.NO, disk.disk.path, disk.disk.format)
    return DiskSnapshot(
        target=disk.disk.target,
        mode=DiskMode.INTERNAL,
        file=found.file,
        format="qcow2",
        internal_id=found.entry.id,
        internal_name=found.entry.name,
    )
