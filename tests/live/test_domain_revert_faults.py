"""A fault at every step of a revert: before it takes effect all is as before, afterwards `recover` finishes it."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain
from snapshot.errors import DomainSnapshotError, RecoverNeeded
from snapshot.model import DiskMode, Liveness, RevertOptions, SnapshotRequest
from tests import oracle
from tests.live.rig import MakeRig, Rig, consistent, disk_counter, ram_record, snapshot_counters
from tests.live.test_domain_faults import Boom, at_step, boom, state

pytestmark = pytest.mark.live

REQUESTS = {
    "load": SnapshotRequest("s"),
    "swap": SnapshotRequest("s", disk_only=True, default_mode=DiskMode.EXTERNAL),
    "restart": SnapshotRequest("s", default_mode=DiskMode.EXTERNAL, liveness=Liveness.LIVE),
}
OPTIONS = RevertOptions(discard_current=True)


def prepared(rig: MakeRig, tmp_path: Path, way: str) -> tuple[Rig, ActiveDomain, Catalog, int]:
    guest = rig()
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    executor.create(domain, catalog, REQUESTS[way])
    executor.create(domain, catalog, SnapshotRequest("later", disk_only=True, default_mode=DiskMode.INTERNAL))
    plan = executor.revert(domain, catalog, "s", OPTIONS, dry_run=True)
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


def finish(guest: Rig, domain: ActiveDomain) -> None:
    assert not guest.complaints()
    domain.qmp.execute("quit")
    domain.close()


@pytest.mark.parametrize("way", REQUESTS)
def test_an_error_at_each_step_of_a_revert(rig: MakeRig, tmp_path: Path, way: str) -> None:
    guest, domain, catalog, total = prepared(rig, tmp_path, way)
    injected = clean = 0
    for number in range(total):
        before = state(guest, domain, catalog)
        try:
            executor.revert(domain, catalog, "s", OPTIONS, progress=at_step(number, boom))
        except Boom:
            after = state(guest, domain, catalog)
            ours = {"files": set(before.pop("files")) | {"start.log"}}
            assert set(after.pop("files")) <= ours["files"]
            assert after == before
        except RecoverNeeded:
            domain.close()
            domain = guest.connect()
            assert executor.recover(domain, catalog) == ["finished the revert of 's'"]
            domain.close()
            domain = guest.connect()
            assert catalog.current == "s"
        if way == "swap":  # the guest boots anew
            guest.wait_for_ticks(3)
        injected += 1
        assert_fits(guest, domain)
        clean += 1
    assert injected == clean == total
    finish(guest, domain)


@pytest.mark.slow
@pytest.mark.parametrize("way", REQUESTS)
def test_the_death_of_domsnap_at_each_step_of_a_revert(rig: MakeRig, tmp_path: Path, way: str) -> None:
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
        if way == "swap":
            guest.wait_for_ticks(3)
        assert_fits(guest, domain)
        domain.close()
        clean += 1
    assert injected == clean == total
    finish(guest, guest.connect())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["load", "swap"])
def test_the_death_of_qemu_at_each_step_of_a_revert(rig: MakeRig, tmp_path: Path, way: str) -> None:
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
            executor.revert(domain, catalog, "s", OPTIONS, progress=at_step(number, guest.kill))
            done = True
        except RecoverNeeded:
            domain.close()
            assert executor.recover(guest.inactive(), catalog) == ["finished the revert of 's'"]
            done = True
        except DomainSnapshotError:
            done = False
        domain.close()
        injected += 1
        facts = guest.inactive().facts(journal.layers())
        counters = [disk_counter(one.disk.path, one.disk.format) for one in facts.disks]
        assert not [name for name in os.listdir(catalog.directory) if name.startswith("operation")]
        if done:
            assert catalog.current == "s"
            assert counters == wanted
        else:
            assert [one.disk.path for one in facts.disks] == last
            assert max(counters) - min(counters) <= 1
        for one in facts.disks:
            assert not [stored for stored in one.snapshots if stored.name.startswith("ds-")]
            assert oracle.image_check(one.disk.path)["rc"] in (0, 3)
        assert snapshot_counters(snapshot) == wanted
        clean += 1
    assert injected == clean == total
