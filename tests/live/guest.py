"""The test guest: a boot sector that counts in memory and on every disk, and the oracle that reads both.

    make_disks -> running(disks) -> Guest: ticks, qmp, socket -> snapshot -> memory_record + disk_counters -> torn

The guest increments n, then writes n to each disk in turn; `phase` in memory is the index of the disk being written,
255 when all are done. Memory and disks belong to one instant exactly if every disk before the phase has n, every
disk after it n - 1, and the disk at the phase either. See fixtures/boot_sector.s.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import qcowlib
from tests.oracle import environment, tool

#: Seconds for one thing to happen, on a machine that is busy with other tests.
DEADLINE = 60.0

T = TypeVar("T")

MIB = 1 << 20
ALL_WRITTEN = 255
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
_PERIOD_AT = 0x166
_MAGIC = b"QCT1"
_RECORD_ADDRESS = 0x8000
_RECORD_LBA = 1
_PR_SET_PDEATHSIG = 1
# "B" at the start, "T" after an increment, and the counter; the first line after a restore may lack its beginning.
_LINE = re.compile(r"[BT]?[0-9A-F]{0,8}")


class GuestError(AssertionError):
    """QEMU or its guest did not do what the test needs."""


class QmpFailed(GuestError):
    """QEMU refused a command; the text is QEMU's."""


# --- The host oracle


@dataclass(frozen=True)
class MemoryRecord:
    """The guest's record in RAM: n counts, phase is the disk being written (255: all are)."""

    n: int
    phase: int


def memory_record(stream: io.RawIOBase | BinaryIO) -> MemoryRecord:
    """The record in a migration stream: of a memory file, or of a vm state.

    A page that changed while it was saved live is in the stream several times: the last one counts.
    """
    data = stream.read()
    assert data is not None
    assert data[:8] == b"QEVM\0\0\0\3", f"not a migration stream: {data[:8]!r}"
    found = -1
    # Before a page: address and flags (0x08 a whole page, 0x20 the same block as before); the name of another block.
    for start in (struct.pack(">Q", _RECORD_ADDRESS | 0x28), struct.pack(">Q", _RECORD_ADDRESS | 0x08) + b"\6pc.ram"):
        at = data.rfind(start + _MAGIC)
        if at >= 0:
            found = max(found, at + len(start))
    assert found >= 0, "the guest's record is not in the migration stream"
    return MemoryRecord(*struct.unpack_from("<II", data, found + 4))


def memory_of_file(path: str | os.PathLike[str]) -> MemoryRecord:
    """The record in a memory file."""
    with open(path, "rb") as stream:
        return memory_record(stream)


def memory_of_vmstate(path: str | os.PathLike[str], snapshot: str) -> MemoryRecord:
    """The record in the vm state of an internal snapshot."""
    with (
        qcowlib.open_image(path, format="qcow2", open_backing=False, force_share=True) as image,
        image.open_snapshot(snapshot) as view,
        view.vmstate.open_stream() as stream,
    ):
        return memory_record(stream)


def disk_counter(path: str | os.PathLike[str], *, snapshot: str | None = None, format: str = "qcow2") -> int:
    """The counter on a disk, or in one of its internal snapshots; -1 when the guest has not written it yet."""
    with qcowlib.open_image(path, format=format, policy=qcowlib.LocalFiles(), force_share=True) as image:
        if snapshot is None:
            record = image.read(_RECORD_LBA * 512, 16)
        else:
            with image.open_snapshot(snapshot) as view:
                record = view.read(_RECORD_LBA * 512, 16)
    if record[:4] != _MAGIC:
        assert record == bytes(16), f"{path} has a foreign record: {record!r}"
        return -1
    return int(struct.unpack_from("<I", record, 4)[0])


def torn(memory: MemoryRecord, counters: Sequence[int] | Mapping[int, int]) -> str | None:
    """Why memory and disks (all, or some by number) are not of one instant; None when they are. Exact, no slack."""
    n, phase = memory.n, memory.phase
    for index, counter in counters.items() if isinstance(counters, Mapping) else enumerate(counters):
        if phase == ALL_WRITTEN or index < phase:
            allowed = {n}
        elif index == phase:
            allowed = {n - 1, n}
        else:
            allowed = {n - 1}
        if counter not in allowed:
            return f"disk {index} has {counter}, memory n={n} phase={phase}: expected {sorted(allowed)}"
    return None


# --- Disks and the command line


def boot_sector(*, period: int = 2) -> bytes:
    """The guest's 512 bytes; period: ticks of the 18.2 Hz timer between two increments, 0 for none."""
    code = bytearray(bytes.fromhex((FIXTURES / "boot_sector.hex").read_text()).ljust(510, b"\0") + b"\x55\xaa")
    code[_PERIOD_AT] = period
    return bytes(code)


def make_disks(
    directory: Path, count: int = 2, *, size: int = 8 * MIB, formats: Sequence[str] = (), period: int = 2
) -> list[Path]:
    """Disks "d0.qcow2", "d1.qcow2" ...; the first one boots the guest. formats: "qcow2" (default) or "raw" by disk."""
    paths = []
    for index in range(count):
        disk_format = formats[index] if index < len(formats) else "qcow2"
        path = directory / f"d{index}.{disk_format}"
        qcowlib.create_image(path, size, format=disk_format)
        if index == 0:
            with qcowlib.open_image(path, format=disk_format, writable=True) as image:
                image.write(0, boot_sector(period=period))
                image.flush()
        paths.append(path)
    return paths


def command_line(
    disks: Sequence[str | os.PathLike[str]],
    *,
    qmp: str,
    memory: int = 4,
    machine: str = "pc",
    name: str = "guest",
    serial: str | None = None,
    monitor: str | None = None,
    formats: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> list[str]:
    """QEMU's command line for the guest; every file name may be a placeholder such as "{qmp}".

    Disk number i is the node "d<i>" behind the device "vd<i>"; its protocol node is "d<i>-file".

    Args:
        disks: image files; the format is taken from `formats`, else from the suffix ("raw" or qcow2).
        qmp: path of the QMP socket for the tool under test.
        memory: MiB of RAM.
        machine: machine type.
        name: name of the domain.
        serial: file for the serial line.
        monitor: path of a second QMP socket, for the test itself.
        formats: of the disks.
        extra: more arguments.
    """
    command = [tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    command += ["-machine", machine, "-m", str(memory), "-name", name]
    for index, disk in enumerate(disks):
        path = os.fspath(disk)
        disk_format = formats[index] if index < len(formats) else "raw" if path.endswith(".raw") else "qcow2"
        storage = {"driver": "file", "node-name": f"d{index}-file", "filename": path, "discard": "unmap"}
        node = {"driver": disk_format, "node-name": f"d{index}", "discard": "unmap", "file": storage}
        command += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive=d{index},id=vd{index}"]
    command += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"] if monitor is not None else []
    command += ["-serial", f"file:{serial}" if serial is not None else "null"]
    return [*command, *extra]


# --- The running guest


class Monitor:
    """A QMP client for the tests alone: plain sockets and deadlines, independent of the code under test."""

    def __init__(self, path: str | os.PathLike[str], process: subprocess.Popen[bytes] | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._socket = _connect(os.fspath(path), process)
        self._message(time.monotonic() + DEADLINE)  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        """Run a command and return its value; "_" in names of arguments stands for "-". Raises QmpFailed."""
        request = {"execute": command, "arguments": {key.replace("_", "-"): arguments[key] for key in arguments}}
        data = json.dumps(request).encode() + b"\n"
        try:
            socket.send_fds(self._socket, [data], [] if fd is None else [fd])
        except OSError as error:
            raise GuestError(f"QEMU has gone: {error}") from None
        deadline = time.monotonic() + DEADLINE
        while "return" not in (answer := self._message(deadline)):
            if "error" in answer:
                raise QmpFailed(f"{command}: {answer['error']['desc']}")
            self.events.append(answer)
        return answer["return"]

    def job(self, command: str, **arguments: Any) -> None:
        """Run a command that makes a job, and the job to its end. Raises QmpFailed with the job's error."""
        self.execute(command, job_id="test-job", **arguments)

        def ended() -> dict[str, Any] | None:
            jobs = {job["id"]: job for job in self.execute("query-jobs")}
            return jobs["test-job"] if jobs["test-job"]["status"] == "concluded" else None

        job = wait_for(ended, f"the end of {command}")
        self.execute("job-dismiss", id="test-job")
        if "error" in job:
            raise QmpFailed(f"{command}: {job['error']}")

    def event_names(self) -> list[str]:
        """Names of the events so far; asks QEMU once, so that those sent before are in."""
        self.execute("query-status")
        return [str(event["event"]) for event in self.events]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise GuestError("QEMU does not answer") from None
            except OSError as error:
                raise GuestError(f"QEMU has gone: {error}") from None
            if not data:
                raise GuestError("QEMU closed the QMP socket")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


@dataclass
class Guest:
    """A QEMU process with the guest in it.

    Attributes:
        process: QEMU.
        directory: a short-lived directory with the sockets and the serial line's file.
        disks: the image files it was started on.
        command: QEMU's command line.
    """

    process: subprocess.Popen[bytes]
    directory: Path
    disks: list[Path]
    command: list[str]
    _monitor: Monitor | None = field(default=None, repr=False)

    @property
    def socket(self) -> str:
        """Path of the QMP socket that is free for the tool under test."""
        return str(self.directory / "qmp")

    @property
    def monitor(self) -> Monitor:
        """The test's own QMP connection, made at first use."""
        if self._monitor is None:
            self._monitor = Monitor(self.directory / "monitor", self.process)
        return self._monitor

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command over the test's own connection."""
        return self.monitor.execute(command, **arguments)

    def serial(self) -> str:
        """What the guest has printed so far."""
        path = self.directory / "serial"
        return path.read_text(errors="replace") if path.exists() else ""

    def ticks(self) -> list[int]:
        """The counters that the guest has printed in whole lines."""
        lines = self.serial().split("\n")[:-1]
        return [int(line[-8:], 16) for line in lines if line[-9:-8] == "T"]

    def wait_ticks(self, more: int = 3) -> int:
        """Wait until the guest has counted on so many times; returns its last count."""
        before = len(self.ticks())

        def enough() -> list[int] | None:
            self.require_alive()
            ticks = self.ticks()
            return ticks if len(ticks) >= before + more else None

        return wait_for(enough, f"{more} more lines of the guest")[-1]

    def complaints(self) -> list[str]:
        """Lines in which the guest says that a disk was not as its memory, or that a disk failed."""
        return [line for line in self.serial().split("\n") if not _LINE.fullmatch(line)]

    def status(self) -> str:
        """QEMU's run state."""
        return str(self.qmp("query-status")["status"])

    def require_alive(self) -> None:
        """Fail the test, with QEMU's last words, when QEMU has ended."""
        if self.process.poll() is not None:
            raise GuestError(f"QEMU ended with {self.process.returncode}: {self.errors()}")

    def errors(self) -> str:
        """What QEMU has written to standard error."""
        return (self.directory / "stderr").read_text(errors="replace")

    def save_memory(self, path: str | os.PathLike[str], *, resume: bool = True) -> None:
        """Stop, write the memory into a file as a migration stream, and go on: what a snapshot tool does by hand."""
        self.qmp("stop")
        with open(path, "wb") as file:
            self.qmp("getfd", fd=file.fileno(), fdname="memory")
            self.qmp("migrate-set-parameters", max_bandwidth=1 << 34)
            self.qmp("migrate", uri="fd:memory")

            def ended() -> bool:
                status = self.qmp("query-migrate").get("status")
                if status in {"failed", "cancelled"}:
                    raise GuestError(f"migration {status}")
                return bool(status == "completed")

            wait_for(ended, "the end of the migration")
        if resume:
            self.qmp("cont")

    def load_memory(self, source: int) -> None:
        """Feed a migration stream to a QEMU that was started with `-incoming defer`, and wait until it is in."""
        self.qmp("getfd", fd=source, fdname="memory")
        self.qmp("migrate-incoming", uri="fd:memory")

        def loaded() -> bool:
            self.require_alive()
            return self.status() != "inmigrate"

        wait_for(loaded, "the end of the incoming migration")

    def quit(self) -> None:
        """End QEMU in order, so that it closes its images."""
        self.qmp("quit")
        self.process.wait(DEADLINE)

    def kill(self) -> None:
        """End QEMU at once (SIGKILL) and forget its connection."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)


def launch(command: Sequence[str], directory: Path, disks: Sequence[Path] = ()) -> Guest:
    """Start QEMU; its last words go to "stderr" in the directory. It dies with this process."""
    with open(directory / "stderr", "wb") as errors:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment(),
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, and tests run in the main thread
        )
    return Guest(process, directory, list(disks), list(command))


@contextmanager
def running(
    disks: Sequence[Path],
    *,
    memory: int = 4,
    machine: str = "pc",
    name: str = "guest",
    formats: Sequence[str] = (),
    extra: Sequence[str] = (),
    ticks: int = 2,
) -> Iterator[Guest]:
    """A guest on these disks, until the block ends; QEMU is killed then if the test has not ended it.

    Args:
        ticks: how many lines to wait for first; with 0 the guest may be stopped (`extra=("-S",)` or `-incoming`).
        disks, memory, machine, name, formats, extra: see `command_line`.
    """
    directory = short_directory()
    guest = None
    try:
        command = command_line(
            disks,
            qmp=str(directory / "qmp"),
            monitor=str(directory / "monitor"),
            serial=str(directory / "serial"),
            memory=memory,
            machine=machine,
            name=name,
            formats=formats,
            extra=extra,
        )
        guest = launch(command, directory, disks)
        guest.qmp("query-status")
        if ticks:
            guest.wait_ticks(ticks)
        yield guest
    finally:
        if guest is not None:
            guest.kill()
        shutil.rmtree(directory, ignore_errors=True)


def short_directory() -> Path:
    """A new directory whose path leaves room for a socket's name (108 bytes at most)."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="qcg-", dir=base if len(base) < 60 else "/tmp"))


def wait_for(question: Callable[[], T | None], what: str, *, deadline: float = DEADLINE) -> T:
    """Ask until the answer is true, and return it; GuestError names what did not happen within the deadline."""
    end = time.monotonic() + deadline
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > end:
            raise GuestError(f"{what}: not within {deadline:.0f} s")
        time.sleep(0.01)


def _connect(path: str, process: subprocess.Popen[bytes] | None) -> socket.socket:
    def connected() -> socket.socket | None:
        if process is not None and process.poll() is not None:
            raise GuestError(f"QEMU ended with {process.returncode} before its socket was there")
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
        except OSError:
            client.close()
            return None
        return client

    return wait_for(connected, f"the socket {path}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
