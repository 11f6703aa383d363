"""L2 entries as few runs: the usual shape of a mapping, found with a subtraction and two comparisons for each entry.

A run is a stretch of guest clusters that are all unallocated, or whose data clusters follow each other in the host
file. Where there are few runs their first and last entries stand for all between them; where there are many, or where
an entry is anything else (compressed, zero, damaged), the entries are to be looked at one by one.
"""

from __future__ import annotations

import numpy as np

from qcowlib.format.entries import L2_OFFSET_MASK, OFLAG_COPIED, Entries, Int64Array, offsets
from qcowlib.metadata.tables import EntryRules

_ENTRIES_PER_RUN = 16  # with shorter runs on average nothing is saved


def find_runs(entries: Entries, rules: EntryRules) -> tuple[Int64Array, Int64Array] | None:
    """The runs of consecutive L2 entries (standard ones, any byte order).

    Args:
        entries: the entries of consecutive guest clusters, one dimension.
        rules: what entries must satisfy to be followed.

    Returns:
        Index of each run's first entry, and the host offset there in bytes, -1 for unallocated clusters (both int64).
        None when they are too many, or some entry is neither empty nor a sound data cluster.
    """
    native = entries.astype(np.uint64)
    size = np.uint64(rules.geometry.cluster_size)
    step = native[1:] - native[:-1]
    goes_on = step == np.where(native[:-1] == 0, np.uint64(0), size)
    heads: Int64Array = np.concatenate(([0], np.flatnonzero(~goes_on) + 1)).astype(np.int64)
    if len(heads) * _ENTRIES_PER_RUN > len(native):
        return None
    first = native[heads]
    host = offsets(first)
    empty = first == 0
    allowed = np.uint64(OFLAG_COPIED | L2_OFFSET_MASK & -rules.geometry.cluster_size)
    sound = ((first & ~allowed) == 0) & ((host != 0) | rules.has_data_file)
    if not (sound | empty).all():
        return None
    # A run's last cluster begins inside the file: so do all before it, and no sum has reached the flags.
    length = np.diff(heads, append=np.int64(len(native)))
    last = host + (length - 1) * rules.geometry.cluster_size
    used = ~empty
    if (last[used] >= rules.data_storage.size()).any():
        return None
    bits = rules.geometry.cluster_bits
    if rules.regions is not None and rules.regions.touch(host[used] >> bits, last[used] >> bits):
        return None
    return heads, np.where(empty, np.int64(-1), host)
