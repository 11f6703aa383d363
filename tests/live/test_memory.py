"""The memory of a real guest converted offline, both ways, and restored by a real QEMU: memory and disks agree."""

import json
from pathlib import Path

import pytest

import qcowlib
from snapshot.memory import export_memory, import_memory, memory_file_facts
from tests.live import guest
from tests.live.guest import QmpFailed, torn
from tests.oracle import assert_clean, qemu_img

pytestmark = pytest.mark.live

INCOMING = ("-S", "-incoming", "defer")


def restored_counters(disks: list[Path], name: str) -> list[int]:
    return [guest.disk_counter(disk, snapshot=name) for disk in disks]


@pytest.mark.parametrize("memory", [4, 16])
def test_internal_snapshot_exported_and_restored_with_incoming(tmp_path: Path, memory: int) -> None:
    disks = guest.make_disks(tmp_path, 2)
    with guest.running(disks, memory=memory) as machine:
        machine.wait_ticks(2)
        machine.monitor.job("snapshot-save", tag="s1", vmstate="d0", devices=["d0", "d1"])
        machine.wait_ticks(3)
        # The image of a running guest is not read without being asked to.
        with pytest.raises(qcowlib.ImageLocked):
            export_memory(str(disks[0]), "s1", tmp_path / "memory")
        assert not (tmp_path / "memory").exists()
        machine.quit()
    facts = export_memory(str(disks[0]), "s1", tmp_path / "memory")
    assert facts.machine is not None
    assert facts.machine.startswith("pc-i440fx-")
    assert ("pc.ram", memory << 20) in facts.ram_blocks
    assert any(device.endswith("/virtio-blk") for device in facts.devices)
    record = guest.memory_of_file(tmp_path / "memory")
    assert record == guest.memory_of_vmstate(disks[0], "s1")
    assert torn(record, restored_counters(disks, "s1")) is None
    for disk in disks:
        qemu_img("snapshot", "-a", "s1", disk)
    with guest.running(disks, memory=memory, extra=INCOMING, ticks=0) as machine:
        with open(tmp_path / "memory", "rb") as file:
            machine.load_memory(file.fileno())
        machine.qmp("cont")
        machine.wait_ticks(3)
        assert machine.ticks()[0] in {record.n, record.n + 1}
        assert machine.complaints() == []


@pytest.mark.parametrize("how", ["snapshot-load", "-loadvm"])
def test_memory_file_imported_and_restored_from_inside(tmp_path: Path, how: str) -> None:
    disks = guest.make_disks(tmp_path, 2)
    memory = tmp_path / "memory"
    with guest.running(disks) as machine:
        machine.wait_ticks(3)
        machine.save_memory(memory, resume=False)
    for disk in disks:
        qemu_img("snapshot", "-c", "s1", disk)
    record = guest.memory_of_file(memory)
    assert torn(record, restored_counters(disks, "s1")) is None
    with guest.running(disks) as machine:  # the disks go on, and the snapshot has no memory yet
        machine.wait_ticks(4)
        with pytest.raises(QmpFailed, match="disk-only snapshot"):
            machine.monitor.job("snapshot-load", tag="s1", vmstate="d0", devices=["d0", "d1"])
        with pytest.raises(qcowlib.ImageLocked):
            import_memory(memory, str(disks[0]), "s1")
        machine.quit()
    facts = import_memory(memory, str(disks[0]), "s1")
    assert facts == memory_file_facts(memory)
    assert_clean(disks[0])
    assert json.loads(qemu_img("info", "--output=json", disks[0]).stdout)["snapshots"][0]["vm-state-size"] == facts.size
    assert guest.memory_of_vmstate(disks[0], "s1") == record
    assert torn(record, restored_counters(disks, "s1")) is None
    if how == "-loadvm":
        with guest.running(disks, extra=("-loadvm", "s1"), ticks=0) as machine:
            machine.qmp("cont")
            check_restored(machine, record.n)
    else:
        with guest.running(disks, ticks=3) as machine:
            printed = len(machine.ticks())
            machine.monitor.job("snapshot-load", tag="s1", vmstate="d0", devices=["d0", "d1"])
            machine.qmp("cont")
            check_restored(machine, record.n, after=printed)
    assert_clean(disks[0])


def check_restored(machine: guest.Guest, n: int, *, after: int = 0) -> None:
    machine.wait_ticks(3)
    assert any(tick in {n, n + 1} for tick in machine.ticks()[after:])
    assert machine.complaints() == []


def test_there_and_back_is_the_same(tmp_path: Path) -> None:
    disks = guest.make_disks(tmp_path, 1)
    with guest.running(disks) as machine:
        machine.monitor.job("snapshot-save", tag="full", vmstate="d0", devices=["d0"])
        machine.quit()
    export_memory(str(disks[0]), "full", tmp_path / "one")
    qemu_img("snapshot", "-c", "other", disks[0])
    import_memory(tmp_path / "one", str(disks[0]), "other")
    export_memory(str(disks[0]), "other", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert_clean(disks[0])


def test_a_cut_memory_file_is_refused_where_qemu_would_fail(tmp_path: Path) -> None:
    disks = guest.make_disks(tmp_path, 1)
    memory = tmp_path / "memory"
    with guest.running(disks) as machine:
        machine.save_memory(memory, resume=False)
    qemu_img("snapshot", "-c", "s1", disks[0])
    whole = memory.read_bytes()
    for cut in (1, 1000, len(whole) // 2):
        memory.write_bytes(whole[:-cut])
        assert not memory_file_facts(memory).complete
        with pytest.raises(Exception, match="cut off"):
            import_memory(memory, str(disks[0]), "s1")
