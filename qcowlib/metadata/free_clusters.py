"""Where new refcount blocks and a new refcount table may lie.

Behind the end of the file nothing can be lost: there they go while anything is in doubt. In a file whose mapping and
refcounts agree that a cluster is free, the first free place is taken, so that the file does not grow (a block device
cannot). Source: QEMU 7.2 places a rebuilt structure in that way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowlib.metadata.reference_counts import ReferenceCounts
from qcowlib.metadata.stored_refcounts import StoredRefcounts

BoolArray = npt.NDArray[np.bool_]


class FreeClusters:
    """Free host clusters.

    Args:
        end: the first cluster behind the end of the file; from there on all are free.
        inside: what is referred to (the old refcount structure included) and the stored refcounts: clusters that
            neither of them knows are free as well. None: only those behind the end are.
    """

    def __init__(self, end: int, inside: tuple[ReferenceCounts, StoredRefcounts] | None = None) -> None:
        self._end = end
        self._inside = inside
        self._top = end
        self._windows: dict[int, BoolArray] = {}

    def place(self, blocks: list[int], block_bits: int, table_clusters: int) -> tuple[dict[int, int], int]:
        """A cluster for each refcount block (by index, ascending), and the first cluster of a table.

        Args:
            blocks: indices of the refcount blocks.
            block_bits: log2 of the clusters that a block covers; a block lies where it counts itself, or behind.
            table_clusters: consecutive clusters that the table needs; none where it is 0.
        """
        self._windows = {}
        self._top = self._end
        places: dict[int, int] = {}
        cursor = 0
        for index in blocks:
            cursor = places[index] = self._take(max(cursor, index << block_bits), 1)
        return places, self._take(0, table_clusters) if table_clusters else 0

    def _take(self, start: int, length: int) -> int:
        """The first of `length` free clusters from `start` on that follow each other; they are free no more."""
        position = start
        while self._inside is not None and position < self._end:
            bits = self._inside[0].chunk_bits
            base = position >> bits << bits
            free = self._window(position >> bits)
            place = _first_run(free[position - base : max(0, self._end - base)], length)
            if place is not None:
                position += place
                free[position - base : position - base + length] = False
                return position
            position = base + len(free)
        start = max(start, self._top)
        self._top = start + length
        return start

    def _window(self, index: int) -> BoolArray:
        """Which clusters of a window are free, less those that were taken."""
        assert self._inside is not None
        if index not in self._windows:
            references, stored = self._inside
            bits = references.chunk_bits
            free: BoolArray = stored.window(index << bits, 1 << bits) == 0
            counts = references.chunk(index)
            if counts is not None:
                free &= counts == 0
            self._windows[index] = free
        return self._windows[index]


def _first_run(free: BoolArray, length: int) -> int | None:
    """The first place where `length` values in a row are true."""
    if length == 1:
        place = int(free.argmax()) if len(free) else 0
        return place if len(free) and free[place] else None
    edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
    fitting = np.flatnonzero(edges[1::2] - edges[::2] >= length)
    return int(edges[2 * fitting[0]]) if len(fitting) else None
