"""The steps of a revert that nothing is against, by the way that it takes (see `plan_revert_request`). No I/O."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from typing import Any

from snapshot.domain import DiskFacts
from snapshot.model import DiskSnapshot, MemoryMode
from snapshot.plan import (
    MEMORY_BANDWIDTH,
    add_base_command,
    add_node_step,
    memory_first,
    reopen_command,
    save_internal_step,
)
from snapshot.plan_revert_request import RevertRequest, Way
from snapshot.restart import fill_command
from snapshot.step import Step, qmp_command


def steps(request: RevertRequest) -> list[Step]:
    """The steps of a revert that nothing is against."""
    makers = {Way.LOAD: _load_steps, Way.SWAP: _swap_steps, Way.RESTART: _restart_steps, Way.OFFLINE: _offline_steps}
    return list(makers[request.way](request))


def _load_steps(request: RevertRequest) -> Iterator[Step]:
    """Save the present state, load the wanted one, forget the saved one."""
    facts = memory_first([request.facts.by_target()[disk.target] for disk in request.chosen])
    name, way_back = request.snapshot.name, f"ds-{request.token}"
    paths, nodes = [one.disk.path for one in facts], [one.node for one in facts]
    yield from _stop_steps(request)
    save = save_internal_step(way_back, facts, request.token)
    yield Step(save.action, save.arguments, "save the present state as the way back", save.commands, undo="delete it")
    arguments = {"name": name, "way_back": way_back, "nodes": nodes, "paths": paths, "job": f"ds-{request.token}-load"}
    holding = next((one.node for one in facts if _holds_memory(one, name)), nodes[0])
    command = qmp_command("snapshot-load", job_id=arguments["job"], tag=name, vmstate=holding, devices=nodes)
    yield Step("load-internal", arguments, f"load memory and disks of '{name}'", (command,), undo="load the way back")
    yield _switch_step(request)
    yield _drop_step(way_back, dict(zip(paths, nodes, strict=True)))
    yield _settle_step(request)


def _holds_memory(facts: DiskFacts, name: str) -> bool:
    return any(stored.name == name and stored.vm_state_size for stored in facts.snapshots)


def _swap_steps(request: RevertRequest) -> Iterator[Step]:
    domain, disks = request.facts.by_target(), []
    old_nodes: list[str] = []
    below: dict[str, str] = {}
    for number, disk in enumerate(request.chosen):
        node, path, top = f"ds-{request.token}-{number}", request.new_layer(disk), domain[disk.target]
        yield from _file_steps(request, disk)
        yield add_node_step(node, path, top.node)
        frozen, frozen_format = request.bottom(disk)
        opened = _opened(request, frozen)
        arguments = {"path": frozen, "image_format": frozen_format, "node": f"{node}-b"}
        below[node] = opened or f"{node}-b"
        commands = () if opened else (add_base_command(**arguments),)
        yield Step("add-base", arguments, f"let QEMU open '{frozen}', if it has not", commands,
                   undo="let QEMU close it")  # fmt: skip
        old_nodes += [top.node, *top.chain_nodes]
        disks.append({"top": top.node, "path": top.disk.path, "format": top.disk.format, "node": node,
                      "frozen": frozen})  # fmt: skip
    yield from _stop_steps(request)
    actions = [{"type": "blockdev-snapshot", "data": {"node": d["top"], "overlay": d["node"]}} for d in disks]
    swap_commands = (qmp_command("transaction", actions=actions), reopen_command(below))
    yield Step("swap", {"disks": disks, "token": request.token}, "put the new overlays under the devices",
               swap_commands, undo="put the present ones back", paused=True)  # fmt: skip
    yield _switch_step(request)
    yield Step("reset", {}, "reset the guest", (qmp_command("system_reset"),))
    closing = tuple(qmp_command("blockdev-del", node_name=node) for node in old_nodes)
    yield Step("drop-nodes", {"nodes": old_nodes}, "let QEMU close the files that are no longer used", closing)
    yield _settle_step(request)


def _opened(request: RevertRequest, path: str) -> str | None:
    """The node of a file that a disk's chain has open already."""
    for facts in request.facts.disks:
        for name, node in zip((facts.disk.path, *facts.disk.backing_chain), (facts.node, *facts.chain_nodes),
                              strict=False):  # fmt: skip
            if os.path.abspath(name) == os.path.abspath(path):
                return node
    return None


def _restart_steps(request: RevertRequest) -> Iterator[Step]:
    for disk in request.chosen:
        yield from _file_steps(request, disk)
    if request.parting:
        yield _part_step(request)
    elif request.facts.active:
        yield from _stop_steps(request)
    if request.inside:
        yield _hold_step(request)
        yield from _apply_steps(request)
        yield Step("let-go", {}, "give the images free for QEMU")
    start = _start_step(request)
    yield start
    yield _switch_step(request)
    ending = (qmp_command("quit"),) if request.facts.active else ()
    yield Step("take-over", start.arguments, "end the old QEMU, if there is one; take its socket's name", ending)
    if request.inside:
        # The nodes of the new QEMU have the names that its command gives them.
        yield _drop_step(f"ds-{request.token}", {disk.file: f"(node of '{disk.file}')" for disk in request.inside})
    yield _settle_step(request)


def _part_step(request: RevertRequest) -> Step:
    """A migration to nowhere: its end is where QEMU lets go of its disks; the memory stays in the process."""
    arguments = {"path": os.devnull, "liveness": "paused", "max_bandwidth": request.facts.max_bandwidth,
                 "capabilities": list(request.facts.capabilities)}  # fmt: skip
    commands = (
        *((qmp_command("stop"),) if request.facts.run_state == "running" else ()),
        qmp_command("migrate-set-parameters", max_bandwidth=MEMORY_BANDWIDTH),
        qmp_command("getfd", fdname="domsnap-memory"),
        qmp_command("migrate", uri="fd:domsnap-memory"),
    )
    text = "stop the guest, and let its QEMU part from the disks; its memory stays where it is"
    return Step("part", arguments, text, commands, undo="let QEMU take the disks back, and resume the guest")


def _start_step(request: RevertRequest) -> Step:
    final = request.socket or ""
    socket = f"{final}.{request.token}" if request.facts.active else final
    values = {"qmp": socket}
    sizes: dict[str, int | None] = {}
    chosen = {disk.target: disk for disk in request.chosen}
    for facts in request.facts.disks:
        target, path, image_format = facts.disk.target, facts.disk.path, facts.disk.format
        if target in chosen:
            path, image_format = request.new_layer(chosen[target]), "qcow2"
            sizes[path] = chosen[target].virtual_size
        elif not facts.disk.read_only:
            sizes[path] = None
        values |= {f"disk:{target}": path, f"format:{target}": image_format}
    memory, with_memory = request.snapshot.memory, request.memory is not MemoryMode.NO
    command = fill_command(request.command, values, ["-S", "-incoming", "defer"] if with_memory else ["-S"])
    arguments: dict[str, Any] = {
        "command": command,
        "folder": request.folder,
        "socket": socket,
        "final": final,
        "memory": memory.file if with_memory else None,
        "state": _state_with_memory(request),
        "machine": memory.machine if with_memory else None,
        "ram_size": memory.ram_size if with_memory else None,
        "sizes": sizes,
        "places": {request.new_layer(disk): disk.place for disk in request.chosen if with_memory},
        "log": os.path.join(request.directory, "start.log"),
        "pid_file": os.path.join(request.directory, "start.pid"),
    }
    text = "start a QEMU with the guest standing, to begin anew"
    commands: tuple[dict[str, Any], ...] = ()
    if with_memory:
        text = f"start a QEMU with the guest standing, with the memory in '{memory.file}'"
        commands = (
            qmp_command("getfd", fdname="domsnap-memory"),
            qmp_command("migrate-incoming", uri="fd:domsnap-memory"),
        )
    return Step("start", arguments, text, commands, undo="end it", program=shlex.join(command))


def _state_with_memory(request: RevertRequest) -> str | None:
    """The name of the internal snapshot whose vm state is the memory; None when it has a file of its own."""
    if request.memory is not MemoryMode.INTERNAL:
        return None
    file = request.snapshot.memory.file
    return next((request.internal_name(d) for d in request.chosen if d.file == file), request.snapshot.name)


def _offline_steps(request: RevertRequest) -> Iterator[Step]:
    yield _hold_step(request)
    yield from _apply_steps(request)
    for disk in request.chosen:
        yield from _file_steps(request, disk)
    yield _switch_step(request)
    if request.inside:
        yield Step("let-go", {}, "give the images free")
        yield _drop_step(f"ds-{request.token}", {disk.file: None for disk in request.inside})


def _stop_steps(request: RevertRequest) -> Iterator[Step]:
    if request.facts.run_state == "running":
        yield Step("stop", {}, "stop the guest", (qmp_command("stop"),), undo="resume it")


def _hold_step(request: RevertRequest) -> Step:
    inside = {disk.file for disk in request.inside}
    held = [{"path": path, "format": "qcow2", "writable": True} for path in sorted(inside)]
    if not request.facts.active or request.parting:  # else a QEMU holds the present layers, and keeps them
        held += [
            {"path": facts.disk.path, "format": facts.disk.format, "writable": False}
            for facts in request.facts.disks
            if facts.disk.path not in inside and not facts.disk.read_only
        ]
    return Step("hold", {"disks": held}, "lock the images, so that the domain cannot start meanwhile")


def _apply_steps(request: RevertRequest) -> Iterator[Step]:
    """Save the present state of each file, then apply the snapshot to it."""
    way_back = f"ds-{request.token}"
    for disk in request.inside:
        arguments = {"path": disk.file, "name": way_back}
        yield Step("create-internal", arguments, f"keep the present state of '{disk.file}'", undo="delete it")
    for disk in request.inside:
        name = request.internal_name(disk)
        arguments = {"path": disk.file, "name": name, "way_back": way_back}
        yield Step("apply-internal", arguments, f"apply '{name}' to '{disk.file}'", undo="apply the present state")


def _file_steps(request: RevertRequest, disk: DiskSnapshot) -> Iterator[Step]:
    """The new files of a disk: an overlay, and before it the copy of a state that only another file's inside has."""
    bottom, bottom_format = request.bottom(disk)
    size = disk.virtual_size
    if request.copied(disk):
        state = request.state(disk)
        size = state.size
        arguments = {"path": bottom, "source": disk.file, "name": request.internal_name(disk), "size": size,
                     "backing": state.backing, "format": state.backing_format,
                     "shared": request.facts.active}  # fmt: skip
        text = f"copy '{arguments['name']}' out of '{disk.file}' into '{bottom}' ({state.data} bytes)"
        yield Step("copy-state", arguments, text, undo="remove it")
    if not request.in_place(disk):
        path = request.new_layer(disk)
        arguments = {"path": path, "backing": bottom, "format": bottom_format, "size": size}
        yield Step("make-overlay", arguments, f"make the overlay '{path}' on '{bottom}'", undo="remove it")


def _drop_step(way_back: str, files: dict[str, str | None]) -> Step:
    """Args: files: path, and QEMU's node as far as it is known."""
    command = "blockdev-snapshot-delete-internal-sync"
    commands = tuple(
        {"execute": command, "arguments": {"device": node, "name": way_back}}
        for node in files.values()
        if node is not None
    )
    return Step("drop-way-back", {"name": way_back, "paths": list(files)}, "delete the way back", commands)


def _switch_step(request: RevertRequest) -> Step:
    layers = {**request.layers, **{disk.target: request.new_layer(disk) for disk in request.chosen}}
    made = [request.new_layer(disk) for disk in request.chosen if not request.in_place(disk)]
    made += [request.bottom(disk)[0] for disk in request.chosen if request.copied(disk)]
    name = None if request.snapshot.foreign else request.snapshot.name  # the catalog cannot name what it has not
    arguments = {"name": name, "current": request.current, "layers": layers, "made": made,
                 "layers_before": dict(request.layers)}  # fmt: skip
    return Step("switch", arguments, f"'{request.snapshot.name}' is current", undo="the one before is", commits=True)


def _settle_step(request: RevertRequest) -> Step:
    running = request.running
    command = qmp_command("cont" if running else "stop")
    return Step("settle", {"running": running}, "resume the guest" if running else "leave the guest paused", (command,))
