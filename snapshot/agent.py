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


def freeze(session: Session, arguments: dict[str, Any]) -> None:  # noqa: ARG001 - one signature for all actions
    """Freeze all file systems of the guest.

    Raises:
        DomainSnapshotError: no file system was frozen, or the agent does not answer.
    """
    if not ask(session, "guest-fsfreeze-freeze"):
        raise DomainSnapshotError("the guest agent froze no file system: the snapshot would not be quiesced")


def thaw(session: Session, arguments: dict[str, Any]) -> None:  # noqa: ARG001
    """Thaw them; a guest that is not frozen stays as it is."""
    if session.alive():
        ask(session, "guest-fsfreeze-thaw")


def problem(path: str) -> str | None:
    """Why the agent at a socket cannot be asked; None when it answers."""
    try:
        _ask(path, "guest-ping", _PING_DEADLINE)
    except DomainSnapshotError as error:
        return str(error)
    return None


def ask(session: Session, command: str) -> Any:  # noqa: ANN401 - the agent's answer
    """Run one command of the guest agent."""
    if session.agent_socket is None:
        raise DomainSnapshotError("the guest agent's socket is not known")
    return _ask(session.agent_socket, command, _DEADLINE)


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
