"""Planning a snapshot: a request and the state of the domain give the reasons against it, or the steps. No I/O.

request + DomainFacts -> resolve -> Resolved (mode and files of every disk, where the memory goes)
Resolved + PathFacts of the named files + names in the catalog -> reasons (all of them) | steps
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snapshot.domain import DiskFacts, DomainFacts
from snapshot.model import Disk, DiskMode, Liveness, MemoryMode, SnapshotRequest
from snapshot.step import Step, qmp_command

_OVERLAY_SPACE = 1 << 20  # a fresh overlay, and what an internal snapshot of the disk alone adds
_MEMORY_MARGIN = 16 << 20  # devices, and pages that are sent twice
_MAX_NAME = 200  # it becomes part of file names
_MAX_FILE_NAME = 255
#: States in which QEMU can take a snapshot.
_USABLE_STATES = ("running", "paused", "prelaunch")
_FORMATS = ("qcow2", "raw")
#: Bytes a second for memory files; QEMU's default of 128 MiB/s makes the pause many times longer.
MEMORY_BANDWIDTH = 16 << 30
#: The migration capability of each way of writing memory that lets the guest run.
MEMORY_CAPABILITIES = {"live": "pause-before-switchover", "background": "background-snapshot"}


@dataclass(frozen=True)
class PathFacts:
    """What is true of a file name on the host.

    Attributes:
        exists: something of that name is there.
        directory: its directory is there and can be written.
        free: bytes free on its file system.
        device: number of that file system.
    """

    exists: bool
    directory: bool
    free: int
    device: int


@dataclass(frozen=True)
class DiskPlan:
    """What happens to one disk; `overlay` is the new file's path for an external snapshot."""

    facts: DiskFacts
    mode: DiskMode
    overlay: str | None = None


@dataclass(frozen=True)
class Resolved:
    """A request with everything decided that it leaves open.

    Attributes:
        request, facts: what it was made from.
        disks: all disks of the domain.
        memory: where the memory goes.
        memory_file: absolute path for an external one.
        liveness: what the guest does meanwhile; a guest that stands still is never taken live.
        unknown: targets in the request that the domain does not have.
    """

    request: SnapshotRequest
    facts: DomainFacts
    disks: tuple[DiskPlan, ...]
    memory: MemoryMode
    memory_file: str | None
    liveness: Liveness
    unknown: tuple[str, ...]

    def of(self, mode: DiskMode) -> list[DiskPlan]:
        """The disks of one mode."""
        return [plan for plan in self.disks if plan.mode is mode]

    def new_files(self) -> list[str]:
        """Paths of all files that are going to be made."""
        overlays = [plan.overlay for plan in self.disks if plan.overlay is not None]
        return overlays if self.memory_file is None else [*overlays, self.memory_file]

    def paths(self) -> set[str]:
        """The files whose `PathFacts` the reasons need."""
        return {*self.new_files(), *(plan.facts.disk.path for plan in self.disks if plan.mode is not DiskMode.NO)}


def resolve(request: SnapshotRequest, facts: DomainFacts, made: Collection[str] = ()) -> Resolved:
    """Decide what a request leaves open.

    Args:
        request: what is asked for.
        facts: of the domain.
        made: the overlays that were made before; new files are named after the file below them.
    """
    disks = tuple(_disk_plan(request, one, made) for one in facts.disks)
    modes = {plan.mode for plan in disks}
    memory, memory_file = MemoryMode.NO, None
    if not request.disk_only:
        live = request.liveness is not Liveness.PAUSED
        plain = DiskMode.EXTERNAL not in modes and request.memory_file is None and not live
        memory = MemoryMode.INTERNAL if plain else MemoryMode.EXTERNAL
    if memory is MemoryMode.EXTERNAL:
        memory_file = request.memory_file
        if memory_file is None and disks:
            memory_file = f"{_stem(facts.disks[0].disk, made)}.{request.name}.mem"
    running = facts.run_state == "running"
    return Resolved(
        request=request,
        facts=facts,
        disks=disks,
        memory=memory,
        memory_file=memory_file,
        liveness=request.liveness if running else Liveness.PAUSED,
        unknown=tuple(sorted(set(request.disks) - {one.disk.target for one in facts.disks})),
    )


def reasons(resolved: Resolved, host: Mapping[str, PathFacts], taken: Collection[str]) -> list[str]:
    """Everything that is against a snapshot; empty when it can be taken.

    Args:
        resolved: what is to be done.
        host: facts of all `resolved.paths()`.
        taken: names in the catalog.
    """
    return [
        *_against_name(resolved, taken),
        *_against_domain(resolved),
        *(reason for plan in resolved.disks for reason in _against_disk(resolved, plan)),
        *_against_files(resolved, host),
        *_against_space(resolved, host),
    ]


def steps(resolved: Resolved, token: str) -> list[Step]:
    """The steps of a snapshot that nothing is against.

    Args:
        resolved: what is to be done.
        token: goes into the names of nodes and jobs.
    """
    return list(_active_steps(resolved, token) if resolved.facts.active else _inactive_steps(resolved))


def name_reasons(name: str) -> Iterator[str]:
    """What is against a name in itself."""
    if not name:
        yield "the name is empty"
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        yield f"the name is longer than {_MAX_NAME} bytes"
    if "/" in name or name.startswith(".") or any(ord(char) < 32 for char in name):
        yield f"the name {name!r} cannot be part of a file name (no '/', no control characters, no leading '.')"
    if name.strip().isdigit():
        yield f"the name '{name}' reads as a number, so that it could be taken for a snapshot's id"


def _stem(disk: Disk, made: Collection[str]) -> str:
    """What the files of a disk's snapshots are named after: its own file, whatever overlays it has got since."""
    chain = (disk.path, *disk.backing_chain)
    return os.path.splitext(next((path for path in chain if path not in made), chain[-1]))[0]


def _disk_plan(request: SnapshotRequest, facts: DiskFacts, made: Collection[str]) -> DiskPlan:
    disk = facts.disk
    asked = request.disks.get(disk.target)
    if asked is not None:
        mode, file = asked.mode, asked.file
    elif disk.read_only:
        mode, file = DiskMode.NO, None
    elif request.default_mode is not None:
        mode, file = request.default_mode, None
    else:
        mode, file = DiskMode.INTERNAL if disk.format == "qcow2" else DiskMode.EXTERNAL, None
    if mode is DiskMode.EXTERNAL and file is None:
        file = f"{_stem(disk, made)}.{request.name}.qcow2"
    return DiskPlan(facts, mode, file if mode is DiskMode.EXTERNAL else None)


def _against_name(resolved: Resolved, taken: Collection[str]) -> Iterator[str]:
    name = resolved.request.name
    yield from name_reasons(name)
    if name in taken:
        yield f"the catalog has a snapshot '{name}' already"
    for plan in resolved.disks:
        if any(name in (stored.name, stored.id) for stored in plan.facts.snapshots):
            yield f"disk {plan.facts.disk.target} has an internal snapshot '{name}' already"


def _against_domain(resolved: Resolved) -> Iterator[str]:
    request, facts = resolved.request, resolved.facts
    for target in resolved.unknown:
        yield f"the domain has no disk '{target}'"
    if all(plan.mode is DiskMode.NO for plan in resolved.disks):
        yield "no disk takes part"
    if request.disk_only and request.memory_file is not None:
        yield "a disk-only snapshot has no memory file"
    if request.disk_only and request.liveness is not Liveness.PAUSED:
        yield "a disk-only snapshot never stops the guest: live and background are about memory"
    if not facts.active:
        yield from _against_inactive(resolved)
        return
    yield from against_state(facts)
    if request.quiesce:
        if not request.disk_only:
            yield "quiesce is for disk-only snapshots: with memory the file systems' state is in the memory"
        if facts.agent_socket is None:
            yield "quiesce needs the guest agent, and its socket is not known"
        if facts.run_state != "running":
            yield "quiesce needs a running guest"
    if resolved.memory is MemoryMode.INTERNAL and (facts.version or (0,)) < (6,):
        yield "internal memory snapshots need QEMU 6.0 (snapshot-save)"


def against_state(facts: DomainFacts) -> Iterator[str]:
    """What QEMU's own state has against any change."""
    if facts.run_state == "postmigrate":
        yield "the guest stands after a finished migration (postmigrate): resume it first"
    elif facts.run_state not in _USABLE_STATES:
        yield f"the guest is in state {facts.run_state}"
    if facts.migration is not None:
        yield f"a migration is under way ({facts.migration})"
    for job in facts.jobs:
        yield f"the job '{job}' is under way"


def _against_inactive(resolved: Resolved) -> Iterator[str]:
    if not resolved.request.disk_only:
        yield "the domain is not started, so it has no memory: only a disk-only snapshot can be taken"
    if resolved.request.quiesce:
        yield "the domain is not started: there is nothing to quiesce"


def _against_disk(resolved: Resolved, plan: DiskPlan) -> Iterator[str]:
    facts, disk = plan.facts, plan.facts.disk
    label = f"disk {disk.target}"
    if plan.mode is DiskMode.NO:
        if not resolved.request.disk_only and not disk.read_only:
            yield f"{label} can be written and is left out: after a revert it would not fit the memory"
        return
    if disk.read_only:
        yield f"{label} is read-only"
    if facts.damaged is not None:
        yield f"{label}: {facts.damaged}"
    if facts.in_use is not None:
        where = "" if resolved.facts.active else "; give its QMP socket, or shut the domain down"
        yield f"{label} is in use by {facts.in_use}{where}"
    if facts.driver not in _FORMATS:
        yield f"{label}: its top node is a '{facts.driver}', which cannot be snapshotted from here"
    if not os.path.isabs(disk.path):
        yield f"{label} was opened by the relative name '{disk.path}', which would break the backing chain"
    if plan.mode is DiskMode.INTERNAL:
        yield from _against_internal(plan, label)
    elif facts.encrypted:
        yield f"{label} is encrypted: an overlay would hold what the guest writes from now on in the clear"


def _against_internal(plan: DiskPlan, label: str) -> Iterator[str]:
    facts = plan.facts
    if facts.disk.format != "qcow2":
        yield f"{label} is {facts.disk.format}: internal snapshots need qcow2"
    if facts.data_file:
        yield f"{label} has an external data file: internal snapshots are not possible"
    for bitmap in facts.bitmaps:
        yield f"{label} has the dirty bitmap '{bitmap}': an internal snapshot could not be reverted to"
    if facts.refcount_bits is not None and (1 << facts.refcount_bits) - 1 < len(facts.snapshots) + 2:
        yield (
            f"{label}: refcounts of {facts.refcount_bits} bits cannot count {len(facts.snapshots) + 1} snapshots "
            "and the active layer"
        )


def _against_files(resolved: Resolved, host: Mapping[str, PathFacts]) -> Iterator[str]:
    for plan in resolved.disks:
        path = plan.facts.disk.path
        if plan.mode is not DiskMode.NO and os.path.isabs(path) and not host[path].exists:
            yield f"disk {plan.facts.disk.target}: there is no '{path}' here (another mount name space, or removed)"
    seen: set[str] = set()
    for path in resolved.new_files():
        if not os.path.isabs(path):
            yield f"'{path}' is a relative name; give an absolute one"
            continue
        if os.path.normpath(path) in seen:
            yield f"'{path}' is to be made twice"
        seen.add(os.path.normpath(path))
        if len(os.path.basename(path).encode("utf-8", "surrogateescape")) > _MAX_FILE_NAME:
            yield f"the file name of '{path}' is longer than {_MAX_FILE_NAME} bytes"
        facts = host[path]
        if facts.exists:
            yield f"'{path}' exists already, and would be overwritten"
        if not facts.directory:
            yield f"the directory of '{path}' does not exist or cannot be written"


def _against_space(resolved: Resolved, host: Mapping[str, PathFacts]) -> Iterator[str]:
    """Sums by file system; the memory counts with its full size, since nobody can tell how much of it is zeroes."""
    needed: dict[int, int] = {}
    example: dict[int, str] = {}

    def need(path: str, size: int) -> None:
        if path in host and (host[path].directory or host[path].exists):
            device = host[path].device
            needed[device] = needed.get(device, 0) + size
            example.setdefault(device, path)

    memory = (resolved.facts.ram_size or 0) + _MEMORY_MARGIN
    for plan in resolved.disks:
        if plan.mode is not DiskMode.NO:
            need(plan.overlay or plan.facts.disk.path, _OVERLAY_SPACE)
    internal = resolved.of(DiskMode.INTERNAL)
    if resolved.memory is MemoryMode.INTERNAL and internal:
        need(internal[0].facts.disk.path, memory)
    if resolved.memory_file is not None:
        need(resolved.memory_file, memory)
    for device, size in needed.items():
        free = host[example[device]].free
        if free < size:
            yield f"{free} bytes are free where '{example[device]}' is, and up to {size} are needed"


def _active_steps(resolved: Resolved, token: str) -> Iterator[Step]:
    facts, name = resolved.facts, resolved.request.name
    running = facts.run_state == "running"
    if resolved.memory is MemoryMode.INTERNAL:
        yield save_internal_step(name, [plan.facts for plan in resolved.of(DiskMode.INTERNAL)], token)
        yield _record_step(resolved)
        return
    external = resolved.of(DiskMode.EXTERNAL)
    for number, plan in enumerate(external):
        yield overlay_step(plan.facts, plan.overlay or "")
        yield add_node_step(f"ds-{token}-{number}", plan.overlay or "", plan.facts.node)
    if resolved.memory_file is not None:
        yield Step(
            "make-memory-file",
            {"path": resolved.memory_file},
            f"make the memory file '{resolved.memory_file}'",
            undo="remove it",
        )
    live = resolved.liveness is Liveness.LIVE
    if resolved.request.quiesce:
        yield Step("freeze", {}, "freeze the guest's file systems", undo="thaw them")
    if resolved.memory is MemoryMode.EXTERNAL:
        if live:
            yield _memory_step(resolved)
        elif running:
            yield Step("stop", {}, "stop the guest", (qmp_command("stop"),), undo="resume it")
    yield disks_step(resolved, token)
    if resolved.memory is MemoryMode.EXTERNAL:
        if live:
            text = "write the rest of the memory, with the guest paused"
            command = qmp_command("migrate-continue", state="pre-switchover")
            yield Step("end-memory", _memory_arguments(resolved), text, (command,), paused=True)
        else:
            yield _memory_step(resolved)
        if running:
            yield Step("cont", {}, "resume the guest", (qmp_command("cont"),), paused=True)
        yield Step("keep-memory", {"path": resolved.memory_file}, "make the memory file durable")
    if resolved.request.quiesce:
        yield Step("thaw", {}, "thaw the guest's file systems", paused=True)
    yield _record_step(resolved)


def _inactive_steps(resolved: Resolved) -> Iterator[Step]:
    taking_part = [plan for plan in resolved.disks if plan.mode is not DiskMode.NO]
    yield Step(
        "hold",
        {"disks": [_held(plan) for plan in taking_part]},
        "lock the images, so that the domain cannot start meanwhile",
    )
    for plan in resolved.of(DiskMode.EXTERNAL):
        yield overlay_step(plan.facts, plan.overlay or "")
    for plan in resolved.of(DiskMode.INTERNAL):
        path = plan.facts.disk.path
        yield Step(
            "create-internal",
            {"path": path, "name": resolved.request.name},
            f"take the internal snapshot '{resolved.request.name}' of '{path}'",
            undo="delete it",
        )
    yield _record_step(resolved)


def _held(plan: DiskPlan) -> dict[str, Any]:
    disk = plan.facts.disk
    return {"path": disk.path, "format": disk.format, "writable": plan.mode is DiskMode.INTERNAL}


def overlay_step(facts: DiskFacts, overlay: str) -> Step:
    """Make an empty overlay file on a disk's active layer; an existing file is never touched."""
    disk = facts.disk
    arguments = {"path": overlay, "backing": disk.path, "format": disk.format, "size": disk.virtual_size}
    return Step("make-overlay", arguments, f"make the overlay '{overlay}' on '{disk.path}'", undo="remove it")


def add_node_step(node: str, path: str, like: str) -> Step:
    """Let QEMU open an overlay, not yet connected to anything."""
    arguments = {"node": node, "path": path, "like": like}
    text = f"let QEMU open '{path}'"
    return Step("add-node", arguments, text, (add_node_command(node, path),), undo="let QEMU close it")


def add_node_command(node: str, path: str, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """The command that opens an overlay without its backing file."""
    file = {"driver": "file", "filename": path, "node-name": f"{node}-f", **options}
    return qmp_command("blockdev-add", driver="qcow2", node_name=node, file=file, backing=None)


def save_internal_step(name: str, disks: list[DiskFacts], token: str) -> Step:
    """Memory and disks into the qcow2 files, by QEMU's own job; all or nothing."""
    nodes = [facts.node for facts in disks]
    arguments = {"name": name, "nodes": nodes, "paths": [facts.disk.path for facts in disks], "job": f"ds-{token}-save"}
    command = qmp_command("snapshot-save", job_id=f"ds-{token}-save", tag=name, vmstate=nodes[0], devices=nodes)
    text = f"save memory and disks as the internal snapshot '{name}'"
    return Step("save-internal", arguments, text, (command,), undo="delete it")


def disks_step(resolved: Resolved, token: str) -> Step:
    """All disks at one instant, by one transaction."""
    external, internal = [], []
    for number, plan in enumerate(resolved.of(DiskMode.EXTERNAL)):
        external.append(
            {"node": plan.facts.node, "overlay": f"ds-{token}-{number}", "path": plan.overlay,
             "base": plan.facts.disk.path, "format": plan.facts.disk.format}
        )  # fmt: skip
    for plan in resolved.of(DiskMode.INTERNAL):
        internal.append({"node": plan.facts.node, "name": resolved.request.name, "path": plan.facts.disk.path})
    arguments = {"external": external, "internal": internal, "token": token}
    stopped = resolved.memory is MemoryMode.EXTERNAL or resolved.request.quiesce
    return Step(
        "disks",
        arguments,
        f"at one instant: {len(external)} disks to their overlays, {len(internal)} internal snapshots",
        (transaction_command(external, internal),),
        undo="merge the overlays back, delete the internal snapshots",
        paused=stopped,
    )


def transaction_command(external: list[dict[str, Any]], internal: list[dict[str, Any]]) -> dict[str, Any]:
    """One QMP transaction for all disks of a snapshot."""
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": one["node"], "overlay": one["overlay"]}} for one in external
    ]
    actions += [
        {"type": "blockdev-snapshot-internal-sync", "data": {"device": one["node"], "name": one["name"]}}
        for one in internal
    ]
    return qmp_command("transaction", actions=actions)


def _memory_arguments(resolved: Resolved) -> dict[str, Any]:
    return {
        "path": resolved.memory_file,
        "liveness": resolved.liveness.value,
        "max_bandwidth": resolved.facts.max_bandwidth,
        "capabilities": list(resolved.facts.capabilities),
    }


def _memory_step(resolved: Resolved) -> Step:
    live = resolved.liveness is Liveness.LIVE
    how = {
        Liveness.PAUSED: "write the memory, with the guest stopped",
        Liveness.LIVE: "write the memory while the guest runs, up to the moment when it has to pause",
        Liveness.BACKGROUND: "write the memory; the guest runs again as soon as its devices are saved",
    }[resolved.liveness]
    capability = MEMORY_CAPABILITIES.get(resolved.liveness.value)
    wanted = [] if capability is None else [{"capability": capability, "state": True}]
    commands = (
        *([qmp_command("migrate-set-capabilities", capabilities=wanted)] if wanted else ()),
        qmp_command("migrate-set-parameters", max_bandwidth=MEMORY_BANDWIDTH),
        qmp_command("getfd", fdname="domsnap-memory"),
        qmp_command("migrate", uri="fd:domsnap-memory"),
    )
    undo = "cancel, put the migration parameters back"
    return Step("memory", _memory_arguments(resolved), how, commands, undo=undo, paused=not live)


def _record_step(resolved: Resolved) -> Step:
    overlays = {plan.facts.disk.target: plan.overlay for plan in resolved.of(DiskMode.EXTERNAL)}
    arguments = {"name": resolved.request.name, "layers": overlays}
    return Step("record", arguments, "enter it into the catalog", undo="take it out again", commits=True)
