"""Extents: where the data of a guest range is.

| kind        | reads as                        | host offset                                   | present in the layer |
|-------------|---------------------------------|-----------------------------------------------|----------------------|
| DATA        | bytes at the host offset        | valid                                         | yes |
| ZERO        | zeroes                          | valid if a cluster is allocated, else -1      | yes |
| UNALLOCATED | the backing file, else zeroes   | valid if the cluster is allocated and only its | no |
|             |                                 | subclusters are not, else -1                  |     |
| COMPRESSED  | inflated bytes                  | first byte of the compressed data             | yes |

The columns follow QEMU's block status (DATA, ZERO, OFFSET_VALID). A compressed row covers (a part of) exactly one
guest cluster. `host_length` is the number of host bytes that the row needs: its length for DATA, the number of bytes
up to the end of the last 512-byte sector for COMPRESSED, 0 for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import GuestOffset, HostOffset

Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]


class ExtentKind(IntEnum):
    """What a row of an extent table says about its range."""

    DATA = 0
    ZERO = 1
    UNALLOCATED = 2
    COMPRESSED = 3


class Extent(NamedTuple):
    """One row: guest start and length in bytes, kind, host offset (None if none), host bytes, layer (0 is the top)."""

    start: GuestOffset
    length: int
    kind: ExtentKind
    host_offset: HostOffset | None
    host_length: int
    layer: int


@dataclass(frozen=True, slots=True)
class ExtentTable:
    """Rows as columns of equal length; rows are sorted by `start`, do not overlap and leave no gap.

    Attributes:
        start: guest offset of each row in bytes (int64).
        length: bytes of each row, at least 1 (int64).
        kind: an `ExtentKind` for each row (uint8).
        host_offset: host offset in bytes, -1 where there is none (int64).
        host_length: host bytes of the row (int64).
        layer: depth in the backing chain, 0 is the image asked (uint16).
    """

    start: Int64Array
    length: Int64Array
    kind: Uint8Array
    host_offset: Int64Array
    host_length: Int64Array
    layer: Uint16Array

    @staticmethod
    def from_rows(rows: Iterable[tuple[int, int, int, int, int, int]]) -> ExtentTable:
        """A table from rows of (start, length, kind, host offset or -1, host length, layer)."""
        columns = np.array(list(rows), dtype=np.int64).reshape(-1, 6)
        return ExtentTable(
            columns[:, 0].copy(),
            columns[:, 1].copy(),
            columns[:, 2].astype(np.uint8),
            columns[:, 3].copy(),
            columns[:, 4].copy(),
            columns[:, 5].astype(np.uint16),
        )

    def __len__(self) -> int:
        return len(self.start)

    def __iter__(self) -> Iterator[Extent]:
        for start, length, kind, host, host_length, layer in self.rows():
            yield Extent(
                GuestOffset(start),
                length,
                ExtentKind(kind),
                HostOffset(host) if host >= 0 else None,
                host_length,
                layer,
            )

    def rows(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Rows as plain integers: (start, length, kind, host offset or -1, host length, layer)."""
        return zip(
            self.start.tolist(),
            self.length.tolist(),
            self.kind.tolist(),
            self.host_offset.tolist(),
            self.host_length.tolist(),
            self.layer.tolist(),
            strict=True,
        )

    def length_of(self, kind: ExtentKind) -> int:
        """Guest bytes in rows of this kind."""
        return int(self.length[self.kind == kind].sum())
