"""The books of a census: what is counted, who owns which metadata cluster, and what was found wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.findings import Severity
from qcowlib.format.entries import Int64Array
from qcowlib.metadata.finding_list import FindingList
from qcowlib.metadata.l2_scan import beyond_text
from qcowlib.metadata.reference_counts import ReferenceCounts, distinct


class Overlap(NamedTuple):
    """A host cluster that two owners claim, and their names."""

    cluster: int
    first: str
    second: str


class Stopped(Exception):
    """The census cannot go on; the argument is the reason in the operating system's words, as qemu-img gives it."""


class _Owner(NamedTuple):
    """Metadata clusters of one kind, each of them claimed by one structure."""

    name: str
    clusters: Int64Array
    references: Int64Array | int


class Ledger:
    """The books.

    Args:
        geometry: sizes of the image.
        file_size: length of the host file in bytes.

    Attributes:
        file_end: that length, rounded up to 512 bytes as QEMU counts it.
        clusters: host clusters of the file; one more where a reference reaches beyond the end.
        references: expected refcounts.
        findings: what was found wrong, in the order of the counting.
        mapping_damaged: something that refers to clusters is damaged.
    """

    def __init__(self, geometry: Geometry, file_size: int) -> None:
        self.geometry = geometry
        self.file_end = (file_size + 511) & -512
        self.clusters = geometry.clusters_for(self.file_end)
        self.references = ReferenceCounts(geometry.refcount_block_bits)
        self.findings = FindingList()
        self.mapping_damaged = False
        self._owners: list[_Owner] = []
        self._owners_of: dict[tuple[str, int, int], list[int]] = {}  # indices of those with one range

    def damage(self, code: str, text: str, host_offset: int | None = None) -> None:
        """A finding that makes the mapping untrustworthy."""
        self.findings.add(code, text, host_offset=host_offset)
        self.mapping_damaged = True

    def beyond(self, offset: int, length: int) -> bool:
        """Whether a range reaches a cluster or more beyond the end of the file; QEMU allows less."""
        return offset + length - self.file_end >= self.geometry.cluster_size

    def count_range(self, name: str, offset: int, length: int) -> None:
        """Count the clusters that a structure takes (bytes); a range that the file does not have is damage."""
        if length <= 0:
            return
        if self.beyond(offset, length):
            self.damage("reference-beyond-end", beyond_text(offset, length), offset)
            return
        first = offset >> self.geometry.cluster_bits
        stop = ((offset + length - 1) >> self.geometry.cluster_bits) + 1
        self.references.add_run(first, stop)
        self.clusters = max(self.clusters, stop)
        # Thousands of snapshots can name one L1 table: two owners show the overlap, and the second stands for the rest.
        owners = self._owners_of.setdefault((name, first, stop), [])
        if len(owners) < 2:
            owners.append(len(self._owners))
            self._owners.append(_Owner(name, np.arange(first, stop, dtype=np.int64), 1))
        else:
            last = self._owners[owners[-1]]
            self._owners[owners[-1]] = _Owner(name, last.clusters, last.references + 1)

    def count_clusters(self, name: str, clusters: Int64Array, references: Int64Array | None = None) -> None:
        """Count metadata clusters inside the file, each claimed by a structure of its own.

        Args:
            name: of the structures.
            clusters: their clusters (int64).
            references: how many references each has; one without it.
        """
        if references is None:
            self.references.add(clusters)
        else:
            for times in distinct(references).tolist():
                self.references.add(clusters[references == times], times)
        if len(clusters):
            self.clusters = max(self.clusters, int(clusters.max()) + 1)
            self._owners.append(_Owner(name, clusters, 1 if references is None else references))

    def count_overflows(self) -> None:
        """References that the refcount width cannot hold: one finding each, as qemu-img meets them."""
        limit = self.geometry.refcount_max
        for cluster, count in zip(*(column.tolist() for column in self.references.above(limit)), strict=True):
            offset = cluster << self.geometry.cluster_bits
            text = (
                f"ERROR: overflow cluster offset=0x{offset:x}\n"
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy "
                "if the image cannot be opened for writing"
            )
            single = min(count - limit, self.findings.room)
            for _ in range(single):
                self.damage("refcount-overflow", text, offset)
            self.findings.add_rest("refcount-overflow", count - limit - single)

    def overlaps(self) -> list[Overlap]:
        """Metadata clusters with two owners, or that guest data claims; ascending. Marks the mapping as damaged."""
        if not self._owners:
            return []
        clusters = np.concatenate([owner.clusters for owner in self._owners])
        names = np.repeat(np.arange(len(self._owners)), [len(owner.clusters) for owner in self._owners])
        expected = np.concatenate(
            [np.broadcast_to(np.int64(0) + owner.references, len(owner.clusters)) for owner in self._owners]
        )
        order = np.argsort(clusters, kind="stable")
        clusters, names, expected = clusters[order], names[order], expected[order]
        starts = np.flatnonzero(np.diff(clusters, prepend=-1))
        distinct = clusters[starts]
        lengths = np.diff(starts, append=len(clusters))
        data = self.references.at(distinct) > np.add.reduceat(expected, starts)
        found = []
        for place in np.flatnonzero((lengths > 1) | data)[: self.findings.room].tolist():
            start = int(starts[place])
            first = self._owners[names[start]].name
            second = self._owners[names[start + 1]].name if lengths[place] > 1 else "guest data"
            found.append(Overlap(int(distinct[place]), first, second))
        self.mapping_damaged |= bool(found)
        return found

    def stop(self, code: str, text: str, reason: str) -> Stopped:
        """Record a finding that ends the census; returns what to raise."""
        self.findings.add(code, text, Severity.CHECK_ERROR)
        self.mapping_damaged = True
        return Stopped(reason)
