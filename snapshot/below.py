"""Internal snapshots in files that a running QEMU has open as backing files, and so only for reading.

QEMU deletes a snapshot in any node that can be written, by the job `snapshot-delete`. A backing file's node is opened
for writing while it does; the layers above read the same before, meanwhile and afterwards. QMP's blockdev-reopen takes
no node that QEMU has named itself, and sets every option that is not given to its default: HMP's reopen does neither.
"""

from __future__ import annotations

import contextlib
from typing import Any

from snapshot.blockgraph import BlockGraph
from snapshot.errors import QmpError
from snapshot.jobs import run_job, wait_for_job
from snapshot.plan_delete import reopen_command
from snapshot.session import Session

_JOB = "ds-delete-below"


def is_below(graph: BlockGraph, node: str) -> bool:
    """Whether a node is a backing file."""
    return any(kind == "block-driver" and role == "backing" for kind, _name, role in graph.parents(node))


def try_writing(session: Session, arguments: dict[str, Any]) -> None:
    """See that QEMU can open a backing file for writing, before anything depends on it.

    Raises:
        QmpError: it cannot; nothing was changed.
    """
    node = BlockGraph.query(session.qmp).find(arguments["path"])
    if node is not None:
        _reopen(session, node, writable=True)
        _reopen(session, node, writable=False)


def read_again(session: Session, arguments: dict[str, Any]) -> None:
    """Undo: only for reading, as before."""
    if session.alive():
        graph = BlockGraph.query(session.qmp)
        node = graph.find(arguments["path"])
        if node is not None and is_below(graph, node) and not graph.node(node)["ro"]:
            _reopen(session, node, writable=False)


def delete_below(session: Session, path: str, node: str, name: str) -> None:
    """Delete the internal snapshot of a name in a backing file, if it is there; again when it was cut off before.

    Raises:
        QmpError: QEMU could not.
    """
    with contextlib.suppress(QmpError):
        wait_for_job(session, _JOB, interruptible=False)
    stored = BlockGraph.query(session.qmp).node(node).get("image", {}).get("snapshots", [])
    try:
        if any(one["name"] == name for one in stored):
            _reopen(session, node, writable=True)
            run_job(session, _JOB, "snapshot-delete", {"tag": name, "devices": [node]}, interruptible=False)
    finally:
        read_again(session, {"path": path})


def _reopen(session: Session, node: str, *, writable: bool) -> None:
    command = reopen_command(node, writable=writable)
    answer = str(session.qmp.execute(command["execute"], command["arguments"])).strip()
    if answer:  # HMP has no other way to say that something failed
        raise QmpError("reopen", answer)
