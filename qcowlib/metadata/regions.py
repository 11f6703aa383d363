"""Where the metadata of an image lies: the map behind the overlap guard.

Guest data must not be read from a cluster that holds metadata (a wrong byte), and no write may go to a cluster that
holds something else (a destroyed image). Both ask here.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from qcowlib.errors import CorruptMetadata

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# With more metadata clusters than this in the range of one question, one sorted search beats a comparison for each.
_FEW = 8


class RegionKind(IntEnum):
    """What a metadata cluster holds."""

    HEADER = 1
    REFCOUNT_TABLE = 2
    REFCOUNT_BLOCK = 3
    L1_TABLE = 4
    L2_TABLE = 5
    BITMAPS = 8
    CRYPTO_HEADER = 9

    @property
    def label(self) -> str:
        """The structure's name for messages."""
        return {"L1_TABLE": "L1 table", "L2_TABLE": "L2 table"}.get(self.name, self.name.lower().replace("_", " "))


class MetadataRegions:
    """The host clusters that hold metadata, with what each holds.

    Args:
        cluster_bits: log2 of the cluster size.
    """

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._clusters: Int64Array = np.zeros(0, dtype=np.int64)  # sorted
        self._kinds: npt.NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self._changes: dict[int, int] = {}  # since the arrays were built; 0 is "no longer metadata"

    def build(self, ranges: list[tuple[RegionKind, Int64Array, int]]) -> None:
        """Set the map from (kind, host offsets in bytes, length of each in bytes); earlier rows win a tie."""
        clusters, kinds = [], []
        for kind, offsets, length in ranges:
            count = (length + (1 << self._bits) - 1) >> self._bits
            rows = ((offsets >> self._bits)[:, None] + np.arange(count, dtype=np.int64)).ravel()
            clusters.append(rows)
            kinds.append(np.full(len(rows), kind, dtype=np.uint8))
        every = np.concatenate(clusters)
        self._clusters, first = np.unique(every, return_index=True)
        self._kinds = np.concatenate(kinds)[first]
        self._changes = {}

    def add(self, kind: RegionKind, offset: int, length: int) -> None:
        """Record that the clusters of a range (bytes) hold this structure from now on."""
        for cluster in range(offset >> self._bits, (offset + length + (1 << self._bits) - 1) >> self._bits):
            self._changes[cluster] = kind

    def remove(self, offset: int, length: int) -> None:
        """Record that the clusters of a range (bytes) hold no metadata any more."""
        for cluster in range(offset >> self._bits, (offset + length + (1 << self._bits) - 1) >> self._bits):
            self._changes[cluster] = 0

    def kind_of(self, cluster: int) -> RegionKind | None:
        """What the host cluster holds, None if it holds no metadata."""
        changed = self._changes.get(cluster)
        if changed is not None:
            return RegionKind(changed) if changed else None
        at = int(np.searchsorted(self._clusters, cluster))
        if at < len(self._clusters) and self._clusters.item(at) == cluster:
            return RegionKind(self._kinds.item(at))
        return None

    def hits(self, clusters: Int64Array) -> BoolArray | None:
        """Which host clusters (int64, any order) hold metadata; None when none does."""
        if not len(clusters):
            return None
        if len(self._changes) > _FEW:
            self._consolidate()
        low, high = np.searchsorted(self._clusters, [int(clusters.min()), int(clusters.max()) + 1])
        between = self._clusters[low:high]
        if len(between) <= _FEW:
            mask = np.zeros(len(clusters), dtype=np.bool_)
            for cluster in between:
                mask |= clusters == cluster
        else:
            at = np.minimum(np.searchsorted(between, clusters), len(between) - 1)
            mask = between[at] == clusters
        for cluster, kind in self._changes.items():
            if kind:
                mask |= clusters == cluster
            else:
                mask &= clusters != cluster
        return mask if mask.any() else None

    def touch(self, first: Int64Array, last: Int64Array) -> bool:
        """Whether any of the ranges of host clusters, `first` to `last` (inclusive) each, holds metadata."""
        if self._changes:
            self._consolidate()
        low = np.searchsorted(self._clusters, first)
        high = np.searchsorted(self._clusters, last, side="right")
        return bool((high > low).any())

    def fixed(self, first: int, last: int) -> Int64Array:
        """The host clusters from `first` to `last` (exclusive) that hold metadata other than L2 tables, sorted."""
        if self._changes:
            self._consolidate()
        low, high = np.searchsorted(self._clusters, [first, last])
        chosen: Int64Array = self._clusters[low:high][self._kinds[low:high] != RegionKind.L2_TABLE]
        return chosen

    def _consolidate(self) -> None:
        changed = np.array(sorted(self._changes), dtype=np.int64)
        kinds = np.array([self._changes[cluster] for cluster in changed.tolist()], dtype=np.uint8)
        old = ~np.isin(self._clusters, changed)
        new = kinds != 0
        clusters = np.concatenate((self._clusters[old], changed[new]))
        order = np.argsort(clusters, kind="stable")
        self._kinds = np.concatenate((self._kinds[old], kinds[new]))[order]
        self._clusters = clusters[order]
        self._changes = {}

    def guard(self, offset: int, length: int, kind: RegionKind | None) -> None:
        """Refuse a write (bytes) that touches a cluster which holds anything else than `kind` (None: guest data).

        Raises:
            CorruptMetadata: the write would destroy metadata; nothing was written.
        """
        first, last = offset >> self._bits, offset + length - 1 >> self._bits
        for cluster in self._known(first, last + 1):
            found = self.kind_of(cluster)
            if found is not None and found is not kind:
                what = kind.label if kind else "guest data"
                raise CorruptMetadata(
                    what,
                    offset,
                    f"a write of {length} bytes would overlap the {found.label} at {cluster << self._bits:#x}",
                )

    def _known(self, first: int, last: int) -> list[int]:
        """The host clusters from `first` to `last` (exclusive) that the map says something about, sorted."""
        if last - first <= 2:
            return list(range(first, last))
        low, high = np.searchsorted(self._clusters, [first, last])
        changed = [cluster for cluster in self._changes if first <= cluster < last]
        return sorted({*self._clusters[low:high].tolist(), *changed})
