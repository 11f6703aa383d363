"""QEMU's jobs: start one, wait until it is concluded, dismiss it, raise its error."""

from __future__ import annotations

import contextlib
from typing import Any

from snapshot.errors import QmpError
from snapshot.qmp import poll
from snapshot.session import Session

_DEADLINE = 24 * 3600.0


def run_job(
    session: Session,
    job: str,
    command: str,
    arguments: dict[str, Any],
    *,
    deadline: float = _DEADLINE,
    interruptible: bool = True,
) -> None:
    """Run a job to its end.

    Raises:
        QmpError: the command was refused, or the job ended with an error.
        Interrupted: a signal came; the job was cancelled.
    """
    session.qmp.execute(command, {"job-id": job, **arguments})
    try:
        wait_for_job(session, job, deadline=deadline, interruptible=interruptible, command=command)
    except QmpError:
        raise
    except BaseException:
        if interruptible:
            cancel_job(session, job)
        raise


def wait_for_job(
    session: Session, job: str, *, deadline: float = _DEADLINE, interruptible: bool = True, command: str = "the job"
) -> None:
    """Wait until a job has ended, and dismiss it; a job that is not there has ended already.

    Raises:
        QmpError: it ended with an error.
    """

    def concluded() -> dict[str, Any] | None:
        if interruptible:
            session.interrupt.check()
        found = job_of(session, job)
        if found is None:
            return {}
        if found["status"] == "ready":
            # It stays "ready" for a moment after the first call, and may have gone on when the second one comes.
            with contextlib.suppress(QmpError):
                session.qmp.execute("job-complete", {"id": job})
        elif found["status"] == "concluded":
            return found
        if found.get("total-progress"):
            session.report(command, found["current-progress"], found["total-progress"])
        return None

    end = poll(concluded, deadline=deadline, what=f"the job '{job}'")
    if end:
        with contextlib.suppress(QmpError):
            session.qmp.execute("job-dismiss", {"id": job})
        if "error" in end:
            raise QmpError(command, end["error"])


def cancel_job(session: Session, job: str) -> None:
    """Cancel a job and wait for its end; nothing happens when it is not there."""
    if session.alive() and job_of(session, job) is not None:
        with contextlib.suppress(QmpError):
            session.qmp.execute("job-cancel", {"id": job})
        with contextlib.suppress(QmpError):
            wait_for_job(session, job, interruptible=False)


def job_of(session: Session, job: str) -> dict[str, Any] | None:
    """A job as QEMU lists it."""
    found = [one for one in session.qmp.execute("query-jobs") if one["id"] == job]
    return found[0] if found else None


def run_commit(session: Session, job: str, top: str, base: str) -> None:
    """Merge an active layer into a node below it, and let the disk go on there."""
    arguments = {"device": top, "base-node": base, "auto-dismiss": False}
    run_job(session, job, "block-commit", arguments, interruptible=False)
