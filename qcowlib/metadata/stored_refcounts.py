"""The refcounts as they are stored, read in bulk.

    refcount table --> host offsets of the refcount blocks --> windows of decoded refcounts

A window is as large as a chunk of `ReferenceCounts`, so that both can be compared. As in QEMU, a block that lies behind
the end of the file reads as zeroes, and one that is not cluster aligned cannot be read at all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.format.entries import (
    ENTRY_DTYPE,
    REFCOUNT_TABLE_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Entries,
    Int64Array,
    flagged,
    offsets,
)
from qcowlib.format.header import Header
from qcowlib.format.refcount_block import RefcountArray, decode_refcounts, refcount_dtype
from qcowlib.metadata.reference_counts import distinct
from qcowlib.metadata.references import empty_words, read_tables
from qcowlib.storage.helpers import read_padded
from qcowlib.storage.protocol import ReadStorage

BoolArray = npt.NDArray[np.bool_]


class StoredRefcounts:
    """The refcount structure of an image, for reading.

    Args:
        storage: the qcow2 file.
        header: its header.

    Attributes:
        geometry: sizes of the image.
        table: the refcount table, '>u8' as on disk; zeroes behind the end of the file.
        block_offsets: host offset of each refcount block in bytes, 0 where there is none (int64); negative where the
            entry exceeds 2^63.
        unreadable: blocks that cannot be read: not cluster aligned, or at a negative offset.
        reserved: table entries with reserved bits set.
    """

    def __init__(self, storage: ReadStorage, header: Header) -> None:
        self._storage = storage
        self.geometry: Geometry = header.geometry
        length = header.refcount_table_clusters * header.cluster_size
        data = read_padded(storage, header.refcount_table_offset, length)
        self.table: Entries = np.frombuffer(data, dtype=ENTRY_DTYPE)
        self.block_offsets: Int64Array = offsets(self.table, REFCOUNT_TABLE_OFFSET_MASK)
        self.unreadable: BoolArray = (self.block_offsets < 0) | (
            (self.block_offsets & (self.geometry.cluster_size - 1)) != 0
        )
        self.reserved: BoolArray = flagged(self.table, REFCOUNT_TABLE_RESERVED)

    def block_range(self, first: int, count: int) -> slice:
        """Indices of the refcount blocks that cover `count` clusters from `first` on."""
        bits = self.geometry.refcount_block_bits
        return slice(first >> bits, (first + count + (1 << bits) - 1) >> bits)

    def used_windows(self, window_bits: int, clusters: int) -> list[int]:
        """Indices of the windows of 2^window_bits clusters that have a block, among the first `clusters` clusters."""
        bits = self.geometry.refcount_block_bits
        blocks = np.flatnonzero(self.block_offsets[: self.block_range(0, clusters).stop])
        windows: list[int] = distinct(blocks << bits >> window_bits).tolist()
        return windows

    def window(self, first: int, count: int) -> RefcountArray:
        """Refcounts of `count` clusters from `first` on, both multiples of a block's clusters (native dtype).

        They are 0 where there is no block, or one that cannot be read.
        """
        blocks = self.block_range(first, count)
        host = self.block_offsets[blocks]
        readable = np.flatnonzero((host != 0) & ~self.unreadable[blocks])
        total = count >> self.geometry.refcount_block_bits
        if not len(readable):
            return np.zeros(count, dtype=refcount_dtype(self.geometry.refcount_order))
        if len(readable) == total:
            words = empty_words(total, self.geometry)
            read_tables(self._storage, self.geometry, host, words)
        else:
            found = empty_words(len(readable), self.geometry)
            read_tables(self._storage, self.geometry, host[readable], found)
            words = np.zeros((total, found.shape[1]), dtype=found.dtype)
            words[readable] = found
        return decode_refcounts(words.reshape(-1).view(np.uint8), self.geometry.refcount_order)

    def readable(self, clusters: Int64Array) -> BoolArray:
        """Whether the refcounts of single clusters can be read; where there is no block they can, and are 0."""
        block = clusters >> self.geometry.refcount_block_bits
        found = np.flatnonzero(block < len(self.table))
        readable = np.ones(len(clusters), dtype=np.bool_)
        readable[found] = ~self.unreadable[block[found]]
        return readable

    def at(self, clusters: Int64Array) -> npt.NDArray[np.uint64]:
        """Refcounts of single clusters (uint64); for few clusters. 0 where there is none or it cannot be read."""
        bits = self.geometry.refcount_block_bits
        counts = np.zeros(len(clusters), dtype=np.uint64)
        block = clusters >> bits
        found = np.flatnonzero(block < len(self.table))
        found = found[(self.block_offsets[block[found]] != 0) & ~self.unreadable[block[found]]]
        for index in distinct(block[found]).tolist():
            here = found[block[found] == index]
            counts[here] = self.window(index << bits, 1 << bits)[clusters[here] - (index << bits)]
        return counts
