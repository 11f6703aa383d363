"""The journal of an operation: what `recover` needs when this process ends in the middle of it.

    operation.json    the whole plan; written and synced before the first step, removed when all is done or undone
    operation.log     one line for each step that may have begun ("begin 3"), and "committed"

The undo of a step looks at what is there, so "may have begun" is enough. The log is synced before a step starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from snapshot.errors import DomainBusy, DomainSnapshotError
from snapshot.step import Step

_PLAN = "operation.json"
_LOG = "operation.log"
_LOCK = "lock"
_LAYERS = "layers.json"
_MADE = "made.json"


@dataclass(frozen=True)
class Operation:
    """An operation on a domain.

    Attributes:
        kind: "create", "revert" or "delete".
        name: of the snapshot.
        domain: name of the domain.
        token: short random text in the names of everything that the operation makes.
        socket: QMP socket of an active domain.
        agent_socket: of the guest agent.
        was_running: whether the guest ran before.
        steps: the plan.
    """

    kind: str
    name: str
    domain: str
    token: str
    socket: str | None
    agent_socket: str | None
    was_running: bool
    steps: tuple[Step, ...]


@dataclass
class Pending:
    """An operation that was cut off: the plan, the steps that may have begun, whether it has taken effect."""

    operation: Operation
    begun: set[int]
    committed: bool


class Journal:
    """The journal of one domain.

    Args:
        directory: the domain's snapshot directory; made when an operation starts.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self._log: int | None = None
        self._begun: set[int] = set()

    def start(self, operation: Operation) -> None:
        """Keep the plan; durable when it returns."""
        value = {**vars(operation), "steps": [step.as_json() for step in operation.steps]}
        self._begun = set()
        self._log = os.open(self._path(_LOG), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        write_atomically(self._path(_PLAN), json.dumps(value, indent=1).encode())

    def begin(self, indices: Sequence[int]) -> None:
        """Note that steps may begin now; durable when it returns."""
        fresh = [index for index in indices if index not in self._begun]
        if fresh:
            self._begun.update(fresh)
            self._note("".join(f"begin {index}\n" for index in fresh))

    def commit(self) -> None:
        """Note that the operation has taken effect; durable when it returns."""
        self._note("committed\n")

    def finish(self) -> None:
        """All is done or undone: remove the journal."""
        if self._log is not None:
            os.close(self._log)
            self._log = None
        for name in (_PLAN, _LOG):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(name))
        sync_directory(self.directory)

    def leave(self) -> None:
        """Keep the journal for `recover`."""
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def pending(self) -> Pending | None:
        """The operation that was cut off, if there is one.

        Raises:
            DomainSnapshotError: the journal cannot be read.
        """
        try:
            with open(self._path(_PLAN), "rb") as file:
                value: dict[str, Any] = json.loads(file.read())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DomainSnapshotError(f"the journal '{self._path(_PLAN)}' cannot be read: {error}") from error
        value["steps"] = tuple(Step.from_json(step) for step in value["steps"])
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError), open(self._path(_LOG), encoding="ascii") as log:
            lines = [line.strip() for line in log if line.endswith("\n")]
        begun = {int(line.split()[1]) for line in lines if line.startswith("begin ")}
        return Pending(Operation(**value), begun, "committed" in lines)

    def resume(self) -> None:
        """Go on noting in the log of a pending operation."""
        self._log = os.open(self._path(_LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def locked(self, wait: float) -> Iterator[None]:
        """Keep other domsnaps away from the domain.

        Raises:
            DomainBusy: another one did not end within `wait` seconds.
        """
        os.makedirs(self.directory, exist_ok=True)
        descriptor = os.open(self._path(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise DomainBusy(
                            f"another domsnap works on this domain (it holds '{self._path(_LOCK)}'); waited {wait:g} s"
                        ) from None
                time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def layers(self) -> dict[str, str]:
        """Path of the active layer by target, for the disks whose active layer is not the described file any more."""
        try:
            with open(self._path(_LAYERS), "rb") as file:
                value = json.loads(file.read())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DomainSnapshotError(f"'{self._path(_LAYERS)}' cannot be read: {error}") from error
        return {str(target): str(path) for target, path in value.items()}

    def set_layers(self, layers: dict[str, str]) -> None:
        """Replace them; durable when it returns."""
        write_atomically(self._path(_LAYERS), json.dumps(layers, indent=1, sort_keys=True).encode())

    def made(self) -> set[str]:
        """Paths of the overlays that were made here: what may be removed when nothing needs it any more."""
        try:
            with open(self._path(_MADE), "rb") as file:
                return set(json.loads(file.read()))
        except FileNotFoundError:
            return set()
        except ValueError as error:
            raise DomainSnapshotError(f"'{self._path(_MADE)}' cannot be read: {error}") from error

    def set_made(self, paths: set[str]) -> None:
        """Replace them; durable when it returns."""
        if paths != self.made():
            write_atomically(self._path(_MADE), json.dumps(sorted(paths), indent=1).encode())

    def _note(self, text: str) -> None:
        assert self._log is not None
        os.write(self._log, text.encode())
        os.fdatasync(self._log)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)


def write_atomically(path: str, data: bytes) -> None:
    """Replace a file; afterwards it is the old or the new one, whatever happens, and durable."""
    temporary = f"{path}.new"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
