"""What every image offers, whatever its format: the two protocols that operations are written against.

Offsets and lengths are guest bytes. Reading may be done from several threads at once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from qcowlib.extents import ExtentTable
from qcowlib.storage.protocol import Buffer


@runtime_checkable
class BlockImage(Protocol):
    """A virtual disk that can be read."""

    @property
    def size(self) -> int:
        """Size of the virtual disk in bytes: a multiple of 512, as QEMU has it."""
        ...

    @property
    def format(self) -> str:
        """ "qcow2" or "raw"."""
        ...

    @property
    def cluster_size(self) -> int:
        """Unit of allocation in bytes; 512 for raw."""
        ...

    @property
    def name(self) -> str:
        """Name for messages; the path of a local file."""
        ...

    @property
    def backing(self) -> BlockImage | None:
        """The image below, opened; None when there is none."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the image was opened for writing."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            OutOfRange: the range does not lie inside the disk.
            CorruptMetadata: the mapping or a payload in the range is damaged.
        """
        ...

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill the whole buffer from `offset`; returns its length. Raises as `read`."""
        ...

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[ExtentTable]:
        """Where the data of the range is, through the chain, in batches; column `layer` is the depth.

        A row of kind UNALLOCATED is in no layer and reads as zeroes. `length` None means up to the end.
        """
        ...

    def layer_extents(self, offset: int, length: int) -> Iterator[ExtentTable]:
        """The same for this layer alone: UNALLOCATED rows are the backing file's matter."""
        ...

    def open_stream(self) -> io.RawIOBase:
        """A seekable file object over the disk; closing it leaves the image open."""
        ...

    def close(self) -> None:
        """Release the file, its locks, and the chain below; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class WritableBlockImage(BlockImage, Protocol):
    """A virtual disk that can be read and written."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`."""
        ...

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the range back; it then reads as zeroes, where the format can say so."""
        ...

    def flush(self) -> None:
        """Barrier: everything written before is durable when it returns."""
        ...
