"""Planning a revert: a snapshot, the state of the domain and what is wanted give the reasons against it, or the steps.

    LOAD      active, memory and disks in the qcow2 files: QEMU loads them, with a way back saved right before
    SWAP      active, disks external: new overlays on the frozen files under the running devices, then a reset
    RESTART   memory in a file (or inactive, in the qcow2): a new QEMU by the domain's command, with incoming memory
    OFFLINE   inactive, disks alone

Nothing that others are based on is changed: a frozen file gets a new overlay, an internal snapshot is applied only to a
file that no overlay needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from snapshot.against import against_state
from snapshot.domain import DiskFacts, DomainFacts, same_file
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, DomainState, MemoryMode, RevertOptions
from snapshot.plan import add_node_step, memory_first, save_internal_step
from snapshot.restart import fill_command
from snapshot.step import Step, qmp_command


class Way(Enum):
    """How a domain goes back."""

    LOAD = "load"
    SWAP = "swap"
    RESTART = "restart"
    OFFLINE = "offline"


@dataclass(frozen=True)
class RevertRequest:
    """Everything that a revert depends on.

    Attributes:
        snapshot, facts, options: what, from where, how.
        described: path of each disk in the domain's description, by target.
        command: the domain's start command; empty when it is not known.
        folder: the directory in which it is run; None: the present one.
        socket: path of its QMP socket.
        layers: paths of the active layers as the journal has them.
        current: name of the current snapshot.
        token: for names.
        directory: of the catalog.
        dependents: for each of the snapshot's files, the files that are based on it.
        missing: files of the snapshot that are not there.
        stems: for each of the snapshot's files, what new files above it are named after.
    """

    snapshot: DomainSnapshot
    facts: DomainFacts
    options: RevertOptions
    described: Mapping[str, str]
    command: Sequence[str]
    socket: str | None
    layers: Mapping[str, str]
    current: str | None
    token: str
    directory: str
    dependents: Mapping[str, Sequence[str]]
    missing: Sequence[str]
    stems: Mapping[str, str]
    folder: str | None = None

    @property
    def chosen(self) -> list[DiskSnapshot]:
        """The disks to revert."""
        wanted = self.options.disks
        disks = [disk for disk in self.snapshot.disks if disk.mode is not DiskMode.NO]
        return disks if wanted is None else [disk for disk in disks if disk.target in wanted]

    @property
    def memory(self) -> MemoryMode:
        """The memory to revert; none when disks were chosen."""
        return self.snapshot.memory.mode if self.options.disks is None else MemoryMode.NO

    @property
    def way(self) -> Way:
        """How the domain goes back."""
        if self.memory is MemoryMode.EXTERNAL or (self.memory is MemoryMode.INTERNAL and not self.facts.active):
            return Way.RESTART
        if self.memory is MemoryMode.INTERNAL:
            return Way.LOAD
        return Way.SWAP if self.facts.active else Way.OFFLINE

    def new_layer(self, disk: DiskSnapshot) -> str:
        """The file that a disk goes on with."""
        if disk.mode is DiskMode.INTERNAL:
            return disk.file
        return f"{self.stems[disk.file]}.{self.snapshot.name}-{self.token}.qcow2"


def reasons(request: RevertRequest) -> list[str]:
    """Everything that is against a revert; empty when it can be done."""
    return [
        *_against_choice(request),
        *_against_files(request),
        *(against_state(request.facts) if request.facts.active else _against_inactive(request)),
        *(_against_load(request) if request.memory is MemoryMode.INTERNAL else ()),
        *(_against_swap(request) if request.way is Way.SWAP else ()),
        *(_against_restart(request) if request.way is Way.RESTART else ()),
    ]


def steps(request: RevertRequest) -> list[Step]:
    """The steps of a revert that nothing is against."""
    makers = {Way.LOAD: _load_steps, Way.SWAP: _swap_steps, Way.RESTART: _restart_steps, Way.OFFLINE: _offline_steps}
    return list(makers[request.way](request))


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
        based = request.dependents.get(disk.file, ())
        facts = request.facts.by_target().get(disk.target)
        if disk.mode is DiskMode.INTERNAL and based:
            yield (
                f"disk {disk.target}: '{based[0]}' is based on '{disk.file}', which holds the internal snapshot: going "
                "back inside that file would destroy what is based on it"
            )
        if disk.mode is DiskMode.EXTERNAL and facts is not None and same_file(facts.disk.path, disk.file):
            yield f"disk {disk.target} is in use as '{disk.file}' itself, which the snapshot had frozen"


def _against_inactive(request: RevertRequest) -> Iterator[str]:
    for facts in request.facts.disks:
        if facts.in_use is not None:
            yield f"disk {facts.disk.target} is in use by {facts.in_use}; give its QMP socket, or shut the domain down"
        if facts.damaged is not None:
            yield f"disk {facts.disk.target}: {facts.damaged}"
        if facts.bitmaps and any(
            disk.target == facts.disk.target and disk.mode is DiskMode.INTERNAL for disk in request.chosen
        ):
            yield f"disk {facts.disk.target} has the dirty bitmap '{facts.bitmaps[0]}', which would not fit any more"
    if request.way is Way.OFFLINE and request.options.running:
        yield "the snapshot has no memory to go on running with: revert, then start the domain"


def _against_load(request: RevertRequest) -> Iterator[str]:
    """What QEMU's load would find out too late, or never."""
    name = request.snapshot.name
    for disk in request.chosen:
        facts = request.facts.by_target().get(disk.target)
        if facts is None:
            continue
        if not same_file(facts.disk.path, disk.file):
            yield f"disk {disk.target} is on '{facts.disk.path}' now, and the snapshot is inside '{disk.file}'"
            continue
        if None not in (disk.place, facts.place) and disk.place != facts.place:
            yield f"disk {disk.target} is a {facts.place} now, and was a {disk.place}: the memory would not fit it"
        count = sum(stored.name == name for stored in facts.snapshots)
        if count != 1:
            yield f"disk {disk.target} has {count} internal snapshots '{name}', where one should be"
        for bitmap in facts.bitmaps:
            yield f"disk {disk.target} has the dirty bitmap '{bitmap}': QEMU would refuse half-way"
    states = [
        stored
        for facts in request.facts.disks
        for stored in facts.snapshots
        if stored.name == name and stored.vm_state_size
    ]
    if len(states) != 1:
        yield f"{len(states)} disks hold memory of the snapshot, where one should"
    if request.facts.active:
        yield from _against_machine(request)


def _against_machine(request: RevertRequest) -> Iterator[str]:
    memory, facts = request.snapshot.memory, request.facts
    if memory.machine is not None and memory.machine != facts.machine:
        yield f"the memory is of a {memory.machine}, and the domain is a {facts.machine}"
    if memory.ram_size is not None and memory.ram_size != facts.ram_size:
        yield f"the memory has {memory.ram_size} bytes of RAM, and the domain {facts.ram_size}"
    if memory.devices and facts.devices and memory.devices != facts.devices:
        gone = sorted(set(memory.devices) - set(facts.devices))
        new = sorted(set(facts.devices) - set(memory.devices))
        yield f"the devices differ: missing {', '.join(gone) or 'none'}; new {', '.join(new) or 'none'}"


def _against_swap(request: RevertRequest) -> Iterator[str]:
    for disk in request.chosen:
        if disk.mode is DiskMode.INTERNAL:
            yield (
                f"disk {disk.target} has an internal snapshot without memory, which a running QEMU cannot go back to: "
                "shut the domain down first"
            )
    if (request.facts.version or (0,)) < (6, 1):
        yield "going back on a running domain needs QEMU 6.1 (blockdev-reopen)"


def _against_restart(request: RevertRequest) -> Iterator[str]:
    if not request.command:
        yield "the memory can only be loaded by a new QEMU, and the domain's start command is not known"
        return
    text = "\n".join(request.command)
    if "{qmp}" not in text or request.socket is None:
        yield "the start command has no place for the QMP socket ({qmp}), or the socket is not known"
    if "{incoming}" not in request.command:
        yield "the start command has no argument {incoming}"
    for disk in request.chosen:
        described = request.described.get(disk.target)
        moved = described is None or not same_file(described, request.new_layer(disk))
        if moved and f"{{disk:{disk.target}}}" not in text:
            yield f"the start command has no {{disk:{disk.target}}}, and the disk's file is another one afterwards"
    if request.facts.active and any(disk.mode is DiskMode.INTERNAL for disk in request.chosen):
        yield "going back to a memory file together with internal disk snapshots needs the domain shut down first"


def _load_steps(request: RevertRequest) -> Iterator[Step]:
    facts = memory_first([request.facts.by_target()[disk.target] for disk in request.chosen])
    yield from _load_with_way_back(request, facts, [one.node for one in facts])
    yield _settle_step(request)


def _load_with_way_back(request: RevertRequest, facts: list[DiskFacts], nodes: list[str]) -> Iterator[Step]:
    """Save the present state, load the wanted one, forget the saved one."""
    way_back, paths = f"ds-{request.token}", [one.disk.path for one in facts]
    if request.facts.run_state == "running":
        yield Step("stop", {}, "stop the guest", (qmp_command("stop"),), undo="resume it")
    save = save_internal_step(way_back, facts, request.token)
    yield Step(save.action, save.arguments | {"nodes": nodes}, "save the present state as the way back", save.commands,
               undo="delete it")  # fmt: skip
    arguments = {"name": request.snapshot.name, "way_back": way_back, "nodes": nodes, "paths": paths,
                 "job": f"ds-{request.token}-load"}  # fmt: skip
    command = qmp_command("snapshot-load", job_id=arguments["job"], tag=request.snapshot.name, devices=nodes)
    text = f"load memory and disks of '{request.snapshot.name}'"
    yield Step("load-internal", arguments, text, (command,), undo="load the way back")
    yield _switch_step(request)
    yield Step("drop-way-back", {"name": way_back, "paths": paths}, "delete the way back")


def _swap_steps(request: RevertRequest) -> Iterator[Step]:
    domain, disks = request.facts.by_target(), []
    old_nodes: list[str] = []
    for number, disk in enumerate(request.chosen):
        node, path = f"ds-{request.token}-{number}", request.new_layer(disk)
        top = domain[disk.target]
        yield _overlay_step(disk, path)
        yield add_node_step(node, path, top.node)
        yield Step(
            "add-base",
            {"path": disk.file, "format": disk.format, "node": f"{node}-b"},
            f"let QEMU open '{disk.file}', if it has not",
            undo="let QEMU close it",
        )
        old_nodes += [top.node, *top.chain_nodes]
        disks.append({"top": top.node, "path": top.disk.path, "format": top.disk.format, "node": node,
                      "frozen": disk.file})  # fmt: skip
    if request.facts.run_state == "running":
        yield Step("stop", {}, "stop the guest", (qmp_command("stop"),), undo="resume it")
    actions = [{"type": "blockdev-snapshot", "data": {"node": d["top"], "overlay": d["node"]}} for d in disks]
    commands = (qmp_command("transaction", actions=actions), qmp_command("blockdev-reopen", options=[]))
    yield Step("swap", {"disks": disks, "token": request.token}, "put the new overlays under the devices", commands,
               undo="put the present ones back", paused=True)  # fmt: skip
    yield _switch_step(request)
    yield Step("reset", {}, "reset the guest", (qmp_command("system_reset"),))
    yield Step("drop-nodes", {"nodes": old_nodes}, "let QEMU close the files that are no longer used")
    yield _settle_step(request)


def _restart_steps(request: RevertRequest) -> Iterator[Step]:
    internal = [disk for disk in request.chosen if disk.mode is DiskMode.INTERNAL]
    external = [disk for disk in request.chosen if disk.mode is DiskMode.EXTERNAL]
    from_file = request.memory is MemoryMode.EXTERNAL
    for disk in external:
        yield _overlay_step(disk, request.new_layer(disk))
    way_back = f"ds-{request.token}"
    if internal and from_file:
        yield from _apply_steps(request, internal, way_back)
        yield Step("let-go", {}, "give the images free for QEMU")
    if request.facts.run_state == "running":
        yield Step("stop", {}, "stop the guest", (qmp_command("stop"),), undo="resume it")
    start = _start_step(request)
    yield start
    if not from_file:
        facts = [request.facts.by_target()[disk.target] for disk in internal]
        yield from _load_with_way_back(request, facts, [])
    else:
        yield _switch_step(request)
    yield Step("take-over", start.arguments, "end the old QEMU, if there is one; take its socket's name")
    if internal and from_file:
        paths = [disk.file for disk in internal]
        yield Step("drop-way-back", {"name": way_back, "paths": paths}, "delete the way back")
    yield _settle_step(request)


def _start_step(request: RevertRequest) -> Step:
    final = request.socket or ""
    socket = f"{final}.{request.token}" if request.facts.active else final
    values = {"qmp": socket}
    sizes: dict[str, int | None] = {}
    chosen = {disk.target: disk for disk in request.chosen}
    for facts in request.facts.disks:
        target, path, image_format = facts.disk.target, facts.disk.path, facts.disk.format
        if target in chosen:
            path = request.new_layer(chosen[target])
            image_format = "qcow2"
            sizes[path] = chosen[target].virtual_size
        elif not facts.disk.read_only:
            sizes[path] = None
        values |= {f"disk:{target}": path, f"format:{target}": image_format}
    memory = request.snapshot.memory
    from_file = memory.mode is MemoryMode.EXTERNAL
    incoming = ["-S", "-incoming", "defer"] if from_file else ["-S"]
    arguments: dict[str, Any] = {
        "command": fill_command(request.command, values, incoming),
        "folder": request.folder,
        "socket": socket,
        "final": final,
        "memory": memory.file if from_file else None,
        "machine": memory.machine,
        "ram_size": memory.ram_size,
        "sizes": sizes,
        "places": {request.new_layer(disk): disk.place for disk in request.chosen},
        "log": os.path.join(request.directory, "start.log"),
        "pid_file": os.path.join(request.directory, "start.pid"),
    }
    text = "start a QEMU with the guest standing" + (f", with the memory '{memory.file}'" if from_file else "")
    return Step("start", arguments, text, undo="end it")


def _offline_steps(request: RevertRequest) -> Iterator[Step]:
    internal = [disk for disk in request.chosen if disk.mode is DiskMode.INTERNAL]
    way_back = f"ds-{request.token}"
    yield from _apply_steps(request, internal, way_back)
    for disk in request.chosen:
        if disk.mode is DiskMode.EXTERNAL:
            yield _overlay_step(disk, request.new_layer(disk))
    yield _switch_step(request)
    if internal:
        yield Step("let-go", {}, "give the images free")
        yield Step("drop-way-back", {"name": way_back, "paths": [d.file for d in internal]}, "delete the way back")


def _apply_steps(request: RevertRequest, internal: list[DiskSnapshot], way_back: str) -> Iterator[Step]:
    """Hold everything; save the present state of each file, then apply the snapshot to it."""
    inside = {disk.file for disk in internal}
    held = [{"path": path, "format": "qcow2", "writable": True} for path in sorted(inside)]
    held += [
        {"path": facts.disk.path, "format": facts.disk.format, "writable": False}
        for facts in request.facts.disks
        if facts.disk.path not in inside
    ]
    yield Step("hold", {"disks": held}, "lock the images, so that the domain cannot start meanwhile")
    for disk in internal:
        arguments = {"path": disk.file, "name": way_back}
        yield Step("create-internal", arguments, f"keep the present state of '{disk.file}'", undo="delete it")
    for disk in internal:
        arguments = {"path": disk.file, "name": request.snapshot.name, "way_back": way_back}
        text = f"apply '{request.snapshot.name}' to '{disk.file}'"
        yield Step("apply-internal", arguments, text, undo="apply the present state")


def _overlay_step(disk: DiskSnapshot, path: str) -> Step:
    arguments = {"path": path, "backing": disk.file, "format": disk.format, "size": disk.virtual_size}
    return Step("make-overlay", arguments, f"make the overlay '{path}' on '{disk.file}'", undo="remove it")


def _switch_step(request: RevertRequest) -> Step:
    layers = {**request.layers, **{disk.target: request.new_layer(disk) for disk in request.chosen}}
    made = [request.new_layer(disk) for disk in request.chosen if disk.mode is DiskMode.EXTERNAL]
    name = None if request.snapshot.foreign else request.snapshot.name  # the catalog cannot name what it has not
    arguments = {"name": name, "current": request.current, "layers": layers, "made": made,
                 "layers_before": dict(request.layers)}  # fmt: skip
    return Step("switch", arguments, f"'{request.snapshot.name}' is current", undo="the one before is", commits=True)


def _settle_step(request: RevertRequest) -> Step:
    running = request.options.running
    if running is None:
        running = request.snapshot.state is DomainState.RUNNING
        if request.way is Way.SWAP:
            running = request.facts.run_state == "running"
    command = qmp_command("cont" if running else "stop")
    return Step("settle", {"running": running}, "resume the guest" if running else "leave the guest paused", (command,))
