"""What the engine asks a running QEMU."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from snapshot import domain as domains
from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.errors import NotPossible, QemuLost, QmpError, SocketTaken
from snapshot.model import DeleteOptions, DiskMode, DomainSnapshot, SnapshotRequest
from snapshot.qmp import Qmp
from tests.live.rig import MakeRig

pytestmark = pytest.mark.live


def test_facts_of_a_running_domain(rig: MakeRig) -> None:
    guest = rig("qcow2", "raw")
    domain = guest.start()
    facts = domain.facts()
    assert (facts.active, facts.run_state, facts.name) == (True, "running", "guest")
    assert facts.machine == "pc-i440fx-7.2"
    assert facts.ram_size == 4 << 20
    assert facts.version is not None
    assert facts.version[:2] >= (7, 2)
    assert [(one.disk.target, one.disk.path, one.driver) for one in facts.disks] == [
        ("vda", guest.disks[0].path, "qcow2"),
        ("vdb", guest.disks[1].path, "raw"),
    ]
    assert [one.disk.node_name for one in facts.disks] == ["d0", "d1"]
    assert facts.disks[0].refcount_bits == 16
    assert [one.disk.virtual_size for one in facts.disks] == [8 << 20] * 2
    domain.close()


def test_a_disk_whose_described_file_is_no_part_of_it_any_more(rig: MakeRig, tmp_path: Path) -> None:
    """QEMU's own names of the drives are not the description's targets."""
    guest = rig(named=False)
    domain = guest.start()
    catalog = Catalog(str(tmp_path / "catalog"))
    external = SnapshotRequest("one", disk_only=True, default_mode=DiskMode.EXTERNAL)
    executor.create(domain, catalog, external)
    executor.delete(domain, catalog, "one", DeleteOptions(into="overlay"))
    taken = executor.create(domain, catalog, external)
    assert isinstance(taken, DomainSnapshot)
    assert [disk.target for disk in taken.disks] == ["vda", "vdb"]
    assert all(disk.file.endswith(".one.qcow2") for disk in taken.disks)


def test_the_socket_of_another_domain(rig: MakeRig, tmp_path: Path) -> None:
    guest = rig()
    guest.start().close()
    others = [replace(disk, path=str(tmp_path / f"other-{disk.target}.qcow2")) for disk in guest.disks]
    guest.description.disks = tuple(others)
    with pytest.raises(NotPossible, match="another domain's socket"):
        executor.create(guest.connect(), Catalog(str(tmp_path / "catalog")), SnapshotRequest("one"))


def test_a_domain_without_its_socket_is_not_taken_for_inactive(rig: MakeRig) -> None:
    guest = rig()
    guest.start().close()
    guest.description.qmp_socket = None
    facts = guest.inactive().facts()
    assert not facts.active
    assert all("another process" in str(one.in_use) for one in facts.disks)


def test_a_taken_socket_is_said_to_be_taken(rig: MakeRig) -> None:
    guest = rig()
    domain = guest.start()
    with pytest.raises(SocketTaken, match="another client"):
        Qmp(guest.socket, wait=0.5)
    threading.Timer(1.0, domain.close).start()
    Qmp(guest.socket, wait=30).close()


def test_errors_of_commands_and_the_end_of_qemu(rig: MakeRig) -> None:
    guest = rig()
    domain = guest.start()
    with pytest.raises(QmpError, match="The command nonsense has not been found"):
        domain.qmp.execute("nonsense")
    guest.kill()
    with pytest.raises(QemuLost):
        domain.qmp.execute("query-status")
    assert not domains.alive(domain.qmp)
    domain.close()
    with pytest.raises(QemuLost):
        Qmp(guest.socket)
    facts = guest.inactive().facts()
    assert [one.in_use for one in facts.disks] == [None, None]
