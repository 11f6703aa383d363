"""domsnap memory export, domsnap memory import: the memory of a snapshot from one place to the other, offline."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from snapshot.cli.found import find_snapshot
from snapshot.cli.output import Progress, plain, size
from snapshot.cli.selection import Selection, selected
from snapshot.cli.syntax import DONE
from snapshot.errors import DomainSnapshotError, NotPossible, RecoverNeeded
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode, MemorySnapshot


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out."""
    with selected(arguments) as selection:
        snapshot = find_snapshot(selection, arguments.name)
        if arguments.verb == "export":
            return _export(snapshot, arguments)
        from snapshot.journal import Journal

        journal = Journal(selection.catalog.directory)
        with journal.locked(arguments.wait):
            if journal.pending() is not None:
                raise RecoverNeeded("an earlier operation was cut off: run recover first")
            return _import(selection, snapshot, arguments)


def _export(snapshot: DomainSnapshot, arguments: argparse.Namespace) -> int:
    from snapshot.memory import export_memory

    memory = snapshot.memory
    if memory.mode is not MemoryMode.INTERNAL or memory.file is None:
        place = f"it is in the file '{memory.file}' already" if memory.file is not None else "it has none"
        raise NotPossible(f"export the memory of '{snapshot.name}'", [place])
    progress = Progress(arguments.verbose)
    try:
        facts = export_memory(
            memory.file,
            _name_in(snapshot, memory.file),
            arguments.output,
            progress=lambda done, total: progress("exporting the memory", done, total),
        )
    finally:
        progress.clear()
    print(
        f"wrote {plain(os.fspath(arguments.output))}: {size(facts.size)}, machine {plain(facts.machine or 'unknown')}"
    )
    return DONE


def _import(selection: Selection, snapshot: DomainSnapshot, arguments: argparse.Namespace) -> int:
    from snapshot.memory import import_memory

    disk = _disk_for(snapshot, arguments.disk)
    source = _source(snapshot, arguments)
    against = [*_against(snapshot, disk, source, arguments), *_frozen(selection.catalog.load(), disk)]
    if against or disk is None or source is None:
        raise NotPossible(f"import memory into '{snapshot.name}'", against)
    facts = import_memory(source, disk.file, disk.internal_id or snapshot.name, machine=snapshot.memory.machine)
    if not snapshot.foreign:
        memory = MemorySnapshot(
            MemoryMode.INTERNAL,
            file=disk.file,
            size=facts.size,
            machine=facts.machine,
            ram_size=snapshot.memory.ram_size,
            devices=facts.devices,
        )
        selection.catalog.replace(replace(snapshot, memory=memory))
    print(f"put {size(facts.size)} of memory into {plain(disk.file)}; {plain(source)} is not needed any more")
    return DONE


def _against(
    snapshot: DomainSnapshot, disk: DiskSnapshot | None, source: str | None, arguments: argparse.Namespace
) -> list[str]:
    """Everything that is against an import: what comes out must be a snapshot that QEMU loads, of one instant."""
    reasons = []
    if snapshot.memory.mode is MemoryMode.INTERNAL:
        reasons.append("its memory is inside already")
    external = [each.target for each in snapshot.disks if each.mode is DiskMode.EXTERNAL]
    if external:
        reasons.append(f"{', '.join(external)}: external, and QEMU loads internal snapshots of all disks only")
    if disk is None:
        wanted = "no disk" if arguments.disk is None else f"{arguments.disk} is no disk that"
        reasons.append(f"{wanted} has an internal snapshot")
    if source is None:
        reasons.append("it has no memory file: give one with -i FILE")
    own = snapshot.memory.file if snapshot.memory.mode is MemoryMode.EXTERNAL else None
    if source is not None and not arguments.same_instant and (own is None or not _same(source, own, snapshot)):
        reasons.append(f"'{source}' is not the snapshot's own memory: --same-instant says that it fits the disks")
    return reasons


def _frozen(snapshots: list[DomainSnapshot], disk: DiskSnapshot | None) -> list[str]:
    """A file that an external snapshot has frozen is not written."""
    names = [
        each.name
        for each in snapshots
        if any(d.mode is DiskMode.EXTERNAL and disk is not None and d.file == disk.file for d in each.disks)
    ]
    return [f"'{disk.file}' is frozen by the external snapshot '{name}'" for name in names] if disk is not None else []


def _same(source: str, own: str, snapshot: DomainSnapshot) -> bool:
    """Whether a memory file is the recorded one, moved perhaps: told by its digest, if there is one."""
    if source == os.path.abspath(own):
        return True
    if snapshot.memory.digest is None:
        return False
    from snapshot.verify import file_digest

    return file_digest(source) == snapshot.memory.digest


def _source(snapshot: DomainSnapshot, arguments: argparse.Namespace) -> str | None:
    given: str | None = arguments.input
    if given is not None:
        return os.path.abspath(given)
    memory = snapshot.memory
    return memory.file if memory.mode is MemoryMode.EXTERNAL else None


def _disk_for(snapshot: DomainSnapshot, target: str | None) -> DiskSnapshot | None:
    """The disk that takes the memory: the one asked for, else the first, where QEMU looks by itself."""
    internal = [disk for disk in snapshot.disks if disk.mode is DiskMode.INTERNAL]
    return next((disk for disk in internal if target in (None, disk.target)), None)


def _name_in(snapshot: DomainSnapshot, file: str) -> str:
    for disk in snapshot.disks:
        if disk.file == file and disk.mode is DiskMode.INTERNAL:
            return disk.internal_id or disk.internal_name or snapshot.name
    raise DomainSnapshotError(f"'{file}' is no disk of the snapshot '{snapshot.name}'")
