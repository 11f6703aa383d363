"""The L2 tables that an L1 table refers to, read in batches.

    l1 entries --l2_offsets--> host offsets --read_tables--> rows of 64-bit words --> L2Batch (entries, bitmaps)

Two readers share `read_tables`: `l2_batches` for whoever changes or walks a mapping, which raises where that is
damaged, and the census, which reads what is there and lists the damage itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import CorruptMetadata
from qcowlib.format.entries import ENTRY_DTYPE, L1_RESERVED, Entries, Int64Array, flagged, offsets
from qcowlib.storage.protocol import ReadStorage

DEFAULT_BATCH_BYTES = 8 << 20
_MAX_PIECE = 4 << 20  # bytes of one read: large enough for the disk, small enough for bytearrays and progress


@dataclass(frozen=True, slots=True)
class L2Batch:
    """Some L2 tables of one L1 table, in the order of the L1 table.

    Attributes:
        l1_index: index of each table's L1 entry (int64, n).
        host_offset: host offset of each table in bytes (int64, n).
        entries: the L2 entries, '>u8' as on disk (n, l2_entries).
        bitmaps: the subcluster bitmaps, '>u8' (n, l2_entries), with extended L2 entries; else None.
    """

    l1_index: Int64Array
    host_offset: Int64Array
    entries: Entries
    bitmaps: Entries | None

    def __len__(self) -> int:
        return len(self.l1_index)


def l2_batches(
    storage: ReadStorage,
    geometry: Geometry,
    l1: Entries,
    *,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
) -> Iterator[L2Batch]:
    """All L2 tables that `l1` refers to, one row for each non-empty L1 entry, about `batch_bytes` at a time.

    A table that two L1 entries share comes twice (and is read twice). Arrays of a batch are the caller's own.

    Args:
        storage: the host file that holds the tables.
        l1: L1 entries, '>u8' or native uint64.
        batch_bytes: bytes of tables in a batch; at least one table.

    Raises:
        CorruptMetadata: an L1 entry has reserved bits, or its table is unaligned or not inside the file. The whole of
            `l1` is looked at before the first batch, so that nothing has been done then.
    """
    require_sound_tables(storage, geometry, l1)
    index, host = l2_offsets(l1)
    per_batch = max(1, batch_bytes >> geometry.cluster_bits)
    for start in range(0, len(host), per_batch):
        chosen = slice(start, start + per_batch)
        words = empty_words(len(host[chosen]), geometry)
        read_tables(storage, geometry, host[chosen], words)
        yield L2Batch(index[chosen], host[chosen], *split_words(words, geometry))


def l2_offsets(l1: Entries) -> tuple[Int64Array, Int64Array]:
    """Indices of the L1 entries that name an L2 table, and the host offsets of those tables (both int64)."""
    host = offsets(l1)
    index = np.flatnonzero(host).astype(np.int64)
    return index, host[index]


def empty_words(tables: int, geometry: Geometry) -> Entries:
    """An uninitialised array that `read_tables` can fill: `tables` rows of a cluster each, '>u8'."""
    return np.empty((tables, geometry.cluster_size // 8), dtype=ENTRY_DTYPE)


def split_words(words: Entries, geometry: Geometry) -> tuple[Entries, Entries | None]:
    """Views of the L2 entries and (with extended L2 entries) the subcluster bitmaps in rows of 64-bit words."""
    if geometry.extended_l2:
        return words[:, 0::2], words[:, 1::2]
    return words, None


def read_tables(storage: ReadStorage, geometry: Geometry, host: Int64Array, into: Entries) -> None:
    """Read one cluster from each of the offsets `host` into the rows of `into`; zeroes behind the end of the file.

    Tables that follow each other in the file are read together.
    """
    size = geometry.cluster_size
    rows = into.view(np.uint8).reshape(-1).data
    starts = np.flatnonzero(np.diff(host, prepend=-1) != size)
    positions, firsts = host[starts].tolist(), (starts * size).tolist()
    end = storage.size()
    for position, first, last in zip(positions, firsts, [*firsts[1:], len(host) * size], strict=True):
        _read_padded_into(storage, rows[first:last], position, end)


def _read_padded_into(storage: ReadStorage, buffer: memoryview, position: int, end: int) -> None:
    """Fill `buffer` from `position`; zeroes from `end` on, where the file ends."""
    done = 0
    while done < len(buffer) and position + done < end:
        got = storage.pread_into(buffer[done : done + _MAX_PIECE], position + done)
        if not got:
            break
        done += got
    if done < len(buffer):
        np.frombuffer(buffer, dtype=np.uint8)[done:] = 0


def require_sound_tables(storage: ReadStorage, geometry: Geometry, l1: Entries) -> None:
    """Raise what `l2_batches` raises for this L1 table."""
    index, host = l2_offsets(l1)
    reserved = np.flatnonzero(flagged(l1, L1_RESERVED))
    if len(reserved):
        raise CorruptMetadata("L1 table", None, f"entry {reserved[0]} has reserved bits set")
    unaligned = np.flatnonzero(host & (geometry.cluster_size - 1))
    if len(unaligned):
        worst = unaligned[0]
        raise CorruptMetadata("L2 table", int(host[worst]), f"is not cluster aligned (L1 entry {index[worst]})")
    beyond = np.flatnonzero(host + geometry.cluster_size > storage.size())
    if len(beyond):
        worst = beyond[0]
        raise CorruptMetadata(
            "L2 table", int(host[worst]), f"lies beyond the end of the file (L1 entry {index[worst]})"
        )
