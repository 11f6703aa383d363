"""What L2 tables refer to, and what is wrong with their entries: a pure function over rows of words.

    words of n tables --> runs           tables that map one contiguous run: all that is known of them is where
                          pieces         tables that map few runs: where each of these is
                          clusters       the host clusters that the entries of all other tables refer to
                          allocated, compressed, fragmented    guest clusters by table, as qemu-img counts them
                          problems       damaged entries, in the order of the table

A table that maps one run, or few, costs a subtraction and two comparisons for each entry; only the others are taken
apart.
Texts are the lines that `qemu-img check` 7.2 prints for the same entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qcowlib.addresses import Geometry
from qcowlib.format.constants import MAX_HOST_OFFSET
from qcowlib.format.entries import (
    L2_OFFSET_MASK,
    OFLAG_COPIED,
    OFLAG_ZERO,
    SUBCLUSTERS_ALLOCATED,
    ClusterType,
    Entries,
    Int64Array,
    classify_many,
    compressed_locations,
    flagged,
    invalid_bitmaps,
    offsets,
    reserved_bits_many,
)
from qcowlib.metadata.reference_counts import ReferenceCounts
from qcowlib.metadata.references import split_words

BoolArray = npt.NDArray[np.bool_]

_ENTRIES_PER_PIECE = 64  # with shorter runs on average, counting them one by one takes as long
_RUN_FLAGS = OFLAG_COPIED | L2_OFFSET_MASK  # entries of a run have no other bits


class Problem(NamedTuple):
    """A damaged L2 entry: row of the table, index of the entry, order within the entry, and what to say."""

    row: int
    entry: int
    step: int
    code: str
    text: str


@dataclass(frozen=True)
class ScanRules:
    """What the entries are measured by.

    Attributes:
        geometry: sizes of the image.
        version: version of the format.
        has_data_file: guest clusters are in an external data file, whose clusters are not counted.
        file_end: length of the host file in bytes, rounded up to 512; a reference may reach less than a cluster beyond.
    """

    geometry: Geometry
    version: int
    has_data_file: bool
    file_end: int

    @property
    def limit(self) -> int:
        """Where data clusters end, in bytes: they begin before."""
        return MAX_HOST_OFFSET + 1 if self.has_data_file else self.file_end


@dataclass
class L2Scan:
    """The result for n tables.

    Attributes:
        run_rows: rows of the tables that map one contiguous run (int64).
        run_first: first host cluster of each such run (int64); it is l2_entries long.
        run_copied: whether its entries have the COPIED flag.
        other_rows: rows of the other tables that are not empty (int64).
        piece_first, piece_length: first host cluster and number of clusters of the runs in those of the other tables
            that map few of them (int64).
        clusters: host clusters that the rest of the other tables refer to, each as often as it is (int64).
        allocated, compressed, fragmented: guest clusters of each table (int64, n).
        problems: damaged entries; details of the first ones only.
        problem_counts: all damaged entries by code and row.
    """

    run_rows: Int64Array
    run_first: Int64Array
    run_copied: BoolArray
    other_rows: Int64Array
    piece_first: Int64Array
    piece_length: Int64Array
    clusters: Int64Array
    allocated: Int64Array
    compressed: Int64Array
    fragmented: Int64Array
    problems: list[Problem] = field(default_factory=list)
    problem_counts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def count_in(self, counts: ReferenceCounts, l2_entries: int, times: int) -> None:
        """Count what the tables refer to, each `times`; not for tables of an image with an external data file."""
        for first in self.run_first.tolist():
            counts.add_run(first, first + l2_entries, times)
        for first, length in zip(self.piece_first.tolist(), self.piece_length.tolist(), strict=True):
            counts.add_run(first, first + length, times)
        counts.add(self.clusters, times)


def scan_tables(words: Entries, rules: ScanRules, detail: int) -> L2Scan:
    """Scan one batch of L2 tables (see `TableScanner.scan`)."""
    return TableScanner(rules, len(words)).scan(words, detail)


class TableScanner:
    """Scans batches of L2 tables, with working space that is allocated once.

    Args:
        rules: what the entries are measured by.
        max_tables: tables in a batch at the most.
    """

    def __init__(self, rules: ScanRules, max_tables: int) -> None:
        self._rules = rules
        steps = (max_tables, rules.geometry.l2_entries - 1)
        self._step = np.empty(steps, dtype=np.uint64)
        self._regular = np.empty(steps, dtype=np.bool_)

    def scan(self, words: Entries, detail: int) -> L2Scan:
        """Scan L2 tables.

        Args:
            words: the tables as native uint64 words, one row each.
            detail: problems that are wanted one by one.
        """
        geometry = self._rules.geometry
        entries, bitmaps = split_words(words, geometry)
        runs = self._find_runs(entries, bitmaps)
        run_rows = np.flatnonzero(runs)
        rest = np.flatnonzero(~runs)
        if len(rest):
            rest = rest[words[rest].any(axis=1)]
        first = entries[run_rows, 0]
        zeroes, none = np.zeros(len(entries), dtype=np.int64), np.zeros(0, dtype=np.int64)
        scan = L2Scan(
            run_rows=run_rows,
            run_first=offsets(first) >> geometry.cluster_bits,
            run_copied=flagged(first, OFLAG_COPIED),
            other_rows=rest,
            piece_first=none,
            piece_length=none,
            clusters=none,
            allocated=runs * np.int64(geometry.l2_entries),
            compressed=zeroes,
            fragmented=zeroes,
        )
        if len(rest) and bitmaps is None:
            rest = rest[~self._take_pieces(entries[rest], rest, scan)]
        if len(rest):
            _OtherTables(entries, bitmaps, rest, self._rules, scan, detail).scan()
        return scan

    def _find_runs(self, entries: Entries, bitmaps: Entries | None) -> BoolArray:
        """Which tables map one run of aligned host clusters inside the file, all with the same COPIED flag."""
        size, count = self._rules.geometry.cluster_size, self._rules.geometry.l2_entries
        first, last = entries[:, 0], entries[:, -1]
        runs: BoolArray = (first & np.uint64(~(_RUN_FLAGS & -size) & (1 << 64) - 1)) == 0
        runs &= last - first == np.uint64((count - 1) * size)
        start = offsets(first)
        runs &= flagged(first, OFLAG_COPIED) if self._rules.has_data_file else start > 0
        runs &= start + (count - 1) * size < self._rules.limit
        if not runs.any():
            return runs
        chosen: slice | Int64Array = slice(None) if runs.all() else np.flatnonzero(runs)
        table = entries[chosen]
        step, regular = self._step[: len(table)], self._regular[: len(table)]
        np.subtract(table[:, 1:], table[:, :-1], out=step)
        np.equal(step, np.uint64(size), out=regular)
        runs[chosen] = regular.all(axis=1)
        if bitmaps is not None:
            kinds = np.array(ClusterType.NORMAL, dtype=np.uint8)
            runs[chosen] &= ~invalid_bitmaps(kinds, bitmaps[chosen]).any(axis=1)
        return runs

    def _take_pieces(self, tables: Entries, rows: Int64Array, scan: L2Scan) -> BoolArray:
        """Add the runs of those tables (at `rows` of the batch) that map few of them and no more; which these are."""
        pieces = few_pieces(tables, self._rules)
        row, first, length = rows[pieces.row], pieces.first, pieces.length
        jumps = (row[1:] == row[:-1]) & (first[1:] != first[:-1] + length[:-1])
        np.add.at(scan.allocated, row, length)
        scan.fragmented = scan.fragmented + np.bincount(row[1:][jumps], minlength=len(scan.fragmented))
        if not self._rules.has_data_file:
            scan.piece_first, scan.piece_length = first, length
        return pieces.few


class Pieces(NamedTuple):
    """The runs in tables that map few of them.

    Attributes:
        few: which tables these are: nothing else is in them, and nothing is damaged.
        row: tables of the runs, ascending (int64).
        first, length: their first host clusters, and how many clusters they are (int64).
        copied: whether their entries have the COPIED flag.
    """

    few: BoolArray
    row: Int64Array
    first: Int64Array
    length: Int64Array
    copied: BoolArray


def few_pieces(tables: Entries, rules: ScanRules) -> Pieces:
    """Look for runs in tables of standard entries, one row each."""
    size, count = rules.geometry.cluster_size, rules.geometry.l2_entries
    # An entry that is empty, or a zero cluster without a place, goes on with its like; a data cluster by its size.
    bare = np.uint64(OFLAG_ZERO if rules.version >= 3 else 0)
    left = tables[:, :-1]
    heads = np.ones(tables.shape, dtype=np.bool_)
    np.not_equal(tables[:, 1:] - left, np.where(left <= bare, np.uint64(0), np.uint64(size)), out=heads[:, 1:])
    few: BoolArray = np.count_nonzero(heads, axis=1) * _ENTRIES_PER_PIECE <= count
    heads[~few] = False
    row, index = np.nonzero(heads)
    stop = np.append(index[1:], count)
    stop[np.append(row[1:] != row[:-1], True)] = count
    first, length = tables[row, index], stop - index
    host, used, copied = offsets(first), first > bare, flagged(first, OFLAG_COPIED)
    allowed = np.uint64(OFLAG_COPIED | L2_OFFSET_MASK & -size)
    sound = (first & ~allowed) == 0
    sound &= copied if rules.has_data_file else host != 0
    # A run's last cluster begins inside the file: so do all before it, and no sum has reached the flags.
    sound &= host + (length - 1) * size < rules.limit
    few[row[used & ~sound]] = False
    kept = np.flatnonzero(used & few[row])
    return Pieces(few, row[kept], host[kept] >> rules.geometry.cluster_bits, length[kept], copied[kept])


class _OtherTables:
    """The entries of tables that are no single run, one by one (as arrays over all of them)."""

    def __init__(
        self,
        entries: Entries,
        bitmaps: Entries | None,
        rows: Int64Array,
        rules: ScanRules,
        result: L2Scan,
        detail: int,
    ) -> None:
        self.rules = rules
        self.result = result
        self.detail = detail
        used = entries[rows] != 0
        if bitmaps is not None:
            used |= bitmaps[rows] != 0
        row, self.index = np.nonzero(used)
        self.row = rows[row]
        self.entry = entries[self.row, self.index]
        self.bitmap = None if bitmaps is None else bitmaps[self.row, self.index]
        self.kind = classify_many(self.entry, rules.geometry.extended_l2, rules.has_data_file)

    def scan(self) -> None:
        """Fill the result."""
        reserved = reserved_bits_many(self.entry, self.rules.geometry, self.rules.version)
        compressed = self.kind == ClusterType.COMPRESSED
        self._note(
            0,
            "l2-entry-reserved-bits",
            reserved & ~compressed,
            lambda at: f"ERROR found l2 entry with reserved bits set: {self.entry[at]:x}",
        )
        parts = []
        if compressed.any():
            parts += self._scan_compressed(np.flatnonzero(compressed))
        standard = (self.kind == ClusterType.NORMAL) | (self.kind == ClusterType.ZERO_ALLOC)
        parts += self._scan_standard(np.flatnonzero(standard))
        if self.bitmap is not None:
            unallocated = (self.kind == ClusterType.UNALLOCATED) & flagged(self.bitmap, SUBCLUSTERS_ALLOCATED)
            self._note(
                1,
                "subclusters-without-cluster",
                unallocated,
                lambda _at: "ERROR: Unallocated cluster has non-zero subcluster allocation map",
            )
        if parts:
            self.result.clusters = np.concatenate(parts)
        self.result.problems.sort()

    def _scan_compressed(self, chosen: Int64Array) -> list[Int64Array]:
        """Compressed clusters: every host cluster that the sector range touches is referred to."""
        entry = self.entry[chosen]
        bits = self.rules.geometry.cluster_bits
        start, length = compressed_locations(entry, bits)
        self._note(
            1,
            "copied-flag-compressed",
            flagged(entry, OFLAG_COPIED),
            lambda at: f"ERROR: coffset=0x{start[at]:x}: copied flag must never be set for compressed clusters",
            chosen,
        )
        countable = np.ones(len(chosen), dtype=np.bool_)
        bare = entry & np.uint64(OFLAG_COPIED - 1)
        index = self.index[chosen]
        if self.rules.has_data_file:
            countable[:] = False
            self._note(
                2,
                "compressed-with-data-file",
                ~countable,
                lambda at: f"ERROR compressed cluster {index[at]} with data file, entry=0x{bare[at]:x}",
                chosen,
            )
        elif self.bitmap is not None:
            countable = self.bitmap[chosen] == 0
            self._note(
                2,
                "compressed-with-subclusters",
                ~countable,
                lambda at: (
                    f"ERROR compressed cluster {index[at]} with non-zero subcluster allocation bitmap, "
                    f"entry=0x{bare[at]:x}"
                ),
                chosen,
            )
        rows = self._by_row(self.row[chosen[countable]])
        self.result.allocated = self.result.allocated + rows
        self.result.compressed = self.result.compressed + rows
        self.result.fragmented = self.result.fragmented + rows
        return self._referred(chosen[countable], start[countable], length[countable], 3)

    def _scan_standard(self, chosen: Int64Array) -> list[Int64Array]:
        """Clusters with a host offset of their own."""
        size = self.rules.geometry.cluster_size
        entry, row = self.entry[chosen], self.row[chosen]
        start = offsets(entry)
        if self.bitmap is not None:
            self._note(
                1,
                "subcluster-bitmap-invalid",
                invalid_bitmaps(self.kind[chosen], self.bitmap[chosen]),
                lambda at: f"ERROR offset={start[at]:x}: Allocated cluster has corrupted subcluster allocation bitmap",
                chosen,
            )
        unaligned = (start & (size - 1)) != 0
        if unaligned.any():
            if self.bitmap is not None:
                holds_data = flagged(self.bitmap[chosen], SUBCLUSTERS_ALLOCATED)
            else:
                holds_data = ~flagged(entry, OFLAG_ZERO)
            what = np.where(holds_data, "Data cluster", "Preallocated cluster")
            self._note(
                2,
                "data-cluster-unaligned",
                unaligned,
                lambda at: f"ERROR offset={start[at]:x}: {what[at]} is not properly aligned; L2 entry corrupted.",
                chosen,
            )
        jumps = (row[1:] == row[:-1]) & (np.diff(start) != size)
        self.result.allocated = self.result.allocated + self._by_row(row)
        self.result.fragmented = self.result.fragmented + self._by_row(row[1:][jumps])
        if self.rules.has_data_file:
            return []
        return self._referred(chosen, start, np.full(len(start), size, dtype=np.int64), 3)

    def _referred(self, chosen: Int64Array, start: Int64Array, length: Int64Array, step: int) -> list[Int64Array]:
        """The host clusters of byte ranges; those that the file does not have are problems."""
        bits = self.rules.geometry.cluster_bits
        beyond = start + length - self.rules.file_end >= self.rules.geometry.cluster_size
        if beyond.any():
            self._note(
                step,
                "reference-beyond-end",
                beyond,
                lambda at: beyond_text(int(start[at]), int(length[at])),
                chosen,
            )
            start, length = start[~beyond], length[~beyond]
        first, last = start >> bits, (start + length - 1) >> bits
        parts = [first]
        for more in range(1, 3):  # a compressed cluster touches three at the most
            longer = last >= first + more
            if not longer.any():
                break
            parts.append(first[longer] + more)
        return parts

    def _by_row(self, rows: Int64Array) -> Int64Array:
        return np.bincount(rows, minlength=len(self.result.allocated))

    def _note(
        self, step: int, code: str, wrong: BoolArray, text: Callable[[int], str], chosen: Int64Array | None = None
    ) -> None:
        """Record the entries where `wrong` is set; it is indexed as `chosen` (as all entries, if None)."""
        found = np.flatnonzero(wrong)
        if not len(found):
            return
        places = found if chosen is None else chosen[found]
        rows, counts = np.unique(self.row[places], return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            self.result.problem_counts[code, row] += count
        for at, place in zip(found.tolist(), places[: self.detail].tolist(), strict=False):
            self.result.problems.append(Problem(int(self.row[place]), int(self.index[place]), step, code, text(at)))


def beyond_text(offset: int, length: int) -> str:
    """qemu-img's line for a reference that the file is too short for."""
    return (
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
        f"offset 0x{offset:x} size 0x{length:x}"
    )
