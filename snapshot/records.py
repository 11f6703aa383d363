"""The catalog's part of an operation: the snapshot is entered, or the entries are changed, as a step with an undo."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import qcowlib
from snapshot.blockgraph import BlockGraph
from snapshot.domain import StoredSnapshot, image_facts
from snapshot.errors import DomainSnapshotError
from snapshot.model import (
    Consistency,
    Disk,
    DiskMode,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
)
from snapshot.plan import DiskPlan, Resolved
from snapshot.session import Session

Arguments = dict[str, Any]


def draft(resolved: Resolved, parent: str | None) -> DomainSnapshot:
    """The snapshot as far as it is known before it is taken."""
    request, facts = resolved.request, resolved.facts
    running = facts.run_state == "running"
    if not facts.active:
        state = DomainState.SHUTOFF
        dirty = any(one.dirty for one in facts.disks)
        consistency = Consistency.CRASH_CONSISTENT if dirty else Consistency.CLEAN
    elif request.disk_only:
        state = DomainState.DISK_SNAPSHOT
        consistency = Consistency.QUIESCED if request.quiesce else Consistency.CRASH_CONSISTENT
    else:
        state = DomainState.RUNNING if running else DomainState.PAUSED
        consistency = Consistency.CHECKPOINT
    inside = resolved.memory_disk
    file = resolved.memory_file if inside is None else inside.disk.path
    memory = MemorySnapshot(MemoryMode.NO)
    if resolved.memory is not MemoryMode.NO:
        memory = MemorySnapshot(
            resolved.memory, file, machine=facts.machine, ram_size=facts.ram_size, devices=facts.devices
        )
    return DomainSnapshot(
        name=request.name,
        domain=facts.name,
        creation_time=0,
        state=state,
        consistency=consistency,
        memory=memory,
        disks=tuple(_disk_draft(plan, request.name) for plan in resolved.disks),
        parent=parent,
        description=request.description,
    )


def _disk_draft(plan: DiskPlan, name: str) -> DiskSnapshot:
    disk: Disk = plan.facts.disk
    return DiskSnapshot(
        target=disk.target,
        mode=plan.mode,
        file=disk.path,
        format=disk.format,
        overlay=plan.overlay,
        internal_name=name if plan.mode is DiskMode.INTERNAL else None,
        virtual_size=disk.virtual_size,
        place=plan.facts.place,
    )


def record(session: Session, arguments: Arguments) -> None:
    """Enter the snapshot that was taken; its ids and sizes are asked for now."""
    snapshot = session.draft
    if snapshot is None:
        raise DomainSnapshotError("there is no snapshot to enter")
    disks = tuple(_with_id(session, disk, snapshot.name) for disk in snapshot.disks)
    memory = snapshot.memory
    if memory.mode is MemoryMode.EXTERNAL and memory.file is not None:
        memory = replace(memory, size=os.path.getsize(memory.file))
    elif memory.mode is MemoryMode.INTERNAL:
        stored = [_stored(session, disk, snapshot.name) for disk in disks if disk.mode is DiskMode.INTERNAL]
        memory = replace(memory, size=max(one.vm_state_size for one in stored))
    session.draft = replace(snapshot, disks=disks, memory=memory, creation_time=session.instant)
    arguments_layers = {**session.journal.layers(), **arguments["layers"]}
    session.journal.set_layers(arguments_layers)
    session.journal.set_made(session.journal.made() | set(arguments["layers"].values()))
    session.store.add(session.draft)


def unrecord(session: Session, arguments: Arguments) -> None:
    """Take the snapshot out again, put the layers and the current snapshot back."""
    if any(snapshot.name == arguments["name"] for snapshot in session.store.load()):
        session.store.remove(arguments["name"])
    session.journal.set_made(session.journal.made() - set(arguments["layers"].values()))
    unswitch(session, arguments)


def switch(session: Session, arguments: Arguments) -> None:
    """After a revert: say which snapshot is current, and which files the domain goes on with."""
    session.journal.set_layers(arguments["layers"])
    session.journal.set_made(session.journal.made() | set(arguments["made"]))
    session.store.set_current(arguments["name"])


def unswitch(session: Session, arguments: Arguments) -> None:
    """Undo of `switch`; a name too many among the files that were made does no harm."""
    if session.store.current != arguments["current"]:
        session.store.set_current(arguments["current"])
    if session.journal.layers() != arguments["layers_before"]:
        session.journal.set_layers(arguments["layers_before"])


def _with_id(session: Session, disk: DiskSnapshot, name: str) -> DiskSnapshot:
    return disk if disk.mode is not DiskMode.INTERNAL else replace(disk, internal_id=_stored(session, disk, name).id)


def _stored(session: Session, disk: DiskSnapshot, name: str) -> StoredSnapshot:
    """The entry of the snapshot in a disk's file."""
    held = session.images.get(disk.file)
    if isinstance(held, qcowlib.Qcow2Image):
        found = [StoredSnapshot(one.id, one.name, one.vm_state_size) for one in held.snapshots]
    elif session.qmp_or_none is not None:
        graph = BlockGraph.query(session.qmp)
        entries = graph.node(graph.find(disk.file) or "").get("image", {}).get("snapshots", [])
        found = [StoredSnapshot(str(one["id"]), one["name"], int(one["vm-state-size"])) for one in entries]
    else:
        found = list(image_facts(Disk(disk.target, disk.file, disk.format)).snapshots)
    mine = [one for one in found if one.name == name]
    if len(mine) != 1:
        raise DomainSnapshotError(
            f"'{disk.file}' has {len(mine)} internal snapshots '{name}' where there should be one"
        )
    return mine[0]
