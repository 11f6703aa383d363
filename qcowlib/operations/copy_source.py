"""What a copy reads: one image, or several one behind the other, as ranges with their content and as bytes.

images -> extents of each, shifted to its place -> data, zero, inherited -> joined to ranges
                                                 -> rows of host files, for copies that the host does by itself
bytes  -> straight into the copier's buffer; what cannot be read is an error, or zeroes and a loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.errors import OptionError, QcowError
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.image.chain import chain_layers
from qcowlib.image.holes import HoleFinder
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.image.raw import RawImage
from qcowlib.image.reader import ReadableImage, zero_fill
from qcowlib.storage.protocol import ReadStorage

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


class Loss(NamedTuple):
    """Guest bytes that could not be read and are taken for zeroes.

    Attributes:
        start, length: the bytes.
        mapping: it is not known where the data is; else the data itself could not be read.
        error: why.
    """

    start: int
    length: int
    mapping: bool
    error: QcowError


class HostRow(NamedTuple):
    """A part of a range: guest bytes that lie as they are in a host file, or that read as zeroes (storage None)."""

    start: int
    length: int
    storage: ReadStorage | None
    host: int


class _Part(NamedTuple):
    """An image, and where it begins in the source."""

    start: int
    image: ReadableImage


class CopySource:
    """One or more images, one behind the other.

    Args:
        images: opened images, or snapshots of some.
        inherits: leave what the only image's own layer has not allocated to the target's backing file.
        salvage: go on where something cannot be read.

    Attributes:
        size: bytes of all of them.
    """

    def __init__(self, images: Sequence[ReadableImage], *, inherits: bool = False, salvage: bool = False) -> None:
        if not images:
            raise OptionError("there is nothing to copy")
        if inherits and len(images) > 1:
            raise OptionError(
                "Having a backing file for the target makes no sense when concatenating multiple input images"
            )
        self.parts: list[_Part] = []
        self.size = 0
        for image in images:
            self.parts.append(_Part(self.size, image))
            self.size += image.size
        self.salvage = salvage
        self._inherits = inherits and images[0].backing is not None

    def ranges(self, start: int, end: int, lost: Callable[[Loss], None] | None = None) -> Iterator[Range]:
        """A part of the source as ranges without gaps, equal neighbours joined.

        Args:
            start, end: bytes of the source.
            lost: is told what could not be found out, when salvaging; it is taken for zeroes.

        Raises:
            QcowError: the mapping is damaged, or a file cannot be read.
        """
        pending: Range | None = None
        for table, content in self._contents(start, end, lost):
            heads = np.flatnonzero(np.concatenate(([True], content[1:] != content[:-1])))
            starts = table.start[heads].tolist()
            ends = [*starts[1:], int(table.start[-1] + table.length[-1])]
            for first, last, kind in zip(starts, ends, content[heads].tolist(), strict=True):
                if pending is not None and pending.content == kind:
                    pending = Range(pending.start, last, pending.content)
                else:
                    if pending is not None:
                        yield pending
                    pending = Range(first, last, Content(kind))
        if pending is not None:
            yield pending

    def read_into(self, offset: int, view: memoryview) -> list[Loss]:
        """Fill `view` from an offset of the source.

        Returns: what could not be read, when salvaging.

        Raises:
            QcowError: a part cannot be read.
        """
        losses: list[Loss] = []
        for part, first, last in self._inside(offset, offset + len(view)):
            piece = view[first - offset : last - offset]
            try:
                part.image.readinto(first - part.start, piece)
            except QcowError:
                if not self.salvage:
                    raise
                losses += _read_by_sectors(part, first, piece)
        return losses

    def host_rows(self, start: int, end: int) -> list[HostRow] | None:
        """Where a range lies in host files; None when a part of it is not there byte by byte (compressed, encrypted).

        Raises: as `ranges`.
        """
        rows: list[HostRow] = []
        for part, first, last in self._inside(start, end):
            storages = [_plain_storage(layer) for layer in chain_layers(part.image)]
            for table in part.image.extents(first - part.start, last - first):
                for at, length, kind, host, _, layer in table.rows():
                    if kind == ExtentKind.COMPRESSED or (kind == ExtentKind.DATA and storages[layer] is None):
                        return None
                    storage = storages[layer] if kind == ExtentKind.DATA else None
                    rows.append(HostRow(part.start + at, length, storage, host))
        return rows

    def _inside(self, start: int, end: int) -> Iterator[tuple[_Part, int, int]]:
        """The images that a range touches, with the part of the range in each."""
        for part in self.parts:
            first, last = max(start, part.start), min(end, part.start + part.image.size)
            if first < last:
                yield part, first, last

    def _contents(
        self, start: int, end: int, lost: Callable[[Loss], None] | None
    ) -> Iterator[tuple[ExtentTable, npt.NDArray[np.uint8]]]:
        """Extents with the content of each row, at their places in the source."""
        for part, first, last in self._inside(start, end):
            image = part.image
            below = image.backing if self._inherits else None
            limit = 0 if below is None else below.size  # behind it the image reads as zeroes
            finder = HoleFinder(image)
            for shallow in self._tables(part, first - part.start, last - part.start, lost):
                table, holes = finder.split(shallow)
                stored = ((table.kind == ExtentKind.DATA) | (table.kind == ExtentKind.COMPRESSED)) & ~holes
                content = np.where(stored, np.uint8(Content.DATA), np.uint8(Content.ZERO))
                if below is not None:
                    content[(table.kind == ExtentKind.UNALLOCATED) & (table.start < limit)] = Content.INHERITED
                yield _shifted(table, part.start), content

    def _tables(self, part: _Part, start: int, end: int, lost: Callable[[Loss], None] | None) -> Iterator[ExtentTable]:
        """Extents of an image's range. When salvaging, what has none is reported, and is a row without data."""
        walk = part.image.layer_extents if self._inherits else part.image.extents
        step, unit = end - start, part.image.cluster_size
        position = start
        while position < end:
            try:
                for table in walk(position, min(step, end - position)):
                    yield table
                    position = int(table.start[-1] + table.length[-1])
                step = min(4 * step, end - start)
            except QcowError as error:
                if not self.salvage:
                    raise
                if step > unit:
                    step = max(unit, step // 4 // unit * unit)
                    continue
                length = min(unit - position % unit, end - position)
                if lost is not None:
                    lost(Loss(part.start + position, length, True, error))
                yield ExtentTable.from_rows([(position, length, int(ExtentKind.ZERO), -1, 0, 0)])
                position += length


def _read_by_sectors(part: _Part, offset: int, view: memoryview) -> list[Loss]:
    """Fill `view` sector by sector, with zeroes where that fails."""
    losses = []
    for at in range(0, len(view), _SECTOR):
        sector = view[at : at + _SECTOR]
        try:
            part.image.readinto(offset - part.start + at, sector)
        except QcowError as error:
            zero_fill(sector)
            losses.append(Loss(offset + at, len(sector), False, error))
    return losses


def _plain_storage(layer: object) -> ReadStorage | None:
    """The file that holds the data of a layer as it is; None where it is encrypted."""
    if isinstance(layer, MappedLayer):
        return layer.state.data_storage if layer.cipher is None else None
    return layer.storage if isinstance(layer, RawImage) else None


def _shifted(table: ExtentTable, by: int) -> ExtentTable:
    """The table for a disk on which its image begins at another offset."""
    if not by:
        return table
    return ExtentTable(table.start + by, table.length, table.kind, table.host_offset, table.host_length, table.layer)
