"""Quiesced disk-only snapshots of a Linux guest: its file systems are whole, which is seen in ext4's own marks.

    QCOWLIB_LINUX_GUEST=1 python3 -m pytest -s tests/live/test_quiesce.py

These tests download some 30 MB of Debian packages and boot Linux under TCG; they run only when asked for.
"""

import os
import sys
from pathlib import Path

import pytest

from snapshot.catalog import Catalog
from snapshot.cli.main import main
from snapshot.model import Consistency
from tests.live import linux_guest
from tests.live.guest import Guest, wait_for
from tests.live.linux_guest import LinuxImages, needs_recovery, running_linux, writes

pytestmark = [
    pytest.mark.live,
    pytest.mark.linux,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("QCOWLIB_LINUX_GUEST") != "1", reason="QCOWLIB_LINUX_GUEST=1 asks for it"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> LinuxImages:
    return linux_guest.build(tmp_path_factory.mktemp("linux"))


def domain_file(directory: Path, disk: Path, guest: Guest) -> Path:
    path = directory / "linux.toml"
    path.write_text(
        f"name = 'linux'\nqmp = '{guest.socket}'\nagent = '{guest.directory}/agent'\n"
        f"[disks.vda]\npath = '{disk}'\nformat = 'qcow2'\n"
    )
    return path


def test_quiesced_and_not(images: LinuxImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk.qcow2"
    linux_guest.make_ext4(disk, tmp_path)
    with running_linux(images, [disk]) as guest:
        vm = domain_file(tmp_path, disk, guest)

        def create(name: str, *words: str) -> None:
            before = writes(guest)
            assert main(["create", name, "-f", str(vm), "--disk-only", *words]) == 0, capsys.readouterr().err
            # The guest writes on: its file systems are thawed, whatever was done.
            wait_for(lambda: writes(guest) >= before + 3, "more files of the guest")
            assert "STOP" not in guest.monitor.event_names()

        for round_number in range(3):
            create(f"inside{round_number}", "--internal", "--quiesce")
            create(f"cut{round_number}", "--internal")
        create("frozen", "--external", "--quiesce")
        create("torn", "--external")
        guest.quit()
    catalog = Catalog(f"{vm}.snapshots")
    marks = {}
    for snapshot in catalog.load():
        (each,) = snapshot.disks
        marks[snapshot.name] = needs_recovery(Path(each.file), snapshot=each.internal_name)
        quiesced = snapshot.name.startswith(("inside", "frozen"))
        assert snapshot.consistency is (Consistency.QUIESCED if quiesced else Consistency.CRASH_CONSISTENT)
        assert marks[snapshot.name] is not quiesced
    assert linux_guest.file_system_errors(Path(catalog.get("frozen").disks[0].file), tmp_path) is None
    with capsys.disabled():
        sys.stdout.write(f"\next4 needs_recovery: {marks}; e2fsck -fn of the quiesced one: clean\n")


def test_an_agent_that_does_not_answer_is_no_quiesced_snapshot(
    images: LinuxImages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk.qcow2"
    linux_guest.make_ext4(disk, tmp_path)
    with running_linux(images, [disk]) as guest:
        vm = domain_file(tmp_path, disk, guest)
        vm.write_text(vm.read_text().replace(f"{guest.directory}/agent", f"{guest.directory}/no-agent"))
        before = set(os.listdir(tmp_path))
        assert main(["create", "s1", "-f", str(vm), "--disk-only", "--external", "--quiesce"]) == 3
        assert "agent" in capsys.readouterr().err
        assert set(os.listdir(tmp_path)) - before <= {"linux.toml.snapshots"}
        count = writes(guest)
        wait_for(lambda: writes(guest) >= count + 3, "more files of the guest")
    assert Catalog(f"{vm}.snapshots").load() == []
