"""Writing memory, against a QEMU that takes its time between what it says and what it does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapshot import active, migration
from snapshot.catalog import Catalog
from snapshot.errors import QmpError
from snapshot.journal import Journal
from snapshot.session import Session

ARGUMENTS = {"path": "/m", "liveness": "live", "max_bandwidth": 1, "capabilities": []}


class SlowQemu:
    """A migration of which each state lasts for some questions.

    Args:
        states: (migration status, run state), in order; the first stays until QEMU is told to continue.
        lasting: questions that each of the others lasts.
    """

    def __init__(self, *states: tuple[str, str], lasting: int = 5) -> None:
        self.states = list(states)
        self.lasting = lasting
        self.left = lasting
        self.moving = states[0][0] != "pre-switchover"
        self.sent: list[str] = []

    def execute(self, command: str, arguments: Any = None, **_more: Any) -> Any:
        if not command.startswith("query"):
            self.sent.append(command)
        status, run_state = self.states[0]
        if command == "migrate-continue":
            if status != "pre-switchover":
                raise QmpError(command, "Migration not in expected state: pre-switchover")
            self.moving = True
        elif command == "cont" and run_state == "finish-migrate":
            raise QmpError(command, "Migration is not finalized yet")
        elif command == "cont":
            self.states[0] = (status, "running")
        elif command == "migrate_cancel":
            raise AssertionError("cancelled")
        if self.moving and len(self.states) > 1:
            self.left -= 1
            if not self.left:
                self.left = self.lasting
                del self.states[0]
        return {"query-migrate": {"status": status}, "query-status": {"status": run_state}}.get(command, {})


SWITCHED = (
    ("pre-switchover", "finish-migrate"),
    ("device", "finish-migrate"),
    ("completed", "finish-migrate"),
    ("completed", "postmigrate"),
)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[SlowQemu], Session]:
    def make(qemu: SlowQemu) -> Session:
        one = Session(None, Catalog(str(tmp_path)), Journal(str(tmp_path)), was_running=True)
        one.qmp_or_none = qemu  # type: ignore[assignment]
        monkeypatch.setattr(one, "alive", lambda: True)
        return one

    return make


def test_the_guest_is_resumed_once_qemu_has_let_it_go(session: Callable[[SlowQemu], Session]) -> None:
    qemu = SlowQemu(*SWITCHED)
    one = session(qemu)
    migration.end_memory(one, ARGUMENTS)
    active.cont(one, {})
    assert qemu.execute("query-status") == {"status": "running"}


@pytest.mark.parametrize("known", [True, False], ids=["by us", "by a domsnap that is gone"])
@pytest.mark.parametrize("reached", range(4))
def test_an_undo_waits_until_nothing_moves(session: Callable[[SlowQemu], Session], reached: int, known: bool) -> None:
    """Whichever state the rest of the memory is in when the undo begins: it is written, then the guest is resumed."""
    qemu = SlowQemu(*SWITCHED[reached:])
    one = session(qemu)
    assert one.continued  # without facts it may have been
    if known:
        qemu.moving = True  # the command was carried out, and nothing of it is to be seen yet
    migration.settle_memory(one, ARGUMENTS)
    migration.cancel_memory(one, ARGUMENTS)
    active.ensure_running(one, {})
    assert "migrate_cancel" not in qemu.sent
    assert qemu.execute("query-status") == {"status": "running"}


def test_what_was_never_told_to_go_on_is_cancelled(session: Callable[[SlowQemu], Session]) -> None:
    qemu = SlowQemu(("pre-switchover", "finish-migrate"))
    one = session(qemu)
    one.continued = False
    migration.settle_memory(one, ARGUMENTS)
    assert qemu.sent == []
    with pytest.raises(AssertionError, match="cancelled"):
        migration.cancel_memory(one, ARGUMENTS)


def test_a_migration_that_failed_by_itself(session: Callable[[SlowQemu], Session]) -> None:
    qemu = SlowQemu(("active", "running"), ("failed", "finish-migrate"), ("failed", "postmigrate"))
    one = session(qemu)
    with pytest.raises(QmpError, match="failed"):
        migration._wait(one, "completed")
    migration.cancel_memory(one, ARGUMENTS)
    active.ensure_running(one, {})
    assert qemu.execute("query-status") == {"status": "running"}
