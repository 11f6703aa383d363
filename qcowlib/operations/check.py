"""Check: what is wrong with an image, as findings; nothing is changed.

    census --> damage in the mapping      } findings in qemu-img's order and words,
    comparison --> wrong refcounts        } counted as qemu-img counts them
    copied flags --> wrong COPIED flags   }
    overlaps --> what qemu-img does not look for

Codes of the findings, which stay as they are:

| severity    | codes |
|-------------|-------|
| leak        | leak, refcount-too-high |
| corruption  | refcount-too-low, refcount-overflow, copied-flag-l1, copied-flag-l2, copied-flag-compressed, overlap |
|  mapping    | reference-beyond-end, l1-entry-reserved-bits, l2-table-unaligned, l2-entry-reserved-bits, |
|             | data-cluster-unaligned, subcluster-bitmap-invalid, subclusters-without-cluster, |
|             | compressed-with-subclusters, compressed-with-data-file |
|  refcounts  | refcount-table-reserved-bits, refcount-block-unaligned, refcount-block-beyond-end, |
|             | refcount-block-shared, refcount-block-damaged |
|  snapshots  | snapshot-entry-incomplete, snapshot-l1-unaligned, snapshot-l1-too-large, snapshots-with-data-file |
| check-error | refcount-unreadable, and where the check stops: snapshot-table-unreadable, snapshot-l1-too-many, |
|             | l1-unreadable, bitmap-directory-damaged, bitmap-table-damaged, bitmap-tables-too-large, |
|             | data-file-unknown, file-too-large, census-too-large |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcowlib.errors import UnsupportedFeature
from qcowlib.findings import CheckReport, Finding, Severity
from qcowlib.format.entries import REFCOUNT_TABLE_OFFSET_MASK, Int64Array, offsets
from qcowlib.image.interface import BlockImage
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.comparison import Comparison, Differences
from qcowlib.metadata.copied_flags import Ones, WrongTables, wrong_l1_entries, wrong_l2_tables
from qcowlib.metadata.finding_list import FindingList
from qcowlib.metadata.state import Qcow2State

Refcounts = Callable[[Int64Array], npt.NDArray[Any]]


class _HasState(Protocol):
    @property
    def state(self) -> Qcow2State: ...


def check(image: BlockImage | _HasState) -> CheckReport:
    """Check the metadata of an opened qcow2 image.

    Findings have qemu-img's texts; overlaps that qemu-img does not see are added at the end. Numbers are those of
    `qemu-img check --output=json`.

    Args:
        image: an opened qcow2 image; backing and data files are not looked at.

    Returns:
        The report; `report.stopped` says why a check could not be completed.

    Raises:
        UnsupportedFeature: the image has no metadata to check: it is raw.
        StorageError: the host file cannot be read.
    """
    state = getattr(image, "state", None)
    if not isinstance(state, Qcow2State):
        raise UnsupportedFeature("image", None, "its format does not support checks")
    return check_state(state)


def check_state(state: Qcow2State) -> CheckReport:
    """`check` for the metadata alone."""
    return check_census(state, census(state))


def check_census(state: Qcow2State, found: Census) -> CheckReport:
    """The report of a census."""
    header = state.header
    report = CheckReport(total_clusters=header.geometry.clusters_for(header.virtual_size))
    report.findings += found.findings
    report.allocated_clusters = found.mapping.allocated
    report.compressed_clusters = found.mapping.compressed
    report.fragmented_clusters = found.mapping.fragmented
    report.stopped = found.stopped
    if found.stopped is not None:
        return report
    comparison = Comparison(found, header.geometry)
    wrong_clusters = _compare_refcounts(report, found, comparison)
    report.findings += copied_flag_findings(state, found, comparison.ones, found.stored.at)
    report.image_end_offset = (comparison.highest_cluster() + 1) << header.cluster_bits
    _tell_overlaps(report, found, header.cluster_bits, wrong_clusters)
    return report


def _compare_refcounts(report: CheckReport, found: Census, comparison: Comparison) -> set[int]:
    """Findings for wrong refcounts; returns the overlapping clusters among them."""
    findings = FindingList()
    overlapping = np.array([overlap.cluster for overlap in found.overlaps], dtype=np.int64)
    wrong: set[int] = set()
    for rows in comparison.differences():
        _tell_differences(findings, rows, found)
        wrong.update(rows.clusters[np.isin(rows.clusters, overlapping)].tolist())
    report.findings += findings.result()
    return wrong


def _tell_differences(findings: FindingList, rows: Differences, found: Census) -> None:
    size = found.stored.geometry.cluster_size
    detail = findings.room
    columns = (column[:detail].tolist() for column in rows)
    for cluster, stored, expected, readable in zip(*columns, strict=True):
        where = cluster * size
        if not readable:
            if not findings:
                _tell_unaligned_block(findings, cluster, found)
            text = f"Can't get refcount for cluster {cluster}: Input/output error"
            findings.add("refcount-unreadable", text, Severity.CHECK_ERROR, host_offset=where)
            continue
        low = stored < expected
        text = f"{'ERROR' if low else 'Leaked'} cluster {cluster} refcount={stored} reference={expected}"
        code = "refcount-too-low" if low else "refcount-too-high" if expected else "leak"
        severity = Severity.CORRUPTION if low else Severity.LEAK
        findings.add(code, text, severity, host_offset=where, repairable=True)
    stored, expected, readable = rows.stored[detail:], rows.expected[detail:], rows.readable[detail:]
    low, high = stored < expected, (stored > expected) & (expected > 0)
    leaked = (stored > 0) & (expected == 0)
    for code, severity, rest in (
        ("refcount-unreadable", Severity.CHECK_ERROR, ~readable),
        ("refcount-too-low", Severity.CORRUPTION, readable & low),
        ("refcount-too-high", Severity.LEAK, readable & high),
        ("leak", Severity.LEAK, readable & leaked),
    ):
        findings.add_rest(code, int(rest.sum()), severity, repairable=code != "refcount-unreadable")


def _tell_unaligned_block(findings: FindingList, cluster: int, found: Census) -> None:
    """The line that QEMU prints when it first meets such a block; it does not count."""
    index = cluster >> found.stored.geometry.refcount_block_bits
    offset = int(found.stored.table[index]) & REFCOUNT_TABLE_OFFSET_MASK
    if offset & (found.stored.geometry.cluster_size - 1):
        text = (
            f"qcow2: Image is corrupt: Refblock offset {offset:#x} unaligned (reftable index: {_c_hex(index)}); "
            "further non-fatal corruption events will be suppressed"
        )
        findings.add("refcount-unreadable", text, Severity.CHECK_ERROR, count=0)


def _c_hex(value: int) -> str:
    """A number as C's "%#x" prints it."""
    return f"{value:#x}" if value else "0"


def copied_flag_findings(state: Qcow2State, found: Census, ones: Ones, refcounts: Refcounts) -> list[Finding]:
    """Findings for wrong COPIED flags, in the order of the active L1 table.

    Args:
        state: the image's metadata.
        found: its census.
        ones: which clusters have refcount 1: as stored, or as they will be.
        refcounts: the refcounts of clusters (int64) by the same measure, for the texts.
    """
    header, mapping = state.header, found.mapping
    findings = FindingList()
    wrong_l1 = wrong_l1_entries(header, mapping, ones)
    by_table: dict[int, list[tuple[int, str]]] = {}
    total = kept = 0
    for batch in wrong_l2_tables(state.storage, header, mapping, ones):
        places = np.searchsorted(mapping.tables.host_offset, batch.host_offset)
        total += int(batch.wrong.sum(axis=1) @ mapping.tables.active_uses[places])
        for table, index, text in islice(_copied_texts(batch, found, refcounts), findings.room - kept):
            by_table.setdefault(table, []).append((index, text))
            kept += 1

    host = offsets(mapping.l1)
    guest_bits = header.geometry.l2_bits + header.cluster_bits
    told = wrong_l1
    if by_table:
        told = wrong_l1 | np.isin(host, np.array(list(by_table), dtype=np.int64))
    for l1_index in np.flatnonzero(told).tolist():
        if not findings.room:
            break
        if wrong_l1[l1_index]:
            refcount = refcounts(host[l1_index : l1_index + 1] >> header.cluster_bits)[0]
            entry = int(mapping.l1[l1_index])
            text = f"ERROR OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} refcount={refcount}"
            where = header.l1_table_offset + 8 * l1_index
            findings.add("copied-flag-l1", text, host_offset=where, repairable=True)
            wrong_l1[l1_index] = False
        for l2_index, text in by_table.get(int(host[l1_index]), ())[: findings.room]:
            where = int(host[l1_index]) + l2_index * header.geometry.l2_entry_size
            guest = (l1_index << guest_bits) + (l2_index << header.cluster_bits)
            findings.add("copied-flag-l2", text, host_offset=where, guest_offset=guest, repairable=True)
            total -= 1
    findings.add_rest("copied-flag-l1", int(wrong_l1.sum()), repairable=True)
    findings.add_rest("copied-flag-l2", total, repairable=True)
    return findings.result()


def _copied_texts(batch: WrongTables, found: Census, refcounts: Refcounts) -> Iterator[tuple[int, int, str]]:
    """(host offset of the table, index of the entry, text) for each wrong flag."""
    rows, indices = np.nonzero(batch.wrong)
    entries = batch.entries[rows, indices]
    if found.has_data_file:
        counts: npt.NDArray[Any] = np.ones(len(rows), dtype=np.uint64)
    else:
        clusters, inverse = np.unique(offsets(entries) >> found.stored.geometry.cluster_bits, return_inverse=True)
        counts = refcounts(clusters)[inverse]
    columns = (batch.host_offset[rows], indices, entries, counts)
    for host, index, entry, refcount in zip(*(column.tolist() for column in columns), strict=True):
        yield host, index, f"ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}"


def _tell_overlaps(report: CheckReport, found: Census, cluster_bits: int, counted: set[int]) -> None:
    """Overlaps: corruptions of their own only where no wrong refcount of the cluster has been counted already."""
    findings = FindingList()
    for cluster, first, second in found.overlaps:
        text = f"ERROR cluster {cluster} is claimed by two: {first} and {second}"
        count = 0 if cluster in counted else 1
        findings.add("overlap", text, host_offset=cluster << cluster_bits, count=count)
    report.findings += findings.result()
