"""Extents with the file that each row is in, so that rows of different images and states can be compared.

image.extents() --> damaged ranges as rows of their own --> Located: rows, and the number of each row's file
two of them cut at the same edges --> `same_content`: the same place in the same file, or zeroes in both
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ChainError, CorruptMetadata
from qcowlib.extents import ExtentKind, ExtentTable, Int64Array
from qcowlib.image.chain import Layer, chain_layers, clip, concatenate, cut
from qcowlib.image.qcow2 import MappedLayer, Qcow2Image, SnapshotView
from qcowlib.image.raw import RawImage, StorageWindow
from qcowlib.image.reader import ReadableImage
from qcowlib.storage.protocol import ReadStorage

#: Kinds of rows beside those of `ExtentKind`: the mapping is damaged; a backing file that was left out has the data.
DAMAGED, MISSING = 254, 255

#: So many damaged places are narrowed down to a cluster; with more, to an L2 table's range; with more yet, not at all.
_NARROW_TO_CLUSTER, _NARROW_TO_TABLE = 1 << 10, 1 << 13


class Places:
    """Numbers for the files that hold data, the same for the same file however it was opened."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def number(self, what: object) -> int:
        """The number of a file, or of the name of one that is not there."""
        return self._numbers.setdefault(what, len(self._numbers))


@dataclass(frozen=True, slots=True)
class Located:
    """Rows of a state.

    Attributes:
        rows: the rows; their kind may be DAMAGED or MISSING, too.
        place: number of the file that each row's host offset counts in (int64).
    """

    rows: ExtentTable
    place: Int64Array

    @property
    def end(self) -> int:
        """Guest offset where the rows end, in bytes."""
        return int(self.rows.start[-1] + self.rows.length[-1])

    def between(self, first: int, end: int) -> Located:
        """The part between two guest offsets."""
        rows = clip(self.rows, first, end)
        if len(rows) == len(self.place):
            return Located(rows, self.place)
        index = np.searchsorted(self.rows.start, rows.start, side="right") - 1
        return Located(rows, self.place[index])

    def at(self, starts: Int64Array, end: int) -> Located:
        """The rows cut at these sorted guest offsets, up to `end`."""
        index = np.searchsorted(self.rows.start, starts, side="right") - 1
        return Located(cut(self.rows, starts, end), self.place[index])

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """Which rows read as zeroes, as the metadata says."""
        zero: npt.NDArray[np.bool_] = (self.rows.kind == ExtentKind.ZERO) | (self.rows.kind == ExtentKind.UNALLOCATED)
        return zero


def join(parts: list[Located]) -> Located:
    """One of parts that follow each other."""
    if len(parts) == 1:
        return parts[0]
    return Located(concatenate([part.rows for part in parts]), np.concatenate([part.place for part in parts]))


def same_content(one: Located, other: Located) -> npt.NDArray[np.bool_]:
    """Which rows, cut at the same edges, are known to hold the same bytes."""
    same: npt.NDArray[np.bool_] = (one.rows.kind == other.rows.kind) & (one.rows.kind != DAMAGED)
    same &= (one.place == other.place) & (one.rows.host_offset == other.rows.host_offset)
    same |= one.zero & other.zero
    return same


def located(image: ReadableImage, places: Places, first: int, last: int) -> Iterator[Located]:
    """Rows of a state from `first` to `last` (bytes), which may lie behind its end: there it is UNALLOCATED.

    Damage becomes rows, so that nothing is raised for it.
    """
    layers = chain_layers(image)
    numbers = np.array([places.number(_view(layer)) for layer in layers], dtype=np.int64)
    missing = left_out(layers[-1])
    end = min(last, image.size)
    for table in sound_rows(image, first, end) if first < end else ():
        place = numbers[table.layer]
        if missing is not None:
            lost = (table.kind == ExtentKind.UNALLOCATED) & (table.layer == len(layers) - 1)
            table.kind[lost] = MISSING
            place[lost] = places.number(missing)
        yield Located(table, place)
    start = max(first, end)
    if start < last:
        row = ExtentTable.from_rows([(start, last - start, ExtentKind.UNALLOCATED, -1, 0, 0)])
        yield Located(row, np.zeros(1, dtype=np.int64))


def _view(layer: Layer) -> object:
    """The file of a layer and the way to look at it: what is decrypted is not what a raw view of the file shows."""
    decrypted = isinstance(layer, MappedLayer) and layer.state.header.crypt_method != 0
    return identity(data_storage(layer)), decrypted


def sound_rows(image: ReadableImage, first: int, last: int) -> Iterator[ExtentTable]:
    """Extents of a guest range (bytes) in which a damaged range is a row of its own."""
    narrowed = 0
    pending = [(first, last)]
    while pending:
        position, end = pending.pop()
        try:
            for table in image.extents(position, end - position):
                yield table
                position = int(table.start[-1] + table.length[-1])
        except (CorruptMetadata, ChainError):
            unit = _unit(image, narrowed)
            middle = (position + end) // 2 // unit * unit
            if middle <= position:
                middle = (position // unit + 1) * unit
            if middle >= end:
                narrowed += 1
                yield ExtentTable.from_rows([(position, end - position, DAMAGED, -1, 0, 0)])
            else:
                pending += [(middle, end), (position, middle)]


def _unit(image: ReadableImage, narrowed: int) -> int:
    """The smallest range that damage is narrowed down to, in bytes."""
    if narrowed < _NARROW_TO_CLUSTER:
        return image.cluster_size
    if narrowed < _NARROW_TO_TABLE and isinstance(image, MappedLayer):
        return image.state.geometry.l2_coverage
    return 1 << 62


def data_storage(layer: Layer) -> ReadStorage | None:
    """The file that the host offsets of a layer count in."""
    if isinstance(layer, MappedLayer):
        return layer.state.data_storage
    return layer.storage if isinstance(layer, RawImage) else None


def identity(storage: ReadStorage | None) -> object:
    """Equal for storages of the same host file."""
    while isinstance(storage, StorageWindow):
        storage = storage.inner  # host offsets count in the file below all windows
    fileno = getattr(storage, "fileno", None)
    if fileno is None:
        return id(storage)
    status = os.fstat(fileno())
    return status.st_dev, status.st_ino


def left_out(layer: Layer) -> str | None:
    """Name of the backing file that was not opened; None when there is no such."""
    image = layer.image if isinstance(layer, SnapshotView) else layer
    return image.header.backing_file if isinstance(image, Qcow2Image) and image.backing_left_out else None
