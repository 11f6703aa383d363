"""What the engine asks a running QEMU."""

import threading

import pytest

from snapshot import domain as domains
from snapshot.errors import QemuLost, QmpError, SocketTaken
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
