"""Actions on a running QEMU: how each step of a plan is done, and undone.

Every undo looks at what is there and makes it what it was; it can be called whether or not the step was done, and again
by another process (`recover`). When QEMU has died meanwhile, the files are put right instead.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import qcowlib
from snapshot import offline
from snapshot.blockgraph import BlockGraph
from snapshot.errors import DomainSnapshotError, QmpError
from snapshot.jobs import run_commit, run_job, wait_for_job
from snapshot.journal import sync_directory
from snapshot.plan import add_base_command, add_node_command, reopen_command, transaction_command
from snapshot.qmp import Qmp
from snapshot.session import Session

Arguments = dict[str, Any]
_SAVE_DEADLINE = 24 * 3600.0


def execute(qmp: Qmp, command: dict[str, Any], deadline: float | None = None) -> Any:  # noqa: ANN401 - QEMU's answer
    """Run a command in its wire form."""
    return qmp.execute(command["execute"], command.get("arguments"), deadline=deadline)


def make_overlay(session: Session, arguments: Arguments) -> None:
    """Make an empty qcow2 file on a base that may be in use; owner and mode are the base's."""
    path, base = arguments["path"], arguments["backing"]
    make_file_like(session, path, base)
    qcowlib.create_overlay(path, base, backing_fmt=arguments["format"], size=arguments["size"], check_backing=False)
    sync(path)


def make_file_like(session: Session, path: str, model: str) -> None:
    """Make an empty file with the owner and the mode of another one.

    Raises:
        DomainSnapshotError: something of that name is there, and is left alone.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        session.foreign.add(path)
        raise DomainSnapshotError(f"cannot make '{path}': {error.strerror}") from error
    try:
        status = os.stat(model)
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, status.st_uid, status.st_gid)
        os.fchmod(descriptor, status.st_mode & 0o777)
    finally:
        os.close(descriptor)


def unmake_overlay(session: Session, arguments: Arguments) -> None:
    """Remove the overlay (or the copy of a state), unless somebody uses it, or it is none of ours."""
    path = arguments["path"]
    if not os.path.exists(path) or path in session.foreign:
        return
    if not offline.is_fresh_overlay(path, arguments["backing"]):
        raise DomainSnapshotError(f"'{path}' is not the image that was to be made: it stays")
    if session.alive() and BlockGraph.query(session.qmp).find(path) is not None:
        raise DomainSnapshotError(f"'{path}' is still used by QEMU")
    if os.path.getsize(path):
        with offline.writable_or_broken(path):
            pass
    os.unlink(path)
    sync_directory(os.path.dirname(path))


def add_node(session: Session, arguments: Arguments) -> None:
    """Let QEMU open an overlay with the cache options of the disk that it is for."""
    like = BlockGraph.query(session.qmp).node(arguments["like"])
    cache = like.get("cache", {})
    options: dict[str, Any] = {"discard": "unmap"}
    if cache:
        options["cache"] = {"direct": cache["direct"], "no-flush": cache["no-flush"]}
    execute(session.qmp, add_node_command(arguments["node"], arguments["path"], **options))


def remove_node(session: Session, arguments: Arguments) -> None:
    """Let QEMU close an overlay."""
    if session.alive() and arguments["node"] in BlockGraph.query(session.qmp):
        session.qmp.execute("blockdev-del", {"node-name": arguments["node"]})


def stop(session: Session, arguments: Arguments) -> None:  # noqa: ARG001 - one signature for all actions
    """Stop the guest."""
    session.qmp.execute("stop")


def cont(session: Session, arguments: Arguments) -> None:  # noqa: ARG001
    """Resume the guest, if it does not run already."""
    if session.qmp.execute("query-status")["status"] != "running":
        session.qmp.execute("cont")


def ensure_running(session: Session, arguments: Arguments) -> None:  # noqa: ARG001
    """Undo of `stop`: a guest that ran before runs; not while its disks may hold anything else than it knows."""
    if session.was_running and not session.parted and session.alive():
        cont(session, {})


def disks(session: Session, arguments: Arguments) -> None:
    """All disks at one instant."""
    session.instant = time.time_ns()
    execute(session.qmp, transaction_command(arguments["external"], arguments["internal"]))


def undo_disks(session: Session, arguments: Arguments) -> None:
    """Merge what was written to the overlays back, and delete the internal snapshots."""
    if not session.alive():
        for one in arguments["external"]:
            offline.merge_back(one["path"], one["base"])
        for one in arguments["internal"]:
            offline.delete_internal(one["path"], one["name"])
        return
    reactivate(session)
    graph = BlockGraph.query(session.qmp)
    for number, one in enumerate(arguments["external"]):
        if graph.child(one["overlay"], "backing") == one["node"]:
            run_commit(session, f"ds-{arguments['token']}-back{number}", one["overlay"], one["node"])
    for one in arguments["internal"]:
        node = node_of(graph, one["node"], one["path"])
        if one["name"] in stored_names(graph, node):
            arguments_ = {"device": node, "name": one["name"]}
            session.qmp.execute("blockdev-snapshot-delete-internal-sync", arguments_)


def reactivate(session: Session) -> None:
    """Take the images back after a finished migration; QEMU can do this only by running the guest.

    A guest that stood still before runs for the moment between two commands.
    """
    if session.qmp.execute("query-status")["status"] == "postmigrate":
        session.qmp.execute("cont")
        if not session.was_running:
            session.qmp.execute("stop")


def stored_names(graph: BlockGraph, node: str) -> list[str]:
    """Names of the internal snapshots of a node."""
    return [snapshot["name"] for snapshot in graph.node(node).get("image", {}).get("snapshots", [])]


def save_internal(session: Session, arguments: Arguments) -> None:
    """Memory and disks into the qcow2 files."""
    nodes, session.instant = nodes_of(session, arguments), time.time_ns()
    command = {"tag": arguments["name"], "vmstate": nodes[0], "devices": nodes}
    run_job(session, arguments["job"], "snapshot-save", command, deadline=_SAVE_DEADLINE, interruptible=False)


def undo_save(session: Session, arguments: Arguments) -> None:
    """Delete the snapshot on every disk that has it."""
    name = arguments["name"]
    if not session.alive():
        for path in arguments["paths"]:
            offline.delete_internal(path, name)
        return
    with contextlib.suppress(QmpError):
        wait_for_job(session, arguments["job"], deadline=_SAVE_DEADLINE, interruptible=False)
    graph = BlockGraph.query(session.qmp)
    having = [node for node in nodes_of(session, arguments) if name in stored_names(graph, node)]
    if having:
        command = {"tag": name, "devices": having}
        run_job(session, f"{arguments['job']}-undo", "snapshot-delete", command, interruptible=False)


def load_internal(session: Session, arguments: Arguments) -> None:
    """Memory and disks back from the qcow2 files; the guest stands before and after."""
    _load(session, arguments, arguments["name"], arguments["job"])


def unload_internal(session: Session, arguments: Arguments) -> None:
    """Undo: back to the state that was saved right before.

    QEMU's load is not atomic, so that this is done whether or not it got as far as changing anything.
    """
    if not session.alive():
        for path in arguments["paths"]:
            offline.apply_internal(path, arguments["way_back"])
        return
    with contextlib.suppress(QmpError):
        wait_for_job(session, arguments["job"], deadline=_SAVE_DEADLINE, interruptible=False)
    graph = BlockGraph.query(session.qmp)
    if all(arguments["way_back"] in stored_names(graph, node) for node in nodes_of(session, arguments)):
        _load(session, arguments, arguments["way_back"], f"{arguments['job']}-back")


def nodes_of(session: Session, arguments: Arguments) -> list[str]:
    """The nodes of a step's files: as planned, or what QEMU has them open as since."""
    graph = BlockGraph.query(session.qmp)
    return [node_of(graph, node, path) for node, path in zip(arguments["nodes"], arguments["paths"], strict=True)]


def node_of(graph: BlockGraph, node: str, path: str) -> str:
    """A node, or the one that has its file open now that it is gone."""
    found = node if node in graph else graph.find(path)
    if found is None:
        raise DomainSnapshotError(f"QEMU does not have '{path}' open")
    return found


def _load(session: Session, arguments: Arguments, name: str, job: str) -> None:
    nodes = nodes_of(session, arguments)
    graph = BlockGraph.query(session.qmp)
    holding = [
        node
        for node in nodes
        for stored in graph.node(node).get("image", {}).get("snapshots", [])
        if stored["name"] == name and stored["vm-state-size"]
    ]
    if len(holding) != 1:
        raise DomainSnapshotError(f"{len(holding)} disks hold memory of the snapshot '{name}', where one should")
    command = {"tag": name, "vmstate": holding[0], "devices": nodes}
    run_job(session, job, "snapshot-load", command, deadline=_SAVE_DEADLINE, interruptible=False)


def drop_way_back(session: Session, arguments: Arguments) -> None:
    """Delete the internal snapshots that were only the way back."""
    name = arguments["name"]
    for path in arguments["paths"]:
        if session.alive():
            graph = BlockGraph.query(session.qmp)
            node = graph.find(path)
            if node is not None and name in stored_names(graph, node):
                session.qmp.execute("blockdev-snapshot-delete-internal-sync", {"device": node, "name": name})
        else:
            offline.delete_internal(path, name)


def swap(session: Session, arguments: Arguments) -> None:
    """Put new overlays of older files under the running devices, all at once."""
    graph = BlockGraph.query(session.qmp)
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": one["top"], "overlay": one["node"]}}
        for one in arguments["disks"]
    ]
    session.qmp.execute("transaction", {"actions": actions})
    below = {one["node"]: node_of(graph, "", one["frozen"]) for one in arguments["disks"]}
    execute(session.qmp, reopen_command(below))


def unswap(session: Session, arguments: Arguments) -> None:
    """Undo: the present overlays back under the devices; the new ones hold nothing, since the guest stands."""
    if not session.alive():
        return
    for number, one in enumerate(arguments["disks"]):
        graph = BlockGraph.query(session.qmp)
        below = graph.child(one["node"], "backing")
        if below is None:
            continue
        top = one["top"] if one["top"] in graph else graph.find(one["path"])
        if top is None:  # QEMU closes a node of its own naming with its last user, and takes no name like it
            top = f"{one['node']}-p"
            options = {"driver": one["format"], "node-name": top, "file": _file_options(graph, one)}
            session.qmp.execute("blockdev-add", options)
        if below != top:
            execute(session.qmp, reopen_command({one["node"]: top}))
        run_commit(session, f"ds-{arguments['token']}-back{number}", one["node"], top)


def _file_options(graph: BlockGraph, one: dict[str, Any]) -> dict[str, Any]:
    """How a disk's file is opened again: with the cache options that its new overlay has got from it."""
    cache = graph.node(one["node"]).get("cache", {})
    options: dict[str, Any] = {"driver": "file", "filename": one["path"], "discard": "unmap"}
    if cache:
        options["cache"] = {"direct": cache["direct"], "no-flush": cache["no-flush"]}
    return options


def add_base(session: Session, arguments: Arguments) -> None:
    """Let QEMU open an older file with all below it, read-only, if it has not done so already."""
    if BlockGraph.query(session.qmp).find(arguments["path"]) is None:
        execute(session.qmp, add_base_command(**arguments))


def drop_nodes(session: Session, arguments: Arguments) -> None:
    """Let QEMU close nodes that nothing uses any more; those that still serve stay."""
    if session.alive():
        for node in arguments["nodes"]:
            with contextlib.suppress(QmpError):
                session.qmp.execute("blockdev-del", {"node-name": node})


def reset(session: Session, arguments: Arguments) -> None:  # noqa: ARG001
    """Restart the guest's machine: its memory does not fit its disks any more."""
    if session.alive():
        session.qmp.execute("system_reset")


def settle(session: Session, arguments: Arguments) -> None:
    """Run or pause the guest, as it was asked for."""
    if session.alive():
        session.qmp.execute("cont" if arguments["running"] else "stop")


def sync(path: str) -> None:
    """Make a file and its name durable.

    Raises:
        DomainSnapshotError: the host could not write it all.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        raise DomainSnapshotError(f"cannot make '{path}' durable: {error.strerror}") from error
