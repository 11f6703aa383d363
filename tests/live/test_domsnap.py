"""The command domsnap on a real running guest: what it prints is true, and memory and disks are of one instant."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snapshot.catalog import Catalog
from snapshot.cli.main import main
from snapshot.model import DiskMode, DomainSnapshot, MemoryMode
from tests.live import guest
from tests.live.guest import Guest, torn
from tests.oracle import assert_clean

pytestmark = pytest.mark.live


def domain_file(directory: Path, disks: list[Path], machine: Guest | None = None) -> Path:
    """A domain file of the guest; without a running one its socket is not there."""
    socket = str(directory / "no-socket") if machine is None else machine.socket
    path = directory / "vm.toml"
    lines = [f"name = 'vm'\nqmp = {json.dumps(socket)}\n"]
    for index, disk in enumerate(disks):
        lines.append(f"[disks.vd{index}]\npath = {json.dumps(str(disk))}\nformat = 'qcow2'\n")
    path.write_text("".join(lines))
    return path


def command(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """Standard output of a command that ends with this exit code."""
    capsys.readouterr()
    result = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert result == code, captured.out + captured.err
    return captured.out


def consistent(snapshot: DomainSnapshot) -> str | None:
    """What the oracle has against a domain snapshot, by the files that the catalog names."""
    memory = snapshot.memory
    assert memory.file is not None
    if memory.mode is MemoryMode.INTERNAL:
        record = guest.memory_of_vmstate(memory.file, snapshot.name)
    else:
        record = guest.memory_of_file(memory.file)
    counters = [
        guest.disk_counter(disk.file, snapshot=disk.internal_name if disk.mode is DiskMode.INTERNAL else None)
        for disk in snapshot.disks
    ]
    return torn(record, counters)


WAYS: dict[str, list[Any]] = {
    "inside": [],
    "mixed": ["--disk", "vd0:external", "--disk", "vd1:internal"],
    "outside": ["--external", "--live", "--digest"],
}


def test_every_way_of_taking_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disks = guest.make_disks(tmp_path, 2, period=1)
    with guest.running(disks) as machine:
        vm = domain_file(tmp_path, disks, machine)
        for name, words in WAYS.items():
            machine.wait_ticks(2)
            assert f"created snapshot '{name}': checkpoint" in command(capsys, "create", name, "-f", vm, *words)
        assert "crash-consistent" in command(capsys, "create", "disks", "-f", vm, "--disk-only")
        machine.wait_ticks(2)
        assert machine.status() == "running"
        assert machine.complaints() == []
        assert command(capsys, "list", "--tree", "-f", vm).split() == [
            "inside", "+-", "mixed", "+-", "outside", "+-", "disks", "(current)",
        ]  # fmt: skip
        for name in [*WAYS, "disks"]:
            assert "problems:     none (checked)" in command(capsys, "info", name, "--check", "-f", vm)
        machine.quit()
    catalog = Catalog(f"{vm}.snapshots")
    assert [consistent(catalog.get(name)) for name in WAYS] == [None] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """At any moment: the guest runs on, no file is left, the catalog is as before; or the snapshot is whole."""
    disks = guest.make_disks(tmp_path, 2)
    stopped = 0
    with guest.running(disks, memory=64) as machine:
        vm = domain_file(tmp_path, disks, machine)
        catalog = Catalog(f"{vm}.snapshots")
        before = set(os.listdir(tmp_path)) | {"vm.toml.snapshots"}
        for attempt in (0, 1, 3, 5, 7, 9, 12):
            words = ["create", f"s{attempt}", "-f", str(vm), "--verbose", "--external"]
            with subprocess.Popen(
                [sys.executable, "-m", "snapshot.cli.main", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            ) as process:
                assert process.stderr is not None
                for _ in range(attempt):  # after this many steps
                    process.stderr.readline()
                process.send_signal(number)
                process.stderr.read()
                code = process.wait(guest.DEADLINE)
            assert machine.status() == "running"
            made = set(os.listdir(tmp_path)) - before
            if any(snapshot.name == f"s{attempt}" for snapshot in catalog.load()):
                assert code == 0  # it was too late
                assert consistent(catalog.get(f"s{attempt}")) is None
                assert len(made) == 3
                break
            stopped += 1
            # Before the command has begun, Python itself is what ends.
            assert code == 128 + number or (attempt == 0 and code in {-number, 1}), (attempt, code)
            assert made == set()
            assert catalog.current is None
        machine.wait_ticks(2)
        assert machine.complaints() == []
    assert stopped >= 3


def test_qmp_socket_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disks = guest.make_disks(tmp_path, 1)
    with guest.running(disks, name="alone") as machine:
        machine.monitor.job("snapshot-save", tag="by hand", vmstate="d0", devices=["d0"])
        where = ["-s", machine.socket, "--catalog", tmp_path / "catalog"]
        command(capsys, "create", "s1", *where)
        value = json.loads(command(capsys, "list", "--output=json", *where))
        assert [(each["name"], each["foreign"], each["domain"]) for each in value["snapshots"]] == [
            ("by hand", True, "alone"),
            ("s1", False, "alone"),
        ]
        # A second client has to wait for the socket, and says so.
        with guest.Monitor(machine.socket):
            capsys.readouterr()
            assert main(["list", "-s", machine.socket, "--wait", "0.5", "--catalog", str(tmp_path / "catalog")]) == 5
            assert machine.socket in capsys.readouterr().err
        command(capsys, "list", *where)


def test_socket_and_domain_file_find_the_same_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(*where: object) -> list[str]:
        value = json.loads(command(capsys, "list", "--output=json", *where))
        return [each["name"] for each in value["snapshots"] if not each["foreign"]]

    disks = guest.make_disks(tmp_path, 1)
    (tmp_path / "other").mkdir()
    other = guest.make_disks(tmp_path / "other", 1)
    with guest.running(disks, name="vm") as machine:
        # First by the socket, then the domain file is written.
        command(capsys, "create", "a", "-s", machine.socket, "--disk-only")
        vm = domain_file(tmp_path, disks, machine)
        command(capsys, "create", "b", "-f", vm, "--disk-only")
        assert names("-f", vm) == names("-s", machine.socket) == ["a", "b"]
        assert not os.path.exists(f"{vm}.snapshots")
        for name in ("a", "b"):
            command(capsys, "delete", name, "-f", vm)
        # Another domain of the same name has a catalog of its own.
        with guest.running(other, name="vm") as second:
            command(capsys, "create", "x", "-s", second.socket, "--disk-only")
            command(capsys, "list", "-s", machine.socket, code=1)
            assert "with other disks" in said(capsys, "create", "y", "-s", machine.socket, "--disk-only")
            command(capsys, "create", "c", "-f", vm, "--disk-only")
            assert names("-f", vm) == ["c"]
            command(capsys, "delete", "x", "-s", second.socket)


def test_the_domain_s_name_leads_to_the_catalog_beside_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state_home: Path
) -> None:
    disks = guest.make_disks(tmp_path, 1)
    with guest.running(disks, name="vm") as machine:
        vm = domain_file(tmp_path, disks, machine)
        command(capsys, "create", "a", "-f", vm, "--disk-only")
        assert os.path.isdir(f"{vm}.snapshots")
        command(capsys, "create", "b", "-s", machine.socket, "--disk-only")
        assert [one.name for one in Catalog(f"{vm}.snapshots").load()] == ["a", "b"]
        # One that was moved away is not followed to nowhere.
        os.rename(f"{vm}.snapshots", tmp_path / "elsewhere")
        command(capsys, "create", "c", "-s", machine.socket, "--disk-only")
        assert [one.name for one in Catalog(f"{vm}.snapshots").load()] == ["c"]
        assert os.listdir(state_home / "domsnap") == ["vm"]


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Standard error of a command that fails."""
    capsys.readouterr()
    assert main([str(word) for word in words]) != 0
    return capsys.readouterr().err


def test_memory_moved_inside_and_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken with the memory in a file, imported, loaded by `snapshot-load`; exported again, loaded by `-incoming`."""
    disks = guest.make_disks(tmp_path, 2)
    with guest.running(disks) as machine:
        vm = domain_file(tmp_path, disks, machine)
        command(capsys, "create", "s1", "-f", vm, "--internal", "--memory", tmp_path / "memory")
        machine.wait_ticks(3)
        assert main(["memory", "import", "s1", "-f", str(vm)]) == 1  # the guest has its images open
        assert "lock" in capsys.readouterr().err
        machine.quit()
    vm = domain_file(tmp_path, disks)
    catalog = Catalog(f"{vm}.snapshots")
    record = guest.memory_of_file(tmp_path / "memory")
    assert catalog.get("s1").memory.mode is MemoryMode.EXTERNAL
    assert "put 690 KiB of memory into" in command(capsys, "memory", "import", "s1", "-f", vm)
    assert catalog.get("s1").memory.mode is MemoryMode.INTERNAL
    assert consistent(catalog.get("s1")) is None
    assert_clean(disks[0])
    with guest.running(disks, ticks=3) as machine:
        printed = len(machine.ticks())
        machine.monitor.job("snapshot-load", tag="s1", vmstate="d0", devices=["d0", "d1"])
        machine.qmp("cont")
        machine.wait_ticks(3)
        assert machine.ticks()[printed:][0] in {record.n - 1, record.n, record.n + 1}
        assert machine.complaints() == []
        machine.quit()
    command(capsys, "memory", "export", "s1", "-f", vm, "-o", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "memory").read_bytes()


def test_back_to_a_snapshot_with_its_memory_in_a_new_qemu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """External with memory: domsnap starts the domain anew from its file; the guest goes on where it was."""
    disks = guest.make_disks(tmp_path, 2)
    serial = tmp_path / "serial"
    with guest.running(disks) as machine:
        vm = domain_file(tmp_path, disks, machine)
        command_line = guest.command_line(
            ["{disk:vd0}", "{disk:vd1}"], qmp="{qmp}", serial="serial"
        )  # beside the domain file
        vm.write_text(f"command = {json.dumps([*command_line, '{incoming}'])}\n" + vm.read_text())
        command(capsys, "create", "s1", "-f", vm, "--external")
        record = guest.memory_of_file(Catalog(f"{vm}.snapshots").get("s1").memory.file or "")
        machine.wait_ticks(4)
        assert "reverted to snapshot 's1'" in command(capsys, "revert", "s1", "-f", vm)
        assert guest.wait_for(lambda: machine.process.poll() is not None, "the end of the old QEMU")
        with guest.Monitor(machine.socket) as monitor:
            ticks = guest.wait_for(lambda: tick_lines(serial, 3), "lines of the restored guest")
            monitor.execute("quit")
        assert ticks[0] in {record.n, record.n + 1}
        assert "!" not in serial.read_text()
        tree = command(capsys, "list", "--tree", "-f", vm)
        assert tree.startswith("s1 (current)\n+- ")  # and the state that was left is below it
    snapshot = Catalog(f"{vm}.snapshots").get("s1")
    assert consistent(snapshot) is None
    for disk in disks:
        assert_clean(disk)


def tick_lines(serial: Path, count: int) -> list[int] | None:
    lines = [line for line in serial.read_text(errors="replace").split("\n")[:-1] if line[:1] == "T"]
    return [int(line[1:], 16) for line in lines] if len(lines) >= count else None
