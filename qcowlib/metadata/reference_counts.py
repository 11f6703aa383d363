"""How often each host cluster is referred to: counters for all clusters of a file, of which few may be in use.

Counters live in chunks of 2^22 clusters or one refcount block, whichever is more. A chunk is made when it is first
counted in, with one byte per cluster, and widens when a count does not fit. So memory follows what is referred to, not
the length of the (sparse, or hostile) file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcowlib.errors import ImageStateError
from qcowlib.format.entries import Int64Array

Counters = npt.NDArray[Any]
"""Counters of one chunk: uint8, uint16, uint32 or int64."""

MIN_CHUNK_BITS = 20  # 4 MiB: from that size on numpy asks the host for huge pages
DEFAULT_BUDGET = 1 << 30
_WIDTHS = tuple(np.dtype(width) for width in (np.uint8, np.uint16, np.uint32, np.int64))
_LIMITS = {
    np.dtype(width): limit
    for width, limit in (("u1", 0xFF), ("u2", 0xFFFF), ("u4", 0xFFFF_FFFF), ("i8", (1 << 63) - 1))
}
_SLAB_BYTES = 16 << 20  # new chunks are cut from pieces of this size: from 4 MiB on numpy asks for huge pages
_DENSE = 4  # a window is counted as a whole when it has at most this many clusters for each reference


def distinct(values: Int64Array) -> Int64Array:
    """Distinct values, ascending; as `np.unique`, which imports numpy.ma: that takes longer than many a check."""
    ordered: Int64Array = np.sort(values)
    kept: Int64Array = ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]
    return kept


class ReferenceCounts:
    """Exact counters by cluster index; no count saturates.

    Args:
        refcount_block_bits: log2 of the clusters that a refcount block covers; a chunk is no smaller.
        budget: bytes that the counters may take.

    Attributes:
        chunk_bits: log2 of the clusters in a chunk.
    """

    def __init__(self, refcount_block_bits: int = 0, budget: int = DEFAULT_BUDGET) -> None:
        self.chunk_bits = max(MIN_CHUNK_BITS, refcount_block_bits)
        self._budget = budget
        self._chunks: dict[int, Counters] = {}
        self._peaks: dict[int, int] = {}  # an upper bound of each chunk's counts
        self._spare: list[Counters] = []

    @property
    def chunk_size(self) -> int:
        """Clusters in a chunk."""
        return 1 << self.chunk_bits

    def chunks(self) -> list[int]:
        """Indices of the chunks that have been counted in, ascending."""
        return sorted(self._chunks)

    def chunk(self, index: int) -> Counters | None:
        """Counters of one chunk (a view), None where nothing was counted."""
        return self._chunks.get(index)

    def add_run(self, first: int, stop: int, times: int = 1) -> None:
        """Count each cluster from `first` up to but not including `stop`.

        Raises:
            ImageStateError: the counters would exceed the budget.
        """
        while first < stop:
            index = first >> self.chunk_bits
            base = index << self.chunk_bits
            end = min(stop, base + self.chunk_size)
            counters = self._room(index, times)[first - base : end - base]
            counters += times
            first = end

    def remove_run(self, first: int, stop: int) -> None:
        """Take back one reference to each cluster from `first` up to but not including `stop`."""
        for cluster in range(first, stop):
            chunk = self._chunks[cluster >> self.chunk_bits]
            chunk[cluster & (self.chunk_size - 1)] -= 1

    def add(self, clusters: Int64Array, times: int = 1) -> None:
        """Count clusters (int64, any order, each as often as it occurs).

        Raises:
            ImageStateError: the counters would exceed the budget.
        """
        if not len(clusters):
            return
        low, high = int(clusters.min()), int(clusters.max())
        if high - low < max(_DENSE * len(clusters), 1 << 12):
            self.add_counts(low, np.bincount(clusters - low) * times)
        else:
            distinct, counts = np.unique(clusters, return_counts=True)
            self._add_distinct(distinct, counts.astype(np.int64) * times)

    def at(self, clusters: Int64Array) -> Int64Array:
        """Counts of single clusters (int64, same shape)."""
        counts = np.zeros(len(clusters), dtype=np.int64)
        owners = clusters >> self.chunk_bits
        for index in distinct(owners).tolist():
            chunk = self._chunks.get(index)
            if chunk is not None:
                here = owners == index
                counts[here] = chunk[clusters[here] - (index << self.chunk_bits)]
        return counts

    def above(self, limit: int) -> tuple[Int64Array, Int64Array]:
        """Clusters counted more than `limit` times, ascending, and their counts."""
        clusters, counts = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for index in self.chunks():
            if self._peaks[index] > limit:
                chunk = self._chunks[index]
                found = np.flatnonzero(chunk > limit)
                clusters.append(found + (index << self.chunk_bits))
                counts.append(chunk[found].astype(np.int64))
        return np.concatenate(clusters), np.concatenate(counts)

    def add_counts(self, low: int, counts: Int64Array) -> None:
        """Count consecutive clusters from `low` on as often as `counts` says (int64).

        Raises:
            ImageStateError: the counters would exceed the budget.
        """
        stop = low + len(counts)
        position = low
        while position < stop:
            index = position >> self.chunk_bits
            base = index << self.chunk_bits
            end = min(stop, base + self.chunk_size)
            part = counts[position - low : end - low]
            chunk = self._room(index, int(part.max()))
            chunk[position - base : end - base] += part.astype(chunk.dtype)
            position = end

    def _add_distinct(self, clusters: Int64Array, counts: Int64Array) -> None:
        owners = clusters >> self.chunk_bits
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(owners)], strict=True):
            index = int(owners[start])
            part = counts[start:stop]
            chunk = self._room(index, int(part.max()))
            chunk[clusters[start:stop] - (index << self.chunk_bits)] += part.astype(chunk.dtype)

    def _room(self, index: int, more: int) -> Counters:
        """The chunk, wide enough to add `more` to any of its counters."""
        chunk = self._chunks.get(index)
        if chunk is None:
            chunk = self._new(index, more, None)
        peak = self._peaks[index] + more
        if peak > _LIMITS[chunk.dtype]:
            peak = int(chunk.max()) + more
            if peak > _LIMITS[chunk.dtype]:
                chunk = self._new(index, peak, chunk)
        self._peaks[index] = peak
        return chunk

    def _new(self, index: int, peak: int, old: Counters | None) -> Counters:
        dtype = next(width for width in _WIDTHS if peak <= _LIMITS[width])
        self._budget -= (dtype.itemsize - (old.itemsize if old is not None else 0)) << self.chunk_bits
        if self._budget < 0:
            raise ImageStateError("counting the references to its clusters would take too much memory")
        if old is not None:
            chunk: Counters = old.astype(dtype)
        else:
            chunk = self._zeroes() if dtype == np.uint8 else np.zeros(self.chunk_size, dtype=dtype)
            self._peaks[index] = 0
        self._chunks[index] = chunk
        return chunk

    def _zeroes(self) -> Counters:
        """A new chunk of uint8."""
        if not self._spare:
            slab = np.zeros((max(1, _SLAB_BYTES >> self.chunk_bits), self.chunk_size), dtype=np.uint8)
            self._spare = list(slab[::-1])
        return self._spare.pop()
