"""Memory of a guest that stands, into a file: saved by QEMU into an image that is no disk of it, copied from there.

    scratch (its name is taken away at once) -> fdset -> node -> snapshot-save -> its vm state -> the memory file

A migration gives the disks' images away when it has ended, and QEMU 7.2 takes them back only by running the guest. The
vm state of an internal snapshot is the same stream, and saving it leaves a guest that stands, and its disks, alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import qcowlib
from snapshot.blockgraph import BlockGraph
from snapshot.errors import DomainSnapshotError, QmpError
from snapshot.jobs import run_job, wait_for_job
from snapshot.memory import copy_vmstate
from snapshot.session import Session

Arguments = dict[str, Any]

_SNAPSHOT = "memory"
_DISK_SIZE = 1 << 20  # nothing is ever written to it


def save_standing(session: Session, arguments: Arguments) -> None:
    """Write the memory into the file that is there.

    Raises:
        QmpError: QEMU could not save it.
        DomainSnapshotError: the host could not hold it.
    """
    node, path = arguments["node"], arguments["path"]
    try:
        with _nameless(arguments["scratch"]) as scratch:
            name = session.qmp.add_descriptor(scratch.fileno(), node)
            file = {"driver": "file", "filename": name}
            session.qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file})
            command = {"tag": _SNAPSHOT, "vmstate": node, "devices": [node]}
            run_job(session, arguments["job"], "snapshot-save", command, interruptible=False)
            _close(session, node)
            with open(path, "r+b", buffering=0) as target:
                copy_vmstate(scratch.fileno(), _SNAPSHOT, target, lambda done, total: _copied(session, done, total))
            scratch.truncate(0)  # QEMU keeps a removed descriptor open until the guest runs
    except OSError as error:
        raise DomainSnapshotError(f"cannot write '{path}': {error.strerror}") from error


@contextlib.contextmanager
def _nameless(path: str) -> Iterator[BinaryIO]:
    """An empty image without a name, so that nothing of the guest's memory is left whatever happens."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b", buffering=0) as file:
        try:
            qcowlib.create_image(path, _DISK_SIZE)
        finally:
            os.unlink(path)
        yield file


def end_standing(session: Session, arguments: Arguments) -> None:
    """Undo: wait for the end of the job, which cannot be cancelled, and let QEMU close the image."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(arguments["scratch"])
    if session.alive():
        with contextlib.suppress(QmpError):
            wait_for_job(session, arguments["job"], interruptible=False)
        _close(session, arguments["node"])


def _copied(session: Session, done: int, total: int) -> None:
    session.interrupt.check()
    session.report("memory", done, total)


def _close(session: Session, node: str) -> None:
    if node in BlockGraph.query(session.qmp):
        session.qmp.execute("blockdev-del", {"node-name": node})
    for one in session.qmp.execute("query-fdsets"):
        if any(descriptor.get("opaque") == node for descriptor in one["fds"]):
            session.qmp.execute("remove-fd", {"fdset-id": one["fdset-id"]})
