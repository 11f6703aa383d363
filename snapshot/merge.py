"""Actions of a deletion: each can be done again when it was cut off, and looks at what is left to do."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

import qcowlib
from snapshot import offline
from snapshot.below import delete_below, is_below
from snapshot.blockgraph import BlockGraph
from snapshot.domain import below_path, same_file
from snapshot.errors import DomainSnapshotError, QmpError
from snapshot.jobs import run_job, wait_for_job
from snapshot.journal import sync_directory
from snapshot.session import Session, unlocked

Arguments = dict[str, Any]
_LOCAL = qcowlib.LocalFiles()


def forget(session: Session, arguments: Arguments) -> None:
    """Take the entry out of the catalog; its children become its parent's."""
    if any(snapshot.name == arguments["name"] for snapshot in session.store.load()):
        session.store.remove(arguments["name"])


def remove_internal(session: Session, arguments: Arguments) -> None:
    """Delete an internal snapshot, by QEMU where it has the file open."""
    name, path = arguments["name"], arguments["path"]
    if session.alive():
        graph = BlockGraph.query(session.qmp)
        node = graph.find(path)
        if node is not None and is_below(graph, node):
            delete_below(session, path, node, name)
            return
        if node is not None:
            for stored in graph.node(node).get("image", {}).get("snapshots", []):
                if stored["name"] == name and arguments["id"] in (None, str(stored["id"])):
                    command = {"device": node, "name": name, "id": str(stored["id"])}
                    session.qmp.execute("blockdev-snapshot-delete-internal-sync", command)
            return
    if os.path.exists(path):
        offline.delete_internal(path, name, arguments["id"])


def merge_down(session: Session, arguments: Arguments) -> None:
    """Write an overlay's data to its base; what was based on the overlay is then based on the base."""
    frozen, overlay = arguments["frozen"], arguments["overlay"]
    if not (session.alive() and _merged_by_qemu(session, arguments)) and os.path.exists(overlay):
        offline.merge_back(overlay, frozen)
    # QEMU has changed the names in the files that it has open.
    for child in arguments["children"]:
        if os.path.exists(child) and _on(child, overlay):
            with unlocked(lambda path=child: offline.open_writable_layer(path)) as image:  # type: ignore[misc]
                qcowlib.rebase(image, frozen, arguments["format"], unsafe=True)


def _merged_by_qemu(session: Session, arguments: Arguments) -> bool:
    """Let QEMU merge, where it has the overlay open; whether it has or had."""
    _finish(session, arguments["job"])
    graph = BlockGraph.query(session.qmp)
    top, base = graph.find(arguments["overlay"]), graph.find(arguments["frozen"])
    if top is None:
        return base is not None
    if base is not None and graph.child(top, "backing") == base:
        device = graph.root_above(top)
        if device is None:
            raise DomainSnapshotError(f"QEMU has '{arguments['overlay']}' open, but under none of its disks")
        command = {"device": device, "base-node": base, "auto-dismiss": False}
        if device != top:
            command["top-node"] = top
        run_job(session, arguments["job"], "block-commit", command)
    _drop(session, top)
    return True


def merge_up(session: Session, arguments: Arguments) -> None:
    """Copy what an overlay still reads from its base into it; it is then based on what the base was based on."""
    frozen, overlay, below = arguments["frozen"], arguments["overlay"], arguments["below"]
    if session.alive():
        _finish(session, arguments["job"])
        graph = BlockGraph.query(session.qmp)
        top, base = graph.find(overlay), graph.find(frozen)
        if top is not None:
            if base is not None and graph.child(top, "backing") == base:
                command: dict[str, Any] = {"device": top, "auto-dismiss": False}
                lower = graph.child(base, "backing")
                if lower is not None:
                    command["base-node"] = lower
                run_job(session, arguments["job"], "block-stream", command)
                _drop(session, base)
            return
    if not os.path.exists(overlay) or not _on(overlay, frozen):
        return
    with contextlib.ExitStack() as opened:
        top_image = opened.enter_context(unlocked(lambda: offline.open_writable(overlay, "qcow2")))
        if not isinstance(top_image, qcowlib.WritableQcow2Image):
            raise DomainSnapshotError(f"'{overlay}' is no qcow2 image")
        if below is None:
            qcowlib.rebase(top_image, None)
        else:
            below_format = arguments["below_format"] or offline.probed(below)
            new = opened.enter_context(qcowlib.open_image(below, format=below_format, policy=_LOCAL))
            qcowlib.rebase(top_image, below, below_format, new=new)


def rename(session: Session, arguments: Arguments) -> None:
    """Entries and active layers that name a file that goes name the one that takes its place."""
    old, new = arguments["old"], arguments["new"]
    for snapshot in session.store.load():
        disks = tuple(
            replace(
                disk,
                file=new if disk.file == old else disk.file,
                format=arguments["format"] if disk.file == old else disk.format,
                overlay=new if disk.overlay == old else disk.overlay,
            )
            for disk in snapshot.disks
        )
        if disks != snapshot.disks:
            session.store.replace(replace(snapshot, disks=disks))
    layers = session.journal.layers()
    if layers.get(arguments["target"]) == old:
        described = arguments["described"]
        if described is not None and same_file(described, new):
            del layers[arguments["target"]]
        else:
            layers[arguments["target"]] = new
        session.journal.set_layers(layers)


def remove_file(session: Session, arguments: Arguments) -> None:
    """Remove a file that nobody uses any more.

    Raises:
        DomainSnapshotError, QcowError: it is in use, or something is based on it; it stays.
    """
    path = arguments["path"]
    if not os.path.lexists(path):
        session.journal.set_made(session.journal.made() - {path})
        return
    if arguments["image"]:
        entries = [disk for snapshot in session.store.load() for disk in snapshot.disks]
        known = {name for disk in entries for name in (disk.file, disk.overlay) if name is not None}
        based = offline.dependents([path], {*known, *session.journal.layers().values()}, arguments["raw"])[path]
        if based:
            raise DomainSnapshotError(f"'{path}' stays: '{based[0]}' is based on it")
        if session.alive() and BlockGraph.query(session.qmp).find(path) is not None:
            raise DomainSnapshotError(f"'{path}' stays: QEMU still has it open")
        with offline.writable_or_broken(path):
            pass
    os.unlink(path)
    sync_directory(os.path.dirname(path))
    session.journal.set_made(session.journal.made() - {path})


def _on(overlay: str, base: str) -> bool:
    below = below_path(overlay)
    return below is not None and same_file(below, base)


def _finish(session: Session, job: str) -> None:
    """Wait for the job of a domsnap that is gone."""
    with contextlib.suppress(QmpError):
        wait_for_job(session, job)


def _drop(session: Session, node: str) -> None:
    """Let QEMU close a node that nothing uses any more; it may have gone by itself."""
    if node in BlockGraph.query(session.qmp):
        with contextlib.suppress(QmpError):
            session.qmp.execute("blockdev-del", {"node-name": node})
