"""A domain for the tests of the engine: the boot-sector guest on a real QEMU, and the host's oracle.

The guest keeps a record at 0x8000 of its memory ("QCT1", le32 n, le32 phase) and writes it to every disk at LBA 1; the
phase is the number of the disk that is being written, 255 when all have been. So memory and disks are of one instant
exactly when each disk's counter is n (its number below the phase), n - 1 (above it), or either of them (equal to it).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from snapshot.domain import ActiveDomain, InactiveDomain, open_domain
from snapshot.model import Disk, DomainSnapshot
from snapshot.qmp import Qmp, listening
from tests import oracle
from tests.live import guest
from tests.live.guest import boot_sector

DEADLINE = 60.0
# "B" at the start, "T" after an increment, and the counter; "!" and "E" are complaints.
_LINE = re.compile(r"[BT]?[0-9A-F]{0,8}")
RECORD = 0x8000


@dataclass
class Description:
    """What a domain file says."""

    name: str
    disks: tuple[Disk, ...]
    qmp_socket: str | None
    command: list[str] = field(default_factory=list)
    agent_socket: str | None = None
    folder: str | None = None


class Rig:
    """One domain: its directory, its disks, its QEMU.

    Args:
        directory: for everything.
        formats: of the disks, in order.
        memory: MiB.
        size: bytes of each disk.
        period: ticks of the guest's timer between two increments.
        options: of the qcow2 images.
        named: give QEMU's nodes names; otherwise it makes them up, as for a plain -drive.
    """

    def __init__(
        self,
        directory: Path,
        *formats: str,
        memory: int = 4,
        size: int = 8 << 20,
        period: int = 1,
        options: str = "",
        named: bool = True,
    ) -> None:
        self.directory = directory
        self.memory = memory
        self.named = named
        self.processes: list[subprocess.Popen[bytes]] = []
        self.socket = str(directory / "q")
        self.serial = directory / "serial"
        boot = boot_sector(period=period)
        disks = []
        for number, image_format in enumerate(formats or ("qcow2", "qcow2")):
            path = directory / f"d{number}.{image_format}"
            raw = directory / "boot.raw"
            raw.write_bytes(boot)
            os.truncate(raw, size)
            extra = ("-o", options) if options and image_format == "qcow2" else ()
            oracle.qemu_img("convert", "-f", "raw", "-O", image_format, *extra, raw, path)
            raw.unlink()
            disks.append(Disk(f"vd{'abcd'[number]}", str(path), image_format))
        self.description = Description("guest", tuple(disks), self.socket, self.command())
        self.disks = disks

    def command(self) -> list[str]:
        """The command line with the placeholders of a domain file."""
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-accel",
            "tcg", "-m", str(self.memory), "-serial", f"file:{self.serial}", "-qmp", "unix:{qmp},server=on,wait=off",
            *self._disk_options(), "{incoming}",
        ]  # fmt: skip

    def _disk_options(self) -> list[str]:
        options: list[str] = []
        for number, disk in enumerate(getattr(self, "disks", ())):
            if not self.named:
                options += ["-drive", f"if=virtio,format={{format:{disk.target}}},file={{disk:{disk.target}}}"]
                continue
            file = {"driver": "file", "filename": f"{{disk:{disk.target}}}"}
            node = {"driver": f"{{format:{disk.target}}}", "node-name": f"d{number}", "file": file}
            options += ["-blockdev", json.dumps(node)]
            options += ["-device", f"virtio-blk-pci,drive=d{number},id={disk.target}"]
        return options

    def start(self, *extra: str, paths: dict[str, str] | None = None) -> ActiveDomain:
        """Start QEMU and wait until the guest has counted to 3."""
        self.description.command = self.command()
        values = {"{qmp}": self.socket}
        for disk in self.disks:
            path = (paths or {}).get(disk.target, disk.path)
            values[f"{{disk:{disk.target}}}"] = path
            values[f"{{format:{disk.target}}}"] = disk.format if path == disk.path else "qcow2"
        arguments = [_filled(argument, values) for argument in self.description.command if argument != "{incoming}"]
        self.processes.append(subprocess.Popen([*arguments, *extra], stderr=(self.directory / "stderr").open("wb")))
        end = time.monotonic() + DEADLINE
        while not listening(self.socket):
            assert time.monotonic() < end, "QEMU does not open its socket"
            assert self.process.poll() is None, (self.directory / "stderr").read_text()
            time.sleep(0.02)
        if not extra:
            self.wait_for_ticks(3)
        return self.connect()

    def connect(self) -> ActiveDomain:
        """Connect to the QEMU that runs."""
        domain = open_domain(self.description)
        assert isinstance(domain, ActiveDomain)
        return domain

    def inactive(self) -> InactiveDomain:
        """The domain that is off."""
        domain = open_domain(self.description)
        assert isinstance(domain, InactiveDomain)
        return domain

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.processes[-1]

    def lines(self) -> list[str]:
        """What the guest has printed."""
        return self.serial.read_bytes().decode("ascii", "replace").split("\n") if self.serial.exists() else []

    def wait_for_ticks(self, count: int) -> None:
        """Wait until the guest has printed that many lines more; so it runs."""
        wanted = len(self.lines()) + count
        end = time.monotonic() + DEADLINE
        while len(self.lines()) < wanted:
            assert time.monotonic() < end, f"the guest does not count: {self.lines()[-3:]}"
            assert self.process.poll() is None, (self.directory / "stderr").read_text()
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """Lines in which the guest says that a disk does not fit its memory, or that a disk failed."""
        return [line for line in self.lines() if not _LINE.fullmatch(line.strip())]

    def kill(self) -> None:
        """End QEMU at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE)

    def quit(self, qmp: Qmp) -> None:
        """End QEMU in order."""
        qmp.execute("quit")
        qmp.close()
        self.process.wait(DEADLINE)

    def close(self) -> None:
        """End what is left, and what the engine has started with this domain's command."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE)
        for process_id in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)

    def running(self) -> list[int]:
        """The processes that have this domain's command, whoever has started them."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it may have ended meanwhile
                if entry.name.isdigit() and f"unix:{self.socket}".encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found


def _filled(argument: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        argument = argument.replace(placeholder, value)
    return argument


def disk_counter(path: str, image_format: str, snapshot: str | None = None) -> int:
    """The counter on a disk, or on a snapshot of it."""
    return guest.disk_counter(path, snapshot=snapshot, format=image_format)


def consistent(record: tuple[int, int], counters: list[int]) -> bool:
    """Whether memory and disks are of one instant."""
    return guest.torn(guest.MemoryRecord(*record), counters) is None


def fits_some_moment(earliest: int, latest: int, disks: int, counters: dict[int, int]) -> bool:
    """Whether disks are of one instant, at which the guest had counted to a number between two others.

    Args:
        earliest, latest: of the guest's memory before and after.
        disks: how many the guest writes.
        counters: by the number of the disk; some may be left out.
    """
    moments = [(n, phase) for n in range(earliest, latest + 1) for phase in (*range(disks), guest.ALL_WRITTEN)]
    return any(guest.torn(guest.MemoryRecord(*moment), counters) is None for moment in moments)


def snapshot_counters(snapshot: DomainSnapshot) -> list[int]:
    """The counters of the disks in a snapshot."""
    return [
        disk_counter(disk.file, disk.format, disk.internal_name) for disk in snapshot.disks if disk.mode.value != "no"
    ]


def snapshot_record(snapshot: DomainSnapshot) -> tuple[int, int]:
    """(n, phase) of the memory in a snapshot."""
    assert snapshot.memory.file is not None
    if snapshot.memory.mode.value == "external":
        found = guest.memory_of_file(snapshot.memory.file)
    else:
        found = guest.memory_of_vmstate(snapshot.memory.file, snapshot.name)
    return found.n, found.phase


def ram_record(qmp: Qmp, directory: Path) -> tuple[int, int]:
    """(n, phase) of the running guest."""
    target = directory / "ram"
    qmp.execute("pmemsave", {"val": RECORD, "size": 12, "filename": str(target)})
    magic, n, phase = struct.unpack("<4sII", target.read_bytes())
    assert magic == b"QCT1"
    return n, phase


MakeRig = Callable[..., Rig]
#: Takes the numbers of faults injected and of clean outcomes.
Faults = Callable[[int, int], None]
