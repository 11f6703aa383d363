"""A fault at every step of a revert: before it takes effect all is as before, afterwards `recover` finishes it."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain, open_domain
from snapshot.errors import DomainSnapshotError, RecoverNeeded
from snapshot.model import DiskMode, DiskRequest, Liveness, RevertOptions, SnapshotRequest
from snapshot.qmp import Qmp, listening, poll
from tests import oracle
from tests.live.rig import Faults, MakeRig, Rig, consistent, disk_counter, ram_record, snapshot_counters
from tests.live.test_domain_faults import Boom, ByTheTest, Faulty, at_step, boom, state

pytestmark = pytest.mark.live

INTERNAL, EXTERNAL = DiskMode.INTERNAL, DiskMode.EXTERNAL
MIXED = {"vda": DiskRequest(INTERNAL), "vdb": DiskRequest(EXTERNAL)}
LATER = SnapshotRequest("later", disk_only=True, default_mode=INTERNAL)
ABOVE = SnapshotRequest("later", disk_only=True, default_mode=EXTERNAL)
#: The snapshot to go back to, and one that is taken after it.
WAYS = {
    "load": (SnapshotRequest("s"), LATER),
    "swap": (SnapshotRequest("s", disk_only=True, default_mode=EXTERNAL), LATER),
    "restart": (SnapshotRequest("s", default_mode=EXTERNAL, liveness=Liveness.LIVE), LATER),
    "anew": (SnapshotRequest("s", disk_only=True, disks=MIXED), LATER),
    "inside": (SnapshotRequest("s", disks=MIXED, liveness=Liveness.LIVE), LATER),
    "copy": (SnapshotRequest("s", disk_only=True, default_mode=INTERNAL), ABOVE),
    "memory in a base": (SnapshotRequest("s"), ABOVE),
}


def ways(*usual: str, slow: Sequence[str]) -> Any:
    """Ways of going back; the others of them run with the slow tests."""
    return pytest.mark.parametrize("way", [*usual, *(pytest.param(way, marks=pytest.mark.slow) for way in slow)])


def options(number: int, keep: bool) -> RevertOptions:
    return RevertOptions(discard_current=not keep, safety_name=f"safe{number}-")


def prepared(
    rig: MakeRig, tmp_path: Path, way: str, *, keep: bool = False, named: bool = True
) -> tuple[Rig, ActiveDomain, Catalog, int]:
    guest = rig(named=named)
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    for request in WAYS[way]:
        executor.create(domain, catalog, request)
    plan = executor.revert(domain, catalog, "s", options(99, keep), dry_run=True)
    assert isinstance(plan, list)
    return guest, domain, catalog, len(plan)


def assert_fits(guest: Rig, domain: ActiveDomain) -> None:
    """Memory and disks belong together, and the guest runs."""
    assert domain.qmp.execute("query-status")["status"] == "running"
    domain.qmp.execute("stop")
    counters = [disk_counter(one.disk.path, one.disk.format) for one in domain.facts().disks]
    record = ram_record(domain.qmp, guest.directory)
    assert consistent(record, counters), (record, counters)
    domain.qmp.execute("cont")


def wait_for_count(guest: Rig, domain: ActiveDomain, way: str) -> None:
    """Wait until a guest that may have booted anew counts; until then there may be no record in its memory."""
    if way in ("swap", "copy"):
        guest.wait_for_ticks(3)
    if way != "anew":
        return
    seen: list[int] = []

    def counts() -> bool | None:
        with contextlib.suppress(AssertionError):
            seen.append(ram_record(domain.qmp, guest.directory)[0])
        return True if len(set(seen)) > 3 else None  # 0, what the disks say, and counting

    poll(counts, deadline=60, what="the guest's start")


def finish(guest: Rig, domain: ActiveDomain) -> None:
    assert not guest.complaints()
    domain.qmp.execute("quit")
    domain.close()


def recovered(guest: Rig, domain: ActiveDomain, catalog: Catalog) -> ActiveDomain:
    """Finish a revert that has taken effect."""
    domain.close()
    domain = guest.connect()
    assert executor.recover(domain, catalog) == ["finished the revert of 's'"]
    domain.close()
    assert catalog.current == "s"
    return guest.connect()


@pytest.mark.parametrize(
    ("way", "keep"),
    [
        ("load", False),
        ("anew", False),
        ("memory in a base", False),
        *(pytest.param(way, False, marks=pytest.mark.slow) for way in ("swap", "restart", "inside", "copy")),
        *(pytest.param(way, True, marks=pytest.mark.slow) for way in ("load", "swap", "inside")),
    ],
)
def test_an_error_at_each_step_of_a_revert(rig: MakeRig, tmp_path: Path, faults: Faults, way: str, keep: bool) -> None:
    """`keep`: the present state, in a safety snapshot that goes with a revert that fails."""
    guest, domain, catalog, total = prepared(rig, tmp_path, way, keep=keep)
    injected = clean = 0
    for number in range(total):
        before, count = state(guest, domain, catalog), ram_record(domain.qmp, tmp_path)[0]
        try:
            executor.revert(domain, catalog, "s", options(number, keep), progress=at_step(number, boom))
        except Boom:
            assert state(guest, domain, catalog) == before
            assert ram_record(domain.qmp, tmp_path)[0] >= count  # it has not begun anew
        except RecoverNeeded:
            domain = recovered(guest, domain, catalog)
        wait_for_count(guest, domain, way)
        injected += 1
        assert_fits(guest, domain)
        clean += 1
    faults(injected, clean)
    assert injected == total
    finish(guest, domain)


@pytest.mark.parametrize("way", ["swap", "copy"])
def test_the_safety_snapshot_goes_with_a_revert_that_fails(rig: MakeRig, tmp_path: Path, way: str) -> None:
    """Nodes that QEMU has named itself are gone once they are swapped out: the way back finds the files."""
    guest, domain, catalog, total = prepared(rig, tmp_path, way, keep=True, named=False)
    plan = executor.revert(domain, catalog, "s", options(99, keep=True), dry_run=True)
    assert isinstance(plan, list)
    number = [step.action for step in plan].index("switch")
    before = state(guest, domain, catalog)
    with pytest.raises(Boom):
        executor.revert(domain, catalog, "s", options(0, keep=True), progress=at_step(number, boom))
    after = state(guest, domain, catalog)
    for one in (before, after):
        one["disks"] = [(path, snapshots, chain) for path, _node, snapshots, chain in one["disks"]]
        del one["nodes"]
    assert after == before
    assert_fits(guest, domain)
    assert number < total
    finish(guest, domain)


def in_front_of(execute: Callable[..., Any], failing: Faulty) -> Callable[..., Any]:
    """`Qmp.execute` of all connections, with one fault in front."""

    def through(qmp: Qmp, command: str, arguments: Any = None, *, deadline: float | None = None) -> Any:
        failing.execute = partial(execute, qmp)
        return failing(command, arguments, deadline=deadline)

    return through


@ways("anew", slow=["swap", "memory in a base"])
@pytest.mark.parametrize("late", [False, True])
def test_each_command_of_a_revert_refused_or_unanswered(
    rig: MakeRig, tmp_path: Path, faults: Faults, way: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: QEMU, the old or the new one, does what it was told, but the answer does not come."""
    guest, domain, catalog, _total = prepared(rig, tmp_path, way)
    execute = Qmp.execute
    injected = clean = 0
    while True:
        before, count = state(guest, domain, catalog), ram_record(domain.qmp, tmp_path)[0]
        failing = Faulty(execute, injected, late=late)
        monkeypatch.setattr(Qmp, "execute", in_front_of(execute, failing))
        try:
            executor.revert(domain, catalog, "s", options(injected, keep=False))
            done = True
        except RecoverNeeded:
            monkeypatch.setattr(Qmp, "execute", execute)
            domain = recovered(guest, domain, catalog)
            done = True
        except (ByTheTest, DomainSnapshotError):
            done = False
        monkeypatch.setattr(Qmp, "execute", execute)
        if not failing.failed:
            break
        injected += 1
        if not done:
            assert state(guest, domain, catalog) == before
            assert ram_record(domain.qmp, tmp_path)[0] >= count
        wait_for_count(guest, domain, way)
        assert_fits(guest, domain)
        clean += 1
    faults(injected, clean)
    assert injected > 3
    finish(guest, domain)


@ways(slow=["load", "swap", "restart", "anew", "memory in a base"])
def test_the_death_of_domsnap_at_each_step_of_a_revert(rig: MakeRig, tmp_path: Path, faults: Faults, way: str) -> None:
    guest, domain, catalog, total = prepared(rig, tmp_path, way)
    domain.close()
    injected = clean = 0
    for number in range(total):
        program = f"""
            import os, signal
            from snapshot import executor
            from snapshot.catalog import Catalog
            from tests.live.rig import Description
            from tests.live.test_domain_faults import at_step
            from snapshot.domain import open_domain
            from snapshot.model import RevertOptions, Disk
            disks = tuple(Disk(target, path, "qcow2") for target, path in {[(d.target, d.path) for d in guest.disks]!r})
            domain = open_domain(Description("guest", disks, {guest.socket!r}, {guest.description.command!r}))
            progress = at_step({number}, lambda: os.kill(os.getpid(), signal.SIGKILL))
            options = RevertOptions(discard_current=True)
            executor.revert(domain, Catalog({catalog.directory!r}), "s", options, progress=progress)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=120, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        injected += 1
        domain = guest.connect()
        (what,) = executor.recover(domain, catalog)
        domain.close()
        domain = guest.connect()
        assert what.startswith(("undid", "finished"))
        assert not [name for name in os.listdir(catalog.directory) if name.startswith("operation")]
        wait_for_count(guest, domain, way)
        assert_fits(guest, domain)
        domain.close()
        clean += 1
    faults(injected, clean)
    assert injected == total
    finish(guest, guest.connect())


@ways("anew", slow=["load", "swap", "memory in a base"])
def test_the_death_of_qemu_at_each_step_of_a_revert(rig: MakeRig, tmp_path: Path, faults: Faults, way: str) -> None:
    guest, domain, catalog, total = prepared(rig, tmp_path, way)
    journal = executor.Journal(catalog.directory)
    snapshot = catalog.load()[0]
    injected = clean = 0
    for number in range(total):
        if number:
            domain = guest.start(paths=journal.layers())
        wanted = snapshot_counters(snapshot)
        last = [one.disk.path for one in domain.facts().disks]
        try:
            executor.revert(domain, catalog, "s", options(number, keep=False), progress=at_step(number, guest.kill))
            done = True
        except RecoverNeeded:
            domain.close()
            here = open_domain(guest.description)
            assert executor.recover(here, catalog) == ["finished the revert of 's'"]
            here.close()
            done = True
        except DomainSnapshotError:
            done = False
        domain.close()
        injected += 1
        assert guest.process.poll() is not None
        assert listening(guest.socket) <= done  # a new QEMU runs only when the revert has taken effect
        with new_one(guest) as running:
            facts = (running or guest.inactive()).facts(journal.layers())
            assert [one.disk.path for one in facts.disks] == (last if not done else list(journal.layers().values()))
        facts = guest.inactive().facts(journal.layers())
        counters = [disk_counter(one.disk.path, one.disk.format) for one in facts.disks]
        assert not [name for name in os.listdir(catalog.directory) if name.startswith("operation")]
        assert catalog.current == "s" or not done
        if done and running is None:
            assert counters == wanted
        assert max(counters) - min(counters) <= 1
        for one in facts.disks:
            assert not [stored for stored in one.snapshots if stored.name.startswith("ds-")]
            assert oracle.image_check(one.disk.path)["rc"] in (0, 3)
        assert snapshot_counters(snapshot) == wanted
        clean += 1
    faults(injected, clean)
    assert injected == total


def test_a_new_qemu_that_dies_before_the_old_one_is_ended(rig: MakeRig, tmp_path: Path) -> None:
    """It has taken effect by then: the old one, whose memory fits the disks no more, must not run again."""
    guest, domain, catalog, _total = prepared(rig, tmp_path, "anew")
    wanted = snapshot_counters(catalog.load()[0])
    plan = executor.revert(domain, catalog, "s", options(99, keep=False), dry_run=True)
    assert isinstance(plan, list)
    number = [step.action for step in plan].index("take-over")

    def kill() -> None:
        pid = int((Path(catalog.directory) / "start.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        own = [str(path) for path in tmp_path.glob("q.*")]
        poll(lambda: None if any(map(listening, own)) else True, deadline=60, what="its end")

    with pytest.raises(RecoverNeeded, match="the new QEMU has ended; the domain is off"):
        executor.revert(domain, catalog, "s", options(0, keep=False), progress=at_step(number, kill))
    guest.process.wait(60)
    assert executor.recover(guest.inactive(), catalog) == ["finished the revert of 's'"]
    facts = guest.inactive().facts(executor.Journal(catalog.directory).layers()).disks
    assert [disk_counter(one.disk.path, one.disk.format) for one in facts] == wanted
    assert not [stored for one in facts for stored in one.snapshots if stored.name.startswith("ds-")]
    assert catalog.current == "s"


@contextlib.contextmanager
def new_one(guest: Rig) -> Iterator[ActiveDomain | None]:
    """The QEMU that the engine has started, if it has; it ends with the block."""
    if not listening(guest.socket):
        yield None
        return
    domain = guest.connect()
    yield domain
    domain.qmp.execute("quit")
    domain.close()
    ended: Callable[[], bool | None] = lambda: None if listening(guest.socket) else True  # noqa: E731
    poll(ended, deadline=60, what="the new QEMU")
    poll(lambda: None if any(one.in_use for one in guest.inactive().facts().disks) else True, deadline=60, what="it")
