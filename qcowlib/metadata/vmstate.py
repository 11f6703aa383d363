"""Storing a vm state: a byte stream in clusters of its own, mapped by L2 tables behind those of the disk.

Nothing refers to what is written here until a snapshot's L1 table does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from qcowlib.errors import SnapshotError
from qcowlib.format.constants import MAX_L1_ENTRIES
from qcowlib.format.entries import ENTRY_DTYPE, SUBCLUSTERS_ALLOCATED, Entries
from qcowlib.metadata.regions import RegionKind
from qcowlib.metadata.transaction import MetadataTransaction

_CHUNK = 8 << 20  # bytes read at a time; a multiple of every cluster size


class ByteStream(Protocol):
    """What a vm state is read from: any binary file object."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


def store_vmstate(
    transaction: MetadataTransaction,
    stream: ByteStream,
    disk_size: int,
    store: Callable[[int, int, bytes | memoryview], None],
) -> tuple[Entries, int]:
    """Write a vm state; phase FILL.

    Args:
        transaction: allocates the clusters.
        stream: the vm state.
        disk_size: bytes of the snapshot's disk; the vm state begins at the first L1 entry behind it.
        store: writes (host offset, guest offset, bytes), encrypted if need be.

    Returns: the L1 entries that follow those of the disk ('>u8'), and the bytes of the vm state.

    Raises:
        SnapshotError: the L1 table would become too large.

    Source: QEMU's place of the vm state (`qcow2_vm_state_offset`).
    """
    geometry = transaction.state.geometry
    first_index = geometry.l1_entries_for(disk_size)
    guest = first_index * geometry.l2_coverage
    total, pieces = 0, [np.zeros(0, dtype=np.uint64)]
    while chunk := _read_chunk(stream):
        if first_index + geometry.l1_entries_for(total + len(chunk)) > MAX_L1_ENTRIES:
            raise SnapshotError("the vm state is too large for the L1 table of the image")
        padded = chunk.ljust(geometry.cluster_end(len(chunk)), b"\0")
        done = 0
        while done < len(padded):
            first, count = transaction.allocate((len(padded) - done) >> geometry.cluster_bits)
            host, length = first << geometry.cluster_bits, count << geometry.cluster_bits
            store(host, guest + total + done, padded[done : done + length])
            pieces.append(np.arange(host, host + length, geometry.cluster_size, dtype=np.uint64))
            done += length
        total += len(chunk)
    return _write_tables(transaction, np.concatenate(pieces)), total


def _read_chunk(stream: ByteStream) -> bytes:
    """`_CHUNK` bytes, less only at the end: a stream may return short."""
    parts, missing = [], _CHUNK
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _write_tables(transaction: MetadataTransaction, entries: Entries) -> Entries:
    """L2 tables for consecutive clusters; the L1 entries for them."""
    geometry = transaction.state.geometry
    l1 = np.zeros(-(-len(entries) // geometry.l2_entries), dtype=ENTRY_DTYPE)
    for index in range(len(l1)):
        cluster, _ = transaction.allocate(1)
        table = transaction.state.tables.new_table(cluster << geometry.cluster_bits)
        part = entries[index * geometry.l2_entries : (index + 1) * geometry.l2_entries]
        table.entries[: len(part)] = part
        if table.bitmaps is not None:
            table.bitmaps[: len(part)] = SUBCLUSTERS_ALLOCATED
        transaction.state.regions.guard(table.host_offset, geometry.cluster_size, RegionKind.L2_TABLE)
        transaction.storage.pwrite(table.words.tobytes(), table.host_offset)
        l1[index] = table.host_offset
    return l1
