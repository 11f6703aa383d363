"""The host clusters of an image that is being laid out, given out as QEMU's allocator does.

A fresh image is planned completely before its first byte is written. Only intervals are kept, so that a plan of a
terabyte costs as little as one of a megabyte.

Source: the observed allocation of QEMU 7.2 (first fit from a moving start; refcount blocks that count themselves;
a refcount table that grows by half beyond the next block boundary).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from qcowlib.addresses import Geometry
from qcowlib.errors import OptionError
from qcowlib.format.constants import MAX_REFCOUNT_TABLE_SIZE, REFCOUNT_TABLE_ENTRY_SIZE


class ImageTooLarge(OptionError):
    """The metadata for this size would pass a limit of the format."""

    def __init__(self) -> None:
        super().__init__("The image size is too large for file format 'qcow2' (try using a larger cluster size)")


class ClusterIntervals:
    """A set of cluster indices, kept as disjoint, sorted, maximal intervals."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    @property
    def end(self) -> int:
        """One behind the highest index; 0 for the empty set."""
        return self._ends[-1] if self._ends else 0

    def clipped(self, start: int, end: int) -> list[tuple[int, int]]:
        """The intervals inside [start, end)."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        return [(max(self._starts[i], start), min(self._ends[i], end)) for i in range(first, last)]

    def first_gap(self, position: int, count: int) -> int:
        """Start of the first run of `count` free indices at or behind `position`."""
        index = bisect_right(self._ends, position)
        while index < len(self._starts) and self._starts[index] < position + count:
            position = self._ends[index]
            index += 1
        return position

    def gap_at(self, position: int, limit: int) -> int:
        """How many indices from `position` on are free, at most `limit`."""
        index = bisect_right(self._ends, position)
        if index == len(self._starts):
            return limit
        return max(0, min(limit, self._starts[index] - position))

    def add(self, start: int, end: int) -> None:
        """Add [start, end), which must be free."""
        if start >= end:
            return
        index = bisect_left(self._starts, start)
        joins_left = index > 0 and self._ends[index - 1] == start
        joins_right = index < len(self._starts) and self._starts[index] == end
        if joins_left and joins_right:
            self._ends[index - 1] = self._ends.pop(index)
            self._starts.pop(index)
        elif joins_left:
            self._ends[index - 1] = end
        elif joins_right:
            self._starts[index] = start
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)

    def remove(self, start: int, end: int) -> None:
        """Remove [start, end), all of which must be in the set."""
        if start >= end:
            return
        index = bisect_right(self._starts, start) - 1
        old_start, old_end = self._starts[index], self._ends[index]
        pieces = [(a, b) for a, b in ((old_start, start), (end, old_end)) if a < b]
        self._starts[index : index + 1] = [a for a, _ in pieces]
        self._ends[index : index + 1] = [b for _, b in pieces]


@dataclass(frozen=True)
class RefcountTablePlace:
    """Where the refcount table lies.

    Attributes:
        cluster: host cluster index of its start.
        clusters: its length in clusters.
    """

    cluster: int
    clusters: int


class HostSpace:
    """The used clusters of a planned image and its refcount structures. All counts are 0 or 1.

    It starts as QEMU starts: header in cluster 0, refcount table in cluster 1, first refcount block in cluster 2.

    Attributes:
        used: clusters in use.
        blocks: refcount table index -> host cluster of the refcount block.
        table: where the refcount table lies.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.used = ClusterIntervals()
        self.used.add(0, 3)
        self.blocks: dict[int, int] = {0: 2}
        self.table = RefcountTablePlace(cluster=1, clusters=1)
        self._entries_per_table_cluster = geometry.cluster_size // REFCOUNT_TABLE_ENTRY_SIZE
        self._search_from = 3

    @property
    def table_entries(self) -> int:
        """Entries that the refcount table has room for."""
        return self.table.clusters * self._entries_per_table_cluster

    def allocate(self, count: int) -> int:
        """Take the first `count` adjacent free clusters; returns the first one's index.

        Raises:
            ImageTooLarge: the refcount table would pass the format's limit.
        """
        while True:
            start = self._find(count)
            if self._count(start, count):
                return start

    def allocate_at(self, start: int, count: int) -> int:
        """Take up to `count` clusters from `start` on, as far as they are free; returns how many. Raises as above."""
        while True:
            free = self.used.gap_at(start, count)
            if self._count(start, free):
                return free

    def renew_refcounts(self, start: int, additional: int, *, exact: bool = True) -> int:
        """Place a new refcount table and the blocks that are missing at `start`, and free the old table.

        Args:
            start: cluster index behind which nothing is in use.
            additional: clusters behind the new structures that the blocks must cover as well.
            exact: the table is only as long as needed, not half as long again.

        Returns: the cluster index behind the new structures. Raises as above.
        """
        return self._renew(start, additional, exact=exact, index=None, block=0)

    def _find(self, count: int) -> int:
        start = self.used.first_gap(self._search_from, count)
        self._search_from = start + count
        return start

    def _count(self, start: int, count: int) -> bool:
        """Raise the refcounts of a free run; False when a refcount block had to be made, which may now lie in it."""
        block_bits = self.geometry.refcount_block_bits
        done, end = start, start + count
        while done < end:
            index = done >> block_bits
            if index not in self.blocks:
                self._make_block(index, done)
                self._search_from = min(self._search_from, start)
                self.used.remove(start, done)
                return False
            part_end = min(end, (index + 1) << block_bits)
            self.used.add(done, part_end)
            done = part_end
        return True

    def _make_block(self, index: int, cluster: int) -> None:
        """Make the refcount block of table index `index`, needed for `cluster`. The caller must search again.

        It may only come as far as making the block that this one needs; the caller's next try makes this one.
        """
        block = self._find(1)
        if block >> self.geometry.refcount_block_bits == index:
            self.used.add(block, block + 1)
        elif not self._count(block, 1):
            return
        if index < self.table_entries:
            self.blocks[index] = block
            return
        entries = self.geometry.refcount_block_entries
        boundary = -(-max(cluster + 1, block + 1) // entries) * entries
        self._renew(boundary, 0, exact=False, index=index, block=block)

    def _renew(self, start: int, additional: int, *, exact: bool, index: int | None, block: int) -> int:
        entries = self.geometry.refcount_block_entries
        total_blocks = self._blocks_needed(start + additional, generous=not exact)
        wanted = total_blocks if exact else total_blocks + -(-total_blocks // 2)
        table_clusters = -(-wanted // self._entries_per_table_cluster)
        if table_clusters * self.geometry.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise ImageTooLarge()
        if index is not None:
            self.blocks[index] = block
        missing = [i for i in range(start // entries, total_blocks) if i not in self.blocks]
        for place, i in enumerate(missing):
            self.blocks[i] = start + place
        table = start + len(missing)
        end = table + table_clusters
        self.used.add(start, end)
        old = self.table
        self.table = RefcountTablePlace(table, table_clusters)
        self.used.remove(old.cluster, old.cluster + old.clusters)
        self._search_from = min(self._search_from, old.cluster)
        return end

    def _blocks_needed(self, clusters: int, *, generous: bool) -> int:
        """Refcount blocks for `clusters` and for the refcount structures themselves: the least fixed point."""
        entries = self.geometry.refcount_block_entries
        table = blocks = 0
        total = -1
        while True:
            blocks = -(-(clusters + table + blocks) // entries)
            table = -(-blocks // self._entries_per_table_cluster)
            last, total = total, clusters + blocks + table
            if total != last:
                continue
            if not generous:
                return blocks
            clusters += -(-table // 2)
            generous = False
