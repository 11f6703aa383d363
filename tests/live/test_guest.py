"""The test guest and its oracle: what the other live tests stand on. The oracle must see every kind of tear."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.live import guest
from tests.live.guest import ALL_WRITTEN, FIXTURES, MemoryRecord, QmpFailed, torn
from tests.live.rig import fits_some_moment

pytestmark = pytest.mark.live


def test_boot_sector_is_built_from_its_source(tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("binutils are not installed")
    code, linked = tmp_path / "g.o", tmp_path / "g.bin"
    subprocess.run(["as", "--32", "-o", code, FIXTURES / "boot_sector.s"], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", linked, code], check=True)
    assert linked.read_bytes() == guest.boot_sector(period=2)


@pytest.mark.parametrize(
    ("memory", "counters", "consistent"),
    [
        (MemoryRecord(7, ALL_WRITTEN), [7, 7], True),
        (MemoryRecord(7, ALL_WRITTEN), [7, 6], False),
        (MemoryRecord(7, ALL_WRITTEN), [8, 7], False),
        (MemoryRecord(7, 0), [6, 6], True),
        (MemoryRecord(7, 0), [7, 6], True),
        (MemoryRecord(7, 0), [7, 7], False),
        (MemoryRecord(7, 1), [7, 6], True),
        (MemoryRecord(7, 1), [7, 7], True),
        (MemoryRecord(7, 1), [6, 6], False),
        (MemoryRecord(0, 0), [-1, -1], True),
        (MemoryRecord(7, 2), [7, 7, 6], True),
        (MemoryRecord(7, 1), [7, 7, 7], False),
    ],
)
def test_oracle_is_exact(memory: MemoryRecord, counters: list[int], consistent: bool) -> None:
    assert (torn(memory, counters) is None) is consistent


@pytest.mark.parametrize(
    ("counters", "possible"),
    [
        ({0: 7, 1: 7}, True),
        ({0: 8, 1: 7}, True),
        ({0: 7, 1: 6}, True),
        ({0: 7, 1: 8}, False),
        ({0: 8, 1: 6}, False),
        ({0: 6, 1: 6}, True),  # 7 is about to be written
        ({0: 5, 1: 5}, False),
        ({0: 9, 1: 8}, False),
        ({1: 8}, True),
        ({1: 9}, False),
        ({1: 5}, False),
    ],
)
def test_oracle_of_disks_alone(counters: dict[int, int], possible: bool) -> None:
    assert fits_some_moment(7, 8, 2, counters) is possible


def test_internal_snapshots_agree_and_torn_ones_do_not(tmp_path: Path) -> None:
    disks = guest.make_disks(tmp_path, 3, period=0)
    names = [f"s{index}" for index in range(8)]
    with guest.running(disks) as machine:
        for name in names:
            machine.wait_ticks(3)
            machine.monitor.job("snapshot-save", tag=name, vmstate="d0", devices=["d0", "d1", "d2"])
        machine.wait_ticks()
        assert machine.complaints() == []
        assert {"STOP", "RESUME"} <= set(machine.monitor.event_names())
        with pytest.raises(QmpFailed, match="already exists"):
            machine.monitor.job("snapshot-save", tag="s0", vmstate="d0", devices=["d0", "d1", "d2"])
    memories = [guest.memory_of_vmstate(disks[0], name) for name in names]
    counters = [[guest.disk_counter(disk, snapshot=name) for disk in disks] for name in names]
    assert [torn(memory, each) for memory, each in zip(memories, counters, strict=True)] == [None] * 8
    assert len({memory.n for memory in memories}) == 8
    for memory, later in zip(memories, counters[1:], strict=False):
        assert torn(memory, later) is not None
        assert torn(memory, [*later[:2], memory.n - 5]) is not None


def test_memory_file_and_restore(tmp_path: Path) -> None:
    disks = guest.make_disks(tmp_path, 2)
    memory = tmp_path / "memory"
    with guest.running(disks, memory=8) as machine:
        machine.wait_ticks(2)
        machine.save_memory(memory, resume=False)
        assert machine.status() == "postmigrate"
    record = guest.memory_of_file(memory)
    assert torn(record, [guest.disk_counter(disk) for disk in disks]) is None
    with guest.running(disks, memory=8, extra=("-S", "-incoming", "defer"), ticks=0) as machine:
        with open(memory, "rb") as file:
            machine.load_memory(file.fileno())
        assert machine.status() == "paused"
        machine.qmp("cont")
        machine.wait_ticks(3)
        assert machine.complaints() == []
        assert machine.ticks()[0] in {record.n, record.n + 1}
        machine.quit()
        assert machine.process.returncode == 0


def test_raw_disks_and_the_guest_s_own_voice(tmp_path: Path) -> None:
    disks = guest.make_disks(tmp_path, 2, formats=("qcow2", "raw"), period=9)
    memory = tmp_path / "memory"
    with guest.running(disks) as machine:
        machine.save_memory(memory, resume=True)
        machine.wait_ticks(4)
    counters = [guest.disk_counter(disks[0]), guest.disk_counter(disks[1], format="raw")]
    assert counters[0] in {counters[1], counters[1] + 1}
    assert torn(guest.memory_of_file(memory), counters) is not None
    with guest.running(disks, extra=("-S", "-incoming", "defer"), ticks=0) as machine:
        with open(memory, "rb") as file:
            machine.load_memory(file.fileno())
        machine.qmp("cont")
        machine.wait_ticks(3)
        # It reads a disk before it writes it: one of the two at least is seen to be ahead of memory.
        assert machine.complaints() != []


def test_qemu_is_gone_after_the_block(tmp_path: Path) -> None:
    disks = guest.make_disks(tmp_path, 1)
    with guest.running(disks) as machine:
        pid, directory = machine.process.pid, machine.directory
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(guest.GuestError, match="QEMU"), guest.running([tmp_path / "missing.qcow2"]):
        pass
