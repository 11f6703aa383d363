"""A guest agent that is lost while the guest is frozen: it is asked again, and what is left to do is said."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshot import agent, executor
from snapshot.catalog import Catalog
from snapshot.errors import DomainSnapshotError, RecoverNeeded, UndoFailed
from snapshot.model import Consistency, DiskMode, DomainSnapshot, SnapshotRequest
from tests.live.rig import MakeRig
from tests.live.test_domain_faults import state

pytestmark = pytest.mark.live

QUIESCED = SnapshotRequest("q", disk_only=True, default_mode=DiskMode.EXTERNAL, quiesce=True)


class Agent:
    """An agent of a guest that has none: it freezes nothing, and is lost as soon as it has done so.

    Args:
        path: of the socket.
        silent: when it is lost it lets clients connect and says nothing; otherwise it hangs up.
    """

    def __init__(self, path: Path, *, silent: bool) -> None:
        self.frozen = self.lost = False
        self.silent = silent
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            if self.lost and self.silent:
                threading.Timer(1.0, connection.close).start()
                continue
            with connection, connection.makefile("rb") as lines:
                for line in [] if self.lost else lines:
                    connection.sendall(
                        json.dumps({"return": self.answer(json.loads(line.lstrip(b"\xff")))}).encode() + b"\n"
                    )

    def answer(self, message: dict[str, Any]) -> Any:
        match message["execute"]:
            case "guest-sync-delimited":
                return message["arguments"]["id"]
            case "guest-fsfreeze-freeze":
                self.frozen = self.lost = True
                return 1
            case "guest-fsfreeze-thaw":
                self.frozen = False
                return 1
        return {}


@pytest.fixture(params=[False, True], ids=["hangs up", "says nothing"])
def lost(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setattr(agent, "_THAW_DEADLINE", 1.0)
    monkeypatch.setattr(agent, "_THAW_ANSWER", 0.2)
    monkeypatch.setattr(agent, "_THAW_PAUSE", 0.1)
    one = Agent(tmp_path / "agent", silent=request.param)
    yield one
    one.listener.close()


def test_lost_for_a_moment(rig: MakeRig, tmp_path: Path, lost: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_THAW_DEADLINE", 30.0)
    guest = rig()
    guest.description.agent_socket = str(tmp_path / "agent")
    domain = guest.start()
    said: list[str] = []

    def progress(text: str, _done: int, _total: int) -> None:
        said.append(text)
        lost.lost = lost.lost and sum("trying again" in each for each in said) < 3

    taken = executor.create(domain, Catalog(str(tmp_path / "catalog")), QUIESCED, progress=progress)
    assert isinstance(taken, DomainSnapshot)
    assert taken.consistency is Consistency.QUIESCED
    assert not lost.frozen
    assert sum("trying again to thaw" in each for each in said) == 3


def test_lost_for_good(rig: MakeRig, tmp_path: Path, lost: Agent) -> None:
    guest = rig()
    guest.description.agent_socket = str(tmp_path / "agent")
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    executor.create(domain, catalog, SnapshotRequest("before", disk_only=True))
    before = state(guest, domain, catalog)
    began = time.monotonic()
    with pytest.raises(UndoFailed) as caught:
        executor.create(domain, catalog, QUIESCED)
    assert time.monotonic() - began < 30
    text = str(caught.value)
    assert text.count("THE GUEST IS STILL FROZEN") == 1
    assert f"see that its guest agent answers at '{tmp_path / 'agent'}', then recover thaws it" in text
    # All else is as before, and the next command says what has to be done first.
    after = state(guest, domain, catalog)
    assert {**after, "journal": before["journal"]} == before
    with pytest.raises(RecoverNeeded):
        executor.create(domain, catalog, QUIESCED)
    with pytest.raises(DomainSnapshotError, match="STILL FROZEN"):
        executor.recover(domain, catalog)
    assert lost.frozen
    lost.lost = False
    assert executor.recover(domain, catalog) == ["undid the create of 'q'"]
    assert not lost.frozen
    assert state(guest, domain, catalog) == before
    guest.wait_for_ticks(2)
    assert not guest.complaints()
    assert not [name for name in os.listdir(tmp_path) if ".q." in name]
