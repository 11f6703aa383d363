"""The census against the stored refcounts, window by window.

census.references, stored refcounts --> differences: the clusters whose refcount is wrong
                                    --> Ones: which clusters have refcount 1, for the COPIED flags
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.format.entries import Int64Array
from qcowlib.format.refcount_block import RefcountArray
from qcowlib.metadata.census import Census
from qcowlib.metadata.copied_flags import Ones
from qcowlib.metadata.reference_counts import Counters

BoolArray = npt.NDArray[np.bool_]
Uint64Array = npt.NDArray[np.uint64]


class Differences(NamedTuple):
    """Clusters of one window whose refcount is wrong or cannot be read, ascending.

    Attributes:
        clusters: their indices (int64).
        stored: their refcounts as stored (uint64).
        expected: as counted, no more than the width can hold (uint64).
        readable: whether the refcount could be read.
    """

    clusters: Int64Array
    stored: Uint64Array
    expected: Uint64Array
    readable: BoolArray


class Comparison:
    """Stored and expected refcounts of one image.

    Args:
        found: the census.
        geometry: sizes of the image.

    Attributes:
        ones: which clusters have a stored refcount of 1; complete when `differences` has been consumed.
    """

    def __init__(self, found: Census, geometry: Geometry) -> None:
        self._found = found
        self._geometry = geometry
        self._bits = found.references.chunk_bits
        counted = found.references.chunks()
        self.ones = Ones(self._bits, counted, found.stored)
        self._windows = sorted({*counted, *found.stored.used_windows(self._bits, found.clusters)})

    def differences(self) -> Iterator[Differences]:
        """Where the stored refcounts are not the expected ones, ascending; clusters beyond the file are left out."""
        for window in self._windows:
            stored = self._stored(window)
            counts = self._found.references.chunk(window)
            if counts is not None:
                self.ones.set_window(window, stored == 1)
            found = self._window_differences(window, stored, counts)
            if found is not None:
                yield found

    def highest_cluster(self) -> int:
        """The last cluster that is in use or referred to, 0 if none is."""
        for window in reversed(self._windows):
            used = self._stored(window) != 0
            counts = self._found.references.chunk(window)
            if counts is not None:
                used |= counts != 0
            first = window << self._bits
            unreadable = self._unreadable(first, len(used))
            if unreadable is not None:
                used &= ~unreadable
            places = np.flatnonzero(used[: max(0, self._found.clusters - first)])
            if len(places):
                return first + int(places[-1])
        return 0

    def _stored(self, window: int) -> RefcountArray:
        return self._found.stored.window(window << self._bits, 1 << self._bits)

    def _unreadable(self, first: int, count: int) -> BoolArray | None:
        """Which clusters of a window have a refcount block that cannot be read; None where all can."""
        blocks = self._found.stored.unreadable[self._found.stored.block_range(first, count)]
        if not blocks.any():
            return None
        every = np.repeat(blocks, self._geometry.refcount_block_entries)
        return np.pad(every, (0, count - len(every)))

    def _window_differences(self, window: int, stored: RefcountArray, counts: Counters | None) -> Differences | None:
        first = window << self._bits
        here = slice(0, max(0, min(len(stored), self._found.clusters - first)))
        if counts is None:
            wrong = stored[here] != 0
        else:
            counts = self._saturated(counts)
            wrong = stored[here] != counts[here]
        unreadable = self._unreadable(first, len(stored))
        if unreadable is not None:
            wrong |= unreadable[here]
        places = np.flatnonzero(wrong)
        if not len(places):
            return None
        return Differences(
            places + first,
            stored[places].astype(np.uint64),
            np.zeros(len(places), dtype=np.uint64) if counts is None else counts[places].astype(np.uint64),
            np.ones(len(places), dtype=np.bool_) if unreadable is None else ~unreadable[places],
        )

    def _saturated(self, counts: Counters) -> Counters:
        """Counts as far as the width can hold them, never int64 (which must not meet the stored uint64)."""
        limit = self._geometry.refcount_max
        if counts.dtype == np.int64:
            counts = counts.astype(np.uint64)
        return np.minimum(counts, counts.dtype.type(limit)) if limit < np.iinfo(counts.dtype).max else counts
