"""Going back to internal snapshots where QEMU itself cannot: without vm state under a running guest, or in a base."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.actions import ACTIONS
from snapshot.catalog import Catalog
from snapshot.cli.main import main
from snapshot.domain import ActiveDomain, open_domain
from snapshot.errors import NotPossible, QmpError, UndoFailed
from snapshot.model import (
    DiskMode,
    DiskRequest,
    DomainSnapshot,
    Liveness,
    RevertOptions,
    SnapshotRequest,
)
from snapshot.qmp import Qmp, listening, poll
from snapshot.session import Session
from snapshot.step import Step
from tests import oracle
from tests.live.rig import MakeRig, Rig, consistent, disk_counter, snapshot_counters, snapshot_record
from tests.live.test_domain_faults import state
from tests.live.test_domain_revert import DISCARD, create, now, wait_for_lines

pytestmark = pytest.mark.live

INTERNAL, EXTERNAL = DiskMode.INTERNAL, DiskMode.EXTERNAL
INSIDE = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(INTERNAL)}
MIXED = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(EXTERNAL)}
STILL = RevertOptions(running=False, discard_current=True)


@pytest.fixture
def ended() -> Iterator[list[ActiveDomain]]:
    """Domains whose QEMU was started by the engine: they end with the test."""
    domains: list[ActiveDomain] = []
    yield domains
    for domain in domains:
        domain.qmp.execute("quit")
        domain.close()


def connected(guest: Rig, domain: ActiveDomain, ended: list[ActiveDomain]) -> ActiveDomain:
    """The domain's new QEMU, which has the old one's socket; the old one has ended."""
    domain.close()
    guest.process.wait(60)
    ended.append(guest.connect())
    return ended[-1]


@pytest.mark.parametrize("disks", [INSIDE, MIXED], ids=["inside", "mixed"])
def test_disks_alone_under_a_running_guest(
    rig: MakeRig, tmp_path: Path, ended: list[ActiveDomain], disks: dict[str, DiskRequest]
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one", disk_only=True, disks=disks))
    wanted = snapshot_counters(taken)
    guest.wait_for_ticks(6)
    executor.revert(domain, catalog, "one", RevertOptions(safety_name="safe"))
    domain = connected(guest, domain, ended)
    assert domain.qmp.execute("query-status")["status"] == "running"
    wait_for_lines(guest)
    assert guest.lines()[0] == f"B{wanted[0]:08X}"  # it has booted from the disks as they were
    assert not guest.complaints()
    assert catalog.current == "one"
    assert snapshot_counters(taken) == wanted
    safe = next(one for one in catalog.load() if one.name == "safe")
    assert consistent(snapshot_record(safe), snapshot_counters(safe))
    assert not [one for facts in domain.facts().disks for one in facts.snapshots if one.name.startswith("ds-")]
    # The state before can be gone back to, memory included, and so on again.
    executor.revert(domain, catalog, "safe", STILL)
    domain.close()
    ended[0] = domain = guest.connect()
    assert now(guest, domain) == (snapshot_record(safe), snapshot_counters(safe))
    domain.qmp.execute("cont")
    wait_for_lines(guest)
    assert not guest.complaints()
    ended.clear()
    layers = [facts.disk.path for facts in domain.facts().disks]
    domain.qmp.execute("quit")
    domain.close()
    poll(lambda: True if not listening(guest.socket) else None, deadline=60, what="QEMU")
    for path in {*layers, *(disk.path for disk in guest.disks)}:
        oracle.assert_clean(path)


@pytest.mark.parametrize("disks", [INSIDE, MIXED], ids=["inside", "mixed"])
def test_with_a_memory_file_under_a_running_guest(
    rig: MakeRig, tmp_path: Path, ended: list[ActiveDomain], disks: dict[str, DiskRequest]
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    memory = str(tmp_path / "one.mem")
    taken = create(domain, catalog, SnapshotRequest("one", disks=disks, memory_file=memory, liveness=Liveness.LIVE))
    assert consistent(snapshot_record(taken), snapshot_counters(taken))
    guest.wait_for_ticks(4)
    executor.revert(domain, catalog, "one", RevertOptions(running=False))
    domain = connected(guest, domain, ended)
    assert now(guest, domain) == (snapshot_record(taken), snapshot_counters(taken))
    domain.qmp.execute("cont")
    wait_for_lines(guest)
    assert not guest.complaints()
    assert catalog.current == "one"
    assert len(catalog.load()) == 2


def test_one_disk_of_two_under_a_running_guest(rig: MakeRig, tmp_path: Path, ended: list[ActiveDomain]) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    taken = create(domain, catalog, SnapshotRequest("one", disk_only=True, disks=INSIDE))
    guest.wait_for_ticks(6)
    executor.revert(domain, catalog, "one", RevertOptions(disks=("vdb",), discard_current=True, running=False))
    domain = connected(guest, domain, ended)
    counters = [disk_counter(one.disk.path, one.disk.format) for one in domain.facts().disks]
    assert counters[1] == snapshot_counters(taken)[1] <= counters[0] - 5
    assert domain.qmp.execute("query-status")["status"] == "prelaunch"


def test_what_a_restart_needs_is_said(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    create(domain, catalog, SnapshotRequest("one", disk_only=True, disks=INSIDE))
    guest.description.command = []
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NotPossible, match="started anew, and that needs the domain's start command"):
        executor.revert(domain, catalog, "one", RevertOptions())
    assert sorted(os.listdir(tmp_path)) == before
    assert [one.name for one in catalog.load()] == ["one"]
    guest.wait_for_ticks(2)


def test_memory_that_a_second_qemu_would_change(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    memory = tmp_path / "memory"
    backend = f"memory-backend-file,id=m,size=4M,mem-path={memory},share=on"
    domain = guest.start("-object", backend, "-machine", "memory-backend=m")
    guest.wait_for_ticks(3)
    catalog = Catalog(str(tmp_path / "catalog"))
    create(domain, catalog, SnapshotRequest("one", disk_only=True, disks=INSIDE))
    with pytest.raises(NotPossible, match=f"memory is the shared file '{memory}'"):
        executor.revert(domain, catalog, "one", DISCARD)
    guest.wait_for_ticks(2)
    assert not guest.complaints()


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def under_an_overlay(guest: Rig, catalog: Catalog, *, disk_only: bool) -> tuple[ActiveDomain, list[DomainSnapshot]]:
    """A running guest with an internal snapshot, then an external one of the same disks, then another one."""
    domain = guest.start()
    taken = [create(domain, catalog, SnapshotRequest("in", disk_only=disk_only, default_mode=INTERNAL))]
    guest.wait_for_ticks(4)
    for name in ("ex", "later"):
        taken.append(create(domain, catalog, SnapshotRequest(name, disk_only=True, default_mode=EXTERNAL)))
        guest.wait_for_ticks(3)
    return domain, taken


@pytest.mark.parametrize("active", [True, False])
def test_disks_in_a_base(rig: MakeRig, tmp_path: Path, active: bool) -> None:
    guest = rig("qcow2", "qcow2", "raw")
    catalog = Catalog(str(tmp_path / "catalog"))
    journal = executor.Journal(catalog.directory)
    domain = guest.start()
    disks = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(INTERNAL), "vdc": DiskRequest(EXTERNAL)}
    taken = [create(domain, catalog, SnapshotRequest("in", disk_only=True, disks=disks))]
    guest.wait_for_ticks(4)
    for name in ("ex", "later"):
        taken.append(create(domain, catalog, SnapshotRequest(name, disk_only=True, default_mode=EXTERNAL)))
        guest.wait_for_ticks(3)
    counters = [snapshot_counters(one) for one in taken]
    if not active:
        guest.quit(domain.qmp)
    here = domain if active else guest.inactive()
    frozen = {disk.file: digest(disk.file) for one in taken for disk in one.disks if disk.mode is EXTERNAL}
    guest.description.command = []  # it needs no other QEMU
    plan = executor.revert(here, catalog, "in", DISCARD, dry_run=True)
    copies = [step for step in plan if isinstance(step, Step) and step.action == "copy-state"]
    assert [step.arguments["source"] for step in copies] == [disk.path for disk in guest.disks[:2]]
    assert all(int(step.text.rsplit("(", 1)[1].split()[0]) >= 1 << 16 for step in copies)
    executor.revert(here, catalog, "in", RevertOptions(safety_name="safe"))
    if active:
        guest.wait_for_ticks(3)
        assert f"B{counters[0][0]:08X}" in guest.lines()
        guest.quit(domain.qmp)
    facts = guest.inactive().facts(journal.layers()).disks
    now_on = [disk_counter(one.disk.path, "qcow2") for one in facts]
    assert now_on == counters[0] if not active else min(now_on) > counters[0][0]
    # All that was there is there still, unchanged, and can be gone back to.
    assert {path: digest(path) for path in frozen} == frozen
    assert [snapshot_counters(one) for one in taken] == counters
    for one, wanted in zip(taken[::-1], counters[::-1], strict=True):
        executor.revert(guest.inactive(), catalog, one.name, DISCARD)
        layers = guest.inactive().facts(journal.layers()).disks
        assert [disk_counter(layer.disk.path, "qcow2") for layer in layers] == wanted
    for one_layer in layers:
        oracle.assert_clean(one_layer.disk.path)
    assert not guest.complaints()


@pytest.mark.parametrize("active", [True, False])
def test_memory_in_a_base(rig: MakeRig, tmp_path: Path, ended: list[ActiveDomain], active: bool) -> None:
    guest = rig()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain, taken = under_an_overlay(guest, catalog, disk_only=False)
    wanted = snapshot_record(taken[0]), snapshot_counters(taken[0])
    assert consistent(*wanted)
    later = [snapshot_counters(one) for one in taken[1:]]
    if not active:
        guest.quit(domain.qmp)
    executor.revert(domain if active else guest.inactive(), catalog, "in", STILL)
    domain = connected(guest, domain, ended)
    assert now(guest, domain) == wanted
    domain.qmp.execute("cont")
    wait_for_lines(guest)
    assert not guest.complaints()
    assert [snapshot_counters(one) for one in taken[1:]] == later


@pytest.mark.parametrize("how", ["disks inside", "disks outside", "memory inside", "memory outside"])
def test_a_paused_guest(rig: MakeRig, tmp_path: Path, ended: list[ActiveDomain], how: str) -> None:
    """It goes back, its own state is kept, and it stays paused or runs, as it is told."""
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    mode = INTERNAL if "inside" in how else EXTERNAL
    taken = create(domain, catalog, SnapshotRequest("one", disk_only="disks" in how, default_mode=mode))
    guest.wait_for_ticks(4)
    domain.qmp.execute("stop")
    before = now(guest, domain)
    vm = tmp_path / "vm.toml"
    vm.write_text(domain_file(guest))
    words = ["revert", "one", "-f", str(vm), "--catalog", str(tmp_path / "catalog"), "--safety", "safe"]
    domain.close()
    assert main([*words, "--paused"]) == 0
    ended.append(reconnected(guest))
    assert ended[0].qmp.execute("query-status")["running"] is False
    counters = [disk_counter(one.disk.path, one.disk.format) for one in ended[0].facts().disks]
    assert counters == snapshot_counters(taken)
    safe = next(one for one in catalog.load() if one.name == "safe")
    assert (snapshot_record(safe), snapshot_counters(safe)) == before
    ended.pop().close()
    assert main(["revert", "safe", *words[2:6], "--discard-current", "--running"]) == 0
    ended.append(reconnected(guest))
    assert ended[0].qmp.execute("query-status")["status"] == "running"
    wait_for_lines(guest)
    assert not guest.complaints()


@pytest.mark.parametrize(
    ("how", "before", "wanted", "after"),
    [
        ("disks outside", "cont", "--paused", False),
        ("disks inside", "cont", "--paused", False),
        ("disks inside", "stop", "--running", True),
        ("memory inside", "stop", None, False),  # as it was when it was taken
        ("memory inside", "stop", "--running", True),
        ("memory outside", "stop", None, False),
    ],
)
def test_what_the_guest_does_afterwards(
    rig: MakeRig, tmp_path: Path, ended: list[ActiveDomain], how: str, before: str, wanted: str | None, after: bool
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    if "memory" in how:
        domain.qmp.execute(before)
    mode = INTERNAL if "inside" in how else EXTERNAL
    create(domain, catalog, SnapshotRequest("one", disk_only="disks" in how, default_mode=mode))
    domain.qmp.execute("cont" if "memory" in how else before)
    domain.close()
    vm = tmp_path / "vm.toml"
    vm.write_text(domain_file(guest))
    words = ["revert", "one", "-f", str(vm), "--catalog", str(tmp_path / "catalog"), "--discard-current"]
    assert main([*words, *([] if wanted is None else [wanted])]) == 0
    ended.append(reconnected(guest))
    assert ended[0].qmp.execute("query-status")["running"] is after
    if not after:
        ended[0].qmp.execute("cont")
    wait_for_lines(guest)
    assert not guest.complaints()


def failing_once(monkeypatch: pytest.MonkeyPatch, action: str, *, undo: bool) -> None:
    """Let an action fail, or its undo, the first time."""
    right = ACTIONS[action]
    calls: list[str] = []

    def fail(session: Session, arguments: dict[str, object]) -> None:
        calls.append(action)
        if len(calls) == 1:
            raise QmpError(action, "by the test")
        (right.undo if undo else right.do)(session, arguments)

    monkeypatch.setitem(ACTIONS, action, replace(right, undo=fail) if undo else replace(right, do=fail))


def test_a_guest_does_not_run_on_disks_that_it_does_not_know(
    rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When even the way back fails, the guest stands until `recover` has put its disks right."""
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    create(domain, catalog, SnapshotRequest("one", disk_only=True, disks=INSIDE))
    guest.wait_for_ticks(3)
    before = state(guest, domain, catalog)
    failing_once(monkeypatch, "switch", undo=False)
    failing_once(monkeypatch, "apply-internal", undo=True)
    with pytest.raises(UndoFailed):
        executor.revert(domain, catalog, "one", DISCARD)
    assert domain.qmp.execute("query-status")["status"] == "postmigrate"
    assert executor.recover(domain, catalog) == ["undid the revert of 'one'"]
    assert state(guest, domain, catalog) == before
    wait_for_lines(guest)
    domain.qmp.execute("stop")
    assert consistent(*now(guest, domain))


def test_a_paused_guest_whose_revert_fails_stays_paused(
    rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = rig(period=20)
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    create(domain, catalog, SnapshotRequest("one", disk_only=True, disks=MIXED))
    guest.wait_for_ticks(1)
    domain.qmp.execute("stop")
    before = state(guest, domain, catalog), now(guest, domain)
    failing_once(monkeypatch, "switch", undo=False)
    with pytest.raises(QmpError, match="by the test"):
        executor.revert(domain, catalog, "one", RevertOptions())
    assert (state(guest, domain, catalog), now(guest, domain)) == before
    assert domain.qmp.execute("query-status")["status"] == "paused"


def reconnected(guest: Rig) -> ActiveDomain:
    domain = open_domain(guest.description)
    assert isinstance(domain, ActiveDomain)
    return domain


def domain_file(guest: Rig) -> str:
    import json

    lines = [f"name = 'guest'\nqmp = {json.dumps(guest.socket)}\ncommand = {json.dumps(guest.description.command)}\n"]
    lines += [
        f"[disks.{disk.target}]\npath = {json.dumps(disk.path)}\nformat = '{disk.format}'\n" for disk in guest.disks
    ]
    return "".join(lines)


WAYS = {
    "load": SnapshotRequest("s"),
    "swap": SnapshotRequest("s", disk_only=True, default_mode=EXTERNAL),
    "restart": SnapshotRequest("s", default_mode=EXTERNAL),
    "inside": SnapshotRequest("s", disk_only=True, disks=MIXED),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_shows_what_is_sent(
    rig: MakeRig, tmp_path: Path, way: str, ended: list[ActiveDomain], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    create(domain, catalog, WAYS[way])
    options = RevertOptions(discard_current=True)
    monkeypatch.setattr(executor.gather.secrets, "token_hex", lambda _bytes: "token")
    plan = executor.revert(domain, catalog, "s", options, dry_run=True)
    assert isinstance(plan, list)
    sent: list[dict[str, object]] = []
    execute = Qmp.execute

    def note(qmp: Qmp, command: str, arguments: object = None, **more: object) -> object:
        if not command.startswith(("query", "x-debug", "qom", "job-dismiss")):
            sent.append({"execute": command, "arguments": arguments})
        return execute(qmp, command, arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Qmp, "execute", note)
    executor.revert(domain, catalog, "s", options)
    monkeypatch.setattr(Qmp, "execute", execute)
    if way in ("restart", "inside"):
        connected(guest, domain, ended)
    shown = [command for step in plan for command in step.commands]
    names = [command["execute"] for command in shown if command["execute"] != "getfd"]
    left = ("migrate-set-capabilities",)
    really = [command for command in sent if command["execute"] not in left]
    if way == "inside":  # the bandwidth is put back
        names.insert(names.index("migrate") + 1, "migrate-set-parameters")
    assert [command["execute"] for command in really] == names
    for name in ("snapshot-load", "transaction", "blockdev-reopen", "migrate-incoming"):
        assert [c["arguments"] for c in shown if c["execute"] == name] == [
            c["arguments"] for c in really if c["execute"] == name
        ]
    if way in ("restart", "inside"):
        (program,) = [step.program for step in plan if step.program]
        assert program.startswith("qemu-system-x86_64 ")
        assert "-S" in program
