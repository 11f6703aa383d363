"""A fault at every step of every plan leaves the domain as it was: guest, graph, files, catalog, no journal."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshot import executor, gather
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain
from snapshot.errors import DomainSnapshotError, Interrupted, QmpError, QmpTimeout, RecoverNeeded
from snapshot.model import DeleteOptions, DiskMode, DiskRequest, Liveness, SnapshotRequest
from tests import oracle
from tests.live.rig import Faults, MakeRig, Rig, disk_counter

pytestmark = pytest.mark.live

INTERNAL, EXTERNAL = DiskMode.INTERNAL, DiskMode.EXTERNAL
MIXED = {"vda": DiskRequest(EXTERNAL), "vdb": DiskRequest(INTERNAL)}
REQUESTS = {
    "internal": SnapshotRequest("f"),
    "paused": SnapshotRequest("f", disks=MIXED),
    "standing": SnapshotRequest("f", disks=MIXED),
    "live": SnapshotRequest("f", default_mode=EXTERNAL, liveness=Liveness.LIVE),
    "background": SnapshotRequest("f", disks=MIXED, liveness=Liveness.BACKGROUND),
    "disk-only": SnapshotRequest("f", disk_only=True, disks=MIXED),
}


def kinds(*usual: str) -> Any:
    """All kinds of snapshots; those that are not named run with the slow tests."""
    return pytest.mark.parametrize(
        "kind", [k if k in usual else pytest.param(k, marks=pytest.mark.slow) for k in REQUESTS]
    )


class ByTheTest(QmpError):
    """A refusal that QEMU did not mean."""


class TimeoutByTheTest(ByTheTest, QmpTimeout):
    """An answer that was lost."""


class Faulty:
    """Stands before `Qmp.execute`: one command that changes something fails.

    Args:
        execute: what does the others.
        spare: how many go through before it.
        late: the command is carried out, and then fails.
    """

    def __init__(self, execute: Callable[..., Any], spare: int, *, late: bool) -> None:
        self.execute = execute
        self.spare = spare
        self.late = late
        self.failed = False

    def __call__(self, command: str, arguments: Any = None, *, deadline: float | None = None) -> Any:
        if not command.startswith(("query", "x-debug", "qom")) and not self.failed:
            self.spare -= 1
            if self.spare < 0:
                self.failed = True
                if not self.late:
                    raise ByTheTest(command, "by the test")
                self.execute(command, arguments)
                raise TimeoutByTheTest(command, "by the test")
        return self.execute(command, arguments, deadline=deadline)


class Boom(RuntimeError):
    """Raised by a test inside the engine."""


def state(guest: Rig, domain: ActiveDomain, catalog: Catalog) -> dict[str, Any]:
    """Everything that a failed operation has to leave alone."""
    facts = domain.facts()
    nodes = domain.qmp.execute("query-named-block-nodes", {"flat": True})
    return {
        "run state": facts.run_state,
        "disks": [(one.disk.path, one.node, one.snapshots, one.disk.backing_chain) for one in facts.disks],
        "nodes": sorted(node["node-name"] for node in nodes if not node["node-name"].startswith("#")),
        "files": sorted(name for name in os.listdir(guest.directory) if name not in ("catalog", "serial", "ram")),
        "catalog": [snapshot.name for snapshot in catalog.load()],
        "current": catalog.current,
        "journal": sorted(name for name in os.listdir(catalog.directory) if name.startswith("operation")),
        "layers": executor.Journal(catalog.directory).layers(),
        "bandwidth": domain.qmp.execute("query-migrate-parameters")["max-bandwidth"],
        "capabilities": facts.capabilities,
        "jobs": domain.qmp.execute("query-jobs"),
    }


def at_step(number: int, act: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A progress callback that does something when a step begins."""
    done: list[int] = []

    def progress(what: str, index: int, total: int) -> None:
        if total < 100 and index == number and not done:
            done.append(index)
            act()

    return progress


def boom() -> None:
    raise Boom


def prepared(rig: MakeRig, tmp_path: Path, kind: str) -> tuple[Rig, ActiveDomain, Catalog]:
    """A running guest, for "standing" one that was paused."""
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    # There is a snapshot already, so that "as before" is not "nothing".
    executor.create(domain, catalog, SnapshotRequest("before", disk_only=True, default_mode=INTERNAL))
    if kind == "standing":
        domain.qmp.execute("stop")
    return guest, domain, catalog


def goes_on(guest: Rig, domain: ActiveDomain) -> None:
    """The guest runs, once it may, and finds its disks as they were."""
    domain.qmp.execute("cont")
    guest.wait_for_ticks(3)
    assert not guest.complaints()


def steps_of(domain: ActiveDomain, catalog: Catalog, kind: str) -> int:
    plan = executor.create(domain, catalog, REQUESTS[kind], dry_run=True)
    assert isinstance(plan, list)
    return len(plan)


@kinds("internal", "standing", "live", "background")
def test_an_error_at_each_step(rig: MakeRig, tmp_path: Path, faults: Faults, kind: str) -> None:
    guest, domain, catalog = prepared(rig, tmp_path, kind)
    before = state(guest, domain, catalog)
    injected = clean = 0
    for number in range(steps_of(domain, catalog, kind)):
        with pytest.raises(Boom):
            executor.create(domain, catalog, REQUESTS[kind], progress=at_step(number, boom))
        injected += 1
        clean += state(guest, domain, catalog) == before
    faults(injected, clean)
    assert injected > 1
    goes_on(guest, domain)
    executor.create(domain, catalog, REQUESTS[kind])


@kinds("paused")
@pytest.mark.parametrize("late", [False, True])
def test_each_command_refused_or_unanswered(
    rig: MakeRig, tmp_path: Path, faults: Faults, kind: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: QEMU does what it was told, but the answer does not come."""
    guest, domain, catalog = prepared(rig, tmp_path, kind)
    before = state(guest, domain, catalog)
    execute = domain.qmp.execute
    # Asking whether background snapshots are possible takes two commands, before anything begins.
    spared = injected = 2 * (kind == "background")
    clean = 0
    while True:
        faulty = Faulty(execute, injected, late=late)
        monkeypatch.setattr(domain.qmp, "execute", faulty)
        with contextlib.suppress(ByTheTest):
            executor.create(domain, catalog, REQUESTS[kind])
        monkeypatch.setattr(domain.qmp, "execute", execute)
        if not faulty.failed:
            break
        if catalog.current == "f":  # dismissing a job that has ended: nothing depends on it
            break
        injected += 1
        after = state(guest, domain, catalog)
        assert after == before
        clean += after == before
    faults(injected - spared, clean)
    goes_on(guest, domain)


@kinds("live")
def test_a_signal_at_each_step(rig: MakeRig, tmp_path: Path, faults: Faults, kind: str) -> None:
    guest, domain, catalog = prepared(rig, tmp_path, kind)
    before = state(guest, domain, catalog)
    injected = clean = 0
    for number in range(steps_of(domain, catalog, kind)):
        which = (signal.SIGINT, signal.SIGTERM)[number % 2]
        with pytest.raises(Interrupted, match=which.name):
            executor.create(
                domain,
                catalog,
                REQUESTS[kind],
                progress=at_step(number, lambda w=which: os.kill(os.getpid(), w)),  # type: ignore[misc]
            )
        injected += 1
        clean += state(guest, domain, catalog) == before
    faults(injected, clean)
    assert injected > 1
    goes_on(guest, domain)


@pytest.mark.parametrize("liveness", Liveness)
def test_a_signal_in_the_middle_of_the_memory(rig: MakeRig, tmp_path: Path, liveness: Liveness) -> None:
    guest = rig(memory=512)
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    executor.create(domain, catalog, SnapshotRequest("before", disk_only=True))
    before = state(guest, domain, catalog)
    sent: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "memory" and total > 1000 and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        executor.create(domain, catalog, SnapshotRequest("f", disks=MIXED, liveness=liveness), progress=progress)
    assert sent
    assert state(guest, domain, catalog) == before
    guest.wait_for_ticks(3)
    assert not guest.complaints()


@kinds("paused")
def test_the_connection_breaks_at_each_step(rig: MakeRig, tmp_path: Path, faults: Faults, kind: str) -> None:
    guest, domain, catalog = prepared(rig, tmp_path, kind)
    before = state(guest, domain, catalog)
    total = steps_of(domain, catalog, kind)
    injected = clean = 0
    for number in range(total):
        with contextlib.suppress(DomainSnapshotError):
            executor.create(domain, catalog, REQUESTS[kind], progress=at_step(number, domain.qmp.close))
        injected += 1
        domain.close()
        domain = guest.connect()
        if catalog.current == "f":
            assert number >= total - 2  # keeping the file and the entry needs no QEMU
            executor.delete(domain, catalog, "f", DeleteOptions(into="base"))
        clean += state(guest, domain, catalog) == before
    faults(injected, clean)
    assert injected > 1
    goes_on(guest, domain)


@kinds("disk-only")
def test_the_death_of_qemu_at_each_step(rig: MakeRig, tmp_path: Path, faults: Faults, kind: str) -> None:
    guest, domain, catalog = prepared(rig, tmp_path, kind)
    total = steps_of(domain, catalog, kind)
    before = state(guest, domain, catalog)
    injected = clean = 0
    for number in range(total):
        if number:
            domain = guest.start()
            domain.qmp.execute("stop" if kind == "standing" else "cont")
        # The last steps may need no QEMU, so that they go through.
        with contextlib.suppress(DomainSnapshotError):
            executor.create(domain, catalog, REQUESTS[kind], progress=at_step(number, guest.kill))
        assert guest.process.poll() is not None
        injected += 1
        domain.close()
        if catalog.current == "f":  # it was complete, and nothing more was needed of QEMU
            assert number >= total - 2
            clean += 1
            break
        after = {name: sorted(os.listdir(tmp_path)) for name in ("files",)}
        after["files"] = [name for name in after["files"] if name not in ("catalog", "serial", "ram")]
        assert after["files"] == before["files"]
        assert [snapshot.name for snapshot in catalog.load()] == before["catalog"]
        assert not [name for name in os.listdir(catalog.directory) if name.startswith("operation")]
        counters = []
        for disk in guest.disks:
            assert [line for line in oracle.image_info(disk.path).get("snapshots", []) if line["name"] == "f"] == []
            assert oracle.image_check(disk.path)["rc"] in (0, 3)
            counters.append(disk_counter(disk.path, disk.format))
        assert max(counters) - min(counters) <= 1
        clean += 1
    faults(injected, clean)
    assert injected >= total - 1
    # The disks are whole: the guest goes on counting on them.
    guest.start(paths=executor.Journal(catalog.directory).layers())
    assert not [line for line in guest.lines()[-3:] if "!" in line]


@kinds("internal", "disk-only")
def test_the_death_of_domsnap_at_each_step(rig: MakeRig, tmp_path: Path, faults: Faults, kind: str) -> None:
    guest, domain, catalog = prepared(rig, tmp_path, kind)
    before = state(guest, domain, catalog)
    total = steps_of(domain, catalog, kind)
    injected = clean = 0
    for number in range(total):
        domain.close()
        program = f"""
            import os, signal
            from snapshot import executor
            from snapshot.catalog import Catalog
            from tests.live.test_domain_faults import REQUESTS, at_step
            from tests.live.rig import Description
            from snapshot.domain import open_domain
            from snapshot.model import Disk
            disks = tuple(Disk(target, path, "qcow2") for target, path in {[(d.target, d.path) for d in guest.disks]!r})
            domain = open_domain(Description("guest", disks, {guest.socket!r}))
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            progress = at_step({number}, kill)
            executor.create(domain, Catalog({catalog.directory!r}), REQUESTS[{kind!r}], progress=progress)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=120, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        injected += 1
        domain = guest.connect()
        with pytest.raises(RecoverNeeded, match="run recover first"):
            executor.create(domain, catalog, REQUESTS[kind])
        assert executor.recover(domain, catalog) == ["undid the create of 'f'"]
        assert executor.recover(domain, catalog) == []
        clean += state(guest, domain, catalog) == before
    faults(injected, clean)
    assert injected == total
    goes_on(guest, domain)


def test_a_full_disk(rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        guest, domain, catalog = prepared(rig, tmp_path, "running")
        requests = {
            "memory": SnapshotRequest("f", default_mode=EXTERNAL, memory_file=str(small / "m")),
            "live": SnapshotRequest("f", disks=MIXED, memory_file=str(small / "m"), liveness=Liveness.LIVE),
            "overlay": SnapshotRequest(
                "f",
                disk_only=True,
                disks={"vda": DiskRequest(EXTERNAL), "vdb": DiskRequest(EXTERNAL, str(small / "o"))},
            ),
        }
        before = state(guest, domain, catalog)
        refusal = pytest.raises(DomainSnapshotError, match="bytes are free")
        with refusal:
            executor.create(domain, catalog, requests["memory"])
        facts = gather.host_facts

        def roomy(paths: set[str]) -> Any:
            return {path: replace(one, free=1 << 40) for path, one in facts(paths).items()}

        monkeypatch.setattr(gather, "host_facts", roomy)
        for kind, request in requests.items():
            filler = small / "filler"
            if kind == "overlay":
                filler.write_bytes(b"x" * (500 << 10))
            with pytest.raises((DomainSnapshotError, Exception), match=r"space|Unable to write|failed"):
                executor.create(domain, catalog, request)
            filler.unlink(missing_ok=True)
            assert state(guest, domain, catalog) == before
            assert os.listdir(small) == []
        guest.wait_for_ticks(3)
        assert not guest.complaints()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
