"""Planning a snapshot: a request and the state of the domain give the steps. No I/O.

request + DomainFacts -> resolve -> Resolved (mode and files of every disk, where the memory goes)
Resolved, if nothing is against it (snapshot.against) -> steps
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snapshot.domain import DiskFacts, DomainFacts
from snapshot.model import Disk, DiskMode, Liveness, MemoryMode, SnapshotRequest
from snapshot.step import Step, qmp_command

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

    @property
    def memory_disk(self) -> DiskFacts | None:
        """The disk whose file takes the memory, if it goes inside."""
        inside = memory_first([plan.facts for plan in self.of(DiskMode.INTERNAL)])
        return inside[0] if inside and self.memory is MemoryMode.INTERNAL else None

    @property
    def standing(self) -> bool:
        """Whether the memory of a guest that stands goes into a file."""
        return self.memory is MemoryMode.EXTERNAL and self.facts.run_state != "running"

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


def steps(resolved: Resolved, token: str) -> list[Step]:
    """The steps of a snapshot that nothing is against.

    Args:
        resolved: what is to be done.
        token: goes into the names of nodes and jobs.
    """
    return list(_active_steps(resolved, token) if resolved.facts.active else _inactive_steps(resolved))


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


def _active_steps(resolved: Resolved, token: str) -> Iterator[Step]:
    name = resolved.request.name
    if resolved.memory is MemoryMode.INTERNAL:
        yield save_internal_step(name, [plan.facts for plan in resolved.of(DiskMode.INTERNAL)], token)
        yield _record_step(resolved)
        return
    for number, plan in enumerate(resolved.of(DiskMode.EXTERNAL)):
        yield overlay_step(plan.facts, plan.overlay or "")
        yield add_node_step(f"ds-{token}-{number}", plan.overlay or "", plan.facts.node)
    if resolved.memory_file is not None:
        text = f"make the memory file '{resolved.memory_file}'"
        yield Step("make-memory-file", {"path": resolved.memory_file}, text, undo="remove it")
    if resolved.request.quiesce:
        yield Step("freeze", {}, "freeze the guest's file systems", undo="thaw them")
    yield from _instant_steps(resolved, token)
    if resolved.memory is MemoryMode.EXTERNAL:
        yield Step("keep-memory", {"path": resolved.memory_file}, "make the memory file durable")
    if resolved.request.quiesce:
        yield Step("thaw", {}, "thaw the guest's file systems", paused=True)
    yield _record_step(resolved)


def _instant_steps(resolved: Resolved, token: str) -> Iterator[Step]:
    """Disks, and memory that goes into a file, of one instant; a guest that ran runs afterwards."""
    disks = disks_step(resolved, token)
    cont = Step("cont", {}, "resume the guest", (qmp_command("cont"),), paused=True)
    if resolved.memory is MemoryMode.NO:
        yield disks
    elif resolved.standing:
        yield from (disks, _standing_step(resolved, token))
    elif resolved.liveness is Liveness.LIVE:
        text = "write the rest of the memory, with the guest paused"
        command = qmp_command("migrate-continue", state="pre-switchover")
        rest = Step("end-memory", _memory_arguments(resolved), text, (command,), paused=True)
        yield from (_memory_step(resolved), disks, rest, cont)
    else:
        stop = Step("stop", {}, "stop the guest", (qmp_command("stop"),), undo="resume it")
        yield from (stop, disks, _memory_step(resolved), cont)


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


def add_base_command(path: str, image_format: str, node: str) -> dict[str, Any]:
    """The command that opens an older file with all below it, read-only."""
    file = {"driver": "file", "filename": path}
    return qmp_command("blockdev-add", driver=image_format, node_name=node, file=file, read_only=True)


def reopen_command(backing: Mapping[str, str]) -> dict[str, Any]:
    """The command that puts overlays (of `add_node_command`) on other nodes, all or none."""
    options = [
        {"driver": "qcow2", "node-name": node, "file": f"{node}-f", "backing": below} for node, below in backing.items()
    ]
    return qmp_command("blockdev-reopen", options=options)


def memory_first(disks: list[DiskFacts]) -> list[DiskFacts]:
    """Disks with the one first that takes the memory: QEMU 7.2 dies when it writes memory into an encrypted image."""
    return sorted(disks, key=lambda facts: facts.encrypted)


def save_internal_step(name: str, disks: list[DiskFacts], token: str) -> Step:
    """Memory and disks into the qcow2 files, by QEMU's own job; all or nothing."""
    disks = memory_first(disks)
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


def _standing_step(resolved: Resolved, token: str) -> Step:
    node, job = f"ds-{token}-m", f"ds-{token}-save"
    commands = (
        qmp_command("add-fd", opaque=node),
        qmp_command(
            "blockdev-add", driver="qcow2", node_name=node, file={"driver": "file", "filename": "/dev/fdset/0"}
        ),
        qmp_command("snapshot-save", job_id=job, tag="memory", vmstate=node, devices=[node]),
        qmp_command("blockdev-del", node_name=node),
    )
    text = "save the memory, with the guest as it stands, into an image that is none of its disks, and copy it"
    scratch = os.path.join(os.path.dirname(resolved.memory_file or ""), f".domsnap-{token}")
    arguments = {"path": resolved.memory_file, "scratch": scratch, "node": node, "job": job}
    return Step("save-standing", arguments, text, commands, undo="let QEMU close that image")


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
