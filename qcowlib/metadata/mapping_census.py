"""The census of the mapping: L1 tables, the L2 tables that they name, and what those refer to.

    L1 tables (active, snapshots') --> distinct L2 tables with their number of uses --> one scan of each
                                   --> findings, told in the order in which qemu-img walks the tables

An L2 table that several L1 entries name is read once and counted with its multiplicity. So snapshots cost next to
nothing, and an L1 table that names one L2 table four million times is no harder than any other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcowlib.format.constants import MAX_INT64, MAX_L1_ENTRIES
from qcowlib.format.entries import ENTRY_DTYPE, L1_RESERVED, Entries, Int64Array, flagged, offsets
from qcowlib.format.header import Header
from qcowlib.format.snapshot_table import SnapshotEntry
from qcowlib.metadata.l2_scan import Problem, ScanRules, TableScanner, beyond_text
from qcowlib.metadata.ledger import Ledger
from qcowlib.metadata.reference_counts import distinct
from qcowlib.metadata.references import empty_words, read_tables
from qcowlib.storage.helpers import read_padded
from qcowlib.storage.protocol import ReadStorage

BoolArray = npt.NDArray[np.bool_]

MAX_L1_WORK = 1 << 27  # L1 entries of all snapshots: far beyond any real image, and still within a minute
SCAN_BYTES = 2 << 20  # a batch of L2 tables: about a core's second-level cache, and few batches
_MERGE_ROWS = 1 << 20  # L1 entries gathered before they are merged into the distinct tables
_HOLE_SEARCH_BYTES = 1 << 30  # with more L2 tables than this, those in holes of the host file are told apart first
_HARMLESS = "copied-flag-compressed"  # the one problem of an L2 entry that leaves no doubt what it refers to


@dataclass(frozen=True)
class L2Tables:
    """The distinct L2 tables that L1 tables name.

    Attributes:
        host_offset: in bytes, ascending (int64); 0 where an L1 entry has flags but no offset, as QEMU takes it.
        uses: L1 entries that name the table (int64).
        active_uses: those in the active L1 table (int64).
        run_first: the first host cluster where the table maps one contiguous run, else -1 (int64).
        run_copied: whether the entries of that run have the COPIED flag.
        empty: tables without any entry, or beyond the end of the file.
    """

    host_offset: Int64Array
    uses: Int64Array
    active_uses: Int64Array
    run_first: Int64Array
    run_copied: BoolArray
    empty: BoolArray

    @staticmethod
    def named(host_offset: Int64Array, uses: Int64Array, active_uses: Int64Array) -> L2Tables:
        """Tables that have not been scanned yet."""
        count = len(host_offset)
        return L2Tables(
            host_offset,
            uses,
            active_uses,
            run_first=np.full(count, -1, dtype=np.int64),
            run_copied=np.zeros(count, dtype=np.bool_),
            empty=np.ones(count, dtype=np.bool_),
        )


@dataclass
class MappingCount:
    """The result.

    Attributes:
        l1: the active L1 table, '>u8'; zeroes behind the end of the file.
        tables: all L2 tables.
        allocated, compressed, fragmented: guest clusters of the active layer as qemu-img counts them.
    """

    l1: Entries
    tables: L2Tables
    allocated: int = 0
    compressed: int = 0
    fragmented: int = 0


@dataclass(frozen=True)
class _L1Table:
    """Place of an L1 table: host offset in bytes and number of entries."""

    offset: int
    entries: int
    active: bool = False


@dataclass
class _Problems:
    """Damaged L2 entries: by table (the first ones), and how often each code occurs in all L1 tables together."""

    by_table: dict[int, list[Problem]] = field(default_factory=lambda: defaultdict(list))
    kept: int = 0
    total: Counter[str] = field(default_factory=Counter)


def count_mapping(ledger: Ledger, storage: ReadStorage, header: Header, snapshots: list[SnapshotEntry]) -> MappingCount:
    """Count what the active layer and all snapshots refer to, their L1 and L2 tables included.

    Raises:
        Stopped: a table cannot be read, or there is too much of them.
    """
    return _MappingCensus(ledger, storage, header).count(snapshots)


@dataclass(frozen=True)
class _WrongEntries:
    """The wrong entries of an L1 table.

    Attributes:
        damaged: an entry cannot be followed.
        totals: numbers of entries with reserved bits, beyond the end, unaligned.
        first: as many as can be told: index, entry, host offset, and the three flags.
    """

    damaged: bool
    totals: Int64Array
    first: tuple[Int64Array, Entries, Int64Array, BoolArray]


class _MappingCensus:
    def __init__(self, ledger: Ledger, storage: ReadStorage, header: Header) -> None:
        self.ledger = ledger
        self.storage = storage
        self.header = header
        self.geometry = ledger.geometry
        self.size = self.geometry.cluster_size
        self.per_batch = max(1, SCAN_BYTES >> self.geometry.cluster_bits)
        rules = ScanRules(self.geometry, header.version, header.has_data_file, ledger.file_end)
        self.scanner = TableScanner(rules, self.per_batch)
        self.problems = _Problems()
        self.wrong_entries: dict[_L1Table, _WrongEntries] = {}

    def count(self, snapshots: list[SnapshotEntry]) -> MappingCount:
        """Gather, scan, tell."""
        active = _L1Table(self.header.l1_table_offset, self.header.l1_size, active=True)
        usable = [table for entry in snapshots if (table := self._usable_table(entry)) is not None]
        tables = self._gather(active, usable)
        self._count_tables(tables)
        count = MappingCount(self._read_l1(active), tables)
        self._scan(tables, count)

        self._tell(active)
        if self.header.has_data_file and snapshots:
            text = f"ERROR {len(snapshots)} snapshots in image with data file"
            self.ledger.damage("snapshots-with-data-file", text)
        for entry in snapshots:
            table = self._usable_table(entry)
            if table is None:
                self._tell_unusable(entry)
            else:
                self._tell(table)
        for code, number in self.problems.total.items():
            self.ledger.findings.add_rest(code, number)
        return count

    # -- L1 tables

    def _usable_table(self, entry: SnapshotEntry) -> _L1Table | None:
        if entry.l1_table_offset & (self.size - 1) or entry.l1_size > MAX_L1_ENTRIES:
            return None
        return _L1Table(entry.l1_table_offset, entry.l1_size)

    def _read_l1(self, table: _L1Table) -> Entries:
        if table.entries and table.offset + table.entries * 8 > MAX_INT64:
            text = "ERROR: I/O error in check_refcounts_l1"
            raise self.ledger.stop("l1-unreadable", text, "Input/output error")
        data = read_padded(self.storage, table.offset, table.entries * 8) if table.entries else b""
        return np.frombuffer(data, dtype=ENTRY_DTYPE)

    def _gather(self, active: _L1Table, snapshots: list[_L1Table]) -> L2Tables:
        """The distinct L2 tables of all L1 tables with their uses."""
        work = 0
        merged: tuple[Int64Array, Int64Array, Int64Array] = _merge([_named(self._read_l1(active), 1, 1)])
        waiting: list[tuple[Int64Array, Int64Array, Int64Array]] = []
        for table, times in Counter(snapshots).items():
            work += table.entries
            if work > MAX_L1_WORK:
                text = f"ERROR: the snapshots' L1 tables have more than {MAX_L1_WORK} entries"
                raise self.ledger.stop("snapshot-l1-too-many", text, "File too large")
            waiting.append(_named(self._read_l1(table), times, 0))
            if sum(len(columns[0]) for columns in waiting) > _MERGE_ROWS:
                merged, waiting = _merge([merged, *waiting]), []
        return L2Tables.named(*_merge([merged, *waiting]))

    def _l1_problems(self, entries: Entries) -> tuple[BoolArray, BoolArray, BoolArray, Int64Array]:
        """Which L1 entries have reserved bits, name a table beyond the end, name an unaligned table; table offsets."""
        host = offsets(entries)
        used = entries != 0
        return flagged(entries, L1_RESERVED), used & (host >= self.ledger.file_end), (host & (self.size - 1)) != 0, host

    # -- L2 tables

    def _count_tables(self, tables: L2Tables) -> None:
        """Count the L2 tables themselves."""
        inside = tables.host_offset < self.ledger.file_end
        host, uses = tables.host_offset[inside], tables.uses[inside]
        self.ledger.count_clusters("L2 table", host >> self.geometry.cluster_bits, uses)
        unaligned = (host & (self.size - 1)) != 0
        if unaligned.any():
            more = (host[unaligned] >> self.geometry.cluster_bits) + 1
            distinct, inverse = np.unique(more, return_inverse=True)
            weights = np.bincount(inverse, weights=uses[unaligned]).astype(np.int64)
            self.ledger.count_clusters("L2 table", distinct, weights)

    def _scan(self, tables: L2Tables, count: MappingCount) -> None:
        """Scan each table once; fills the columns of `tables` that say what it maps."""
        per_batch = self.per_batch
        words = empty_words(per_batch, self.geometry)
        native = np.empty(words.shape, dtype=np.uint64)
        present = self._outside_holes(tables.host_offset)
        for times in distinct(tables.uses).tolist():
            chosen = np.flatnonzero(present & (tables.uses == times))
            for start in range(0, len(chosen), per_batch):
                batch = chosen[start : start + per_batch]
                read_tables(self.storage, self.geometry, tables.host_offset[batch], words[: len(batch)])
                np.copyto(native[: len(batch)], words[: len(batch)])
                self._scan_batch(native[: len(batch)], batch, times, tables, count)

    def _scan_batch(
        self, native: Entries, batch: Int64Array, times: int, tables: L2Tables, count: MappingCount
    ) -> None:
        detail = self.ledger.findings.room - self.problems.kept
        scan = self.scanner.scan(native, max(0, detail))
        run_tables = batch[scan.run_rows]
        tables.run_first[run_tables] = scan.run_first
        tables.run_copied[run_tables] = scan.run_copied
        tables.empty[run_tables] = False
        tables.empty[batch[scan.other_rows]] = False
        if not self.header.has_data_file:
            scan.count_in(self.ledger.references, self.geometry.l2_entries, times)
            if len(scan.clusters):
                self.ledger.clusters = max(self.ledger.clusters, int(scan.clusters.max()) + 1)
        active = tables.active_uses[batch]
        count.allocated += int(scan.allocated @ active)
        count.compressed += int(scan.compressed @ active)
        count.fragmented += int(scan.fragmented @ active)
        for problem in scan.problems:
            self.problems.by_table[int(tables.host_offset[batch[problem.row]])].append(problem)
        self.problems.kept += len(scan.problems)
        for (code, _row), number in scan.problem_counts.items():
            self.problems.total[code] += number * times
            self.ledger.mapping_damaged |= code != _HARMLESS

    def _outside_holes(self, host: Int64Array) -> BoolArray:
        """Which tables to read: those inside the file, and where that is very much, outside of its holes."""
        present = host < self.ledger.file_end
        if len(host) << self.geometry.cluster_bits < _HOLE_SEARCH_BYTES:
            return present
        found = np.zeros(len(host), dtype=np.bool_)
        start = int(host[0])
        for begin, length, is_data in self.storage.data_ranges(start, max(0, self.ledger.file_end - start)):
            if is_data:
                first, stop = np.searchsorted(host, [begin - self.size + 1, begin + length])
                found[first:stop] = True
        return present & found

    # -- findings in qemu-img's order

    def _tell(self, table: _L1Table) -> None:
        """Count an L1 table and tell what is wrong with its entries and with the L2 tables that it names."""
        name = "active L1 table" if table.active else "snapshot L1 table"
        self.ledger.count_range(name, table.offset, table.entries * 8)
        wrong = self._wrong_entries(table)
        self.ledger.mapping_damaged |= wrong.damaged
        told = np.zeros(3, dtype=np.int64)
        for index, entry, host, flags in zip(*(column.tolist() for column in wrong.first), strict=True):
            if not self.ledger.findings.room:
                break
            told += flags
            where = table.offset + 8 * index
            reserved, beyond, unaligned = flags
            if reserved:
                text = f"ERROR found L1 entry with reserved bits set: {entry:x}"
                self.ledger.findings.add("l1-entry-reserved-bits", text, host_offset=where)
            if beyond:
                text = beyond_text(host, self.size)
                self.ledger.findings.add("reference-beyond-end", text, host_offset=where)
            if unaligned:
                text = f"ERROR l2_offset={host:x}: Table is not cluster aligned; L1 entry corrupted"
                self.ledger.findings.add("l2-table-unaligned", text, host_offset=where)
            self._tell_table(table, index, host)
        rest = (wrong.totals - told).tolist()
        for code, number in zip(
            ("l1-entry-reserved-bits", "reference-beyond-end", "l2-table-unaligned"), rest, strict=True
        ):
            self.ledger.findings.add_rest(code, number)

    def _wrong_entries(self, table: _L1Table) -> _WrongEntries:
        """What is wrong in an L1 table; found once, as thousands of snapshots can name the same one."""
        known = self.wrong_entries.get(table)
        if known is not None:
            return known
        entries = self._read_l1(table)
        reserved, beyond, unaligned, host = self._l1_problems(entries)
        wrong = reserved | beyond | unaligned
        damaged = bool(wrong.any())
        if self.problems.by_table:
            wrong |= (entries != 0) & np.isin(host, np.array(list(self.problems.by_table), dtype=np.int64))
        first = np.flatnonzero(wrong)[: self.ledger.findings.room]
        flags = np.stack((reserved[first], beyond[first], unaligned[first]), axis=1)
        totals = np.array([reserved.sum(), beyond.sum(), unaligned.sum()], dtype=np.int64)
        found = _WrongEntries(damaged, totals, (first, entries[first], host[first], flags))
        self.wrong_entries[table] = found
        return found

    def _tell_table(self, table: _L1Table, l1_index: int, host: int) -> None:
        shift = self.geometry.l2_bits + self.geometry.cluster_bits
        for problem in self.problems.by_table.get(host, ())[: self.ledger.findings.room]:
            guest = (l1_index << shift) + (problem.entry << self.geometry.cluster_bits) if table.active else None
            where = host + problem.entry * self.geometry.l2_entry_size
            self.ledger.findings.add(problem.code, problem.text, host_offset=where, guest_offset=guest)
            self.problems.total[problem.code] -= 1

    def _tell_unusable(self, entry: SnapshotEntry) -> None:
        name = f"ERROR snapshot {entry.id} ({entry.name})"
        if entry.l1_table_offset & (self.size - 1):
            code, what = (
                "snapshot-l1-unaligned",
                f"l1_offset={entry.l1_table_offset:#x}: L1 table is not cluster aligned",
            )
        else:
            code, what = "snapshot-l1-too-large", f"l1_size={entry.l1_size:#x}: L1 table is too large"
        self.ledger.damage(code, f"{name} {what}; snapshot table entry corrupted", entry.l1_table_offset)


def _named(entries: Entries, times: int, active: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """What an L1 table names: host offsets, uses, uses by the active layer; every entry that is not 0 counts."""
    host, counts = np.unique(offsets(entries[entries != 0]), return_counts=True)
    return host, counts.astype(np.int64) * times, counts.astype(np.int64) * active


def _merge(columns: Iterable[tuple[Int64Array, Int64Array, Int64Array]]) -> tuple[Int64Array, Int64Array, Int64Array]:
    """One set of columns with distinct host offsets, their uses added up."""
    every: Iterator[Int64Array] = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    host, uses, active = every
    order = np.argsort(host, kind="stable")
    host, uses, active = host[order], uses[order], active[order]
    starts = np.flatnonzero(np.diff(host, prepend=-1))
    if not len(starts):
        return host, uses, active
    return host[starts], np.add.reduceat(uses, starts), np.add.reduceat(active, starts)
