"""Whole mapping trees at once: count what a tree refers to, change refcounts by it, clear and set COPIED bits.

A tree is an L1 table with the L2 tables and guest clusters under it. Everything is done table by table in arrays; a
loop in Python goes over batches of L2 tables and over refcount blocks only.
"""

from __future__ import annotations

from errno import EAGAIN, EFBIG, EINVAL

import numpy as np
import numpy.typing as npt

from qcowlib.errors import CorruptMetadata, SnapshotError
from qcowlib.format.entries import (
    L1_OFFSET_MASK,
    OFLAG_COPIED,
    ClusterType,
    Entries,
    Int64Array,
    classify_many,
    offsets,
)
from qcowlib.metadata.l2_scan import L2Scan, ScanRules, scan_tables
from qcowlib.metadata.refcounts import RefcountStructure
from qcowlib.metadata.reference_counts import ReferenceCounts
from qcowlib.metadata.references import L2Batch, l2_batches, require_sound_tables
from qcowlib.metadata.regions import RegionKind
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.transaction import MetadataTransaction
from qcowlib.storage.protocol import Storage

_BATCH_BYTES = 4 << 20
_COPIED_TOP, _REST_TOP = 0x80, 0x7F  # of an entry's first byte on disk


def count_tree(state: Qcow2State, l1: Entries) -> ReferenceCounts:
    """How often the tree under `l1` ('>u8') refers to each host cluster: L2 tables and guest clusters.

    Raises:
        CorruptMetadata: an entry of the tree is damaged.
    """
    require_sound_tables(state.storage, state.geometry, l1)
    counts = ReferenceCounts(state.geometry.refcount_block_bits)
    used = offsets(l1, L1_OFFSET_MASK)
    distinct, uses = np.unique(used[used != 0], return_counts=True)
    counts.add(used[used != 0] >> state.geometry.cluster_bits)
    rules = ScanRules(
        state.geometry, state.header.version, state.header.has_data_file, state.storage.size() + 511 & -512
    )
    for times in np.unique(uses).tolist():
        chosen = distinct[uses == times].astype(np.uint64).astype(">u8")
        for batch in l2_batches(state.storage, state.geometry, chosen, batch_bytes=_BATCH_BYTES):
            _add_scan(counts, scan_tables(_words(batch), rules, 1), batch, state, times)
    return counts


def require_room(refcounts: RefcountStructure, counts: ReferenceCounts) -> None:
    """Make sure that the stored refcounts can be raised by `counts`, before anything is written.

    Args:
        refcounts: the refcount structure.
        counts: references of an existing tree: no stored refcount may be lower.

    Raises:
        CorruptMetadata: a stored refcount is lower than the number of references.
        SnapshotError: the refcount width cannot hold another reference.
    """
    limit = refcounts.largest
    for first, part in _spans(counts):
        stored = refcounts.window(first, len(part))
        counted = part.astype(stored.dtype) if int(part.max()) <= limit else part.astype(np.uint64)
        low = np.flatnonzero(stored < counted)
        if len(low):
            cluster = first + int(low[0])
            rule = f"refcount {stored[low[0]]} of a cluster with {counted[low[0]]} references; the image needs a repair"
            raise CorruptMetadata("refcount block", cluster << refcounts.cluster_bits, rule)
        if (stored.dtype.type(limit) - stored < counted).any():
            rule = f"a refcount width of {refcounts.width} bits cannot hold another reference to the clusters in use"
            raise SnapshotError(rule, errno=EINVAL)


def difference(
    gained: ReferenceCounts, lost: ReferenceCounts, refcount_block_bits: int
) -> tuple[ReferenceCounts, ReferenceCounts]:
    """What is left of references that come and go together: (those to add, those to subtract)."""
    more, less = ReferenceCounts(refcount_block_bits), ReferenceCounts(refcount_block_bits)
    for index in sorted({*gained.chunks(), *lost.chunks()}):
        new, old = gained.chunk(index), lost.chunk(index)
        net = np.zeros(gained.chunk_size, dtype=np.int64)
        if new is not None:
            net += new
        if old is not None:
            net -= old
        first = index << gained.chunk_bits
        if (net > 0).any():
            more.add_counts(first, np.maximum(net, 0))
        if (net < 0).any():
            less.add_counts(first, np.maximum(-net, 0))
    return more, less


def add_references(refcounts: RefcountStructure, counts: ReferenceCounts) -> None:
    """Raise refcounts by `counts`, in memory."""
    for first, part in _spans(counts):
        refcounts.add(first, part)


def subtract_references(refcounts: RefcountStructure, counts: ReferenceCounts) -> None:
    """Lower refcounts by `counts`, in memory; only in phase RELEASE."""
    for first, part in _spans(counts):
        refcounts.subtract(first, part)


def freed_runs(refcounts: RefcountStructure, counts: ReferenceCounts) -> list[tuple[int, int]]:
    """(first cluster, clusters) of the counted clusters whose refcount is 0 now."""
    runs: list[tuple[int, int]] = []
    for first, part in _spans(counts):
        free = (refcounts.window(first, len(part)) == 0) & (part != 0)
        if not free.any():
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
        runs += [(first + int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return runs


def release_tree(transaction: MetadataTransaction, counts: ReferenceCounts) -> None:
    """Phase RELEASE for a tree that nothing on disk names any more."""
    refcounts, bits = transaction.refcounts, transaction.state.geometry.cluster_bits
    subtract_references(refcounts, counts)
    refcounts.write_blocks()
    for first, count in freed_runs(refcounts, counts):
        transaction.storage.discard(first << bits, count << bits)
    refcounts.rescan()
    transaction.releases += 1


def write_active_l1(transaction: MetadataTransaction) -> None:
    """Write the active L1 table in place: for changes that may reach the file one by one."""
    state = transaction.state
    if len(state.l1):
        state.regions.guard(state.header.l1_table_offset, state.l1.nbytes, RegionKind.L1_TABLE)
        transaction.storage.pwrite(state.l1.tobytes(), state.header.l1_table_offset)


def clear_copied(state: Qcow2State, storage: Storage, l1: Entries) -> None:
    """Clear the COPIED bits of all L2 entries under `l1` and of `l1` itself (in memory only).

    The L2 tables are written in place: with COPIED clear a writer merely copies once too often.
    """
    for batch in l2_batches(state.storage, state.geometry, l1, batch_bytes=_BATCH_BYTES):
        tops = _tops(batch)
        rows = np.flatnonzero((tops & _COPIED_TOP).any(axis=1))
        if len(rows):
            tops[rows] &= _REST_TOP
            _write_rows(state, storage, batch, rows)
    l1 &= np.uint64(~OFLAG_COPIED & (1 << 64) - 1)


def set_copied(state: Qcow2State, storage: Storage, refcounts: RefcountStructure, l1: Entries) -> None:
    """Make the COPIED bits under `l1` and in it (in memory) say which clusters have refcount 1."""
    rules = ScanRules(
        state.geometry, state.header.version, state.header.has_data_file, state.storage.size() + 511 & -512
    )
    for batch in l2_batches(state.storage, state.geometry, l1, batch_bytes=_BATCH_BYTES):
        scan = scan_tables(_words(batch), rules, 0)
        tops = _tops(batch)
        changed = []
        for row, first in zip(scan.run_rows.tolist(), scan.run_first.tolist(), strict=True):
            wanted = refcounts.window(first, state.geometry.l2_entries) == 1
            changed += [row] if _put_copied(tops[row], wanted) else []
        for row in scan.other_rows.tolist():
            entries = batch.entries[row]
            kinds = classify_many(entries, state.geometry.extended_l2)
            placed = np.flatnonzero((kinds == ClusterType.NORMAL) | (kinds == ClusterType.ZERO_ALLOC))
            wanted = np.zeros(len(entries), dtype=np.bool_)
            wanted[placed] = refcounts.gather(offsets(entries[placed]) >> state.geometry.cluster_bits) == 1
            changed += [row] if _put_copied(tops[row], wanted) else []
        if changed:
            _write_rows(state, storage, batch, np.array(sorted(changed), dtype=np.int64))
    tables = offsets(l1, L1_OFFSET_MASK)
    alone = (tables != 0) & (refcounts.gather(tables >> state.geometry.cluster_bits) == 1)
    flags = np.where(alone, np.uint64(OFLAG_COPIED), np.uint64(0))
    l1[:] = (l1 & np.uint64(~OFLAG_COPIED & (1 << 64) - 1)) | flags


def _words(batch: L2Batch) -> Entries:
    """The words of a batch in native order."""
    if batch.bitmaps is None:
        return batch.entries.astype(np.uint64)
    words = np.empty((len(batch), batch.entries.shape[1] * 2), dtype=np.uint64)
    words[:, 0::2], words[:, 1::2] = batch.entries, batch.bitmaps
    return words


def _rows(batch: L2Batch) -> Entries:
    """The tables of a batch as they are on disk: entries and bitmaps are views of one array."""
    if batch.bitmaps is None:
        return batch.entries
    base = batch.entries.base
    assert base is not None
    return np.asarray(base).reshape(len(batch), -1)


def _tops(batch: L2Batch) -> npt.NDArray[np.uint8]:
    """The first byte of every L2 entry, as a view."""
    size = 16 if batch.bitmaps is not None else 8
    return _rows(batch).view(np.uint8).reshape(len(batch), -1)[:, ::size]


def _put_copied(tops: npt.NDArray[np.uint8], wanted: npt.NDArray[np.bool_]) -> bool:
    """Set the COPIED bits of one table; whether any changed."""
    new = tops & _REST_TOP | wanted.astype(np.uint8) << 7
    if np.array_equal(new, tops):
        return False
    tops[:] = new
    return True


def _write_rows(state: Qcow2State, storage: Storage, batch: L2Batch, rows: Int64Array) -> None:
    words = _rows(batch)
    for row in rows.tolist():
        offset = int(batch.host_offset[row])
        state.regions.guard(offset, state.geometry.cluster_size, RegionKind.L2_TABLE)
        storage.pwrite(memoryview(words[row].view(np.uint8)), offset)


# QEMU's failure to find, or to make, a refcount block for a cluster that lies there.
_STOCK_ERRNO = {"l2-entry-reserved-bits": EFBIG, "reference-beyond-end": EAGAIN}


def _add_scan(counts: ReferenceCounts, scan: L2Scan, batch: L2Batch, state: Qcow2State, times: int) -> None:
    for problem in scan.problems:
        raise CorruptMetadata(
            "L2 table",
            int(batch.host_offset[problem.row]),
            f"entry {problem.entry}: {problem.code}",
            errno=_STOCK_ERRNO.get(problem.code),
        )
    if state.header.has_data_file:
        return
    scan.count_in(counts, state.geometry.l2_entries, times)


def _spans(counts: ReferenceCounts) -> list[tuple[int, npt.NDArray[np.integer]]]:
    """(first cluster, counters) of the counted part of every chunk."""
    spans = []
    for index in counts.chunks():
        chunk = counts.chunk(index)
        assert chunk is not None
        used = chunk != 0
        if used.any():
            low, high = int(used.argmax()), len(used) - int(used[::-1].argmax())
            spans.append(((index << counts.chunk_bits) + low, chunk[low:high]))
    return spans
