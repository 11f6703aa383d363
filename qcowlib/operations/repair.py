"""Repair: a plan made of a check's findings, proved before anything is written, and carried out with barriers.

    check --> findings --> mapping: drop, mend, copy away }  on an overlay
                       --> refcounts: raise | make anew   }  over the file
                       --> second check of the overlay: not clean means that nothing is done
    carry out: undo file --> the listed writes, a barrier between two epochs --> second check of the file
                         --> dirty and corrupt bits, if that is clean

Order of the writes (see design, D4):

    DROP     entries that refer to nothing that can be; reserved bits                  nothing new is referred to
    FILL     copies in new clusters, refcounts raised or a new refcount structure, COPIED bits cleared
    GROW     refcount table entries, or the header with the new refcount table (and snapshot table)
    LINK     entries that refer to the copies, the header
    RELEASE  refcounts lowered, COPIED bits set; what is freed keeps its bytes
    DONE     dirty and corrupt bits

While the mapping is damaged nothing is freed: in the mode "leaks" such an image is left as it is. Texts are those of
`qemu-img check -r` 7.2, where it repairs the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qcowlib.errors import ImageStateError, OptionError, QcowError, UnsupportedFeature
from qcowlib.findings import CheckReport, Finding, Severity
from qcowlib.format.constants import MAX_INT64, MIN_EXTENDED_L2_CLUSTER_BITS
from qcowlib.format.entries import Int64Array
from qcowlib.format.features import KNOWN_AUTOCLEAR, Incompatible
from qcowlib.format.header import Header
from qcowlib.image.interface import BlockImage
from qcowlib.metadata.census import Census, census
from qcowlib.metadata.comparison import Comparison
from qcowlib.metadata.copied_flags import Ones
from qcowlib.metadata.free_clusters import FreeClusters
from qcowlib.metadata.heal import Healing
from qcowlib.metadata.mapping_repair import MappingRepair, NotRepairable
from qcowlib.metadata.mending import LostRange
from qcowlib.metadata.snapshot_rescue import RescuedSnapshots
from qcowlib.metadata.state import Qcow2State, load_state
from qcowlib.operations.check import check_census, check_state, copied_flag_findings
from qcowlib.operations.repair_tables import find_tables
from qcowlib.operations.repair_undo import write_undo_file
from qcowlib.storage.overlay import OverlayStorage
from qcowlib.storage.protocol import Storage

_SECTOR = 512
_MANY = 8  # findings, and times as many, from which on the L2 tables are of the other kind than the header says
_CANNOT_REBUILD = "Input/output error"  # what qemu-img says where -r leaks would have to make refcounts anew


@dataclass
class RepairPlan:
    """What a repair would do; nothing has been written yet.

    Attributes:
        report: the findings of the first check.
        lines: what to tell, in order: findings as they are, or "Repairing ..." where they will be repaired.
        actions: what is done beyond that, in words.
        moved: guest clusters that lie on metadata, and are copied away.
        lost: guest ranges that are dropped, at most 100,000; `more_lost` counts the others.
        lost_snapshots: snapshots that are dropped.
        leaks_fixed, corruptions_fixed: counters as of `qemu-img check --output=json`.
        failure: why the check could not be completed ("Invalid argument"), None when it could.
        refusal: why nothing is repaired, None when something is or nothing is wrong.
        keeps_bytes: bytes are replaced that cannot be computed again: an undo file is needed.
    """

    report: CheckReport
    lines: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    moved: int = 0
    lost: list[LostRange] = field(default_factory=list)
    more_lost: int = 0
    lost_snapshots: list[str] = field(default_factory=list)
    leaks_fixed: int = 0
    corruptions_fixed: int = 0
    failure: str | None = None
    refusal: str | None = None
    keeps_bytes: bool = False
    _overlay: OverlayStorage | None = field(default=None, repr=False)
    _bits: bytes | None = field(default=None, repr=False)

    @property
    def repairs(self) -> bool:
        """Whether anything that the check found will be repaired."""
        return bool(self.leaks_fixed or self.corruptions_fixed)


def plan_repair(image: BlockImage, mode: str) -> RepairPlan:
    """Plan the repair of an opened qcow2 image; nothing is written.

    Args:
        image: opened with `open_for_repair`, or for reading.
        mode: "leaks": only give leaked clusters back; "all".

    Raises:
        OptionError: another mode.
        UnsupportedFeature: the image has no metadata to check: it is raw.
        StorageError: the host file cannot be read.
    """
    if mode not in ("leaks", "all"):
        raise OptionError(f"a repair mode is 'leaks' or 'all', not '{mode}'")
    planning = _Planning(_state(image))
    return planning.leaks() if mode == "leaks" else planning.everything()


def carry_out_repair(plan: RepairPlan, image: BlockImage, undo_path: str | None) -> CheckReport:
    """Do what a plan says, and check again.

    Args:
        plan: of this image, which has been open since.
        image: opened with `open_for_repair`.
        undo_path: where to keep what is replaced (`qcow` takes IMAGE.repair-undo); it must not exist. None keeps
            nothing. Repairs that replace only what can be computed again need none (`plan.keeps_bytes`).

    Returns: the findings of the second check.

    Raises:
        OptionError: the image was opened for reading only.
        StorageError: a file could not be written. What was written so far does no harm: another repair finishes it.
    """
    storage, overlay = _state(image).storage, plan._overlay
    if not isinstance(storage, Storage):
        raise OptionError(f"'{image.name}' was not opened to be repaired")
    if overlay is None:
        return plan.report
    if plan.keeps_bytes and undo_path is not None:
        write_undo_file(undo_path, storage, overlay, plan._bits)
    overlay.replay(storage)
    report = check_state(load_state(storage, for_check=True))
    if plan._bits is not None and report.stopped is None and not report.findings:
        storage.pwrite(plan._bits, 0)
        storage.flush()
    return report


def _state(image: BlockImage) -> Qcow2State:
    state = getattr(image, "state", None)
    if not isinstance(state, Qcow2State):
        raise UnsupportedFeature("image", None, "its format does not support checks")
    return state


class _Planning:
    def __init__(self, state: Qcow2State) -> None:
        self.base = state.storage
        self.header = state.header
        self.data_storage = state.data_storage
        self.overlay = OverlayStorage(state.storage)

    # -- the two modes

    def leaks(self) -> RepairPlan:
        """Give leaked clusters back, if every cluster that is referred to is known."""
        state = self._state(self.header)
        found = census(state)
        report = check_census(state, found)
        plan = RepairPlan(report, [finding.text for finding in _told(report)], failure=report.stopped)
        if found.stopped is not None:
            return plan
        zeroes, low = self._too_low(found)
        if found.refcounts_damaged or zeroes:
            plan.lines = [finding.text for finding in _told(report) if not finding.code.startswith("copied-flag-l")]
            plan.lines.append("ERROR need to rebuild refcount structures")
            plan.failure = _CANNOT_REBUILD
            return plan
        if found.mapping_damaged or (low and report.leaks):
            # A cluster with too many references tells of an entry that is not what it was, as one without any may.
            if report.leaks:
                reason = "the mapping is damaged" if found.mapping_damaged else "refcounts are too low"
                plan.refusal = f"{reason}, so that nothing may be given back"
            return plan
        lines = _refcount_lines(report)
        plan.lines = [*lines, *(_repairing(line, leaks_only=True) for line in lines)]
        if low:
            plan.lines += [finding.text for finding in report.findings if finding.code.startswith("copied-flag-l")]
            return plan
        plan.leaks_fixed = report.leaks
        copied = self._copied(found)
        plan.lines += [_repairing(finding.text) for finding in copied]
        plan.corruptions_fixed = _count(copied)
        Healing(self.header, self.overlay, found).run()
        self._finish(plan, self.header)
        return plan

    def everything(self) -> RepairPlan:
        """Repair all that can be repaired without guessing; all of it, or nothing."""
        state = self._state(self.header)
        found = census(state)
        report = check_census(state, found)
        try:
            return self._plan(report, found)
        except (NotRepairable, ImageStateError) as reason:
            return self._refused(report, str(reason))

    def _refused(self, report: CheckReport, reason: str) -> RepairPlan:
        lines = [finding.text for finding in _told(report)]
        return RepairPlan(report, lines, failure=report.stopped, refusal=reason)

    # -- mode "all"

    def _plan(self, report: CheckReport, found: Census) -> RepairPlan:
        """The plan; `found` and `report` are the first check, anew where tables are not where the header says."""
        plan = RepairPlan(report)
        tables = find_tables(self.base, self.overlay, self.header)
        rescued, self.header = tables.snapshots, tables.header
        built = self.header.build()[:_SECTOR]
        header_damaged = built != self.base.pread(len(built), 0)
        if found.stopped or rescued.repairs or tables.found_again or header_damaged:
            found = census(self._state(self.header), rescued)
            report = check_census(self._state(self.header), found)
        if found.mapping_damaged:
            self._refuse_other_entries(report, rescued)
        mapping = MappingRepair(self.base, self.overlay, self.header, rescued)
        mended = [finding for finding in _told(report) if _is_mapping(finding)]
        damaged = bool(mended or found.mapping_damaged or found.stopped or rescued.repairs or header_damaged)
        damaged |= self._is_table_cut(found)
        told = [finding for finding in found.findings if finding.code in _REFCOUNT_STRUCTURE]
        if damaged:
            mapping.drop()
            found = census(self._state(mapping.header), rescued)
        plan.keeps_bytes = bool(self.overlay.epochs[0])
        if self._is_outside_counted(found, told):
            self._drop_refcount_blocks(found)
            found = census(self._state(mapping.header), rescued)
        plan.lines = ["Repairing header: it names tables that cannot be used"] if header_damaged else []
        plan.lines += [text for _, text, _ in rescued.repairs] + [_repairing(finding.text) for finding in mended]
        plan.lines += [_repairing(f.text) if f.code == "refcount-block-beyond-end" else f.text for f in told]
        plan.lines += ["ERROR could not resize image: Invalid argument"] * _impossible(found)
        plan.corruptions_fixed = (
            int(header_damaged) + _count(mended) + _count(told) + sum(count for _, _, count in rescued.repairs)
        )
        if damaged or told:
            report = check_census(self._state(self.header), found)
        rebuild = self._tell_refcounts(plan, report, found, rescued)
        if damaged:
            mapping.move()
        plan.keeps_bytes |= mapping.header != self.header or header_damaged or self.overlay.has_staged
        plan.lost, plan.more_lost = mapping.lost.ranges, mapping.lost.more
        plan.actions, plan.moved = tables.found_again + mapping.actions, mapping.moved
        plan.lost_snapshots = rescued.lost
        header = self._repair_refcounts(mapping.header, found, rebuild=rebuild, sound=not damaged)
        self._finish(plan, header)
        self._prove(header)
        return plan

    def _refuse_other_entries(self, report: CheckReport, rescued: RescuedSnapshots) -> None:
        """An image that has lost its extended-L2 bit looks damaged all over; its entries are not to be dropped."""
        other = self.header.incompatible_features ^ Incompatible.EXTENDED_L2
        header = replace(self.header, incompatible_features=other)
        if header.version < 3 or (header.extended_l2 and header.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS):
            return
        try:
            again = check_census(self._state(header), census(self._state(header), rescued))
        except QcowError:
            return
        here, there = (one.corruptions + one.leaks for one in (report, again))
        if again.stopped is None and here >= _MANY and there * _MANY <= here:
            wrong = (
                "not set, although the L2 tables have them"
                if header.extended_l2
                else "set, although the tables have none"
            )
            raise NotRepairable(
                f"the header's bit for extended L2 entries is {wrong}: "
                f"read in the other way the image has {there} findings, not {here}"
            )

    def _is_table_cut(self, found: Census) -> bool:
        """Whether the file ends inside an L1 or L2 table, by less than a cluster, which the check allows."""
        tables = found.mapping.tables.host_offset
        ends = [self.header.l1_table_offset + 8 * self.header.l1_size]
        ends += [int(tables.max()) + self.header.cluster_size] if len(tables) else []
        return max(ends) > self.base.size()

    def _is_outside_counted(self, found: Census, told: list[Finding]) -> bool:
        """Whether the refcount table is wrong only in naming blocks beyond the end of the file that are counted there.

        Nothing is lost when such an entry is cleared. Uncounted ones tell that the structure is not what it was.
        """
        if {finding.code for finding in told} != {"refcount-block-beyond-end"} or _impossible(found):
            return False
        clusters = _outside_blocks(found)
        return bool((found.stored.at(clusters) != 0).all())

    def _drop_refcount_blocks(self, found: Census) -> None:
        """Clear the refcount table's entries for blocks beyond the end of the file: they count nothing."""
        outside = np.isin(found.stored.block_offsets >> self.header.cluster_bits, _outside_blocks(found))
        for index in np.flatnonzero(outside).tolist():
            self.overlay.pwrite(bytes(8), self.header.refcount_table_offset + 8 * index)
        self.overlay.flush()

    def _tell_refcounts(self, plan: RepairPlan, report: CheckReport, found: Census, rescued: RescuedSnapshots) -> bool:
        """Lines and numbers of what is wrong with refcounts and flags; whether they must be made anew.

        As for QEMU, that is so where a cluster in use has the refcount zero, or the structure itself is damaged.
        """
        if found.stopped is not None:
            raise NotRepairable(found.findings[-1].text)
        lines = _refcount_lines(report)
        zeroes, _ = self._too_low(found)
        shared = any({first, second} & {"refcount table", "refcount block"} for _, first, second in found.overlaps)
        rebuild = found.refcounts_damaged or shared or zeroes > 0
        uncounted = _outside_blocks(found)
        uncounted = uncounted[found.stored.at(uncounted) == 0]
        lines += [f"ERROR cluster {cluster} refcount=0 reference=1" for cluster in uncounted.tolist()]
        plan.corruptions_fixed += len(uncounted)
        plan.lines += lines
        if rebuild:
            plan.lines += ["Rebuilding refcount structure", *self._released_lines(found)]
            header = replace(self.header, refcount_table_offset=0, refcount_table_clusters=0)
            copied = self._copied(census(self._state(header), rescued))
        else:
            plan.lines += [_repairing(line) for line in lines]
            copied = self._copied(found)
        plan.lines += [_repairing(finding.text) for finding in copied]
        plan.corruptions_fixed += _count(copied)
        plan.corruptions_fixed += sum(f.count for f in report.findings if f.code == "refcount-too-low")
        plan.leaks_fixed += report.leaks
        return rebuild

    def _repair_refcounts(self, header: Header, found: Census, *, rebuild: bool, sound: bool) -> Header:
        """The refcounts and COPIED flags for the mapping as it is now; returns the header then.

        Args:
            header: what the header will be, with the old refcount table.
            found: the census before anything was copied away, the old refcount structure included.
            rebuild: make the refcounts from nothing.
            sound: nothing but the refcounts was damaged.
        """
        free = None
        if rebuild:
            end = max(found.clusters, header.geometry.clusters_for(self.overlay.size()))
            # Only where mapping and refcounts are beyond doubt can they say together that a place is free.
            if sound and not found.refcounts_damaged:
                free = FreeClusters(end, (found.references, found.stored))
            header = replace(header, refcount_table_offset=0, refcount_table_clusters=0)
        target = census(self._state(header))
        if target.stopped is not None or target.mapping_damaged:
            raise NotRepairable(_first_damage(target))
        healing = Healing(header, self.overlay, target, free=free, link=self._link)
        healing.run()
        return healing.header

    def _link(self, header: Header) -> None:
        """The header as it is to be, then the entries that refer to copies."""
        sector = header.build()[:_SECTOR]
        if sector != self.overlay.pread(len(sector), 0):
            self.overlay.pwrite(sector, 0)
        self.overlay.link()

    def _released_lines(self, found: Census) -> list[str]:
        """What a new refcount structure leaves behind: the clusters of the old one."""
        stored, bits = found.stored, self.header.cluster_bits
        table = self.header.refcount_table_offset >> bits
        sound = (stored.block_offsets > 0) & ~stored.unreadable & ~stored.reserved
        blocks = stored.block_offsets[sound] >> bits
        blocks = blocks[blocks < found.clusters]
        tables = np.arange(table, table + self.header.refcount_table_clusters)
        clusters, own = np.unique(np.concatenate((tables, blocks)).astype(np.int64), return_counts=True)
        counted = found.references.at(clusters)
        return [
            f"Repairing cluster {cluster} refcount={count} reference={count - times}"
            for cluster, count, times in zip(clusters.tolist(), counted.tolist(), own.tolist(), strict=True)
            if count >= times
        ] + [f"Repairing cluster {cluster} refcount=1 reference=0" for cluster in _outside_blocks(found).tolist()]

    # -- what both modes share

    def _state(self, header: Header) -> Qcow2State:
        return Qcow2State(self.overlay, header, None if self.data_storage is self.base else self.data_storage)

    def _too_low(self, found: Census) -> tuple[int, int]:
        """Clusters in use whose refcount is zero, and those whose refcount is too low otherwise."""
        zeroes = low = 0
        for rows in Comparison(found, self.header.geometry).differences():
            below = rows.readable & (rows.stored < rows.expected)
            zeroes += int((below & (rows.stored == 0)).sum())
            low += int((below & (rows.stored > 0)).sum())
        return zeroes, low

    def _copied(self, found: Census) -> list[Finding]:
        """COPIED flags that are wrong by the refcounts as they will be."""
        ones = Ones.expected(found.references)
        return copied_flag_findings(self._state(self.header), found, ones, found.references.at)

    def _finish(self, plan: RepairPlan, header: Header) -> None:
        """The header's last write: no dirty and corrupt bit, no autoclear bits that nobody knows."""
        bits = header.incompatible_features & ~(Incompatible.DIRTY | Incompatible.CORRUPT)
        autoclear = header.autoclear_features & KNOWN_AUTOCLEAR
        done = replace(header, incompatible_features=int(bits), autoclear_features=int(autoclear))
        if done != header:
            plan._bits = done.build()[:_SECTOR]
        plan._overlay = self.overlay

    def _prove(self, header: Header) -> None:
        """Check what the file would be; a repair that does not end in a sound image is none."""
        after = check_state(self._state(header))
        if after.stopped is not None or after.findings:
            raise NotRepairable(after.stopped or after.findings[0].text)


_REFCOUNT_STRUCTURE = (
    "refcount-table-reserved-bits",
    "refcount-block-unaligned",
    "refcount-block-beyond-end",
    "refcount-block-shared",
    "refcount-block-damaged",
)
_REFCOUNTS = ("leak", "refcount-too-high", "refcount-too-low", "refcount-unreadable")


def _is_mapping(finding: Finding) -> bool:
    """Whether a finding is about the mapping: not about refcounts or COPIED flags that follow from it."""
    return finding.code not in (*_REFCOUNT_STRUCTURE, *_REFCOUNTS, "copied-flag-l1", "copied-flag-l2")


def _told(report: CheckReport) -> list[Finding]:
    """The findings that are told: not those that only explain others."""
    return [finding for finding in report.findings if finding.count or finding.code != "overlap"]


def _refcount_lines(report: CheckReport) -> list[str]:
    return [finding.text for finding in report.findings if finding.code in _REFCOUNTS]


def _repairing(text: str, *, leaks_only: bool = False) -> str:
    """A finding's text as that of its repair."""
    if text.startswith("Leaked "):
        return "Repairing " + text.removeprefix("Leaked ")
    if leaks_only:
        return text
    return "Repairing " + text.removeprefix("ERROR").lstrip(": ") if text.startswith("ERROR") else text


def _count(findings: list[Finding]) -> int:
    return sum(finding.count for finding in findings if finding.severity is Severity.CORRUPTION)


def _outside_blocks(found: Census) -> Int64Array:
    """Clusters beyond the end of the file where refcount blocks should be."""
    stored = found.stored
    bits, size = stored.geometry.cluster_bits, stored.geometry.cluster_size
    possible = (stored.block_offsets > 0) & (stored.block_offsets <= MAX_INT64 - size)
    clusters = stored.block_offsets[possible & ~stored.unreadable & ~stored.reserved] >> bits
    outside: Int64Array = np.unique(clusters[clusters >= found.clusters])
    return outside


def _impossible(found: Census) -> int:
    """Refcount blocks that no file reaches to."""
    offsets, size = found.stored.block_offsets, found.stored.geometry.cluster_size
    return int(((offsets < 0) | (offsets > MAX_INT64 - size)).sum())


def _first_damage(found: Census) -> str:
    texts = [finding.text.partition("\n")[0] for finding in found.findings]
    texts += [f"cluster {cluster} holds the {first} and the {second}" for cluster, first, second in found.overlaps]
    return texts[0].removeprefix("ERROR").lstrip(": ") if texts else "the mapping is damaged"
