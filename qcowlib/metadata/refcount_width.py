"""Another refcount width: all refcount blocks and the refcount table written anew, and swung in together.

    stored refcounts, less those of the old structure -> new blocks, for those that count anything
    new blocks and table behind all that is in use -> flush -> one header write: width, place and length of the table

The new structure counts itself and not the old one; the old one counts neither the new one, which nothing names before
the swing. So on both sides of the header write no refcount is too low, and nothing is leaked.

Source: qcow2.txt, "Host cluster management"; texts of QEMU 7.2's amend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import OptionError
from qcowlib.format.constants import MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_SIZE
from qcowlib.format.entries import ENTRY_DTYPE, Entries
from qcowlib.format.refcount_block import RefcountArray, encode_refcounts, refcount_dtype
from qcowlib.metadata.header_swing import laid_out, swing_header
from qcowlib.metadata.refcounts import cluster_runs
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.metadata.transaction import MetadataTransaction

_WINDOW_BITS = 20

Progress = Callable[[int, int], None]


def change_refcount_width(
    transaction: MetadataTransaction, refcount_order: int, progress: Progress | None = None
) -> None:
    """Write all refcounts with another width. The image's metadata is stale afterwards: it is to be loaded anew.

    Args:
        transaction: of the image; nothing is pending, nobody else uses the image.
        refcount_order: log2 of the new width in bits.
        progress: called with (work done, work to do).

    Raises:
        OptionError: a refcount does not fit, or the refcount table would be too large. Nothing was changed.
        StorageError: the host file failed; the image has its old refcounts, or its new ones.
    """
    _Widening(transaction, refcount_order, progress).run()


class _Widening:
    def __init__(self, transaction: MetadataTransaction, refcount_order: int, progress: Progress | None) -> None:
        state = transaction.state
        self.transaction = transaction
        self.storage = transaction.storage
        self.header = state.header
        self.old = StoredRefcounts(transaction.storage, state.header)
        self.geometry: Geometry = replace(state.geometry, refcount_order=refcount_order)
        self.progress = progress
        self.walk = 0  # steps of the plan so far: QEMU tells its progress by them
        bits = state.geometry.cluster_bits
        table = state.header.refcount_table_offset >> bits
        blocks = self.old.block_offsets[self.old.block_offsets > 0] >> bits
        # Clusters of the structure that is given up, sorted.
        self.given_up = np.sort(
            np.concatenate((blocks, np.arange(table, table + state.header.refcount_table_clusters, dtype=np.int64)))
        )
        self.window_bits = max(_WINDOW_BITS, state.geometry.refcount_block_bits, self.geometry.refcount_block_bits)

    def run(self) -> None:
        bits = self.geometry.cluster_bits
        used, end = self._survey()
        blocks, table_clusters = self._fixed_point(used, end)
        places = {index: end + number for number, index in enumerate(blocks)}
        stop = end + len(blocks) + table_clusters
        if table_clusters << bits > MAX_REFCOUNT_TABLE_SIZE or stop << bits > MAX_HOST_OFFSET:
            raise OptionError(
                "This operation would make the refcount table grow beyond the maximum size supported by QEMU, aborting"
            )
        with self.transaction.direct_writes():
            self._write_blocks(places, (end, stop))
            table: Entries = np.zeros(table_clusters << bits - 3, dtype=ENTRY_DTYPE)
            table[list(places)] = np.array(list(places.values()), dtype=np.int64) << bits
            table_offset = end + len(blocks) << bits
            self.storage.pwrite(table.tobytes(), table_offset)
            self.storage.flush()  # all of the new structure is there before the header names it
            header = replace(
                self.transaction.state.header,
                refcount_order=self.geometry.refcount_order,
                refcount_table_offset=table_offset,
                refcount_table_clusters=table_clusters,
            )
            swing_header(self.transaction, laid_out(self.transaction.state.header, header))
            for first, count in cluster_runs(self.given_up):
                self.storage.discard(first << bits, count << bits)

    def _survey(self) -> tuple[list[int], int]:
        """Indices of the new blocks that count anything, and the first cluster behind everything in use."""
        used: list[int] = []
        end = self.geometry.clusters_for(self.storage.size())
        limit = self.geometry.refcount_max
        for first, counts in self._windows(0, 3):
            if int(counts.max()) > limit:
                at = int(np.flatnonzero(counts > counts.dtype.type(limit))[0])
                raise OptionError(
                    f"Cannot decrease refcount entry width to {self.geometry.refcount_bits} bits: Cluster at offset "
                    f"{first + at << self.geometry.cluster_bits:#x} has a refcount of {counts[at]}"
                )
            mask = counts.reshape(-1, self.geometry.refcount_block_entries).any(axis=1)
            used += ((first >> self.geometry.refcount_block_bits) + np.flatnonzero(mask)).tolist()
            occupied = np.flatnonzero(counts)
            if len(occupied):
                end = max(end, first + int(occupied[-1]) + 1)
        return used, end

    def _fixed_point(self, used: list[int], end: int) -> tuple[list[int], int]:
        """The new blocks with those that count the new structure itself, and clusters of the new table."""
        blocks, table_clusters = set(used), 0
        per_cluster = self.geometry.cluster_size // 8
        while True:
            for done in (self.walk, self.walk + 1):
                self._report(done, max(self.walk + 2, 3))
            stop = end + len(blocks) + table_clusters
            bits = self.geometry.refcount_block_bits
            needed = blocks | set(range(end >> bits, (stop - 1 >> bits) + 1))
            wanted = max(needed) // per_cluster + 1
            if needed == blocks and wanted == table_clusters:
                return sorted(blocks), table_clusters
            blocks, table_clusters = needed, wanted
            self.walk += 1

    def _write_blocks(self, places: dict[int, int], own: tuple[int, int]) -> None:
        entries, bits = self.geometry.refcount_block_entries, self.geometry.refcount_block_bits
        dtype = refcount_dtype(self.geometry.refcount_order)
        pending = dict(places)
        for first, counts in self._windows(self.walk + 1, self.walk + 2):
            wide = counts.astype(dtype)
            self._count_own(first, wide, own)
            for index in range(first >> bits, first + len(counts) >> bits):
                if index in pending:
                    start = (index << bits) - first
                    self._write_block(pending.pop(index), wide[start : start + entries])
        for index, cluster in pending.items():  # those that count nothing but the new structure
            block = np.zeros(entries, dtype=dtype)
            self._count_own(index << bits, block, own)
            self._write_block(cluster, block)

    def _count_own(self, first: int, counts: RefcountArray, own: tuple[int, int]) -> None:
        low, high = max(own[0], first), min(own[1], first + len(counts))
        if low < high:
            counts[low - first : high - first] = 1

    def _write_block(self, cluster: int, counts: RefcountArray) -> None:
        self.storage.pwrite(
            encode_refcounts(counts, self.geometry.refcount_order), cluster << self.geometry.cluster_bits
        )

    def _windows(self, walk: int, walks: int) -> Iterator[tuple[int, RefcountArray]]:
        """(first cluster, refcounts without those of the old structure) of each part that has refcount blocks."""
        size = 1 << self.window_bits
        every = len(self.old.table) << self.old.geometry.refcount_block_bits
        windows = self.old.used_windows(self.window_bits, every)
        for number, window in enumerate(windows):
            first = window << self.window_bits
            counts = self.old.window(first, size)
            low, high = np.searchsorted(self.given_up, [first, first + size])
            counts[self.given_up[low:high] - first] = 0
            yield first, counts
            self._report(walk * len(windows) + number + 1, walks * len(windows))

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)
