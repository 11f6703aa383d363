"""QMP: one connection to a running QEMU, with deadlines and with errors that say what happened.

    Qmp(socket) -> greeting, version -> execute(command, arguments) -> value | QmpError | QmpTimeout | QemuLost

`qemu.qmp` does the protocol in an event loop of its own thread, so that a signal finds the main thread waiting, never
in the middle of a message. Jobs and migrations are polled: an event can be missed, a state cannot.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar, cast

from snapshot.errors import DomainSnapshotError, QemuLost, QmpError, QmpTimeout, SocketTaken

try:
    from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError
    from qemu.qmp.protocol import StateError
except ImportError as error:  # pragma: no cover - depends on the installation
    raise DomainSnapshotError("an active domain needs the package qemu.qmp: pip install 'qcowlib[domain]'") from error

# qemu.qmp reports on its own loggers what it raises as well.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

#: Seconds that a command may take; those that work on whole images have longer ones of their own.
DEADLINE = 60.0
#: Seconds to wait for a socket that another client holds.
CONNECT_DEADLINE = 10.0

_T = TypeVar("_T")


class Qmp:
    """A connection to the QMP socket of a QEMU.

    Args:
        path: the UNIX socket.
        wait: seconds to wait while another client holds the socket.
        deadline: seconds that a command may take when its call does not say otherwise.

    Raises:
        SocketTaken: the socket accepts, but nobody greets: it serves one client at a time.
        QemuLost: nobody listens there.
    """

    def __init__(self, path: str, *, wait: float = CONNECT_DEADLINE, deadline: float = DEADLINE) -> None:
        self.path = path
        self.deadline = deadline
        self._client = QMPClient("domsnap")
        self._loop = asyncio.new_event_loop()
        # The end of QEMU ends tasks inside qemu.qmp whose errors nobody asks for; execute() reports it.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._connect(wait)
        except BaseException:
            self._stop_loop()
            raise
        atexit.register(self.close)  # or the interpreter complains about tasks that were never awaited

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version."""
        greeting = self._client.greeting
        if greeting is None:
            raise QemuLost(f"QEMU at '{self.path}' did not greet")
        numbers = cast(dict[str, dict[str, int]], greeting.QMP.version)["qemu"]
        return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, deadline: float | None = None
    ) -> Any:  # noqa: ANN401 - QEMU's answer
        """Run one command.

        Args:
            command: its name.
            arguments: JSON values.
            deadline: seconds to wait for the answer; None takes that of the connection.

        Raises:
            QmpError: QEMU refused it.
            QmpTimeout: no answer in time; the command may still be carried out later.
            QemuLost: the connection ended.
        """
        return self._run(self._client.execute(command, dict(arguments or {})), command, deadline)

    def send_descriptor(self, descriptor: int, name: str) -> None:
        """Give QEMU a copy of a file descriptor, under a name for `migrate` and `migrate-incoming` ("fd:NAME")."""

        self._execute_with(descriptor, "getfd", {"fdname": name})

    def add_descriptor(self, descriptor: int, label: str) -> str:
        """Give QEMU a copy of a file descriptor for its block layer.

        Args:
            descriptor: the open file.
            label: stands in `query-fdsets`, so that it can be found and removed.

        Returns: the file name under which it can be opened.
        """
        added = self._execute_with(descriptor, "add-fd", {"opaque": label})
        return f"/dev/fdset/{added['fdset-id']}"

    def _execute_with(self, descriptor: int, command: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        async def send() -> object:
            # The descriptor belongs to the next command on the wire, so nothing may come between.
            self._client.send_fd_scm(descriptor)
            return await self._client.execute(command, arguments)

        return self._run(send(), command, None)

    def events(self) -> list[dict[str, Any]]:
        """The events that have come since the last call, oldest first."""

        async def drain() -> list[dict[str, Any]]:
            queue = self._client.events
            return [] if queue.empty() else [dict(message) for message in queue.clear()]

        return self._run(drain(), "events", None)

    def close(self) -> None:
        """End the connection; a second call does nothing."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        with contextlib.suppress(DomainSnapshotError, concurrent.futures.CancelledError):
            self._run(self._client.disconnect(), "disconnect", 5.0)
        self._stop_loop()

    def _connect(self, wait: float) -> None:
        end = time.monotonic() + wait
        while True:
            left = max(0.2, end - time.monotonic())
            try:
                self._run(self._client.connect(self.path), "connect", left)
                return
            except QmpTimeout:
                raise self._taken(wait) from None
            except QemuLost as error:
                if not _backlog_full(error):
                    raise
                if time.monotonic() > end:
                    raise self._taken(wait) from None
                time.sleep(0.1)

    def _taken(self, wait: float) -> SocketTaken:
        return SocketTaken(
            f"the QMP socket '{self.path}' accepts but does not greet: another client (libvirt, a second domsnap) "
            f"holds it; waited {wait:g} s"
        )

    def _run(self, work: Coroutine[Any, Any, _T], command: str, deadline: float | None) -> _T:
        seconds = self.deadline if deadline is None else deadline
        if self._loop.is_closed():
            work.close()
            raise QemuLost(f"the connection to '{self.path}' is closed")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), self._loop)
        try:
            return future.result(seconds + 5)
        except ExecuteError as error:
            raise QmpError(command, str(error), error.error_class) from error
        except TimeoutError as error:
            raise QmpTimeout(f"QEMU did not answer {command} within {seconds:g} s") from error
        except (
            ExecInterruptedError,
            StateError,
            QMPError,
            EOFError,
            OSError,
            concurrent.futures.CancelledError,
        ) as error:
            raise QemuLost(f"no QEMU at '{self.path}' ({command}: {error or type(error).__name__})") from error

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()


def _backlog_full(error: QemuLost) -> bool:
    """Whether so many clients wait at the socket already that the host would not let another one queue.

    asyncio takes the refusal (EAGAIN) for a connection in the making; the first read on it says EINVAL or ENOTCONN.
    """
    cause = error.__cause__.__cause__ if isinstance(error.__cause__, ConnectError) else None
    return isinstance(cause, OSError) and cause.errno in (errno.EAGAIN, errno.EINVAL, errno.ENOTCONN)


@contextlib.contextmanager
def connection(path: str, *, wait: float = CONNECT_DEADLINE) -> Iterator[Qmp]:
    """A connection that is closed at the end."""
    qmp = Qmp(path, wait=wait)
    try:
        yield qmp
    finally:
        qmp.close()


def listening(path: str) -> bool:
    """Whether somebody listens on a UNIX socket, taken or not."""
    import socket

    if not os.path.exists(path):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full: somebody is there
            return True
        except OSError:
            return False
    return True


def poll(question: Callable[[], _T | None], *, deadline: float, what: str, pause: float = 0.01) -> _T:
    """Ask until there is an answer; the pauses get longer, up to a quarter of a second.

    Raises:
        QmpTimeout: no answer in time.
    """
    end = time.monotonic() + deadline
    while True:
        answer = question()
        if answer is not None:
            return answer
        if time.monotonic() > end:
            raise QmpTimeout(f"{what} did not end within {deadline:g} s")
        time.sleep(pause)
        pause = min(pause * 1.3, 0.25)
