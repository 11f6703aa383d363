"""A domain for the tests of the engine: the boot-sector guest on a real QEMU, and the host's oracle.

The guest keeps a record at 0x8000 of its memory ("QCT1", le32 n, le32 phase) and writes it to every disk at LBA 1; the
phase is the number of the disk that is being written, 255 when all have been. So memory and disks are of one instant
exactly when each disk's counter is n (its number below the phase), n - 1 (above it), or either of them (equal to it).
"""

from __future__ import annotations

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
from typing import Any

import qcowlib
from snapshot.domain import ActiveDomain, InactiveDomain, open_domain
from snapshot.model import Disk, DomainSnapshot
from snapshot.qmp import Qmp
from tests import oracle

DEADLINE = 60.0
# "B" at the start, "T" after an increment, and the counter; "!" and "E" are complaints.
_LINE = re.compile(r"[BT]?[0-9A-F]{0,8}")
RECORD = 0x8000
# The source is in the notes of the project; see fixtures/.
BOOT_SECTOR = (
    bytes.fromhex(
        "ea057c0000fa31c08ed88ec08ed0bc007cfbfcbafb03b083eebaf803b001ee42b000eebafb03b003ee833e677d00740e"
        "b034e643a0677de640a0687de640bf0080b9000131c0f3ab66c706008051435431b380e8b90066813e00825143543175"
        "0866a1048266a30480b042e8c400e85700b380e8990066a10482663b0604807411b021e8b80066a10482e8c000b020e8"
        "ac00e8280075dc66c70608800000000066ff060480e82000b054e885008a0e667d84c974bcfbf4fec975faebb4fec388"
        "d82c803a067504c3b380660fb6c32c8066a3088066c706747d01000000c706707d0080e8240066a104806683e03f6640"
        "66c1e00766a3747de80f00e8bfff75ca66c7060880ff000000c3b80043eb1266c706747d01000000c706707d0082b800"
        "4288dabe6c7d53cd135b7305b045e80d00c3e8090066a10480e81100b00a50bafd03eca82074fb58baf803eec36689c7"
        "b9080066c1c70489f8240f3c0a1c692fe8dbffe2eec30200008d7400100001000080000001000000"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)


@dataclass
class Description:
    """What a domain file says."""

    name: str
    disks: tuple[Disk, ...]
    qmp_socket: str | None
    command: list[str] = field(default_factory=list)
    agent_socket: str | None = None


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
        boot = bytearray(BOOT_SECTOR)
        boot[0x166] = period
        disks = []
        for number, image_format in enumerate(formats or ("qcow2", "qcow2")):
            path = directory / f"d{number}.{image_format}"
            raw = directory / "boot.raw"
            raw.write_bytes(bytes(boot))
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
        while not os.path.exists(self.socket):
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
        """End what is left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE)


def _filled(argument: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        argument = argument.replace(placeholder, value)
    return argument


def memory_record(stream: bytes) -> tuple[int, int]:
    """(n, phase) from a migration stream: the last time that the page at 0x8000 was sent."""
    found = -1
    for flags in (0x08, 0x28):
        found = max(found, stream.rfind(struct.pack(">Q", RECORD | flags) + b"QCT1"))
    assert found >= 0, "no record in the stream"
    n, phase = struct.unpack_from("<II", stream, found + 12)
    return int(n), int(phase)


def disk_counter(path: str, image_format: str, snapshot: str | None = None) -> int:
    """The counter on a disk, or on a snapshot of it."""
    with qcowlib.open_image(path, format=image_format, policy=qcowlib.LocalFiles(), force_share=True) as image:
        view: Any = image if snapshot is None else image.open_snapshot(snapshot)
        data = view.read(512, 12)
    assert data[:4] == b"QCT1", data
    return int(struct.unpack_from("<I", data, 4)[0])


def consistent(record: tuple[int, int], counters: list[int]) -> bool:
    """Whether memory and disks are of one instant."""
    n, phase = record
    for number, counter in enumerate(counters):
        allowed = {n} if number < phase else {n - 1, n} if number == phase else {n - 1}
        if counter not in allowed:
            return False
    return True


def snapshot_counters(snapshot: DomainSnapshot) -> list[int]:
    """The counters of the disks in a snapshot."""
    return [
        disk_counter(disk.file, disk.format, disk.internal_name) for disk in snapshot.disks if disk.mode.value != "no"
    ]


def snapshot_record(snapshot: DomainSnapshot) -> tuple[int, int]:
    """(n, phase) of the memory in a snapshot."""
    assert snapshot.memory.file is not None
    if snapshot.memory.mode.value == "external":
        return memory_record(Path(snapshot.memory.file).read_bytes())
    with qcowlib.open_image(snapshot.memory.file, policy=qcowlib.LocalFiles(), force_share=True) as image:
        state: Any = image.open_snapshot(snapshot.name).vmstate
        return memory_record(state.read(0, state.size))


def ram_record(qmp: Qmp, directory: Path) -> tuple[int, int]:
    """(n, phase) of the running guest."""
    target = directory / "ram"
    qmp.execute("pmemsave", {"val": RECORD, "size": 12, "filename": str(target)})
    magic, n, phase = struct.unpack("<4sII", target.read_bytes())
    assert magic == b"QCT1"
    return n, phase


MakeRig = Callable[..., Rig]
