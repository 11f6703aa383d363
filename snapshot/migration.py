"""Memory of a running guest into a file: QEMU's migration, into a descriptor that we pass.

paused       stop ... migrate -> completed ... cont
live         migrate -> pre-switchover (the guest stands, its disks are still ours) ... migrate-continue -> completed
background   stop ... migrate: the guest runs again by itself as soon as its devices are saved -> completed
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from snapshot.active import sync
from snapshot.errors import DomainSnapshotError, QmpError, QmpTimeout
from snapshot.journal import sync_directory
from snapshot.plan import MEMORY_BANDWIDTH, MEMORY_CAPABILITIES
from snapshot.qmp import Qmp, poll
from snapshot.session import Session

Arguments = dict[str, Any]

_DEADLINE = 24 * 3600.0
_LEAVE_DEADLINE = 60.0
_SETTLED = (None, "none", "completed", "failed", "cancelled")
#: Passes over the memory after which a guest that changes it faster than it is written is stopped.
_PASSES = 30
_CAPABILITIES = ("pause-before-switchover", "background-snapshot", "events")
_MAGIC = b"QEVM\0\0\0\3"


def make_memory_file(session: Session, arguments: Arguments) -> None:
    """Make the empty file."""
    try:
        os.close(os.open(arguments["path"], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        session.foreign.add(arguments["path"])
        raise DomainSnapshotError(f"cannot make '{arguments['path']}': {error.strerror}") from error


def unmake_memory_file(session: Session, arguments: Arguments) -> None:
    """Remove the file, unless it is none of ours."""
    path = arguments["path"]
    if path in session.foreign or not os.path.exists(path):
        return
    with open(path, "rb") as file:
        if file.read(8).strip(b"\0") not in (b"", _MAGIC):
            raise DomainSnapshotError(f"'{path}' is not the memory file that was to be written: it stays")
    os.unlink(path)
    sync_directory(os.path.dirname(path))


def background_possible(qmp: Qmp) -> str | None:
    """None when QEMU and the host's kernel can write memory in the background, else QEMU's reason."""
    try:
        _set_capabilities(qmp, {"background-snapshot": True})
    except QmpError as error:
        return error.text
    finally:
        with contextlib.suppress(QmpError):
            _set_capabilities(qmp, {"background-snapshot": False})
    return None


def write_memory(session: Session, arguments: Arguments) -> None:
    """Start writing; wait until it is done, or, live, until the guest stands before the rest.

    Raises:
        QmpError: QEMU could not write it.
    """
    qmp, liveness = session.qmp, arguments["liveness"]
    before = set(arguments["capabilities"])
    wanted = MEMORY_CAPABILITIES.get(liveness)
    _set_capabilities(qmp, {name: name == wanted for name in {*before, *_CAPABILITIES} if name != "events"})
    qmp.execute("migrate-set-parameters", {"max-bandwidth": MEMORY_BANDWIDTH})
    descriptor = os.open(arguments["path"], os.O_WRONLY | os.O_CLOEXEC)
    try:
        qmp.send_descriptor(descriptor, "domsnap-memory")
    finally:
        os.close(descriptor)
    qmp.execute("migrate", {"uri": "fd:domsnap-memory"})
    _wait(session, "pre-switchover" if liveness == "live" else "completed", converge=liveness == "live")
    if liveness != "live":
        _restore(qmp, arguments)


def end_memory(session: Session, arguments: Arguments) -> None:
    """Live: write the rest, with the guest standing."""
    session.continued = True
    session.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    _wait(session, "completed")
    _restore(session.qmp, arguments)


def settle_memory(session: Session, arguments: Arguments) -> None:  # noqa: ARG001 - one signature for all actions
    """Undo of `end_memory`: let the rest be written, unless it is known that this was never begun.

    Between the command and its effect QEMU still says "pre-switchover", and once it gives the images away it must not
    be told to cancel: 7.2 would resume the guest without them. Telling it again to go on leaves nothing to guess.
    """
    if not session.alive() or not session.continued:
        return

    def written() -> bool | None:
        status = _status(session.qmp)
        if status == "pre-switchover":
            with contextlib.suppress(QmpError):
                session.qmp.execute("migrate-continue", {"state": "pre-switchover"})
        return None if status in ("pre-switchover", "device") else True

    poll(written, deadline=_DEADLINE, what="writing the rest of the memory", pause=0.002)


def keep_memory(session: Session, arguments: Arguments) -> None:  # noqa: ARG001 - one signature for all actions
    """Make the file durable, and see that it is what it should be."""
    sync(arguments["path"])
    with open(arguments["path"], "rb") as file:
        if file.read(8) != _MAGIC:
            raise DomainSnapshotError(f"'{arguments['path']}' does not begin like QEMU's migration stream")


def cancel_memory(session: Session, arguments: Arguments) -> None:
    """Undo: cancel what is under way, wait for its end, put the parameters back."""
    if not session.alive():
        return
    qmp = session.qmp
    if _status(qmp) not in _SETTLED:
        # QEMU 7.2 hangs for good when a background snapshot is cancelled; the guest runs meanwhile.
        if arguments["liveness"] != "background":
            with contextlib.suppress(QmpError):
                qmp.execute("migrate_cancel")
        with contextlib.suppress(QmpError):
            _wait(session, None)
    _leave(qmp)
    with contextlib.suppress(QmpError):
        qmp.execute("closefd", {"fdname": "domsnap-memory"})
    _restore(qmp, arguments)


def _wait(session: Session, wanted: str | None, *, converge: bool = False) -> None:
    """Wait for a status; None means any in which nothing is under way. A guest that writes too fast is stopped."""
    end, pause = time.monotonic() + _DEADLINE, 0.002
    while True:
        if wanted is not None:
            session.interrupt.check()
        answer = session.qmp.execute("query-migrate")
        status = answer.get("status")
        if status == wanted or (wanted is None and status in _SETTLED):
            if status in _SETTLED:
                _leave(session.qmp)
            return
        if wanted is not None and status in ("failed", "cancelled"):
            raise QmpError("migrate", answer.get("error-desc") or f"writing the memory {status}")
        ram = answer.get("ram", {})
        if ram.get("total"):
            session.report("memory", int(ram["total"]) - int(ram["remaining"]), int(ram["total"]))
        if converge and ram.get("dirty-sync-count", 0) > _PASSES:
            session.qmp.execute("stop")
            converge = False
        if time.monotonic() > end:
            raise QmpTimeout(f"writing the memory did not end within {_DEADLINE:g} s")
        time.sleep(pause)
        pause = min(pause * 1.2, 0.02)  # of the guest's, too, while it stands


def _leave(qmp: Qmp) -> None:
    """Wait for the end of the run state "finish-migrate", in which QEMU refuses to resume the guest.

    A migration says that it has completed or failed a moment before it lets the guest go, or run again.
    """

    def left() -> bool | None:
        return None if qmp.execute("query-status")["status"] == "finish-migrate" else True

    poll(left, deadline=_LEAVE_DEADLINE, what="the migration, which has ended,", pause=0.002)


def _restore(qmp: Qmp, arguments: Arguments) -> None:
    """Capabilities and bandwidth as they were; QEMU refuses while a migration is under way."""
    before = set(arguments["capabilities"])
    _set_capabilities(qmp, {name: name in before for name in {*before, *_CAPABILITIES} if name != "events"})
    if arguments["max_bandwidth"] is not None:
        qmp.execute("migrate-set-parameters", {"max-bandwidth": arguments["max_bandwidth"]})


def _set_capabilities(qmp: Qmp, states: dict[str, bool]) -> None:
    # Off first: QEMU checks what excludes what after each one.
    for name, state in sorted(states.items(), key=lambda item: item[1]):
        qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]})


def _status(qmp: Qmp) -> str | None:
    status: str | None = qmp.execute("query-migrate").get("status")
    return status
