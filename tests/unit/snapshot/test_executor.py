"""The executor on files of a domain that is off: order of undo, journal, recovery, locks."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from snapshot import executor
from snapshot.actions import ACTIONS, Action
from snapshot.catalog import Catalog
from snapshot.domain import InactiveDomain
from snapshot.errors import DomainBusy, DomainSnapshotError, RecoverNeeded, UndoFailed
from snapshot.journal import Journal, Operation
from snapshot.model import DeleteOptions, Disk, DiskMode, RevertOptions, SnapshotRequest
from snapshot.session import Session
from snapshot.step import Step
from tests.live.rig import Description


class Recorder:
    """Actions that say what was called; "x" fails when done, "u" when undone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in "abcxuy":
            monkeypatch.setitem(
                ACTIONS, name, Action(self._maker("do", name, "x"), self._maker("undo", name, "u"), name == "y")
            )

    def _maker(self, what: str, name: str, failing: str) -> Callable[[Session, dict[str, Any]], None]:
        def call(_session: Session, _arguments: dict[str, Any]) -> None:
            self.calls.append(f"{what} {name}")
            if name == failing:
                raise DomainSnapshotError(f"{what} of {name} failed")

        return call


def operation(actions: str, commits: int | None = None) -> Operation:
    steps = tuple(Step(name, {}, f"step {name}", commits=index == commits) for index, name in enumerate(actions))
    return Operation("create", "s", "g", "t", None, None, False, steps)


def session(tmp_path: Path) -> Session:
    catalog = Catalog(str(tmp_path))
    return Session(None, catalog, Journal(str(tmp_path)))


def test_all_steps_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    executor.run(session(tmp_path), operation("abc", 2))
    assert recorder.calls == ["do a", "do b", "do c"]
    assert os.listdir(tmp_path) == []


def test_undo_in_reverse_of_all_that_may_have_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with pytest.raises(DomainSnapshotError, match="do of x failed"):
        executor.run(session(tmp_path), operation("abxc"))
    assert recorder.calls == ["do a", "do b", "do x", "undo x", "undo b", "undo a"]
    assert os.listdir(tmp_path) == []


def test_a_failed_undo_stops_the_others_but_not_the_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with pytest.raises(UndoFailed, match="step u: undo of u failed"):
        executor.run(session(tmp_path), operation("ayubx"))
    assert recorder.calls[5:] == ["undo x", "undo b", "undo u", "undo y"]
    pending = Journal(str(tmp_path)).pending()
    assert pending is not None
    assert pending.begun == {0, 1, 2, 3, 4}
    assert not pending.committed


def test_after_the_commit_there_is_only_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    with pytest.raises(RecoverNeeded, match="has taken effect"):
        executor.run(session(tmp_path), operation("abxc", 1))
    assert recorder.calls == ["do a", "do b", "do x"]
    monkeypatch.setitem(ACTIONS, "x", ACTIONS["a"])
    recorder.calls.clear()
    domain = InactiveDomain(Description("g", (), None))
    assert executor.recover(domain, Catalog(str(tmp_path))) == ["finished the create of 's'"]
    assert recorder.calls == ["do a", "do c"]
    assert executor.recover(domain, Catalog(str(tmp_path))) == []


def test_steps_while_the_guest_stands_are_noted_before_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    steps = (Step("a"), Step("b"), Step("c", paused=True), Step("x", paused=True), Step("a"))
    notes: list[list[int]] = []
    begin = Journal.begin
    monkeypatch.setattr(Journal, "begin", lambda self, indices: (notes.append(list(indices)), begin(self, indices))[1])
    with pytest.raises(DomainSnapshotError):
        executor.run(session(tmp_path), Operation("create", "s", "g", "t", None, None, False, steps))
    assert notes == [[0], [1, 2, 3]]


def test_the_journal_survives_a_torn_log(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.start(operation("abc"))
    journal.begin([0, 1])
    journal.leave()
    with open(tmp_path / "operation.log", "a", encoding="ascii") as log:
        log.write("begi")
    pending = journal.pending()
    assert pending is not None
    assert pending.begun == {0, 1}
    (tmp_path / "operation.json").write_text("{")
    with pytest.raises(DomainSnapshotError, match="cannot be read"):
        journal.pending()


def test_two_domsnaps(tmp_path: Path) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with Journal(str(tmp_path)).locked(1):
            held.set()
            go.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(30)
    with pytest.raises(DomainBusy, match="another domsnap"), Journal(str(tmp_path)).locked(0.2):
        pass
    threading.Timer(0.3, go.set).start()
    with Journal(str(tmp_path)).locked(30):
        pass
    other.join()


@pytest.fixture
def off(tmp_path: Path) -> tuple[InactiveDomain, Catalog]:
    """A domain with three disks that is off."""
    disks = []
    for target in ("vda", "vdb", "vdc"):
        path = tmp_path / f"{target}.qcow2"
        qcowlib.create_image(path, 4 << 20)
        with qcowlib.open_image(path, writable=True) as image:
            image.write(0, target.encode() * 1000)
        disks.append(Disk(target, str(path), "qcow2"))
    return InactiveDomain(Description("off", tuple(disks), None)), Catalog(str(tmp_path / "catalog"))


@pytest.mark.parametrize("mode", [DiskMode.INTERNAL, DiskMode.EXTERNAL])
def test_the_third_disk_fails_and_the_first_two_are_as_before(
    off: tuple[InactiveDomain, Catalog], tmp_path: Path, mode: DiskMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain, catalog = off
    files = sorted(os.listdir(tmp_path))
    name = "create-internal" if mode is DiskMode.INTERNAL else "make-overlay"
    action, count = ACTIONS[name], 0

    def failing(session: Session, arguments: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(28, "No space left on device")
        action.do(session, arguments)

    monkeypatch.setitem(ACTIONS, name, Action(failing, action.undo))
    with pytest.raises(DomainSnapshotError, match="No space"):
        executor.create(domain, catalog, SnapshotRequest("s", disk_only=True, default_mode=mode))
    assert count == 3
    assert sorted(set(os.listdir(tmp_path)) - {"catalog"}) == files
    assert [one.snapshots for one in domain.facts().disks] == [()] * 3
    assert catalog.load() == []
    assert catalog.current is None


def test_internal_life_of_a_domain_that_is_off(off: tuple[InactiveDomain, Catalog]) -> None:
    domain, catalog = off
    path = domain.description.disks[0].path
    executor.create(domain, catalog, SnapshotRequest("s", disk_only=True))
    with qcowlib.open_image(path, writable=True) as image:
        image.write(0, b"later")
    executor.revert(domain, catalog, "s", RevertOptions(safety_name="safe"))
    with qcowlib.open_image(path) as image:
        assert image.read(0, 5) == b"vdavd"
        assert [one.name for one in image.snapshots] == ["s", "safe"]
    executor.revert(domain, catalog, "safe", RevertOptions(discard_current=True))
    with qcowlib.open_image(path) as image:
        assert image.read(0, 5) == b"later"
    executor.delete(domain, catalog, "s", DeleteOptions(children=True))
    with qcowlib.open_image(path) as image:
        assert image.snapshots == []
        assert qcowlib.check(image).findings == []


def test_nobody_can_start_the_domain_meanwhile(off: tuple[InactiveDomain, Catalog]) -> None:
    domain, catalog = off
    seen: list[str] = []

    def progress(what: str, _index: int, _total: int) -> None:
        if what.startswith("enter"):
            for disk in domain.description.disks:
                with pytest.raises(qcowlib.ImageLocked):
                    qcowlib.open_image(disk.path, writable=True)
                seen.append(disk.target)

    executor.create(domain, catalog, SnapshotRequest("s", disk_only=True), progress=progress)
    assert seen == ["vda", "vdb", "vdc"]


@pytest.mark.parametrize("content", [b"somebody's own file", b"", b"QFI\xfb"])
def test_a_file_that_appears_after_the_check_is_never_removed(
    off: tuple[InactiveDomain, Catalog], tmp_path: Path, content: bytes
) -> None:
    domain, catalog = off
    path = tmp_path / "vdb.s.qcow2"

    def progress(what: str, _index: int, _total: int) -> None:
        if what.startswith("make the overlay") and str(path) in what:
            path.write_bytes(content)

    request = SnapshotRequest("s", disk_only=True, default_mode=DiskMode.EXTERNAL)
    with pytest.raises(DomainSnapshotError, match="File exists"):
        executor.create(domain, catalog, request, progress=progress)
    assert path.read_bytes() == content
    assert sorted(name for name in os.listdir(tmp_path) if ".s." in name) == ["vdb.s.qcow2"]
    assert Journal(str(catalog.directory)).pending() is None
