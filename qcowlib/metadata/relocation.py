"""Moving clusters together: which host clusters are kept, and where each of them goes.

The kept clusters follow each other in their old order, so that what was contiguous stays contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qcowlib.format.entries import Int64Array
from qcowlib.metadata.reference_counts import ReferenceCounts

BoolArray = npt.NDArray[np.bool_]


class ClusterSet:
    """A set of host clusters, as chunks of flags like those of `ReferenceCounts`."""

    def __init__(self, chunk_bits: int) -> None:
        self._bits = chunk_bits
        self._chunks: dict[int, BoolArray] = {}

    @staticmethod
    def counted(counts: ReferenceCounts) -> ClusterSet:
        """The clusters that have references."""
        found = ClusterSet(counts.chunk_bits)
        found._chunks = {index: chunk != 0 for index in counts.chunks() if (chunk := counts.chunk(index)) is not None}
        return found

    @property
    def clusters(self) -> int:
        """How many there are."""
        return sum(int(np.count_nonzero(chunk)) for chunk in self._chunks.values())

    def add(self, clusters: Int64Array) -> None:
        """Add clusters (int64), all of one chunk."""
        if len(clusters):
            index = int(clusters[0]) >> self._bits
            self._chunks.setdefault(index, np.zeros(1 << self._bits, dtype=np.bool_))[
                clusters - (index << self._bits)
            ] = True

    def chunk(self, index: int) -> BoolArray | None:
        """The flags of a chunk; None when it is empty."""
        return self._chunks.get(index)

    def contains(self, clusters: Int64Array) -> BoolArray:
        """Which of some clusters (int64, any order) are in the set."""
        found = np.zeros(len(clusters), dtype=np.bool_)
        index = clusters >> self._bits
        for number, chunk in self._chunks.items():
            here = index == number
            found[here] = chunk[clusters[here] - (number << self._bits)]
        return found


class Relocation:
    """Old places and new ones.

    Args:
        counts: the references of each host cluster; those with none are not kept.
        dropped: clusters that are not kept in spite of references.
        cluster_bits: log2 of the cluster size.

    Attributes:
        clusters: number of clusters that are kept.
    """

    def __init__(self, counts: ReferenceCounts, dropped: ClusterSet, cluster_bits: int) -> None:
        self._bits = cluster_bits
        first, stop = [], []
        for index in counts.chunks():
            chunk, without = counts.chunk(index), dropped.chunk(index)
            assert chunk is not None
            kept = chunk != 0
            if without is not None:
                kept &= ~without
            edges = np.flatnonzero(np.diff(kept.astype(np.int8), prepend=np.int8(0), append=np.int8(0)))
            first.append(edges[0::2] + (index << counts.chunk_bits))
            stop.append(edges[1::2] + (index << counts.chunk_bits))
        self._old: Int64Array = np.concatenate(first)
        length = np.concatenate(stop) - self._old
        self._new: Int64Array = np.concatenate(([0], np.cumsum(length)[:-1])).astype(np.int64)
        self._length: Int64Array = length
        self.clusters = int(length.sum())

    def moved(self, host: Int64Array) -> Int64Array:
        """New host offsets (bytes, int64) for old ones inside kept clusters."""
        run = np.searchsorted(self._old, host >> self._bits, side="right") - 1
        return host + ((self._new[run] - self._old[run]) << self._bits)

    def moved_one(self, host: int) -> int:
        """`moved` for one host offset in bytes."""
        return int(self.moved(np.array([host], dtype=np.int64))[0])

    def runs(self, most: int) -> Iterator[tuple[int, int, int]]:
        """(old first cluster, new first cluster, clusters) of what moves together, at most `most` clusters."""
        for old, new, length in zip(self._old.tolist(), self._new.tolist(), self._length.tolist(), strict=True):
            for done in range(0, length, most):
                yield old + done, new + done, min(most, length - done)

    def old_clusters(self, first: int, count: int) -> Int64Array:
        """The old clusters of `count` new ones from `first` on."""
        new = np.arange(first, min(first + count, self.clusters), dtype=np.int64)
        run = np.searchsorted(self._new, new, side="right") - 1
        return new + (self._old[run] - self._new[run])
