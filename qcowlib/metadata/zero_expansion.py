"""Zero clusters made expressible in version 2: not allocated, or data above a backing file.

    each L2 table, of the active layer and of all snapshots, once:
        no backing file    zero entries -> unallocated                                            LINK
        backing file       zeroes into a cluster (its own, if nobody else has it) -> data entry   FILL, LINK
        clusters that are no longer named -> freed                                                RELEASE

Before and after each write of a table it reads the same, so that a crash leaves an image that is half expanded and
whole. A cluster that a zero entry keeps for later, but others read, is never written.

Source: qcow2.txt, "Standard Cluster Descriptor": version 2 has no zero flag.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcowlib.format.entries import (
    ENTRY_DTYPE,
    L1_OFFSET_MASK,
    OFLAG_COPIED,
    ClusterType,
    Int64Array,
    classify_many,
    offsets,
)
from qcowlib.metadata.heal import require_enough_refcounts
from qcowlib.metadata.refcounts import cluster_runs
from qcowlib.metadata.reference_counts import ReferenceCounts
from qcowlib.metadata.references import L2Batch, l2_batches
from qcowlib.metadata.regions import RegionKind
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.metadata.trees import release_tree, set_copied, write_active_l1

_BATCH_BYTES = 4 << 20
_STEPS = 256  # of the progress in one L1 table

Progress = Callable[[int, int], None]
#: (host offset, guest offset, plain bytes): store guest bytes, encrypted if the image is
Store = Callable[[int, int, bytes], None]


def expand_zeroes(
    transaction: MetadataTransaction, store: Store | None, *, has_backing: bool, progress: Progress | None = None
) -> None:
    """Turn all zero clusters into unallocated ones, or into data.

    Args:
        transaction: of the image (without extended L2 entries and data file); nothing is pending.
        store: stores guest bytes in an encrypted image; None where zeroes are zeroes in the file.
        has_backing: unallocated clusters show a backing file.
        progress: called with (L1 entries seen, all L1 entries).

    Raises:
        CorruptMetadata: a table is damaged.
        StorageError: the host file failed. In both cases the image reads as before.
    """
    _Expansion(transaction, store, has_backing).run(progress)


class _Expansion:
    def __init__(self, transaction: MetadataTransaction, store: Store | None, has_backing: bool) -> None:
        self.transaction = transaction
        self.state = transaction.state
        self.geometry = transaction.state.geometry
        self.store = store
        self.has_backing = has_backing
        self.freed = False

    def run(self, progress: Progress | None) -> None:
        """Table by table, each once, in the order of the L1 tables."""
        state = self.state
        trees = [state.l1, *(state.snapshot_mapping(entry).l1 for entry in state.snapshots)]
        require_enough_refcounts(state)  # the mapping is sound, and what is freed is nobody else's
        every = offsets(np.concatenate(trees), L1_OFFSET_MASK)
        self.tables, self.uses = np.unique(every[every != 0], return_counts=True)
        done: Int64Array = np.zeros(0, dtype=np.int64)
        seen = 0
        for number, l1 in enumerate(trees):
            host = offsets(l1, L1_OFFSET_MASK)
            fresh = np.zeros(len(host), dtype=np.bool_)
            fresh[np.unique(host, return_index=True)[1]] = True
            fresh &= (host != 0) & ~np.isin(host, done)
            chosen = np.where(fresh, host, 0).astype(np.uint64).astype(ENTRY_DTYPE)
            for batch in l2_batches(state.storage, self.geometry, chosen, batch_bytes=_BATCH_BYTES):
                self._expand(batch, active=number == 0)
            done = np.union1d(done, host)
            if progress is not None:
                for position in range(0, len(host), max(1, len(host) // _STEPS)):
                    progress(seen + position + 1, len(every))
            seen += len(host)
        if self.freed:
            with self.transaction.direct_writes():
                set_copied(state, self.transaction.storage, self.transaction.refcounts, state.l1)
                write_active_l1(self.transaction)

    def _expand(self, batch: L2Batch, *, active: bool) -> None:
        """One batch of tables, in place."""
        kinds = classify_many(batch.entries, False)
        zero = (kinds == ClusterType.ZERO_PLAIN) | (kinds == ClusterType.ZERO_ALLOC)
        rows = np.flatnonzero(zero.any(axis=1))
        if not len(rows):
            return
        lost = ReferenceCounts(self.geometry.refcount_block_bits)
        with self.transaction.direct_writes():
            for row in rows.tolist():
                self._expand_table(batch, row, np.flatnonzero(zero[row]), lost, active=active)
        self.transaction.commit()  # refcounts of new clusters
        with self.transaction.direct_writes():
            self.transaction.flush()  # nothing may refer to what is not there yet
            for row in rows.tolist():
                offset = int(batch.host_offset[row])
                self.state.regions.guard(offset, self.geometry.cluster_size, RegionKind.L2_TABLE)
                self.transaction.storage.pwrite(batch.entries[row].tobytes(), offset)
            self.transaction.flush()  # references must be gone before their clusters are free
            release_tree(self.transaction, lost)

    def _expand_table(
        self, batch: L2Batch, row: int, chosen: Int64Array, lost: ReferenceCounts, *, active: bool
    ) -> None:
        """New entries for the zero clusters of one table, in memory; zeroes in the file where they need them."""
        bits, refcounts = self.geometry.cluster_bits, self.transaction.refcounts
        uses = int(self.uses[np.searchsorted(self.tables, int(batch.host_offset[row]))])
        host = offsets(batch.entries[row][chosen])
        kept = np.zeros(len(chosen), dtype=np.bool_)
        if self.has_backing:
            kept = (host != 0) & (refcounts.gather(host >> bits) == uses)
        given_up = host[(host != 0) & ~kept] >> bits
        if len(given_up):
            lost.add(given_up, uses)
            self.freed = True
        if not self.has_backing:
            batch.entries[row][chosen] = 0
            return
        host[~kept] = self._allocate(int(np.count_nonzero(~kept)), uses)
        base = int(batch.l1_index[row]) * self.geometry.l2_coverage
        self._store_zeroes(host, base + (chosen << bits))
        flag = np.uint64(OFLAG_COPIED if active and uses == 1 else 0)
        batch.entries[row][chosen] = host.astype(np.uint64) | flag

    def _allocate(self, wanted: int, uses: int) -> Int64Array:
        """Host offsets of new clusters, each counted `uses` times."""
        found = []
        while wanted:
            first, count = self.transaction.allocate(wanted)
            if uses > 1:
                self.transaction.refcounts.add(first, uses - 1, count)
            found.append(np.arange(first, first + count, dtype=np.int64) << self.geometry.cluster_bits)
            wanted -= count
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _store_zeroes(self, host: Int64Array, guest: Int64Array) -> None:
        size = self.geometry.cluster_size
        if self.store is not None:
            for place, address in zip(host.tolist(), guest.tolist(), strict=True):
                self.store(place, address, bytes(size))
            return
        for first, count in cluster_runs(np.sort(host) >> self.geometry.cluster_bits):
            self.transaction.storage.write_zeroes(first << self.geometry.cluster_bits, count * size)
