"""Internal snapshots in backing files are deleted: the layers above read the same, also under a running guest."""

from pathlib import Path

import pytest

import qcowlib
from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.domain import ActiveDomain
from snapshot.errors import NotPossible, QmpError, RecoverNeeded
from snapshot.model import DeleteOptions, DiskMode, DomainSnapshot, SnapshotRequest
from tests import oracle
from tests.live.rig import MakeRig, Rig, disk_counter, snapshot_counters
from tests.live.test_domain_faults import Boom, at_step, boom, state

pytestmark = pytest.mark.live


def prepared(guest: Rig, catalog: Catalog, *, memory: bool) -> tuple[ActiveDomain, list[DomainSnapshot]]:
    """A guest on overlays; internal snapshots of what is below them."""
    domain = guest.start()
    for name in ("in", "kept"):
        executor.create(domain, catalog, SnapshotRequest(name, disk_only=not memory))
        guest.wait_for_ticks(2)
    executor.create(domain, catalog, SnapshotRequest("ex", disk_only=True, default_mode=DiskMode.EXTERNAL))
    guest.wait_for_ticks(2)
    return domain, [one for one in catalog.load() if one.name != "in"]


def read_only(domain: ActiveDomain, guest: Rig) -> list[bool]:
    """Of the nodes of the files below."""
    files = [disk.path for disk in guest.disks]
    nodes = domain.qmp.execute("query-named-block-nodes", {"flat": True})
    return [node["ro"] for node in nodes if node["file"] in files]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("memory", [True, False])
def test_under_a_running_guest(rig: MakeRig, tmp_path: Path, named: bool, memory: bool) -> None:
    """`named`: by the command line; QEMU takes blockdev-reopen for no node that it has named itself."""
    guest = rig(named=named)
    catalog = Catalog(str(tmp_path / "catalog"))
    domain, others = prepared(guest, catalog, memory=memory)
    counters = [snapshot_counters(one) for one in others]
    plan = executor.delete(domain, catalog, "in", DeleteOptions(), dry_run=True)
    shown = [step.commands for step in plan if not isinstance(step, str)]
    assert sum(command["execute"] == "snapshot-delete" for commands in shown for command in commands) == 2
    executor.delete(domain, catalog, "in", DeleteOptions())
    assert [one.name for one in catalog.load()] == ["kept", "ex"]
    assert [snapshot_counters(one) for one in others] == counters
    assert read_only(domain, guest) == [True] * 4
    guest.wait_for_ticks(2)
    layers = [one.disk.path for one in domain.facts().disks]
    guest.quit(domain.qmp)
    assert not guest.complaints()
    assert all(disk_counter(path, "qcow2") > counters[-1][0] for path in layers)
    for path in [*layers, *(disk.path for disk in guest.disks)]:
        oracle.assert_clean(path)
    assert [[one["name"] for one in oracle.image_info(disk.path)["snapshots"]] for disk in guest.disks] == [
        ["kept"]
    ] * 2


def test_when_off(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain, others = prepared(guest, catalog, memory=True)
    layers = [one.disk.path for one in domain.facts().disks]
    guest.quit(domain.qmp)
    counters = [snapshot_counters(one) for one in others], [disk_counter(path, "qcow2") for path in layers]
    executor.delete(guest.inactive(), catalog, "in", DeleteOptions())
    assert ([snapshot_counters(one) for one in others], [disk_counter(path, "qcow2") for path in layers]) == counters
    for path in [*layers, *(disk.path for disk in guest.disks)]:
        oracle.assert_clean(path)


def test_a_base_that_another_process_reads(rig: MakeRig, tmp_path: Path) -> None:
    """Nobody may write it then: that is found before the snapshot has left the catalog."""
    guest = rig()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain, _others = prepared(guest, catalog, memory=False)
    before = state(guest, domain, catalog)
    with (
        qcowlib.open_image(guest.disks[1].path, format="qcow2", open_backing=False),
        pytest.raises(QmpError, match="lock"),
    ):
        executor.delete(domain, catalog, "in", DeleteOptions())
    assert state(guest, domain, catalog) == before
    assert read_only(domain, guest) == [True] * 4
    executor.delete(domain, catalog, "in", DeleteOptions())
    guest.wait_for_ticks(2)
    assert not guest.complaints()


def test_two_of_one_name(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain, _others = prepared(guest, catalog, memory=False)
    layers = {one.disk.target: one.disk.path for one in domain.facts().disks}
    guest.quit(domain.qmp)
    oracle.qemu_img("snapshot", "-c", "in", guest.disks[0].path)
    domain = guest.start(paths=layers)
    with pytest.raises(NotPossible, match="holds 2 internal snapshots 'in' and is a backing file now"):
        executor.delete(domain, catalog, "in", DeleteOptions())


def test_an_error_at_each_step(rig: MakeRig, tmp_path: Path) -> None:
    """Each time another snapshot is deleted."""
    guest = rig()
    catalog = Catalog(str(tmp_path / "catalog"))
    domain = guest.start()
    names = [f"in-{number}" for number in range(6)]
    for name in names:
        executor.create(domain, catalog, SnapshotRequest(name, disk_only=True))
    executor.create(domain, catalog, SnapshotRequest("ex", disk_only=True, default_mode=DiskMode.EXTERNAL))
    counters = snapshot_counters(catalog.load()[-1])
    plan = executor.delete(domain, catalog, names[0], DeleteOptions(), dry_run=True)
    assert len(plan) == len(names)
    injected = clean = 0
    for number, name in enumerate(names):
        before = state(guest, domain, catalog)
        try:
            executor.delete(domain, catalog, name, DeleteOptions(), progress=at_step(number, boom))
        except Boom:
            assert state(guest, domain, catalog) == before
        except RecoverNeeded:
            assert executor.recover(domain, catalog) == [f"finished the delete of '{name}'"]
            assert name not in [one.name for one in catalog.load()]
        injected += 1
        assert read_only(domain, guest) == [True] * 4
        clean += 1
    assert injected == clean == len(names)
    left = [one.name for one in catalog.load()][:-1]
    assert len(left) == 3  # as many steps come before it takes effect
    assert snapshot_counters(catalog.load()[-1]) == counters
    guest.wait_for_ticks(2)
    guest.quit(domain.qmp)
    assert not guest.complaints()
    for disk in guest.disks:
        assert [one["name"] for one in oracle.image_info(disk.path)["snapshots"]] == left
        oracle.assert_clean(disk.path)
