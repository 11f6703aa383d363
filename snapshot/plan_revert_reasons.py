"""What is against a revert: all of it at once, before anything is touched. No I/O."""

from __future__ import annotations

from collections.abc import Iterator

from snapshot.against import against_state
from snapshot.domain import same_file
from snapshot.model import DiskMode, MemoryMode
from snapshot.plan_revert_request import RevertRequest, Way


def reasons(request: RevertRequest) -> list[str]:
    """Everything that is against a revert; empty when it can be done."""
    return [
        *_against_choice(request),
        *_against_files(request),
        *_against_internal(request),
        *(against_state(request.facts) if request.facts.active else _against_inactive(request)),
        *(_against_machine(request) if request.way is Way.LOAD else ()),
        *(_against_swap(request) if request.way is Way.SWAP else ()),
        *(_against_restart(request) if request.way is Way.RESTART else ()),
    ]


def _against_choice(request: RevertRequest) -> Iterator[str]:
    have = {disk.target for disk in request.snapshot.disks if disk.mode is not DiskMode.NO}
    for target in request.options.disks or ():
        if target not in have:
            yield f"the snapshot has no disk '{target}'"
    domain = request.facts.by_target()
    for disk in request.chosen:
        if disk.target not in domain:
            yield f"the domain has no disk '{disk.target}' any more"
    if request.memory is not MemoryMode.NO:
        for facts in request.facts.disks:
            if facts.disk.target not in have and not facts.disk.read_only:
                yield f"disk {facts.disk.target} can be written and is not in the snapshot: it would not fit the memory"


def _against_files(request: RevertRequest) -> Iterator[str]:
    for path in request.missing:
        yield f"'{path}' is missing"
    for disk in request.chosen:
        if disk.mode is DiskMode.EXTERNAL and request.on_top(disk):
            yield f"disk {disk.target} is in use as '{disk.file}' itself, which the snapshot had frozen"
        if request.copied(disk) and disk.file not in request.missing:
            state = request.state(disk)
            if state.problem is not None:
                yield f"disk {disk.target}: its state cannot be copied out of '{disk.file}': {state.problem}"
            elif state.free < state.data:
                yield (
                    f"disk {disk.target}: {state.free} bytes are free for a copy of its state, "
                    f"and up to {state.data} are needed"
                )


def _against_internal(request: RevertRequest) -> Iterator[str]:
    """What QEMU's load would find out too late, or never; for other ways, what would stop them half-way."""
    for disk in request.chosen:
        if disk.mode is not DiskMode.INTERNAL or disk.file in request.missing:
            continue
        count = sum(stored.name == request.internal_name(disk) for stored in request.stored[disk.file])
        if count != 1:
            yield f"disk {disk.target} has {count} internal snapshots '{request.snapshot.name}', where one should be"
        facts = request.facts.by_target().get(disk.target)
        for bitmap in facts.bitmaps if facts is not None and request.in_place(disk) and request.on_top(disk) else ():
            late = "QEMU would refuse half-way" if request.way is Way.LOAD else "it would not fit any more"
            yield f"disk {disk.target} has the dirty bitmap '{bitmap}': {late}"
    if request.memory is MemoryMode.INTERNAL:
        states = [
            stored
            for disk in request.chosen
            for stored in request.stored.get(disk.file, ())
            if stored.name == request.internal_name(disk) and stored.vm_state_size
        ]
        if len(states) != 1:
            yield f"{len(states)} disks hold memory of the snapshot, where one should"


def _against_inactive(request: RevertRequest) -> Iterator[str]:
    for facts in request.facts.disks:
        if facts.in_use is not None:
            yield f"disk {facts.disk.target} is in use by {facts.in_use}; give its QMP socket, or shut the domain down"
        if facts.damaged is not None:
            yield f"disk {facts.disk.target}: {facts.damaged}"
    if request.way is Way.OFFLINE and request.options.running:
        yield "the snapshot has no memory to go on running with: revert, then start the domain"


def _against_machine(request: RevertRequest) -> Iterator[str]:
    memory, facts = request.snapshot.memory, request.facts
    if memory.machine is not None and memory.machine != facts.machine:
        yield f"the memory is of a {memory.machine}, and the domain is a {facts.machine}"
    if memory.ram_size is not None and memory.ram_size != facts.ram_size:
        yield f"the memory has {memory.ram_size} bytes of RAM, and the domain {facts.ram_size}"
    for disk in request.chosen:
        place = facts.by_target()[disk.target].place if disk.target in facts.by_target() else None
        if None not in (disk.place, place) and disk.place != place:
            yield f"disk {disk.target} is a {place} now, and was a {disk.place}: the memory would not fit it"
    if memory.devices and facts.devices and memory.devices != facts.devices:
        gone = sorted(set(memory.devices) - set(facts.devices))
        new = sorted(set(facts.devices) - set(memory.devices))
        yield f"the devices differ: missing {', '.join(gone) or 'none'}; new {', '.join(new) or 'none'}"


def _against_swap(request: RevertRequest) -> Iterator[str]:
    if (request.facts.version or (0,)) < (6, 1):
        yield "going back on a running domain needs QEMU 6.1 (blockdev-reopen)"


def _against_restart(request: RevertRequest) -> Iterator[str]:
    if not request.command:
        needed = "the domain's start command, which is not known: give a domain file with 'command'"
        if request.memory is not MemoryMode.NO:
            yield f"the memory can only be loaded by a new QEMU, and that needs {needed}"
        for disk in request.inside if request.memory is MemoryMode.NO else ():
            yield (
                f"disk {disk.target} has an internal snapshot without memory, which no running QEMU can go back to: "
                f"it has to be started anew, and that needs {needed}, or shut the domain down first"
            )
        return
    text = "\n".join(request.command)
    if "{qmp}" not in text or request.socket is None:
        yield "the start command has no place for the QMP socket ({qmp}), or the socket is not known"
    if "{incoming}" not in request.command:
        yield "the start command has no argument {incoming}"
    chosen = {disk.target: disk for disk in request.chosen}
    for facts in request.facts.disks:
        target = facts.disk.target
        if facts.disk.read_only:
            continue
        path = request.new_layer(chosen[target]) if target in chosen else facts.disk.path
        described = request.described.get(target)
        if (described is None or not same_file(described, path)) and f"{{disk:{target}}}" not in text:
            yield f"the start command has no {{disk:{target}}}, and the disk's file is another one afterwards"
    for path in request.memory_files:
        yield (
            f"the guest's memory is the shared file '{path}', which a second QEMU would change: "
            "shut the domain down first"
        )
    for blocker in request.facts.blockers if request.parting else ():
        yield f"QEMU cannot let go of its disks: {blocker}"
