"""Storage for proofs: what a power cut could leave behind, and a host that fails on demand.

    initial bytes -> RecordingStorage -> the code under test -> epochs of operations
                                                                    |
                     crash_states: every disk that a power cut may leave -> CrashState.storage()

An epoch is what lies between two barriers (`flush`). A power cut in an epoch leaves all earlier epochs whole, and of
its own operations any subset, the sectors of one write counted singly: hosts reorder and cut between barriers.
"""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

from qcowlib.errors import StorageError
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.protocol import Buffer, Storage

#: Bytes that a disk writes as a whole or not at all.
SECTOR = 512
_CHECKPOINT = 32  # prefixes share a copy of the disk taken every so many operations


class Operation(NamedTuple):
    """One change of a file: kind is "write", "zero", "discard", "allocate" or "truncate" (its size is `offset`)."""

    kind: str
    offset: int
    length: int
    data: bytes

    def apply(self, storage: Storage) -> None:
        """Do it on another storage."""
        if self.kind == "write":
            storage.pwrite(self.data, self.offset)
        elif self.kind == "zero":
            storage.write_zeroes(self.offset, self.length)
        elif self.kind == "discard":
            storage.discard(self.offset, self.length)
        elif self.kind == "allocate":
            storage.allocate(self.offset, self.length)
        else:
            storage.truncate(self.offset)

    def spans_sectors(self) -> bool:
        """Whether this is a write that touches more than one disk sector."""
        return self.kind == "write" and self.offset // SECTOR != (self.offset + max(self.length, 1) - 1) // SECTOR

    def sectors(self) -> list[Operation]:
        """A write as one write per disk sector that it touches; other operations are whole."""
        if self.kind != "write":
            return [self]
        end = self.offset + self.length
        cuts = [self.offset, *range((self.offset // SECTOR + 1) * SECTOR, end, SECTOR), end]
        return [
            Operation("write", start, stop - start, self.data[start - self.offset : stop - self.offset])
            for start, stop in pairwise(cuts)
        ]


class _Wrapper:
    """Passes everything that does not change the file to another storage."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        """Name of the inner storage."""
        return self.inner.name

    def size(self) -> int:
        """Length of the inner storage in bytes."""
        return self.inner.size()

    def pread(self, length: int, offset: int) -> bytes:
        """Read from the inner storage."""
        return self.inner.pread(length, offset)

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Read from the inner storage."""
        return self.inner.pread_into(buffer, offset)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Ranges of the inner storage."""
        return self.inner.data_ranges(offset, length)

    def close(self) -> None:
        """Close the inner storage."""
        self.inner.close()


class RecordingStorage(_Wrapper):
    """Passes everything to `inner` and lists the changes that succeeded, epoch by epoch.

    Attributes:
        epochs: operations between barriers; the last epoch is the one that no barrier ended yet, perhaps empty.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.epochs: list[list[Operation]] = [[]]
        self._marks: list[tuple[int, Hashable]] = []
        self._lock = threading.Lock()  # the order of the list is the order of the changes

    def mark(self, label: Hashable) -> None:
        """Note that the code under test promised something; put it after the `flush` that makes it durable."""
        with self._lock:
            # Operations behind the last barrier are not durable yet: then the promise holds from the next epoch on.
            self._marks.append((len(self.epochs) - (0 if self.epochs[-1] else 1), label))

    def marks_before(self, epoch: int) -> tuple[Hashable, ...]:
        """Labels of the promises that a power cut in this epoch must keep."""
        return tuple(label for since, label in self._marks if since <= epoch)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write and record."""
        content = bytes(data)
        self._do(Operation("write", offset, len(content), content))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero and record."""
        self._do(Operation("zero", offset, length, b""))

    def discard(self, offset: int, length: int) -> None:
        """Discard and record."""
        self._do(Operation("discard", offset, length, b""))

    def allocate(self, offset: int, length: int) -> None:
        """Allocate and record."""
        self._do(Operation("allocate", offset, length, b""))

    def truncate(self, size: int) -> None:
        """Truncate and record."""
        self._do(Operation("truncate", size, 0, b""))

    def flush(self) -> None:
        """Flush, and end the epoch if it holds any change."""
        with self._lock:
            self.inner.flush()
            if self.epochs[-1]:
                self.epochs.append([])

    def _do(self, operation: Operation) -> None:
        with self._lock:
            operation.apply(self.inner)
            self.epochs[-1].append(operation)


@dataclass(frozen=True)
class CrashState:
    """One disk that a power cut may leave.

    Attributes:
        epoch: index of the epoch in which the power went.
        text: which of its operations arrived, for messages.
        marks: labels of the promises made durable before (see `RecordingStorage.mark`).
        base: content of the file that the operations start from; shared between states.
        operations: what arrived on top of it, in order.
    """

    epoch: int
    text: str
    marks: tuple[Hashable, ...]
    base: bytes
    operations: tuple[Operation, ...]

    def storage(self) -> BytesStorage:
        """A fresh, writable disk in this state."""
        disk = BytesStorage(self.base, name=f"<epoch {self.epoch}: {self.text}>")
        for operation in self.operations:
            operation.apply(disk)
        return disk


def crash_states(recording: RecordingStorage, initial: Buffer, *, samples: int, seed: int) -> Iterator[CrashState]:
    """The disks that a power cut during a recording may leave; the same ones for the same arguments.

    For each epoch: every prefix of its operations; `samples` subsets of them that are no prefix, or all where there
    are no more; and `samples` disks on which one write arrived in part, sector by sector.

    Args:
        recording: what was done.
        initial: content of the file before the recording.
        samples: states per epoch and kind.
        seed: start of the pseudo-random choices.
    """
    start = bytes(initial)
    for number, epoch in enumerate(recording.epochs):
        marks = recording.marks_before(number)
        choose = random.Random(f"{seed}/{number}")
        base, done = start, 0
        # All of an epoch is the same disk as nothing of the next one, which has more promises to keep.
        for count in range(len(epoch) + (number == len(recording.epochs) - 1)):
            text = f"the first {count} of {len(epoch)} operations"
            yield CrashState(number, text, marks, base, tuple(epoch[done:count]))
            if count - done == _CHECKPOINT:
                base, done = _apply(base, epoch[done:count]), count
        for chosen in _subsets(len(epoch), samples, choose):
            operations = tuple(epoch[index] for index in chosen)
            yield CrashState(number, f"operations {list(chosen)} of {len(epoch)}", marks, start, operations)
        for index, operations, text in _torn(epoch, samples, choose):
            yield CrashState(number, f"operation {index} of {len(epoch)} torn, {text}", marks, start, operations)
        start = _apply(base, epoch[done:])


def _apply(base: bytes, operations: Iterable[Operation]) -> bytes:
    disk = BytesStorage(base)
    for operation in operations:
        operation.apply(disk)
    return disk.getvalue()


def _subsets(count: int, samples: int, choose: random.Random) -> Iterator[tuple[int, ...]]:
    """Subsets of range(count) that are no prefix: all of them if they are few, else a sample without repetition."""
    if count < 24 and (1 << count) - count - 1 <= samples:
        for size in range(1, count):
            yield from (chosen for chosen in combinations(range(count), size) if chosen[-1] != size - 1)
        return
    seen: set[tuple[int, ...]] = set()
    while len(seen) < samples:
        density = choose.choice((0.1, 0.5, 0.9))  # one lost and one early write are the likely accidents
        chosen = tuple(index for index in range(count) if choose.random() < density)
        if chosen and chosen[-1] != len(chosen) - 1 and chosen not in seen:
            seen.add(chosen)
            yield chosen


def _torn(
    epoch: Sequence[Operation], samples: int, choose: random.Random
) -> Iterator[tuple[int, tuple[Operation, ...], str]]:
    """States in which some sectors of one write are missing; half of them with all earlier operations whole."""
    candidates = [index for index, operation in enumerate(epoch) if operation.spans_sectors()]
    for sample in range(samples if candidates else 0):
        torn = choose.choice(candidates)
        sectors = epoch[torn].sectors()
        if sample % 2:
            kept = sorted(choose.sample(range(len(sectors)), choose.randrange(1, len(sectors))))
            others = [index for index in range(len(epoch)) if index != torn and choose.random() < 0.5]
            text = f"{len(kept)} of {len(sectors)} sectors, with {others}"
        else:
            kept = list(range(choose.randrange(1, len(sectors))))
            others = list(range(torn))
            text = f"the first {len(kept)} of {len(sectors)} sectors, after all earlier ones"
        operations: list[Operation] = []
        for index in sorted([*others, torn]):
            operations += [sectors[part] for part in kept] if index == torn else [epoch[index]]
        yield torn, tuple(operations), text


@dataclass(frozen=True)
class Fault:
    """One failure to come.

    Attributes:
        call: name of the method: "pread", "pwrite", "write_zeroes", "discard", "allocate", "truncate", "flush", or
            "change" for any of these but "pread".
        nth: which call of that name fails, counted from 1.
        code: errno of the failure.
        written: bytes of a `pwrite` that reach the file before it fails.
        lasting: whether all later calls of that name fail as well.
    """

    call: str
    nth: int
    code: int = errno.EIO
    written: int = 0
    lasting: bool = False


class FaultyStorage(_Wrapper):
    """Passes everything to `inner`, except what the plan lets fail with `StorageError`.

    Args:
        inner: the storage beneath.
        plan: failures to come.
        capacity: length in bytes beyond which the file cannot grow: the host is full (ENOSPC), what fits is written.

    Attributes:
        counts: calls so far, by name and for "change".
        failures: calls that failed so far; 0 at the end of a run says that it made fewer calls than planned.
    """

    def __init__(self, inner: Storage, plan: Iterable[Fault] = (), *, capacity: int | None = None) -> None:
        super().__init__(inner)
        self.plan = tuple(plan)
        self.capacity = capacity
        self.counts: Counter[str] = Counter()
        self.failures = 0
        self._lock = threading.Lock()

    def pread(self, length: int, offset: int) -> bytes:
        """Read, or fail."""
        self._step("pread", "read")
        return self.inner.pread(length, offset)

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Read, or fail; counted as "pread"."""
        self._step("pread", "read")
        return self.inner.pread_into(buffer, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write, or write in part and fail."""
        content = bytes(data)
        fault = self._count("pwrite")
        if fault is not None:
            self.inner.pwrite(content[: fault.written], offset)
            self._fail("write", fault.code)
        room = self._room()
        self.inner.pwrite(content[: max(0, room - offset)], offset)
        if offset + len(content) > room:
            self._fail("write", errno.ENOSPC)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero, or fail."""
        self._step("write_zeroes", "write")
        if offset + length > self._room():
            self._fail("write", errno.ENOSPC)
        self.inner.write_zeroes(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Discard, or fail."""
        self._step("discard", "discard")
        self.inner.discard(offset, length)

    def allocate(self, offset: int, length: int) -> None:
        """Allocate, or fail."""
        self._step("allocate", "allocate")
        if offset + length > self._room():
            self._fail("allocate", errno.ENOSPC)
        self.inner.allocate(offset, length)

    def truncate(self, size: int) -> None:
        """Truncate, or fail; a sparse file grows beyond the capacity without a failure."""
        self._step("truncate", "resize")
        self.inner.truncate(size)

    def flush(self) -> None:
        """Flush, or fail."""
        self._step("flush", "flush")
        self.inner.flush()

    def _step(self, call: str, action: str) -> None:
        fault = self._count(call)
        if fault is not None:
            self._fail(action, fault.code)

    def _count(self, call: str) -> Fault | None:
        """Count a call; the fault that the plan has for it."""
        names = {call} if call == "pread" else {call, "change"}
        with self._lock:
            self.counts.update(names)
            for fault in self.plan:
                reached = self.counts[fault.call]
                if fault.call in names and (reached == fault.nth or (fault.lasting and reached > fault.nth)):
                    return fault
        return None

    def _room(self) -> int:
        """The offset up to which the file may be written."""
        return sys.maxsize if self.capacity is None else max(self.capacity, self.inner.size())

    def _fail(self, action: str, code: int) -> None:
        with self._lock:
            self.failures += 1
        raise StorageError(self.name, action, OSError(code, os.strerror(code)))
