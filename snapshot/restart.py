"""Starting a domain's QEMU from a snapshot, and ending the one before it.

    part:  the old QEMU stops and lets go of its disks; its memory stays in its process, for the way back
    start: command -> process -> QMP -> machine and RAM as recorded? -> memory through a descriptor -> loaded

The new QEMU runs beside the old one, which stands still until the new one has everything; its QMP socket has a name of
its own until the old one is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

import qcowlib
from snapshot import active, migration
from snapshot.domain import device_place
from snapshot.errors import DomainSnapshotError, QemuLost, QmpTimeout
from snapshot.memory import copy_vmstate
from snapshot.qmp import Qmp, listening
from snapshot.session import Session

Arguments = dict[str, Any]

_START_DEADLINE = 60.0
_LOAD_DEADLINE = 3600.0
_TERM_DEADLINE = 5.0


def part(session: Session, arguments: Arguments) -> None:
    """Stop the guest and let QEMU let go of its disks, by a migration that nobody reads.

    A process that has ended a migration holds no lock that keeps others from writing, and reads everything anew when it
    goes on: until then it is the way back.
    """
    session.parted = True
    session.qmp.execute("stop")
    migration.write_memory(session, arguments)


def unpart(session: Session, arguments: Arguments) -> None:
    """Undo: the old QEMU takes its disks back, which hold by now what they held when it parted from them."""
    migration.cancel_memory(session, arguments)
    session.parted = False
    if session.alive():
        active.reactivate(session)
        active.ensure_running(session, {})


def start(session: Session, arguments: Arguments) -> None:
    """Start QEMU with its guest standing, and load the memory file if there is one.

    Raises:
        DomainSnapshotError: it did not start, is another machine, or could not load the memory; it was ended again.
    """
    log = arguments["log"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            arguments["command"],
            cwd=arguments["folder"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with open(arguments["pid_file"], "w", encoding="ascii") as file:
        file.write(str(process.pid))
    session.started = process
    qmp = _connect(process, arguments["socket"], log)
    session.held.callback(qmp.close)
    _check_machine(qmp, arguments)
    if arguments["memory"] is not None:
        _load(session, qmp, process, arguments)
    session.replace_qmp(qmp)


def end_started(session: Session, arguments: Arguments) -> None:
    """Undo: end the process that was started."""
    process = session.started
    pid = process.pid if process is not None else _recorded_pid(arguments)
    if pid is not None:
        _end(pid, process)
    for name in (arguments["pid_file"], arguments["socket"] if arguments["socket"] != arguments["final"] else None):
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    session.restore_qmp()


def take_over(session: Session, arguments: Arguments) -> None:
    """End the old QEMU, and give the new one's socket its name."""
    own, final = arguments["socket"], arguments["final"]
    if own != final and os.path.exists(own):
        old, new = session.previous_qmp, session.qmp_or_none
        if new is not None and new.path == final:  # in `recover`: what is known is the old one
            old, new = new, None
        if old is not None:
            # Even when the new one has ended since: the old one's memory fits the disks no more.
            with contextlib.suppress(QemuLost, QmpTimeout):
                old.execute("quit")
            old.close()
        end = time.monotonic() + _START_DEADLINE
        while listening(final):
            if time.monotonic() > end:
                raise QmpTimeout(f"the old QEMU at '{final}' does not end")
            time.sleep(0.05)
        if not listening(own):
            os.unlink(own)
            raise DomainSnapshotError(f"the new QEMU has ended; the domain is off ({_tail(arguments['log'])})")
        os.replace(own, final)
        if new is None:
            new = Qmp(final)
            session.held.callback(new.close)
            session.replace_qmp(new)
    session.rename_qmp(final)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(arguments["pid_file"])


def fill_command(command: Sequence[str], values: dict[str, str], incoming: Sequence[str]) -> list[str]:
    """A domain's start command with its placeholders replaced; `{incoming}` stands for several arguments."""
    filled: list[str] = []
    for argument in command:
        if argument == "{incoming}":
            filled.extend(incoming)
            continue
        text = argument
        for name, value in values.items():
            text = text.replace("{" + name + "}", value)
        filled.append(text)
    return filled


def _connect(process: subprocess.Popen[bytes], socket: str, log: str) -> Qmp:
    end = time.monotonic() + _START_DEADLINE
    while True:
        if process.poll() is not None:
            raise DomainSnapshotError(f"the domain's command ended with {process.returncode}: {_tail(log)}")
        if listening(socket):
            with contextlib.suppress(QemuLost):
                return Qmp(socket)
        if time.monotonic() > end:
            raise QmpTimeout(f"the domain's command opened no QMP socket '{socket}' within {_START_DEADLINE:g} s")
        time.sleep(0.05)


def _check_machine(qmp: Qmp, arguments: Arguments) -> None:
    """QEMU checks some of this only after it has begun to load, and some never."""
    machine = str(qmp.execute("qom-get", {"path": "/machine", "property": "type"})).removesuffix("-machine")
    if arguments["machine"] is not None and machine != arguments["machine"]:
        raise DomainSnapshotError(f"the command starts a {machine}, and the memory is of a {arguments['machine']}")
    memory = qmp.execute("query-memory-size-summary")
    ram = int(memory["base-memory"]) + int(memory.get("plugged-memory", 0))
    if arguments["ram_size"] is not None and ram != arguments["ram_size"]:
        raise DomainSnapshotError(
            f"the command starts a machine with {ram} bytes of RAM, and the memory has {arguments['ram_size']}"
        )
    shown = {os.path.realpath(one["inserted"]["file"]): one for one in qmp.execute("query-block") if "inserted" in one}
    for path, size in arguments["sizes"].items():
        device = shown.get(os.path.realpath(path))
        if device is None:
            raise DomainSnapshotError(f"the command does not open '{path}' as one of its disks")
        found = device["inserted"]["image"]["virtual-size"]
        if size is not None and found != size:
            raise DomainSnapshotError(f"'{path}' is a disk of {found} bytes, and the snapshot's was of {size}")
    expected = {os.path.realpath(path) for path in arguments["sizes"]}
    for device in qmp.execute("query-block"):
        inserted = device.get("inserted")
        if inserted is not None and not inserted["ro"] and os.path.realpath(inserted["file"]) not in expected:
            raise DomainSnapshotError(
                f"the command opens '{inserted['file']}' for writing, which is no disk of the domain"
            )
    for path, place in arguments["places"].items():
        device = shown[os.path.realpath(path)]
        now = device_place(qmp, device["qdev"]) if device.get("qdev") else None
        if None not in (place, now) and place != now:
            raise DomainSnapshotError(f"the command makes '{path}' a {now}, and in the snapshot it was a {place}")


def _load(session: Session, qmp: Qmp, process: subprocess.Popen[bytes], arguments: Arguments) -> None:
    problems = _give_memory(qmp, arguments)
    try:
        qmp.execute("migrate-incoming", {"uri": "fd:domsnap-memory"})
        end = time.monotonic() + _LOAD_DEADLINE
        while (status := qmp.execute("query-migrate").get("status")) != "completed":
            session.interrupt.check()
            if status == "failed" or time.monotonic() > end:
                raise DomainSnapshotError(f"loading the memory failed: {_why(problems, arguments)}")
            time.sleep(0.02)
    except QemuLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_START_DEADLINE)
        raise DomainSnapshotError(f"QEMU refused the memory: {_why(problems, arguments)}") from None


def _give_memory(qmp: Qmp, arguments: Arguments) -> list[str]:
    """Give QEMU a descriptor of the memory file, or of a pipe that is fed from a vm state.

    Returns: where it is noted when the feeding fails.
    """
    path, state, problems = arguments["memory"], arguments["state"], list[str]()
    if state is None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        descriptor, target = os.pipe()
        # Nobody waits for it: a QEMU that does not read is ended, and that ends the thread too.
        threading.Thread(target=_feed, args=(path, state, target, problems), daemon=True).start()
    try:
        qmp.send_descriptor(descriptor, "domsnap-memory")
    finally:
        os.close(descriptor)
    return problems


def _feed(path: str, state: str, descriptor: int, problems: list[str]) -> None:
    with open(descriptor, "wb", buffering=0) as pipe:
        try:
            copy_vmstate(path, state, pipe, lambda _done, _total: None)
        except BrokenPipeError:
            return  # QEMU has read all that it needs, or has ended
        except (OSError, DomainSnapshotError, qcowlib.QcowError) as error:
            problems.append(str(error))


def _why(problems: list[str], arguments: Arguments) -> str:
    return problems[0] if problems else _tail(arguments["log"])


def _tail(log: str) -> str:
    with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
        return "; ".join(lines[-3:]) or "it said nothing"
    return "it said nothing"


def _recorded_pid(arguments: Arguments) -> int | None:
    """The process that a domsnap which is gone has started, if it still is that one."""
    with contextlib.suppress(OSError, ValueError):
        with open(arguments["pid_file"], encoding="ascii") as file:
            pid = int(file.read())
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        if any(arguments["socket"].encode() in word for word in words):
            return pid
    return None


def _end(pid: int, process: subprocess.Popen[bytes] | None) -> None:
    """End a process that was started here, with what it has started; in order, so that it puts its images right."""
    for number, patience in ((signal.SIGTERM, _TERM_DEADLINE), (signal.SIGKILL, _START_DEADLINE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, QmpTimeout):
            if process is not None:
                process.wait(patience)
            else:
                _wait_for_end(pid, patience)
            return
    raise QmpTimeout(f"the process {pid} does not end")


def _wait_for_end(pid: int, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.05)
    raise QmpTimeout(f"the process {pid} does not end")
