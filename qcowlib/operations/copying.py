"""Copying guest data into another image.

    ranges of the source --widened to the target's units--> batches of about 1 MiB of data
    batch --read into a buffer, looked through for zeroes, compressed (in an executor)--> given places, in guest order
          --> written (for a new target in the executor)

Ranges without data are not read. Data ranges are widened to the units that the target allocates, so that the target is
written in whole units. Buffers are used again: fresh memory costs more than the copy into it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from itertools import pairwise
from os import strerror

import numpy as np
import numpy.typing as npt

from qcowlib.errors import QcowError
from qcowlib.image.raw import WritableRawImage
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.copy_source import Content, CopySource, Loss, Range
from qcowlib.operations.offload import HostCopy

Progress = Callable[[int, int], None]
WritableImage = WritableQcow2Image | WritableRawImage
BoolArray = npt.NDArray[np.bool_]

NEVER = 1 << 63  # no guest offset reaches it

_PIECE = 1 << 20
_LARGEST_PIECE = 16 << 20
_IN_FLIGHT = 16 << 20
_RANGES = 256  # in one batch, however small they are
_SECTOR = 512


@dataclass(frozen=True)
class CopyJob:
    """What is copied, and how.

    Attributes:
        source: what to read.
        start, end: the part of it in bytes; the target begins with it.
        has_backing: the target shows a backing file where nothing is written: no range is widened over it.
        zero_from: the target is known to read as zeroes from this offset on.
        compressed: write compressed clusters.
        sparse_size: bytes of zeroes from which on a range is left out of the target; 0 writes all zeroes.
        offload: let the host copy, where data lies as it is in both files; it is not looked through for zeroes.
        out_of_order: write to a raw target as soon as data is there.
        fresh: nobody uses the target before all is done: what is written may come in any order, behind what names it.
        executor: where to read ahead, and to compress; None does all in the calling thread.
        progress: called with (bytes done, bytes to do) of data.
        lost: is told what could not be read, when the source salvages.
    """

    source: CopySource
    start: int
    end: int
    has_backing: bool = False
    zero_from: int = NEVER
    compressed: bool = False
    sparse_size: int = 4096
    offload: bool = False
    out_of_order: bool = False
    fresh: bool = False
    executor: Executor | None = None
    progress: Progress | None = None
    lost: Callable[[Loss], None] | None = None

    def data_bytes(self) -> int:
        """Bytes to copy. Walks the whole mapping of the part.

        Raises:
            QcowError: the mapping is damaged, or a file cannot be read.
        """
        ranges = self.source.ranges(self.start, self.end)
        return sum(run.end - run.start for run in ranges if run.content is Content.DATA or not self.sparse_size)


def widened(ranges: Iterator[Range], unit: int, start: int, end: int) -> Iterator[Range]:
    """The ranges with data widened to whole units (counted from `start`), the others cut back accordingly."""
    position = start
    waiting: list[Range] = []  # not data, in the unit that the next data may claim
    for run in ranges:
        if run.content is Content.DATA:
            first = start + (run.start - start) // unit * unit
            yield from _before(waiting, first)
            waiting = []
            first, last = max(first, position), min(end, start - (start - run.end) // unit * unit)
            if last > first:
                yield Range(first, last, Content.DATA)
                position = last
        elif run.end > position:
            waiting.append(Range(max(run.start, position), run.end, run.content))
            settled = start + (run.end - start) // unit * unit
            yield from _before(waiting, settled)
            waiting = [Range(max(one.start, settled), one.end, one.content) for one in waiting if one.end > settled]
    yield from waiting


def _before(ranges: list[Range], limit: int) -> Iterator[Range]:
    for one in ranges:
        if one.start < limit:
            yield Range(one.start, min(one.end, limit), one.content)


@dataclass
class _Batch:
    """Ranges to be done together, in the order of the target; and what reading the data of them gave.

    Attributes:
        ranges: offsets count in the source.
        size: bytes of data in them.
        buffer: holds the data, range behind range.
        used: for each range of data, which of its blocks are not zero (all of them when zeroes are written, too).
        packed: for each range of data, its clusters compressed; None for one that does not get smaller.
        stored: bytes are in the target already.
        losses: what could not be read.
        places: (host offset, guest offset, bytes) that are to be written yet.
    """

    ranges: list[Range] = field(default_factory=list)
    size: int = 0
    buffer: bytearray = field(default_factory=bytearray)
    used: list[BoolArray] = field(default_factory=list)
    packed: list[list[bytes | None]] = field(default_factory=list)
    stored: bool = False
    losses: list[Loss] = field(default_factory=list)
    places: list[tuple[int, int, memoryview]] = field(default_factory=list)

    def data(self) -> Iterator[tuple[Range, memoryview]]:
        """The ranges of data with their bytes."""
        view, position = memoryview(self.buffer), 0
        for run in self.ranges:
            if run.content is Content.DATA:
                yield run, view[position : position + run.end - run.start]
                position += run.end - run.start


def copy(job: CopyJob, target: WritableImage, *, total: int) -> None:
    """Write the part of the source to the beginning of the target.

    Args:
        job: what to copy.
        target: at least as large as the part.
        total: `job.data_bytes()`.

    Raises:
        QcowError: reading or writing failed; what was written before stays.
    """
    _Copier(job, target, total).run()


class _Copier:
    def __init__(self, job: CopyJob, target: WritableImage, total: int) -> None:
        self.job = job
        self.target = target
        self.total = total
        self.done = 0
        allocates = _SECTOR
        if isinstance(target, WritableQcow2Image):
            whole = job.compressed or job.offload
            allocates = target.cluster_size if whole else target.state.geometry.subcluster_size
        self.block = max(allocates, 1 << max(job.sparse_size, _SECTOR).bit_length() - 1)
        if job.compressed:
            self.block = allocates
        self.piece = max(_PIECE, self.block)
        # With a backing file a byte that the source inherits stays inherited, so nothing is widened over it.
        self.unit = 1 if job.has_backing and not job.compressed else min(self.block, _LARGEST_PIECE)
        self.host_copy = HostCopy(target) if job.offload else None
        self.waiting: deque[Future[_Batch]] = deque()
        self.filling: deque[Future[_Batch]] = deque()
        later = job.fresh and job.executor is not None
        self.writes_at_once = isinstance(target, WritableRawImage) and (later or job.out_of_order)
        self.places_first = isinstance(target, WritableQcow2Image) and later and not job.compressed
        self.in_flight = max(2, _IN_FLIGHT // self.piece)
        self.buffers: list[bytearray] = []

    def run(self) -> None:
        """Copy everything; nothing is left in the executor when it raises."""
        try:
            for batch in self._batches():
                self._submit(batch)
            while self.waiting:
                self._finish_one()
            while self.filling:
                self.filling.popleft().result()
        finally:
            for future in (*self.waiting, *self.filling):
                future.cancel()
            wait((*self.waiting, *self.filling))

    def _ranges(self) -> Iterator[Range]:
        """The ranges of the source as they are to be written; those that are left to the target are missing."""
        job = self.job
        for run in widened(job.source.ranges(job.start, job.end, job.lost), self.unit, job.start, job.end):
            if run.content is Content.ZERO and not job.sparse_size:
                yield run._replace(content=Content.DATA)
            elif run.content is not Content.INHERITED:
                yield run

    def _batches(self) -> Iterator[_Batch]:
        batch = _Batch()
        for run in self._ranges():
            start = run.start
            if run.content is Content.ZERO:
                batch.ranges.append(run)
                start = run.end
            elif self.host_copy is not None:
                yield batch
                batch = _Batch()
                start = self._offload(run)
            while start < run.end:
                end = self._cut(start, run.end, self.piece - batch.size)
                if end > start:
                    batch.ranges.append(Range(start, end, Content.DATA))
                    batch.size += end - start
                    start = end
                if start < run.end:
                    yield batch
                    batch = _Batch()
            if len(batch.ranges) >= _RANGES:
                yield batch
                batch = _Batch()
        yield batch

    def _cut(self, start: int, end: int, room: int) -> int:
        """Where the next piece of a range ends: it fits into the room and ends with a block of the target."""
        if end - start <= room:
            return end
        base = self.job.start
        return max(start, base + (start + room - base) // self.block * self.block)

    def _offload(self, run: Range) -> int:
        """Let the host copy a range; returns where it ended: the range's end, or where this way ended."""
        assert self.host_copy is not None
        while self.waiting:
            self._finish_one()  # the target is written in order
        start, job = run.start, self.job
        while start < run.end:
            end = self._cut(start, run.end, max(self.piece, _LARGEST_PIECE))
            with _Doing("writing", start - job.start):
                copied = self.host_copy.copy(job.source, start, end, start - job.start)
            if not copied:
                self.host_copy = None
                return start
            self._count(end - start)
            start = end
        return start

    def _submit(self, batch: _Batch) -> None:
        if not batch.ranges:
            return
        batch.buffer = self._buffer()
        if self.job.executor is None:
            self._store(self._fetch(batch))
        else:
            self.waiting.append(self.job.executor.submit(self._fetch, batch))

    def _buffer(self) -> bytearray:
        """A buffer that nobody uses; the oldest batch gives its one back when there are enough of them."""
        while not self.buffers and len(self.waiting) + len(self.filling) >= self.in_flight:
            if self.waiting and (self.waiting[0].done() or not self.filling):
                self._finish_one()
            else:
                self.buffers.append(self.filling.popleft().result().buffer)
        return self.buffers.pop() if self.buffers else bytearray(self.piece)

    def _finish_one(self) -> None:
        self._store(self.waiting.popleft().result())

    # In the executor.

    def _fetch(self, batch: _Batch) -> _Batch:
        """Read the data of a batch, and do with it what needs no order."""
        job = self.job
        for run, view in batch.data():
            with _Doing("reading", run.start - job.start):
                batch.losses += job.source.read_into(run.start, view)
            used = nonzero_blocks(view, self.block) if job.sparse_size else _all_blocks(view, self.block)
            batch.used.append(used)
            if job.compressed and isinstance(self.target, WritableQcow2Image):
                batch.packed.append(_packed(self.target, view, used))
        if self.writes_at_once:
            self._write(batch)
            batch.stored = True
        return batch

    def _fill(self, batch: _Batch) -> _Batch:
        """Write the data of clusters that have their places."""
        assert isinstance(self.target, WritableQcow2Image)
        for host, guest, piece in batch.places:
            with _Doing("writing", guest):
                self.target.store(host, guest, piece)
        return batch

    # In order.

    def _store(self, batch: _Batch) -> None:
        for loss in batch.losses:
            if self.job.lost is not None:
                self.job.lost(loss)
        if not batch.stored:
            self._write(batch)
        if batch.places and self.job.executor is not None:
            self.filling.append(self.job.executor.submit(self._fill, batch))
        else:
            self.buffers.append(batch.buffer)
        self._count(batch.size)

    def _count(self, length: int) -> None:
        self.done += length
        if self.job.progress is not None and length:
            self.job.progress(min(self.done, self.total), self.total)

    def _write(self, batch: _Batch) -> None:
        views = dict(batch.data())
        used, packed = iter(batch.used), iter(batch.packed)
        for run in batch.ranges:
            offset = run.start - self.job.start
            with _Doing("writing", offset):
                if run.content is Content.ZERO:
                    self._zero(offset, run.end - run.start)
                elif batch.packed and isinstance(self.target, WritableQcow2Image):
                    self._write_packed(self.target, offset, views[run], next(used), next(packed))
                else:
                    self._write_sparse(batch, offset, views[run], next(used))

    def _write_sparse(self, batch: _Batch, offset: int, view: memoryview, used: BoolArray) -> None:
        """Write the blocks that are not zero, and the others as zeroes where the target needs it."""
        edges = [0, *(np.flatnonzero(used[1:] != used[:-1]) + 1).tolist(), len(used)]
        for first, last in pairwise(edges):
            start, end = first * self.block, min(last * self.block, len(view))
            if not used[first]:
                self._zero(offset + start, end - start)
            elif not self._place(batch, offset + start, view[start:end]):
                self.target.write(offset + start, view[start:end])

    def _place(self, batch: _Batch, offset: int, view: memoryview) -> bool:
        """Give whole clusters of a new image their places, to be written by another thread; False: that is not so."""
        if not self.places_first or not isinstance(self.target, WritableQcow2Image):
            return False
        if len(view) % self.target.cluster_size:
            return False
        places = self.target.place(offset, len(view))
        for guest, host, length in places or ():
            batch.places.append((host, guest, view[guest - offset : guest - offset + length]))
        return places is not None

    def _write_packed(
        self, target: WritableQcow2Image, offset: int, view: memoryview, used: BoolArray, packed: list[bytes | None]
    ) -> None:
        size = target.cluster_size
        for number, data in enumerate(packed):
            piece = view[number * size : (number + 1) * size]
            if used[number]:
                target.write_packed(offset + number * size, piece, data)
            else:
                self._zero(offset + number * size, len(piece))

    def _zero(self, offset: int, length: int) -> None:
        length = min(length, self.job.zero_from - offset)
        if length > 0:
            self.target.write_zeroes(offset, length)


class _Doing:
    """Puts qemu-img's words into an error: what was being done, and at which guest byte."""

    def __init__(self, action: str, offset: int) -> None:
        self._action = action
        self._offset = offset

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, QcowError) and error.errno is not None:
            error.stock = f"error while {self._action} at byte {self._offset}: {strerror(error.errno)}"


def _packed(target: WritableQcow2Image, view: memoryview, used: BoolArray) -> list[bytes | None]:
    """The clusters of a range compressed, but those that will be left out as zeroes."""
    size = target.cluster_size
    return [
        target.pack(view[number * size : (number + 1) * size]) if wanted else None
        for number, wanted in enumerate(used.tolist())
    ]


def nonzero_blocks(data: memoryview, block: int) -> BoolArray:
    """For each block of the data (the last may be short) whether a byte of it is not zero."""
    # Any byte but 0 is true, and numpy stops looking at a block of truths at the first one.
    truths = np.frombuffer(data, dtype=np.bool_)
    whole = len(data) // block
    used: BoolArray = np.asarray(truths[: whole * block].reshape(whole, block).any(axis=1), dtype=np.bool_)
    return np.append(used, truths[whole * block :].any()) if len(data) % block else used


def _all_blocks(data: memoryview, block: int) -> BoolArray:
    return np.ones(-(-len(data) // block), dtype=np.bool_)
