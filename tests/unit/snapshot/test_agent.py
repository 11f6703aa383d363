"""The guest agent's protocol, against an agent that answers as QEMU's does."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshot import agent
from snapshot.catalog import Catalog
from snapshot.errors import DomainSnapshotError, QmpError
from snapshot.journal import Journal
from snapshot.session import Session

Answer = Callable[[str], dict[str, Any]]


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[[Answer], Session]]:
    """Start an agent; what an earlier client left half-said stands before its first answer."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent"))
    listener.listen(1)

    def serve(answer: Answer) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                connection.sendall(b'{"return": 17}\n')
                for line in lines:
                    message = json.loads(line.lstrip(b"\xff"))
                    if message["execute"] == "guest-sync-delimited":
                        connection.sendall(
                            b"\xff" + json.dumps({"return": message["arguments"]["id"]}).encode() + b"\n"
                        )
                    else:
                        connection.sendall(json.dumps(answer(message["execute"])).encode() + b"\n")

    def make(answer: Answer) -> Session:
        threading.Thread(target=serve, args=(answer,), daemon=True).start()
        path = str(tmp_path / "agent")
        return Session(None, Catalog(str(tmp_path)), Journal(str(tmp_path)), agent_socket=path)

    yield make
    listener.close()


def test_freeze_and_thaw(agents: Callable[[Answer], Session]) -> None:
    said: list[str] = []

    def answer(command: str) -> dict[str, Any]:
        said.append(command)
        return {"return": 2}

    session = agents(answer)
    agent.freeze(session, {})
    assert agent.ask(session, "guest-fsfreeze-thaw") == 2
    assert said == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_nothing_frozen_is_not_quiesced(agents: Callable[[Answer], Session]) -> None:
    with pytest.raises(DomainSnapshotError, match="froze no file system"):
        agent.freeze(agents(lambda _command: {"return": 0}), {})


def test_a_refusal(agents: Callable[[Answer], Session]) -> None:
    error = {"error": {"class": "CommandNotFound", "desc": "Command guest-fsfreeze-freeze has been disabled"}}
    with pytest.raises(QmpError, match="has been disabled"):
        agent.freeze(agents(lambda _command: error), {})


def test_nobody_there(tmp_path: Path) -> None:
    session = Session(None, Catalog(str(tmp_path)), Journal(str(tmp_path)), agent_socket=str(tmp_path / "nobody"))
    with pytest.raises(DomainSnapshotError, match="cannot be reached"):
        agent.freeze(session, {})
