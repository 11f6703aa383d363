"""Reading guest bytes through a chain, and what all images of this library share.

small range   layer.lookup() and one read for each piece, down the chain: no arrays
large range   chain.resolve() -> rows joined -> one read for each row, straight into the caller's buffer
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from qcowlib.errors import OutOfRange
from qcowlib.extents import ExtentKind, ExtentTable
from qcowlib.image.chain import Layer, chain_layers, merge_adjacent, resolve
from qcowlib.image.stream import ImageStream

_DATA = int(ExtentKind.DATA)
_COMPRESSED = int(ExtentKind.COMPRESSED)
_UNALLOCATED = int(ExtentKind.UNALLOCATED)

# Ranges of at most this many clusters take the scalar path: building arrays costs about as much as a hundred look-ups.
_SCALAR_CLUSTERS = 64
_ZEROES = bytes(1 << 16)


def zero_fill(view: memoryview) -> None:
    """Set all bytes of a buffer to zero."""
    if len(view) <= len(_ZEROES):
        view[:] = _ZEROES[: len(view)]
    else:
        np.frombuffer(view, dtype=np.uint8)[:] = 0


def read_range(top: Layer, offset: int, view: memoryview, *, fresh: bool = False) -> None:
    """Fill `view` with the guest bytes from `offset` on; `fresh` says that it holds zeroes already."""
    layers = chain_layers(top)
    for table in resolve(top, offset, len(view), reading=True):
        for start, length, kind, host, host_length, number in merge_adjacent(table).rows():
            piece = view[start - offset : start - offset + length]
            if kind == _DATA:
                layers[number].read_data(start, host, piece)
            elif kind == _COMPRESSED:
                layers[number].read_compressed(start, host, host_length, piece)
            elif kind == _UNALLOCATED:
                layers[number].read_missing(start, piece, fresh)
            elif not fresh:
                zero_fill(piece)


def read_pieces(layer: Layer, offset: int, view: memoryview, *, fresh: bool = False) -> None:
    """The same as `read_range`, one look-up at a time."""
    done = 0
    while done < len(view):
        kind, host, run = layer.lookup(offset + done)
        piece = view[done : done + run]
        if kind == _DATA:
            layer.read_data(offset + done, host, piece)
        elif kind == _COMPRESSED:
            layer.read_compressed(offset + done, host, 0, piece)
        elif kind == _UNALLOCATED:
            _read_below(layer, offset + done, piece, fresh)
        elif not fresh:
            zero_fill(piece)
        done += len(piece)


def _read_below(layer: Layer, offset: int, piece: memoryview, fresh: bool) -> None:
    below = layer.backing
    inside = 0 if below is None else max(0, min(len(piece), below.size - offset))
    if below is not None and inside:
        read_pieces(below, offset, piece[:inside], fresh=fresh)
    if inside < len(piece):
        layer.read_missing(offset + inside, piece[inside:], fresh)


class ReadableImage(ABC):
    """The reading side of an image, over the layer methods that a format supplies (they are described in
    `chain.Layer`).

    Args:
        backing: the image below; closed together with this one.
    """

    format: str
    cluster_size: int
    writable: bool = False

    def __init__(self, backing: ReadableImage | None = None) -> None:
        self._backing = backing

    @property
    @abstractmethod
    def size(self) -> int:
        """Size of the virtual disk in bytes."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name for messages; the path of a local file."""

    @property
    def backing(self) -> ReadableImage | None:
        """The image below, opened; None when there is none."""
        return self._backing

    @abstractmethod
    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of this layer alone: UNALLOCATED ones are the backing file's matter."""

    def read_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """Rows of this layer alone, for who is going to read them."""
        return self.layer_extents(offset, length)

    @abstractmethod
    def lookup(self, offset: int) -> tuple[int, int, int]:
        """(kind, host offset or -1, bytes of the same kind from `offset` on) for one guest offset."""

    @abstractmethod
    def read_data(self, guest: int, host: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a DATA row."""

    @abstractmethod
    def read_compressed(self, guest: int, host: int, host_length: int, view: memoryview) -> None:
        """Fill `view` with bytes of a COMPRESSED row; `host_length` 0 means that the caller does not know it."""

    def read_missing(self, guest: int, view: memoryview, fresh: bool) -> None:  # noqa: ARG002 - others name the offset
        """Fill `view` where no layer has data; `fresh` says that it holds zeroes already."""
        if not fresh:
            zero_fill(view)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at guest offset `offset`.

        Raises:
            OutOfRange: the range does not lie inside the disk, or is too large for the memory.
            CorruptMetadata: the mapping or a payload in the range is damaged.
            ChainError: the range needs a backing file that was not opened.
        """
        self._require_inside(offset, length)
        try:
            # Nobody else holds these bytes, so the view is on themselves: they are filled in place and not copied.
            holder = io.BytesIO(bytes(length))
            self._fill(offset, holder.getbuffer(), fresh=True)
            return holder.getvalue()
        except (MemoryError, OverflowError):
            raise OutOfRange(f"{length} bytes do not fit into memory") from None

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill the whole buffer from guest offset `offset`; returns its length. Raises as `read`."""
        view = memoryview(buffer).cast("B")
        self._require_inside(offset, len(view))
        self._fill(offset, view, fresh=False)
        return len(view)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[ExtentTable]:
        """Where the data of the range is, through the chain, in batches; column `layer` is the depth.

        A row of kind UNALLOCATED is in no layer and reads as zeroes.

        Args:
            offset: guest bytes.
            length: guest bytes; None means up to the end.

        Raises:
            OutOfRange: the range does not lie inside the disk.
            CorruptMetadata: the mapping of the range is damaged.
        """
        length = max(0, self.size - offset) if length is None else length
        self._require_inside(offset, length)
        if length:
            for table in resolve(self, offset, length):
                yield merge_adjacent(table)

    def open_stream(self) -> io.RawIOBase:
        """A seekable file object over the disk; closing it leaves the image open."""
        return ImageStream(self, self.name)

    def close(self) -> None:
        """Release the chain below; a second call does nothing."""
        if self._backing is not None:
            self._backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, offset: int, view: memoryview, *, fresh: bool) -> None:
        if len(view) <= _SCALAR_CLUSTERS * self.cluster_size:
            read_pieces(self, offset, view, fresh=fresh)
        else:
            read_range(self, offset, view, fresh=fresh)

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(f"{length} bytes at {offset} do not lie inside the disk of {self.size} bytes")
