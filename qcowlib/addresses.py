"""Addresses in an image and the arithmetic between them.

A guest offset counts bytes of the virtual disk, a host offset bytes of a file; the two are different types.
All shifting and masking of table indices is here, in `Geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NewType

GuestOffset = NewType("GuestOffset", int)
HostOffset = NewType("HostOffset", int)

SUBCLUSTERS_PER_CLUSTER = 32


@dataclass(frozen=True)
class Geometry:
    """Sizes and index arithmetic that follow from three header fields.

    Attributes:
        cluster_bits: log2 of the cluster size in bytes, 9 to 21.
        refcount_order: log2 of the refcount width in bits, 0 to 6.
        extended_l2: whether L2 entries are 16 bytes with a subcluster bitmap.

    Source: qcow2.txt, "Header", "Refcounts", "L2 table entry", "Extended L2 Entries".
    """

    cluster_bits: int
    refcount_order: int = 4
    extended_l2: bool = False

    @cached_property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @cached_property
    def l2_entry_size(self) -> int:
        """Bytes in an L2 entry: 8, or 16 when extended."""
        return 16 if self.extended_l2 else 8

    @cached_property
    def l2_bits(self) -> int:
        """log2 of the number of entries in an L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @cached_property
    def l2_entries(self) -> int:
        """Entries in an L2 table."""
        return 1 << self.l2_bits

    @cached_property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table maps."""
        return 1 << (self.l2_bits + self.cluster_bits)

    @cached_property
    def subclusters_per_cluster(self) -> int:
        """32 with extended L2 entries, else 1."""
        return SUBCLUSTERS_PER_CLUSTER if self.extended_l2 else 1

    @cached_property
    def subcluster_size(self) -> int:
        """Bytes in a subcluster (the cluster size without extended L2 entries)."""
        return self.cluster_size // self.subclusters_per_cluster

    @cached_property
    def refcount_bits(self) -> int:
        """Width of a refcount in bits: 1, 2, 4, ... 64."""
        return 1 << self.refcount_order

    @cached_property
    def refcount_max(self) -> int:
        """The largest refcount that the width can hold."""
        return (1 << self.refcount_bits) - 1

    @cached_property
    def refcount_block_bits(self) -> int:
        """log2 of the number of refcounts in a refcount block."""
        return self.cluster_bits + 3 - self.refcount_order

    @cached_property
    def refcount_block_entries(self) -> int:
        """Refcounts in a refcount block."""
        return 1 << self.refcount_block_bits

    def clusters_for(self, length: int) -> int:
        """Clusters needed for `length` bytes."""
        return (length + self.cluster_size - 1) >> self.cluster_bits

    def l1_entries_for(self, size: int) -> int:
        """L1 entries needed to map `size` guest bytes."""
        return (size + self.l2_coverage - 1) >> (self.l2_bits + self.cluster_bits)

    def l1_index(self, guest: int) -> int:
        """Index into the L1 table for a guest offset."""
        return guest >> (self.l2_bits + self.cluster_bits)

    def l2_index(self, guest: int) -> int:
        """Index into the L2 table for a guest offset."""
        return (guest >> self.cluster_bits) & (self.l2_entries - 1)

    def in_cluster(self, offset: int) -> int:
        """Offset inside its cluster."""
        return offset & (self.cluster_size - 1)

    def cluster_start(self, offset: int) -> int:
        """Offset rounded down to a cluster boundary."""
        return offset & -self.cluster_size

    def cluster_end(self, offset: int) -> int:
        """Offset rounded up to a cluster boundary."""
        return (offset + self.cluster_size - 1) & -self.cluster_size
