"""The census of an image: how often every host cluster is referred to, counted afresh from all that refers to clusters.

    header, mapping (`mapping_census`), snapshot table, refcount table,     --> references: expected refcounts
    LUKS header, bitmaps, refcount blocks                                       findings: damage met on the way
                                                                                overlaps: clusters with two owners
                                                                                mapping_damaged, refcounts_damaged

Check compares the census with the stored refcounts, heal writes it into them. What counts as a reference, what is
called damage, and the texts are those of `qemu-img check` 7.2 (facts from QEMU's block/qcow2-refcount.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcowlib.errors import FormatError, ImageStateError
from qcowlib.findings import Finding
from qcowlib.format.bitmap_directory import (
    BITMAP_TABLE_OFFSET_MASK,
    BitmapEntry,
    check_bitmap_entry,
    invalid_bitmap_table_entries,
    parse_bitmap_directory,
)
from qcowlib.format.constants import MAX_SNAPSHOTS
from qcowlib.format.entries import ENTRY_DTYPE, Int64Array, offsets
from qcowlib.format.snapshot_table import SnapshotEntry, build_snapshot_table, parse_snapshot_table
from qcowlib.metadata.l2_scan import beyond_text
from qcowlib.metadata.ledger import Ledger, Overlap, Stopped
from qcowlib.metadata.mapping_census import L2Tables, MappingCount, count_mapping
from qcowlib.metadata.reference_counts import ReferenceCounts
from qcowlib.metadata.snapshot_rescue import RescuedSnapshots
from qcowlib.metadata.state import Qcow2State
from qcowlib.metadata.stored_refcounts import StoredRefcounts
from qcowlib.storage.helpers import read_padded

__all__ = ["Census", "L2Tables", "Overlap", "census"]

MAX_CLUSTERS = (1 << 31) - 1  # QEMU's limit for a check
MAX_BITMAP_WORK = 1 << 27  # bitmap table entries of all bitmaps


@dataclass(frozen=True)
class Census:
    """The result.

    Attributes:
        references: expected refcounts; they may exceed what the refcount width can hold.
        findings: damage met on the way, in qemu-img's order and with its texts.
        overlaps: metadata clusters that something else claims as well.
        mapping_damaged: something that refers to clusters is damaged or overlaps, so that a cluster which nothing
            seems to refer to may hold data: no refcount may be lowered.
        refcounts_damaged: the refcount table or a block is out of range, unaligned, or used by something else.
        clusters: host clusters of the file; one more where a reference reaches beyond its end.
        mapping: the active L1 table, all L2 tables, and qemu-img's numbers of guest clusters.
        stored: the stored refcounts.
        has_data_file: guest clusters are in an external data file and have no refcounts.
        stopped: why the census could not go on (the rest is partial then), None when it is complete.
    """

    references: ReferenceCounts
    findings: list[Finding]
    overlaps: list[Overlap]
    mapping_damaged: bool
    refcounts_damaged: bool
    clusters: int
    mapping: MappingCount
    stored: StoredRefcounts
    has_data_file: bool
    stopped: str | None


def census(state: Qcow2State, rescued: RescuedSnapshots | None = None) -> Census:
    """Count all references in an image.

    Only the header has to be sound; every other damage becomes a finding.

    Args:
        state: the image's metadata.
        rescued: what a repair makes of the snapshot table; None: the table as it is, whose damage ends the census.

    Raises:
        StorageError: the host file cannot be read.
    """
    return _Count(state, rescued).run()


class _Count:
    """One census in the making."""

    def __init__(self, state: Qcow2State, rescued: RescuedSnapshots | None) -> None:
        self.rescued = rescued
        self.storage = state.storage
        self.header = state.header
        self.ledger = Ledger(state.geometry, state.storage.size())
        self.stored = StoredRefcounts(self.storage, self.header)
        self.refcounts_damaged = False
        # The file itself is not looked at, so it need not be open; it must have a name somewhere.
        self.data_file_known = bool(
            self.header.data_file_name or (state.data_storage is not state.storage and state.data_storage.name)
        )
        empty = np.zeros(0, dtype=np.int64)
        self.mapping = MappingCount(np.zeros(0, dtype=ENTRY_DTYPE), L2Tables.named(empty, empty, empty))

    def run(self) -> Census:
        stopped = None
        overlaps: list[Overlap] = []
        try:
            self.count_all()
            overlaps = self.ledger.overlaps()
        except Stopped as stop:
            stopped = str(stop)
        except ImageStateError as error:
            stopped = str(self.ledger.stop("census-too-large", f"ERROR: {error}", "Cannot allocate memory"))
        return Census(
            references=self.ledger.references,
            findings=self.ledger.findings.result(),
            overlaps=overlaps,
            mapping_damaged=self.ledger.mapping_damaged,
            refcounts_damaged=self.refcounts_damaged,
            clusters=self.ledger.clusters,
            mapping=self.mapping,
            stored=self.stored,
            has_data_file=self.header.has_data_file,
            stopped=stopped,
        )

    def count_all(self) -> None:
        """All phases in qemu-img's order."""
        header, ledger = self.header, self.ledger
        if header.has_data_file and not self.data_file_known:
            # The bit alone may be the damage: without it, all data clusters would look leaked.
            raise ledger.stop("data-file-unknown", "ERROR 'data-file' is required for this image", "Invalid argument")
        snapshots = self.read_snapshots() if self.rescued is None else self.rescued.entries
        if ledger.clusters > MAX_CLUSTERS:
            raise ledger.stop("file-too-large", f"ERROR: the file has {ledger.clusters} clusters", "File too large")
        ledger.count_range("header", 0, header.cluster_size)
        self.mapping = count_mapping(ledger, self.storage, header, snapshots)
        if snapshots:
            length = len(build_snapshot_table(snapshots)) if self.rescued is None else self.rescued.length
            ledger.count_range("snapshot table", header.snapshots_offset, length)
        ledger.count_range("refcount table", header.refcount_table_offset, self.stored.table.nbytes)
        crypto = header.crypto_header
        if crypto is not None:
            ledger.count_range("encryption header", crypto.offset, crypto.length)
        self.count_bitmaps()
        self.count_refcount_blocks()
        ledger.count_overflows()

    def read_snapshots(self) -> list[SnapshotEntry]:
        """The snapshot table, with what is wrong with it."""
        try:
            snapshots = parse_snapshot_table(
                lambda offset, length: self.storage.pread(length, offset), self.header, pad=True
            )
        except FormatError as error:
            count = self.header.nb_snapshots
            text = f"ERROR failed to read the snapshot table: {error.stock}"
            if count > MAX_SNAPSHOTS:
                text = (
                    f"ERROR snapshot table too large\nYou can force-remove all {count - MAX_SNAPSHOTS} overhanging "
                    "snapshots with {program} check -r all"
                )
            reason = "File too large" if "limit" in error.rule else "Invalid argument"
            raise self.ledger.stop("snapshot-table-unreadable", text, reason) from None
        if self.header.version >= 3:
            for index, entry in enumerate(snapshots):
                if len(entry.extra_data) < 16:
                    text = f"ERROR snapshot table entry {index} is incomplete"
                    self.ledger.findings.add("snapshot-entry-incomplete", text)
        return snapshots

    def count_bitmaps(self) -> None:
        """The bitmap directory, the bitmaps' tables and their data."""
        work = 0
        for entry in self.read_bitmap_directory():
            self.ledger.count_range("bitmap table", entry.table_offset, entry.table_size * 8)
            work += entry.table_size
            if work > MAX_BITMAP_WORK:
                text = f"ERROR: the bitmap tables have more than {MAX_BITMAP_WORK} entries"
                raise self.ledger.stop("bitmap-tables-too-large", text, "File too large")
            self.count_bitmap(entry)

    def read_bitmap_directory(self) -> list[BitmapEntry]:
        """The bitmap directory; damage ends the census, as no bitmap's clusters are known then."""
        try:
            extension = self.header.bitmaps_extension
            if extension is None:
                return []
            self.ledger.count_range("bitmap directory", extension.directory_offset, extension.directory_size)
            data = read_padded(self.storage, extension.directory_offset, extension.directory_size)
            entries = parse_bitmap_directory(data, extension)
            for entry in entries:
                check_bitmap_entry(entry, self.header.cluster_size, self.header.virtual_size)
        except FormatError as error:
            raise self.ledger.stop("bitmap-directory-damaged", f"ERROR: {error}", "Invalid argument") from None
        return entries

    def count_bitmap(self, entry: BitmapEntry) -> None:
        """The data of one bitmap."""
        table = np.frombuffer(read_padded(self.storage, entry.table_offset, entry.table_size * 8), dtype=ENTRY_DTYPE)
        wrong = np.flatnonzero(invalid_bitmap_table_entries(table, self.header.cluster_size))
        if len(wrong):
            text = f"ERROR: entry {wrong[0]} of the table of bitmap '{entry.name}' is invalid: {int(table[wrong[0]]):x}"
            raise self.ledger.stop("bitmap-table-damaged", text, "Invalid argument")
        host = offsets(table, BITMAP_TABLE_OFFSET_MASK)
        host = host[host != 0]
        beyond = host >= self.ledger.file_end
        outside = host[beyond]
        told = outside[: self.ledger.findings.room].tolist()
        for offset in told:
            self.ledger.damage("reference-beyond-end", beyond_text(offset, self.header.cluster_size), offset)
        self.ledger.findings.add_rest("reference-beyond-end", len(outside) - len(told))
        self.ledger.count_clusters("bitmap data", host[~beyond] >> self.header.cluster_bits)

    def count_refcount_blocks(self) -> None:
        """The refcount blocks; each must be inside the file and used by nothing else."""
        stored = self.stored
        used = np.flatnonzero(stored.table != 0)
        host = stored.block_offsets[used]
        cluster = host >> self.header.cluster_bits
        reserved = stored.reserved[used]
        unaligned = (host & (self.header.cluster_size - 1)) != 0
        outside = (cluster >= self.ledger.clusters) | (host < 0) | (host >= self.ledger.file_end)
        sound = ~(reserved | unaligned | outside) & (host != 0)
        counted = cluster[sound]
        # QEMU looks at the count right after it added this block: what was there before, and earlier equal blocks.
        found = np.zeros(len(used), dtype=np.int64)
        found[sound] = self.ledger.references.at(counted) + _rank(counted) + 1
        np.minimum(found, min(self.header.geometry.refcount_max, np.iinfo(np.int64).max), out=found)
        self.ledger.count_clusters("refcount block", counted)
        wrong = np.flatnonzero(reserved | unaligned | outside | (found > 1))
        self.refcounts_damaged = bool(len(wrong))
        told = wrong[: self.ledger.findings.room].tolist()
        for place in told:
            index = int(used[place])
            where = self.header.refcount_table_offset + 8 * index
            if reserved[place]:
                text = f"ERROR refcount table entry {index} has reserved bits set"
                self.ledger.findings.add("refcount-table-reserved-bits", text, host_offset=where)
            elif unaligned[place]:
                text = f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                self.ledger.findings.add("refcount-block-unaligned", text, host_offset=where)
            elif outside[place]:
                text = f"ERROR refcount block {index} is outside image"
                self.ledger.findings.add("refcount-block-beyond-end", text, host_offset=where)
            else:
                text = f"ERROR refcount block {index} refcount={found[place]}"
                self.ledger.findings.add("refcount-block-shared", text, host_offset=int(host[place]))
        self.ledger.findings.add_rest("refcount-block-damaged", len(wrong) - len(told))


def _rank(values: Int64Array) -> Int64Array:
    """How many equal values come before each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    lengths = np.diff(starts, append=len(values))
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return rank
