"""The guest agent: freezing and thawing the guest's file systems."""

from __future__ import annotations

import json
import secrets
import socket
import time
from typing import Any

from snapshot.errors import DomainSnapshotError, QmpError, QmpTimeout
from snapshot.session import Session

_DEADLINE = 60.0
_PING_DEADLINE = 10.0
#: A frozen guest that nobody thaws is as good as dead, so that an agent which is lost for a moment is asked again.
_THAW_DEADLINE, _THAW_ANSWER, _THAW_PAUSE = 30.0, 10.0, 1.0


def freeze(session: Session, arguments: dict[str, Any]) -> None:  # noqa: ARG001 - one signature for all actions
    """Freeze all file systems of the guest.

    Raises:
        DomainSnapshotError: no file system was frozen, or the agent does not answer.
    """
    if not ask(session, "guest-fsfreeze-freeze"):
        raise DomainSnapshotError("the guest agent froze no file system: the snapshot would not be quiesced")


def thaw(session: Session, arguments: dict[str, Any]) -> None:  # noqa: ARG001
    """Thaw them; a guest that is not frozen stays as it is.

    Raises:
        DomainSnapshotError: the agent could not be brought to it for a while; nobody else can.
    """
    end = time.monotonic() + _THAW_DEADLINE
    while session.alive():
        try:
            ask(session, "guest-fsfreeze-thaw", deadline=_THAW_ANSWER)
        except DomainSnapshotError as error:
            session.interrupt.check()
            if time.monotonic() > end:
                raise DomainSnapshotError(f"the guest's file systems could not be thawed: {error}") from error
            session.report(f"trying again to thaw the guest's file systems: {error}", 0, 0)
            time.sleep(_THAW_PAUSE)
        else:
            return


def unfreeze(session: Session, arguments: dict[str, Any]) -> None:
    """Undo of `freeze`: thaw, and say what a user can do where that fails."""
    try:
        thaw(session, arguments)
    except DomainSnapshotError as error:
        raise DomainSnapshotError(
            f"{error}; THE GUEST IS STILL FROZEN: see that its guest agent answers at '{session.agent_socket}', then "
            "recover thaws it (a reset of the guest thaws it as well)"
        ) from error


def problem(path: str) -> str | None:
    """Why the agent at a socket cannot be asked; None when it answers."""
    try:
        _ask(path, "guest-ping", _PING_DEADLINE)
    except DomainSnapshotError as error:
        return str(error)
    return None


def ask(session: Session, command: str, deadline: float = _DEADLINE) -> Any:  # noqa: ANN401 - the agent's answer
    """Run one command of the guest agent."""
    if session.agent_socket is None:
        raise DomainSnapshotError("the guest agent's socket is not known")
    return _ask(session.agent_socket, command, deadline)


def _ask(path: str, command: str, deadline: float) -> Any:  # noqa: ANN401 - the agent's answer
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(deadline)
            connection.connect(path)
            number = secrets.randbelow(1 << 31)
            # The 0xff byte ends whatever an earlier client left half-said.
            _send(connection, "guest-sync-delimited", {"id": number}, b"\xff")
            end = time.monotonic() + deadline
            stream = connection.makefile("rb")
            while _answer(stream.readline()) != number:
                if time.monotonic() > end:
                    raise QmpTimeout("the guest agent does not answer")
            _send(connection, command, {})
            return _answer(stream.readline(), command)
    except TimeoutError as error:
        raise QmpTimeout(f"the guest agent did not answer {command} within {deadline:g} s") from error
    except OSError as error:
        raise DomainSnapshotError(f"the guest agent at '{path}' cannot be reached: {error.strerror}") from error


def _send(connection: socket.socket, command: str, arguments: dict[str, Any], prefix: bytes = b"") -> None:
    connection.sendall(prefix + json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")


def _answer(line: bytes, command: str | None = None) -> Any:  # noqa: ANN401
    if not line:
        raise DomainSnapshotError("the guest agent's connection ended")
    try:
        value = json.loads(line.lstrip(b"\xff"))
    except ValueError:
        return None  # the rest of an answer to somebody else
    if "error" in value and command is not None:
        raise QmpError(command, value["error"].get("desc", ""), value["error"].get("class", ""))
    return value.get("return")
