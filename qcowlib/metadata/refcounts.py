"""The refcount structure of an image opened for writing: refcount table, refcount blocks, free clusters.

Counts go up at once in memory and are written in phase FILL; counts go down only in phase RELEASE, when the transaction
says that the references are gone on disk. So the file never holds a refcount below the number of references (I1).

A new refcount block counts itself. When the refcount table is full, a larger one is written behind everything that the
old one covers, together with the blocks that count it, and the header swings to it in phase GROW.

Source: qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata, FormatError
from qcowlib.format.constants import MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_SIZE
from qcowlib.format.entries import ENTRY_DTYPE, Entries, Int64Array
from qcowlib.format.header import Header
from qcowlib.format.refcount_block import RefcountArray, decode_refcounts, encode_refcounts, refcount_dtype
from qcowlib.metadata.regions import MetadataRegions, RegionKind
from qcowlib.storage.helpers import read_exact
from qcowlib.storage.protocol import Storage

_CLEAN_BUDGET = 32 << 20
_SEARCH_STEP = 1 << 15  # clusters that a search looks at together: a block may count millions


class RefcountStructure:
    """Refcounts of host clusters, by cluster index.

    Args:
        storage: the qcow2 file.
        header: its header.
        regions: the metadata map; blocks and tables made here are added to it.

    Attributes:
        dirty: indices of refcount blocks that are newer in memory than in the file.
    """

    def __init__(self, storage: Storage, header: Header, regions: MetadataRegions) -> None:
        self._storage = storage
        self._geometry: Geometry = header.geometry
        self._regions = regions
        self._order = self._geometry.refcount_order
        self._bits = self._geometry.refcount_block_bits
        self._table_offset = header.refcount_table_offset
        length = header.refcount_table_clusters * self._geometry.cluster_size
        data = read_exact(storage, self._table_offset, length, "refcount table")
        self._table: Entries = np.frombuffer(bytearray(data), dtype=ENTRY_DTYPE)
        named = self._table[self._table != 0]
        if len(np.unique(named)) != len(named):
            raise CorruptMetadata("refcount table", self._table_offset, "names a refcount block twice")
        self._blocks: dict[int, RefcountArray] = {}
        self._clean_capacity = max(8, _CLEAN_BUDGET // (self._geometry.refcount_block_entries * self._itemsize))
        self.dirty: set[int] = set()
        self._new_entries: set[int] = set()  # refcount table entries to write in GROW
        self._old_tables: list[tuple[int, int]] = []  # (offset, bytes) of the tables that GROW replaces
        self._run = (0, 0)  # free clusters from ... to, found by the last search
        self._search_from = 0

    @property
    def _itemsize(self) -> int:
        return refcount_dtype(self._order).itemsize

    @property
    def largest(self) -> int:
        """The largest refcount that the width can hold."""
        return self._geometry.refcount_max

    @property
    def width(self) -> int:
        """Bits of a refcount."""
        return self._geometry.refcount_bits

    @property
    def cluster_bits(self) -> int:
        """log2 of the cluster size."""
        return self._geometry.cluster_bits

    @property
    def table_location(self) -> tuple[int, int]:
        """Host offset of the refcount table in bytes and its clusters, as the header must say after GROW."""
        return self._table_offset, len(self._table) * 8 >> self._geometry.cluster_bits

    @property
    def dirty_bytes(self) -> int:
        """Memory that changed refcount blocks take."""
        return len(self.dirty) * self._geometry.refcount_block_entries * self._itemsize

    def get(self, cluster: int) -> int:
        """The refcount of one host cluster."""
        block = self._block(cluster >> self._bits)
        return 0 if block is None else int(block[cluster & (1 << self._bits) - 1])

    def window(self, first: int, count: int) -> RefcountArray:
        """A copy of the refcounts of `count` clusters from `first` on (native dtype; 0 where no block is)."""
        window = np.zeros(count, dtype=refcount_dtype(self._order))
        for block_index, inside, at in self._pieces(first, count):
            block = self._block(block_index)
            if block is not None:
                window[at] = block[inside]
        return window

    def gather(self, clusters: Int64Array) -> RefcountArray:
        """The refcounts of clusters in any order (int64), native dtype; 0 where no block is."""
        found = np.zeros(len(clusters), dtype=refcount_dtype(self._order))
        owners = clusters >> self._bits
        for block_index in np.unique(owners).tolist():
            block = self._block(block_index)
            if block is not None:
                here = owners == block_index
                found[here] = block[clusters[here] & (1 << self._bits) - 1]
        return found

    def add(self, first: int, counts: RefcountArray | int, length: int | None = None) -> None:
        """Raise the refcounts of consecutive clusters.

        Args:
            first: the first cluster.
            counts: how much for each cluster, or one number for `length` clusters.
            length: number of clusters when `counts` is a number.

        Raises:
            FormatError: the width is too small for a count; earlier blocks of the range have been changed in memory.
        """
        for block_index, inside, at in self._pieces(first, length if length is not None else np.size(counts)):
            more = counts[at] if isinstance(counts, np.ndarray) else counts
            if not np.any(more):
                continue  # a part without clusters in use may have no block
            block = self._writable_block(block_index)
            if np.max(more) > self._geometry.refcount_max:
                raise FormatError("refcount block", self._offset(block_index), self._overflow_text())
            more = np.asarray(more).astype(block.dtype)  # one dtype: uint64 with int64 would become float64
            if (block.dtype.type(self._geometry.refcount_max) - block[inside] < more).any():
                raise FormatError("refcount block", self._offset(block_index), self._overflow_text())
            block[inside] += more

    def subtract(
        self, first: int, counts: RefcountArray | int, length: int | None = None, *, shared: bool = False
    ) -> None:
        """Lower the refcounts of consecutive clusters, as `add` raises them; only in phase RELEASE.

        A refcount that is too low for it stays at 0: it was wrong before. So was one that would give up the header,
        the refcount structure or the active L1 table: it is left as it is, a leak at worst.

        Args:
            first: the first cluster.
            counts: how much for each cluster, or one number for `length` clusters.
            length: number of clusters when `counts` is a number.
            shared: the reference that is gone said that there are others (COPIED clear). A refcount that says that
                there are none is as likely to be the wrong one of the two: 1 stays.
        """
        for block_index, inside, at in self._pieces(first, length if length is not None else np.size(counts)):
            if self._block(block_index) is None:
                continue
            block = self._writable_block(block_index)
            less = counts[at].astype(block.dtype) if isinstance(counts, np.ndarray) else block.dtype.type(counts)
            here, start = block[inside], (block_index << self._bits) + inside.start
            fixed = self._regions.fixed(start, start + len(here)) - start
            kept = here[fixed]
            least = here.dtype.type(1 if shared else 0)
            here -= np.minimum(here - np.minimum(here, least), less)
            here[fixed] = np.where(here[fixed] == 0, kept, here[fixed])
            freed = here == 0
            if freed.any():
                lowest = start + int(freed.argmax())
                self._search_from = min(self._search_from, lowest)

    def allocate(self, want: int, minimum: int = 1) -> tuple[int, int]:
        """Take a run of free clusters: refcount 1 from now on in memory.

        Args:
            want: clusters wanted.
            minimum: the least number that is of use.

        Returns:
            (first cluster, clusters): at least `minimum`, at most `want`.

        Raises:
            CorruptMetadata: a cluster with refcount 0 holds metadata.
            FormatError: the refcount table or the host offset would exceed the format's limits.
        """
        start, stop = self._run
        if stop - start < minimum:
            start, stop = self._find(minimum)
        count = min(want, stop - start)
        self._run = (start + count, stop)
        if (start + count) << self._geometry.cluster_bits > MAX_HOST_OFFSET:
            raise FormatError("host cluster", None, "the file would exceed the largest host offset")
        self._regions.guard(start << self._geometry.cluster_bits, count << self._geometry.cluster_bits, None)
        self.add(start, 1, count)
        return start, count

    def give_back(self, first: int, count: int) -> None:
        """Undo an allocation of the open transaction that nothing refers to."""
        self.subtract(first, 1, count)
        self._run = (0, 0)

    def rescan(self) -> None:
        """Look for free clusters again; after a commit, when released clusters may be used."""
        self._run = (0, 0)

    def write_blocks(self) -> None:
        """Write changed refcount blocks and a new refcount table (FILL, RELEASE). No barrier."""
        for block_index in sorted(self.dirty):
            data = encode_refcounts(self._blocks[block_index], self._order)
            offset = self._offset(block_index)
            self._regions.guard(offset, len(data), RegionKind.REFCOUNT_BLOCK)
            self._storage.pwrite(data, offset)
        self.dirty.clear()
        if self._old_tables:
            self._regions.guard(self._table_offset, self._table.nbytes, RegionKind.REFCOUNT_TABLE)
            self._storage.pwrite(self._table.tobytes(), self._table_offset)
            self._new_entries.clear()

    @property
    def has_growth(self) -> bool:
        """Whether phase GROW has anything to write."""
        return bool(self._new_entries or self._old_tables)

    def write_growth(self) -> list[tuple[int, int]]:
        """Write new refcount table entries (GROW). No barrier.

        Returns:
            (offset, bytes) of the tables that the header no longer names, once it is swung.
        """
        for block_index in sorted(self._new_entries):
            entry = self._table[block_index : block_index + 1].tobytes()
            self._storage.pwrite(entry, self._table_offset + block_index * 8)
        self._new_entries.clear()
        old, self._old_tables = self._old_tables, []
        return old

    def drop_unused_blocks(self) -> list[int]:
        """Take refcount blocks that count nothing but themselves out of the refcount table. No barrier.

        Returns: their clusters. Those that another block counts still have a refcount, to be lowered after a barrier.
        """
        dropped = []
        for block_index in np.flatnonzero(self._table).tolist():
            block = self._block(block_index)
            assert block is not None
            cluster = self._offset(block_index) >> self._geometry.cluster_bits
            counts_itself = cluster >> self._bits == block_index and block[cluster & (1 << self._bits) - 1] != 0
            if np.count_nonzero(block) == int(counts_itself):
                dropped.append((block_index, cluster))
        for block_index, cluster in dropped:
            self._table[block_index] = 0
            self._storage.pwrite(
                self._table[block_index : block_index + 1].tobytes(), self._table_offset + block_index * 8
            )
            del self._blocks[block_index]
            self.dirty.discard(block_index)
            self._regions.remove(cluster << self._geometry.cluster_bits, self._geometry.cluster_size)
        self._run = (0, 0)
        return [cluster for _, cluster in dropped]

    def used_clusters(self) -> int:
        """One behind the last host cluster whose refcount is not 0."""
        for block_index in np.flatnonzero(self._table)[::-1].tolist():
            block = self._block(block_index)
            assert block is not None
            used = np.flatnonzero(block)
            if len(used):
                last: int = used.item(-1)
                return (int(block_index) << self._bits) + last + 1
        return 0

    def _pieces(self, first: int, count: int) -> list[tuple[int, slice, slice]]:
        """(block index, slice inside the block, slice of the request) for consecutive clusters."""
        pieces, done, size = [], 0, 1 << self._bits
        while done < count:
            block_index, inside = first + done >> self._bits, (first + done) & size - 1
            step = min(count - done, size - inside)
            pieces.append((block_index, slice(inside, inside + step), slice(done, done + step)))
            done += step
        return pieces

    def _offset(self, block_index: int) -> int:
        return int(self._table.item(block_index)) if block_index < len(self._table) else 0

    def _block(self, block_index: int) -> RefcountArray | None:
        """The refcounts of one block; None where the refcount table names none."""
        block = self._blocks.get(block_index)
        if block is not None:
            return block
        offset = self._offset(block_index)
        if not offset:
            return None
        if offset & (self._geometry.cluster_size - 1):
            raise CorruptMetadata(
                "refcount table", self._table_offset + block_index * 8, f"offset {offset:#x} is unaligned"
            )
        kind = self._regions.kind_of(offset >> self._geometry.cluster_bits)
        if kind is not RegionKind.REFCOUNT_BLOCK:
            rule = f"overlaps the {kind.label}" if kind else "does not lie inside the file"
            raise CorruptMetadata("refcount block", offset, rule)
        data = read_exact(self._storage, offset, self._geometry.cluster_size, "refcount block")
        block = decode_refcounts(data, self._order)
        if len(self._blocks) - len(self.dirty) >= self._clean_capacity:
            del self._blocks[next(index for index in self._blocks if index not in self.dirty)]
        self._blocks[block_index] = block
        return block

    def _writable_block(self, block_index: int) -> RefcountArray:
        block = self._block(block_index)
        if block is None:
            first = block_index << self._bits + self._geometry.cluster_bits
            raise CorruptMetadata(
                "refcount table", None, f"clusters from {first:#x} on are in use but have no refcounts"
            )
        self.dirty.add(block_index)
        return block

    def _open_frontier(self, block_index: int, minimum: int) -> bool:
        """Make refcount blocks from `block_index` on, which has none, so that `minimum` clusters behind them are free.

        The blocks lie in front of the space that they count. False when other blocks stand in the way.
        """
        count = 1
        while count + minimum > count << self._bits:
            count = -(-(count + minimum) >> self._bits)
        if any(self._offset(block_index + number) for number in range(count)):
            return False
        if block_index + count > len(self._table):
            self._grow_table(block_index + count - 1)
            return True
        first = block_index << self._bits
        for number in range(count):
            self._place_block(block_index + number, first + number)
        self._count_once(first, count)
        return True

    def _place_before(self, block_index: int, cluster: int) -> bool:
        """Make a refcount block at a free cluster in front of the space that it counts: so a run goes on behind it.

        False when the refcount table has no room.
        """
        if block_index >= len(self._table):
            return False
        self._place_block(block_index, cluster)
        self.add(cluster, 1, 1)
        return True

    def _place_behind(self, block_index: int, cluster: int) -> bool:
        """Make a refcount block inside of the space that it counts, behind a run that reaches into it; QEMU's place.

        False when the run reaches through all of that space, or the refcount table has no room.
        """
        if block_index >= len(self._table) or cluster >> self._bits != block_index:
            return False
        self._place_block(block_index, cluster)
        self._count_once(cluster, 1)
        return True

    def _place_block(self, block_index: int, cluster: int) -> None:
        offset = cluster << self._geometry.cluster_bits
        self._regions.guard(offset, self._geometry.cluster_size, None)
        self._regions.add(RegionKind.REFCOUNT_BLOCK, offset, self._geometry.cluster_size)
        self._blocks[block_index] = np.zeros(1 << self._bits, dtype=refcount_dtype(self._order))
        self._table[block_index] = offset
        self._new_entries.add(block_index)
        self.dirty.add(block_index)

    def _count_once(self, first: int, count: int) -> None:
        for block_index, inside, _ in self._pieces(first, count):
            self._blocks[block_index][inside] = 1

    def _grow_table(self, block_index: int) -> None:
        """A refcount table that has an entry for `block_index`: new blocks and the new table from `start` on."""
        start = len(self._table) << self._bits
        entries_per_cluster = self._geometry.cluster_size // 8
        blocks, table_clusters = 1, 1
        while True:
            last = max(block_index, start + blocks + table_clusters - 1 >> self._bits)
            # Half as much again, so that a growing file does not copy its table each time.
            wanted = -(-max(last + 1, len(self._table) * 3 // 2) // entries_per_cluster)
            needed = (start + blocks + wanted - 1 >> self._bits) - len(self._table) + 1
            if needed <= blocks and wanted <= table_clusters:
                break
            blocks, table_clusters = max(needed, blocks), max(wanted, table_clusters)
        if table_clusters * self._geometry.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
            raise FormatError("refcount table", self._table_offset, "would exceed its largest size")
        self._old_tables.append((self._table_offset, self._table.nbytes))
        old_entries = len(self._table)
        table = np.zeros(table_clusters * entries_per_cluster, dtype=ENTRY_DTYPE)
        table[:old_entries] = self._table
        self._table = table
        for number in range(blocks):
            self._place_block(old_entries + number, start + number)
        self._table_offset = start + blocks << self._geometry.cluster_bits
        self._regions.guard(self._table_offset, table.nbytes, None)
        self._regions.add(RegionKind.REFCOUNT_TABLE, self._table_offset, table.nbytes)
        self._count_once(start, blocks + table_clusters)

    def _find(self, minimum: int) -> tuple[int, int]:
        """The first run of at least `minimum` free clusters, as far as the search has looked."""
        position = self._search_from
        start, stop = position, position  # a free run that ends where the search stands
        while True:
            block_index = position >> self._bits
            block = self._block(block_index)
            following = min(block_index + 1 << self._bits, position + _SEARCH_STEP)
            if block is None and start < stop == block_index << self._bits:
                if self._place_behind(block_index, start + minimum):
                    continue
                if self._place_before(block_index, start):
                    start += 1
                    continue
            if block is None:
                if not self._open_frontier(block_index, minimum):
                    position = start = stop = block_index + 1 << self._bits
                continue
            inside = position & (1 << self._bits) - 1
            free = np.flatnonzero(block[inside : inside + following - position] == 0) + position
            position = following
            if not len(free):
                continue
            breaks = np.flatnonzero(np.diff(free) != 1)
            starts = free[np.concatenate(([0], breaks + 1))]
            stops = free[np.concatenate((breaks, [len(free) - 1]))] + 1
            if int(starts[0]) == stop:
                starts[0] = start
            long = np.flatnonzero(stops - starts >= minimum)
            if len(long):
                start, stop = int(starts[long[0]]), int(stops[long[0]])
                break
            start, stop = int(starts[-1]), int(stops[-1])
        if minimum == 1:
            self._search_from = start
        return start, stop

    def _overflow_text(self) -> str:
        return f"a refcount of {self._geometry.refcount_bits} bits cannot hold another reference"


def cluster_runs(clusters: Int64Array) -> list[tuple[int, int]]:
    """Sorted distinct cluster indices as (first, count) runs."""
    if not len(clusters):
        return []
    breaks = np.flatnonzero(np.diff(clusters) != 1)
    starts = clusters[np.concatenate(([0], breaks + 1))]
    stops = clusters[np.concatenate((breaks, [len(clusters) - 1]))] + 1
    return list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
