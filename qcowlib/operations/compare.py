"""Comparing two disks: the first place where they differ, as qemu-img's compare finds it.

    rows of first  --.  status: data, zero, where, allocated; cut at each other's edges
    rows of second --'--> zero in both, or the same place of the same file: equal without a look
                      --> else read, 2 MiB at a time; what is zero is not read

In strict mode the states must be equal too: a zero cluster is not an unallocated one. What the larger disk has more
must be zero, or not strict at all.

Source: QEMU 7.2, block status as `qemu-img compare` asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.errors import QcowError
from qcowlib.extents import ExtentKind, ExtentTable, Int64Array, Uint8Array
from qcowlib.image.chain import Layer, chain_layers, clip, cut
from qcowlib.image.holes import HoleFinder
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.image.raw import RawImage, StorageWindow
from qcowlib.image.reader import ReadableImage
from qcowlib.storage.local import LocalFile

_DATA, _ZERO, _PLACED, _ALLOCATED, _END = 1, 2, 4, 8, 16
# Status by extent kind: DATA, ZERO, UNALLOCATED, COMPRESSED.
_STATUS = np.array([_DATA | _ALLOCATED, _ZERO | _ALLOCATED, _ZERO, _DATA | _ALLOCATED], dtype=np.uint8)

_PIECE = 2 << 20
_SECTOR = 512
# QEMU looks at one L2 table at a time, at 4 KiB of it where all tables exceed its cache.
_QEMU_L2_CACHE = 32 << 20
_QEMU_SLICE = 4096


class Outcome(Enum):
    """How a comparison ended."""

    IDENTICAL = "identical"
    CONTENT = "content"  # differs
    STATUS = "status"  # differs, in strict mode
    SIZE = "size"  # differs, in strict mode


class Comparison(NamedTuple):
    """What a comparison found.

    Attributes:
        outcome: the first difference, or that there is none.
        offset: guest offset of the first sector that differs, or of the first range whose status differs; in bytes.
        sizes_differ: the disks are not of one size, and were equal as far as both reach.
    """

    outcome: Outcome
    offset: int | None = None
    sizes_differ: bool = False


class NotComparable(QcowError):
    """One of the images could not be read before a difference was found.

    Args:
        number: which image, 0 or 1.
        name: its name.
        offset: guest offset of the range that could not be read, in bytes; None when its mapping could not be.
        cause: what went wrong.
    """

    def __init__(self, number: int, name: str, offset: int | None, cause: QcowError) -> None:
        self.number = number
        self.offset = offset
        self.cause = cause
        where = "the mapping" if offset is None else f"guest offset {offset}"
        super().__init__(f"{where} of '{name}' could not be read: {cause}", errno=cause.errno)


def compare(
    first: ReadableImage,
    second: ReadableImage,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Find the first difference between two disks.

        with qcowlib.open_image("a.qcow2") as a, qcowlib.open_image("b.raw", format="raw") as b:
            assert qcowlib.compare(a, b).outcome is qcowlib.Outcome.IDENTICAL

    Args:
        first, second: opened images or snapshots.
        strict: sizes, and what is allocated, must be equal as well.
        progress: called with (guest bytes done, guest bytes in all).

    Raises:
        NotComparable: an image cannot be read, and is the same up to there.
    """
    sizes_differ = first.size != second.size
    if strict and sizes_differ:
        return Comparison(Outcome.SIZE)
    reader = _Reader(first, second, progress)
    for pieces in _pieces(_Side(0, first), _Side(1, second)):
        found = reader.judge(pieces, strict)
        if found is not None:
            outcome, offset = found
            return Comparison(outcome, offset, sizes_differ and offset >= min(first.size, second.size))
    return Comparison(Outcome.IDENTICAL, sizes_differ=sizes_differ)


# -- what each disk says about its ranges


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one disk: extents, the status of each, and the number of the file that it is in."""

    extents: ExtentTable
    status: Uint8Array
    file: Int64Array

    @property
    def start(self) -> int:
        return int(self.extents.start[0])

    @property
    def end(self) -> int:
        return int(self.extents.start[-1] + self.extents.length[-1])

    def between(self, first: int, end: int) -> _Rows:
        """The part between two guest offsets; both lie inside."""
        starts = clip(self.extents, first, end).start
        return self.at(starts, end)

    def at(self, starts: Int64Array, end: int) -> _Rows:
        """The rows cut at sorted offsets, up to `end`."""
        row = np.searchsorted(self.extents.start, starts, side="right") - 1
        return _Rows(cut(self.extents, starts, end), self.status[row], self.file[row])


class _Side:
    """One of the two disks, as a source of rows.

    Args:
        number: 0 or 1.
        image: the disk.
    """

    def __init__(self, number: int, image: ReadableImage) -> None:
        self.number = number
        self.image = image
        self._finder = HoleFinder(image)
        self._layers = chain_layers(image)
        self._files = [_file_identity(layer) for layer in self._layers]
        # Below these there is another layer: what they leave unallocated lies behind its end.
        self._covers = np.array([layer.backing is not None for layer in self._layers])
        self._plain = np.array([not isinstance(layer, MappedLayer) or layer.cipher is None for layer in self._layers])

    def rows(self, numbers: dict[object, int]) -> Iterator[_Rows]:
        """All of the disk; `numbers` gives each file its number."""
        files = np.array([numbers.setdefault(file, len(numbers)) for file in self._files], dtype=np.int64)
        for table in self._sound_extents():
            extents, holes = self._finder.split(table)
            extents = self._cut_before_end(extents)
            if len(extents) != len(holes):
                holes = np.append(holes, holes[-1:])
            status = _STATUS[extents.kind]
            status[holes] |= _ZERO
            behind = (extents.kind == ExtentKind.UNALLOCATED) & self._covers[extents.layer]
            status[behind] |= _ALLOCATED
            shown = self._plain[extents.layer] & (extents.kind != ExtentKind.COMPRESSED) & ~behind
            status[shown & (extents.host_offset >= 0)] |= _PLACED
            status[self._reaches_end(extents, behind)] |= _END
            yield _Rows(extents, status, files[extents.layer])

    def _sound_extents(self) -> Iterator[ExtentTable]:
        """Extents up to the first damage, then the error."""
        position, end = 0, self.image.size
        try:
            for table in self.image.extents(position, end):
                yield table
                position = int(table.start[-1] + table.length[-1])
        except QcowError as error:
            sound = self._sound_until(position, end)
            if sound > position:
                yield from self.image.extents(position, sound - position)
            raise NotComparable(self.number, self.image.name, None, error) from error

    def _sound_until(self, low: int, high: int) -> int:
        """The end of the last cluster, from `low` on, before a damaged one; `high` lies behind that."""
        unit = self.image.cluster_size
        while (middle := (low + high) // 2 // unit * unit) > low:
            try:
                for _ in self.image.extents(low, middle - low):
                    pass
            except QcowError:
                high = middle
            else:
                low = middle
        return low

    def _cut_before_end(self, extents: ExtentTable) -> ExtentTable:
        """A last row that ends with the disk begins where QEMU's last look begins: it alone says that it is the end."""
        start, end = int(extents.start[-1]), int(extents.start[-1] + extents.length[-1])
        if end != self.image.size:
            return extents
        layers = self._layers[: int(extents.layer[-1]) + 1]
        border = max((end - 1) // unit * unit for unit in map(_qemu_unit, layers))
        return cut(extents, np.append(extents.start, border), end) if border > start else extents

    def _reaches_end(self, extents: ExtentTable, behind: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Rows that QEMU marks as the last: at the end of the disk, or of the lowest layer if that has nothing."""
        ends = extents.start + extents.length
        sizes = np.array([layer.size for layer in self._layers], dtype=np.int64)
        lowest = (extents.kind == ExtentKind.UNALLOCATED) & ~behind
        reaches: npt.NDArray[np.bool_] = (ends == self.image.size) | (lowest & (ends == sizes[extents.layer]))
        return reaches


def _file_identity(layer: Layer) -> object:
    """Equal for two layers whose host offsets count in the same file and whose data is stored in the same way."""
    storage = layer.state.data_storage if isinstance(layer, MappedLayer) else getattr(layer, "storage", None)
    while isinstance(storage, StorageWindow):
        storage = storage.inner
    form = layer.cipher is None if isinstance(layer, MappedLayer) else isinstance(layer, RawImage)
    if isinstance(storage, LocalFile):
        status = os.fstat(storage.fileno())
        return status.st_dev, status.st_ino, form
    return id(storage)


def _qemu_unit(layer: Layer) -> int:
    """Guest bytes of which QEMU looks up at most so many at once."""
    if not isinstance(layer, MappedLayer):
        return 1 << 62
    geometry = layer.state.geometry
    entry = 16 if geometry.extended_l2 else 8
    if geometry.clusters_for(layer.size) * entry > _QEMU_L2_CACHE:
        return min(geometry.l2_coverage, (_QEMU_SLICE // entry) << geometry.cluster_bits)
    return geometry.l2_coverage


# -- both disks beside each other


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Ranges with the rows of both disks; a disk that has ended is zero."""

    first: _Rows
    second: _Rows

    @property
    def end(self) -> int:
        return self.first.end


def _pieces(one: _Side, other: _Side) -> Iterator[_Pieces]:
    """Both disks in batches, cut at the edges of both, up to the end of the larger one."""
    numbers: dict[object, int] = {}
    left_rows, right_rows = one.rows(numbers), other.rows(numbers)
    longest = max(one.image.size, other.image.size)
    left = right = None
    position = 0
    while position < longest:
        # An image that cannot be looked up further says so when it is its turn.
        left = left if left is not None and left.end > position else _next(left_rows, position, longest)
        right = right if right is not None and right.end > position else _next(right_rows, position, longest)
        end = min(left.end, right.end)
        left_part, right_part = left.between(position, end), right.between(position, end)
        starts = np.union1d(left_part.extents.start, right_part.extents.start)
        yield _Pieces(left_part.at(starts, end), right_part.at(starts, end))
        position = end


def _next(rows: Iterator[_Rows], position: int, longest: int) -> _Rows:
    """The next batch; behind the end of a disk it is zero."""
    found = next(rows, None)
    if found is not None:
        return found
    extents = ExtentTable.from_rows([(position, longest - position, ExtentKind.UNALLOCATED, -1, 0, 0)])
    return _Rows(extents, _STATUS[extents.kind], np.full(1, -1, dtype=np.int64))


class _Ranges(NamedTuple):
    """Neighbouring ranges that are read together: their edges in bytes, and which disk is known to be zero there."""

    edges: Int64Array
    known_zero: tuple[bool, bool]

    @property
    def unit(self) -> type[np.uint64 | np.uint8]:
        """What can be compared at once: a raw file may end anywhere."""
        return np.uint8 if np.bitwise_or.reduce(self.edges) % np.dtype(np.uint64).itemsize else np.uint64


def _to_read(first: _Rows, second: _Rows, limit: int) -> Iterator[_Ranges]:
    """What metadata alone does not tell to be equal, of the first `limit` pieces."""
    zeroes = (first.status & _ZERO != 0, second.status & _ZERO != 0)
    same_place = (first.file == second.file) & (first.extents.kind == second.extents.kind)
    same_place &= (first.extents.host_offset == second.extents.host_offset) & (first.extents.host_offset >= 0)
    chosen = np.flatnonzero(~(zeroes[0] & zeroes[1]) & ~same_place)
    chosen = chosen[chosen < limit]
    if not len(chosen):
        return
    starts = first.extents.start[chosen]
    ends = starts + first.extents.length[chosen]
    one, other = zeroes[0][chosen], zeroes[1][chosen]
    goes_on = (starts[1:] == ends[:-1]) & (one[1:] == one[:-1]) & (other[1:] == other[:-1])
    bounds = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(chosen)]
    for low, high in pairwise(bounds):
        yield _Ranges(np.append(starts[low:high], ends[high - 1]), (bool(one[low]), bool(other[low])))


# -- what has to be read


class _Reader:
    """Reads both disks where their metadata does not tell whether they are equal.

    Args:
        first, second: the disks.
        progress: called with (guest bytes done, guest bytes in all).
    """

    def __init__(
        self, first: ReadableImage, second: ReadableImage, progress: Callable[[int, int], None] | None
    ) -> None:
        self._images = (first, second)
        self._buffers = (bytearray(_PIECE), bytearray(_PIECE))  # used again: fresh memory costs more than the reading
        self._progress = progress
        self._longest = max(first.size, second.size)

    def judge(self, pieces: _Pieces, strict: bool) -> tuple[Outcome, int] | None:
        """The first difference among some pieces."""
        first, second = pieces.first, pieces.second
        unequal = np.flatnonzero(first.status != second.status)[: int(strict)].tolist()
        limit = unequal[0] if unequal else len(first.extents)
        for ranges in _to_read(first, second, limit):
            offset = self._first_difference(ranges)
            if offset is not None:
                return Outcome.CONTENT, offset
        if unequal:
            return Outcome.STATUS, int(first.extents.start[limit])
        self._tell(pieces.end)
        return None

    def _first_difference(self, ranges: _Ranges) -> int | None:
        """The first sector in which the disks differ."""
        start, end = int(ranges.edges[0]), int(ranges.edges[-1])
        for offset in range(start, end, _PIECE):
            stop = min(offset + _PIECE, end)
            try:
                found = self._differing_sector(ranges, offset, stop)
            except NotComparable:
                found = self._differing_before_error(ranges, offset, stop)
            if found is not None:
                return found
            self._tell(stop)
        return None

    def _differing_before_error(self, ranges: _Ranges, start: int, stop: int) -> int | None:
        """Range by range, as QEMU reads: what comes before the range that cannot be read may differ."""
        inside = ranges.edges[(ranges.edges > start) & (ranges.edges < stop)].tolist()
        for low, high in pairwise([start, *inside, stop]):
            found = self._differing_sector(ranges, low, high)
            if found is not None:
                return found
        return None

    def _differing_sector(self, ranges: _Ranges, start: int, stop: int) -> int | None:
        """The first sector of one piece that differs; sectors count from where its range begins."""
        contents = [
            np.frombuffer(self._read(number, start, stop - start), dtype=ranges.unit)
            for number in (0, 1)
            if not ranges.known_zero[number]
        ]
        differs = contents[0] != contents[1] if len(contents) > 1 else contents[0] != 0
        if not differs.any():
            return None
        place = start + int(np.argmax(differs)) * contents[0].itemsize
        origin = int(ranges.edges[np.searchsorted(ranges.edges, place, side="right") - 1])
        return origin + (place - origin) // _SECTOR * _SECTOR

    def _read(self, number: int, offset: int, length: int) -> memoryview:
        """Guest bytes, in a buffer that the next call uses again."""
        image = self._images[number]
        view = memoryview(self._buffers[number])[:length]
        try:
            image.readinto(offset, view)
        except QcowError as error:
            raise NotComparable(number, image.name, offset, error) from error
        return view

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self._longest)
