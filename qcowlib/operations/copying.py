"""Copying guest data from one image to another.

    extents of the source --runs--> data, zero, inherited --expanded to the target's units--> pieces
    pieces --read (in an executor)--> looked through for zeroes --> written, in order

Ranges without data are not read. Data ranges are widened to the units that the target allocates, so that the target is
written in whole units.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.image.holes import HoleFinder
from qcowlib.image.raw import WritableRawImage
from qcowlib.image.reader import ReadableImage
from qcowlib.image.writable import WritableQcow2Image

Progress = Callable[[int, int], None]
WritableImage = WritableQcow2Image | WritableRawImage

_PIECE = 2 << 20  # a multiple of every cluster size
_IN_FLIGHT = 8
_SECTOR = 512


class Content(IntEnum):
    """What a range of the source is for the target."""

    ZERO = 0
    DATA = 1
    INHERITED = 2  # the target's backing file shows it


class Range(NamedTuple):
    """Guest bytes of the source."""

    start: int
    end: int
    content: Content


@dataclass(frozen=True)
class CopyJob:
    """What is copied, and how.

    Attributes:
        source: the image to read.
        start, end: the part of it in bytes; the target begins with it.
        has_backing: the target has a backing file with the content of the source's: leave to it what the source's
            own layer has not allocated.
        compressed: write compressed clusters.
        sparse_size: bytes of zeroes from which on a range is left out of the target; 0 writes all zeroes.
        executor: where to read ahead, and to compress; None does all in the calling thread.
        progress: called with (bytes done, bytes to do) of data.
    """

    source: ReadableImage
    start: int
    end: int
    has_backing: bool = False
    compressed: bool = False
    sparse_size: int = 4096
    executor: Executor | None = None
    progress: Progress | None = None

    def data_bytes(self) -> int:
        """Bytes to copy. Walks the whole mapping of the part.

        Raises:
            CorruptMetadata: the mapping is damaged.
        """
        runs = source_runs(self)
        return sum(run.end - run.start for run in runs if run.content is Content.DATA or not self.sparse_size)


def source_runs(job: CopyJob) -> Iterator[Range]:
    """The part of the source as ranges without gaps, equal neighbours joined."""
    pending: Range | None = None
    for table, content in _contents(job):
        heads = np.flatnonzero(np.concatenate(([True], content[1:] != content[:-1])))
        starts = table.start[heads].tolist()
        ends = [*starts[1:], int(table.start[-1] + table.length[-1])]
        for start, end, kind in zip(starts, ends, content[heads].tolist(), strict=True):
            if pending is not None and pending.content == kind:
                pending = Range(pending.start, end, pending.content)
            else:
                if pending is not None:
                    yield pending
                pending = Range(start, end, Content(kind))
    if pending is not None:
        yield pending


def _contents(job: CopyJob) -> Iterator[tuple[ExtentTable, npt.NDArray[np.uint8]]]:
    """Extents of the source with the content of each row."""
    source, length = job.source, job.end - job.start
    if not length:
        return
    below = source.backing
    limit = below.size if below is not None else 0  # behind it the source reads as zeroes
    finder = HoleFinder(source)
    inherits = job.has_backing and below is not None
    tables = source.layer_extents(job.start, length) if inherits else source.extents(job.start, length)
    for shallow in tables:
        table, holes = finder.split(shallow)
        stored = ((table.kind == ExtentKind.DATA) | (table.kind == ExtentKind.COMPRESSED)) & ~holes
        content = np.where(stored, np.uint8(Content.DATA), np.uint8(Content.ZERO))
        if inherits:
            content[(table.kind == ExtentKind.UNALLOCATED) & (table.start < limit)] = Content.INHERITED
        yield table, content


def widened(runs: Iterator[Range], unit: int, start: int, end: int) -> Iterator[Range]:
    """The runs with data widened to whole units (counted from `start`), the others cut back accordingly."""
    position = start
    waiting: list[Range] = []  # not data, in the unit that the next data may claim
    for run in runs:
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


def copy(job: CopyJob, target: WritableImage, *, is_zero: bool, total: int) -> None:
    """Write the part of the source to the beginning of the target.

    Args:
        job: what to copy.
        target: at least as large as the part.
        is_zero: the target reads as zeroes: zero ranges need not be written.
        total: `job.data_bytes()`.

    Raises:
        QcowError: reading or writing failed; what was written before stays.
    """
    _Copier(job, target, is_zero, total).run()


class _Copier:
    def __init__(self, job: CopyJob, target: WritableImage, is_zero: bool, total: int) -> None:
        self.job = job
        self.target = target
        self.skip_zeroes = is_zero and job.sparse_size > 0
        self.total = total
        self.done = 0
        self.waiting: deque[tuple[Future[bytes | None], int, int]] = deque()
        allocates = _SECTOR
        if isinstance(target, WritableQcow2Image):
            allocates = target.cluster_size if job.compressed else target.state.geometry.subcluster_size
        self.block = max(allocates, 1 << max(job.sparse_size, _SECTOR).bit_length() - 1)
        self.piece = target.cluster_size if job.compressed else max(_PIECE, self.block)

    def run(self) -> None:
        """Copy everything; nothing is left in the executor when it raises."""
        job = self.job
        # With a backing file a byte that the source inherits stays inherited, so nothing is widened over it.
        unit = 1 if job.has_backing and not job.compressed else min(self.block, _PIECE)
        try:
            for run in widened(source_runs(job), unit, job.start, job.end):
                if run.content is Content.DATA:
                    self._copy_data(run.start, run.end)
                elif run.content is Content.ZERO:
                    self._zero(run.start - job.start, run.end - run.start)
            while self.waiting:
                self._finish_one()
        finally:
            for future, _, _ in self.waiting:
                future.cancel()
            wait([future for future, _, _ in self.waiting])

    def _copy_data(self, start: int, end: int) -> None:
        while start < end:
            # Pieces end at multiples of their size in the target, also when the range begins elsewhere.
            offset = start - self.job.start
            length = min(end - start, self.piece - offset % self.piece)
            if self.job.executor is None:
                self._store(offset, self._fetch(start, length), length)
            else:
                self.waiting.append((self.job.executor.submit(self._fetch, start, length), offset, length))
                if len(self.waiting) >= _IN_FLIGHT:
                    self._finish_one()
            start += length

    def _finish_one(self) -> None:
        future, offset, length = self.waiting.popleft()
        self._store(offset, future.result(), length)

    def _fetch(self, start: int, length: int) -> bytes | None:
        """Read a piece; a compressed one is stored at once, where the work of compressing is."""
        data = self.job.source.read(start, length)
        if not self.job.compressed or not isinstance(self.target, WritableQcow2Image):
            return data
        if self.job.sparse_size and not _nonzero_blocks(data, len(data)).any():
            return data
        self.target.write_compressed(start - self.job.start, data)
        return None

    def _store(self, offset: int, data: bytes | None, length: int) -> None:
        if data is not None:
            self._write_sparse(offset, data)
        self.done += length
        if self.job.progress is not None:
            self.job.progress(min(self.done, self.total), self.total)

    def _write_sparse(self, offset: int, data: bytes) -> None:
        """Write the blocks that are not zero, and the others as zeroes where the target needs it."""
        if not self.job.sparse_size:
            self.target.write(offset, data)
            return
        used = _nonzero_blocks(data, self.block)
        edges = [0, *(np.flatnonzero(used[1:] != used[:-1]) + 1).tolist(), len(used)]
        view = memoryview(data)
        for first, last in pairwise(edges):
            start, end = first * self.block, min(last * self.block, len(data))
            if used[first]:
                self.target.write(offset + start, view[start:end])
            else:
                self._zero(offset + start, end - start)

    def _zero(self, offset: int, length: int) -> None:
        while self.waiting and not self.skip_zeroes:
            self._finish_one()  # the target is written in order
        if self.job.sparse_size:
            if not self.skip_zeroes:
                self.target.write_zeroes(offset, length)
            return
        zeroes = bytes(min(length, _PIECE))
        for start in range(offset, offset + length, _PIECE):
            count = min(_PIECE, offset + length - start)
            self.target.write(start, memoryview(zeroes)[:count])
            self.done += count
            if self.job.progress is not None:
                self.job.progress(min(self.done, self.total), self.total)


def _nonzero_blocks(data: bytes, block: int) -> npt.NDArray[np.bool_]:
    """For each block of the data (the last may be short) whether a byte of it is not zero."""
    whole = len(data) // block
    words = np.frombuffer(data, dtype=np.uint64, count=whole * (block // 8)).reshape(whole, block // 8)
    used = words[:, 0] != 0 if whole else np.zeros(0, dtype=np.bool_)
    unknown = np.flatnonzero(~used)  # most blocks tell by their first word
    if len(unknown):
        used[unknown] = words[unknown].any(axis=1)
    tail = data[whole * block :]
    if tail:
        used = np.append(used, tail.count(0) != len(tail))
    return used
