"""domsnap info: everything about one snapshot, and whether everything that it needs is there."""

from __future__ import annotations

import argparse
import json

from snapshot.cli.found import find_snapshot
from snapshot.cli.output import as_json, plain, size, when
from snapshot.cli.selection import selected
from snapshot.cli.syntax import DONE, FAILED
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode


def run(arguments: argparse.Namespace) -> int:
    """Carry the command out; the exit code is 1 when something is missing or wrong."""
    from snapshot.verify import problems

    with selected(arguments) as selection:
        snapshot = find_snapshot(selection, arguments.name)
        current = selection.catalog.current == snapshot.name and not snapshot.foreign
        found = problems(snapshot, thorough=arguments.check)
    if arguments.output == "json":
        print(json.dumps({**as_json(snapshot), "current": current, "problems": found}, indent=4))
    else:
        for label, value in _facts(snapshot, current):
            lines = [plain(line) for line in value.split("\n")]
            print("\n".join([f"{label + ':':<13} {lines[0]}".rstrip(), *(f"{'':13} {line}" for line in lines[1:])]))
        print(f"{'problems:':<13} {'none' if not found else len(found)}{' (checked)' if arguments.check else ''}")
        for problem in found:
            print(f"  - {plain(problem)}")
    return FAILED if found else DONE


def _facts(snapshot: DomainSnapshot, current: bool) -> list[tuple[str, str]]:
    worth = snapshot.consistency.value
    if snapshot.foreign and snapshot.memory.mode is MemoryMode.NO:
        worth = "unknown (made by QEMU or qemu-img)"
    facts = [
        ("name", snapshot.name),
        ("domain", snapshot.domain),
        ("created", when(snapshot.creation_time)),
        ("consistency", worth),
        ("state", snapshot.state.value),
        ("parent", snapshot.parent or "-"),
        ("current", "yes" if current else "no"),
        ("origin", "found in the files" if snapshot.foreign else "catalog"),
        ("description", snapshot.description or "-"),
        ("memory", _memory(snapshot)),
    ]
    return [*facts, *((f"disk {disk.target}", _disk(disk)) for disk in snapshot.disks)]


def _memory(snapshot: DomainSnapshot) -> str:
    memory = snapshot.memory
    if memory.mode is MemoryMode.NO:
        return "none"
    lines = [f"{memory.mode.value}, {size(memory.size)} ({memory.size} bytes)", f"in {memory.file}"]
    lines += [f"machine {memory.machine}"] if memory.machine is not None else []
    lines += [f"RAM {size(memory.ram_size)}"] if memory.ram_size is not None else []
    lines += [f"{len(memory.devices)} devices"] if memory.devices else []
    return "\n".join(lines)


def _disk(disk: DiskSnapshot) -> str:
    if disk.mode is DiskMode.NO:
        return "left out"
    if disk.mode is DiskMode.INTERNAL:
        return f"internal, id {disk.internal_id}\nin {disk.file}"
    return f"external\nfrozen  {disk.file} ({disk.format})\noverlay {disk.overlay}"
