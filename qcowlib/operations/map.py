"""The map of an image: its extents with the flags of qemu-img's map, rows joined as far as they tell the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.extents import ExtentKind, ExtentTable, Int64Array
from qcowlib.image.chain import Layer, chain_layers
from qcowlib.image.holes import HoleFinder
from qcowlib.image.qcow2 import MappedLayer
from qcowlib.image.raw import RawImage
from qcowlib.image.reader import ReadableImage

_PRESENT, _ZERO, _DATA = 1, 2, 4
# Flags by extent kind: DATA, ZERO, UNALLOCATED, COMPRESSED.
_FLAGS = np.array([_PRESENT | _DATA, _PRESENT | _ZERO, _ZERO, _PRESENT | _DATA], dtype=np.uint8)


class MapRow(NamedTuple):
    """One row of the map, with qemu-img's names.

    Attributes:
        start, length: guest range in bytes.
        depth: the layer that decides, 0 is the image itself.
        present: a layer has allocated the range.
        zero: it reads as zeroes.
        data: it has data (both: an allocated cluster over a hole of the host file).
        offset: where it is in `filename`, in bytes; None when compressed, encrypted or nowhere.
        filename: the file that the offset counts in.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    filename: str | None


def map_image(image: ReadableImage, offset: int = 0, length: int | None = None) -> Iterator[MapRow]:
    """Where each part of a disk comes from.

        for row in map_image(image):
            print(row.start, row.length, row.data)

    Args:
        image: an opened image or snapshot.
        offset, length: guest range in bytes; what lies behind the end of the disk is left out.

    Raises:
        CorruptMetadata: the mapping of the range is damaged.
    """
    end = image.size if length is None else min(image.size, offset + length)
    if offset >= end:
        return
    finder = HoleFinder(image)
    names, plain = _layer_facts(image)
    pending: _Rows | None = None
    for table in image.extents(offset, end - offset):
        rows = _Rows.of(*finder.split(table), plain)
        rows = (rows if pending is None else pending.followed_by(rows)).joined()
        yield from rows[:-1].values(names)
        pending = rows[-1:]  # the next batch may go on with it
    if pending is not None:
        yield from pending.values(names)


def _layer_facts(image: ReadableImage) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """For each layer the file of its data, and whether that can be read without decoding."""
    names: list[str] = []
    plain: list[bool] = []
    for layer in chain_layers(image):
        names.append(_data_file_name(layer))
        plain.append(not isinstance(layer, MappedLayer) or layer.cipher is None)
    return names, np.array(plain, dtype=np.bool_)


def _data_file_name(layer: Layer) -> str:
    if isinstance(layer, MappedLayer):
        return layer.state.data_storage.name
    return layer.name if isinstance(layer, RawImage) else ""


@dataclass(frozen=True)
class _Rows:
    """Columns of map rows; `host` is -1 where there is no offset."""

    start: Int64Array
    length: Int64Array
    depth: npt.NDArray[np.uint16]
    flags: npt.NDArray[np.uint8]
    host: Int64Array

    @staticmethod
    def of(table: ExtentTable, holes: npt.NDArray[np.bool_], plain: npt.NDArray[np.bool_]) -> _Rows:
        """The rows of an extent table, not joined."""
        flags = _FLAGS[table.kind]
        flags[holes] |= _ZERO
        shown = plain[table.layer] & (table.kind != ExtentKind.COMPRESSED)
        return _Rows(table.start, table.length, table.layer, flags, np.where(shown, table.host_offset, -1))

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, chosen: slice) -> _Rows:
        return _Rows(self.start[chosen], self.length[chosen], self.depth[chosen], self.flags[chosen], self.host[chosen])

    def followed_by(self, other: _Rows) -> _Rows:
        """These rows and then others."""
        return _Rows(
            np.concatenate((self.start, other.start)),
            np.concatenate((self.length, other.length)),
            np.concatenate((self.depth, other.depth)),
            np.concatenate((self.flags, other.flags)),
            np.concatenate((self.host, other.host)),
        )

    def joined(self) -> _Rows:
        """Rows that tell the same as the one before, and whose offset goes on from it, made one with it."""
        goes_on = np.where(self.host[:-1] < 0, self.host[1:] < 0, self.host[:-1] + self.length[:-1] == self.host[1:])
        same = goes_on & (self.flags[1:] == self.flags[:-1]) & (self.depth[1:] == self.depth[:-1])
        heads = np.flatnonzero(np.concatenate(([True], ~same)))
        length = np.add.reduceat(self.length, heads)
        return _Rows(self.start[heads], length, self.depth[heads], self.flags[heads], self.host[heads])

    def values(self, names: list[str]) -> Iterator[MapRow]:
        """The rows as values."""
        columns = (self.start, self.length, self.depth, self.flags, self.host)
        for start, length, depth, flags, host in zip(*(column.tolist() for column in columns), strict=True):
            yield MapRow(
                start,
                length,
                depth,
                bool(flags & _PRESENT),
                bool(flags & _ZERO),
                bool(flags & _DATA),
                host if host >= 0 else None,
                names[depth] if host >= 0 else None,
            )
