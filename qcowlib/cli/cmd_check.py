"""qcow check: damage and leaked clusters, in qemu-img's words and with its exit codes; repair, and the way back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    CommandFailed,
    cache_mode,
    one_filename,
    program_name,
    report,
    wants_json,
)
from qcowlib.cli.opening import ImageName, image_name, open_image_name_for_check, open_image_name_for_repair
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.qapi import Value, dumps

if TYPE_CHECKING:
    from qcowlib.findings import CheckReport
    from qcowlib.operations.repair import RepairPlan

SOUND, FAILED, CORRUPT, LEAKS, NO_CHECK = 0, 1, 2, 3, 63

_SHOWN_RANGES = 1000

SYNTAX = Syntax(
    "check",
    "[--object OBJECT] [--image-opts] [-q] [-f FMT] [--output=human|json] [-r leaks|all [--dry-run]] [-T CACHE] [-U] "
    "[--undo FILE] FILENAME",
    (
        FORMAT,
        OUTPUT,
        Option("repair", "r", "repair", "leaks|all", "repair: give leaked clusters back, or all that can be repaired"),
        Option("dry-run", "", "dry-run", None, "with -r: show what would be done and what it loses, change nothing"),
        Option("undo", "", "undo", "FILE", "take a repair back; FILE is the undo file that it left beside the image"),
        Option("source-cache", "T", "", "CACHE", "cache mode for reading; reading is the same in all of them"),
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "A repair that replaces more than refcounts and flags keeps the old bytes in FILENAME.repair-undo first.\n"
    "Exit codes: 0 sound, 1 could not be done, 2 corrupt, 3 leaked clusters only, 63 the format has no check.",
)


def run(arguments: Arguments) -> int:
    """Check one image, repair it, or take a repair back."""
    mode, undo = arguments.last("repair"), arguments.last("undo")
    if mode not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {mode}")
    if arguments.has("dry-run") and mode is None:
        raise UsageError("--dry-run belongs to -r")
    if undo is not None and mode is not None:
        raise UsageError("-r and --undo are mutually exclusive")
    filename = one_filename(arguments)
    wants_json(arguments)
    cache_mode(arguments.last("source-cache"), "writeback", "Invalid source cache option")
    name = image_name(arguments, filename)
    if undo is not None:
        return _undo(arguments, name, undo)
    if mode is not None:
        return _repair(arguments, name, mode)
    with open_image_name_for_check(name, force_share=arguments.has("force-share")) as image:
        from qcowlib.image.qcow2 import Qcow2Image
        from qcowlib.operations.check import check

        if not isinstance(image, Qcow2Image):
            return _no_check()
        found = check(image)
    return _tell(arguments, found, {})


def _no_check() -> int:
    report("This image format does not support checks")
    return NO_CHECK


def _tell(arguments: Arguments, found: CheckReport, fixed: dict[str, Value], *, told_before: bool = False) -> int:
    """Print a check's report; returns the exit code.

    Args:
        arguments: say how.
        found: the report.
        fixed: counters of the repair before.
        told_before: the findings have been printed.
    """
    from qcowlib.findings import Severity

    # The findings go to stderr in both forms, as qemu-img has it; scripts read the JSON from stdout.
    told = found.findings
    reason = found.stopped
    if reason is not None and told and told[-1].severity is Severity.CHECK_ERROR:
        last, told = told[-1], told[:-1]
        if last.code == "snapshot-table-unreadable":
            report(last.text.replace("{program}", program_name()))
        else:
            reason = last.text.removeprefix("ERROR ")  # what could not be looked at, in one line
    for finding in () if told_before else told:
        if finding.count or finding.code != "overlap":  # else a wrong refcount tells the same
            print(finding.text, file=sys.stderr)
    if reason is not None:
        report(f"Check failed: {reason}")
        return FAILED
    if not arguments.has("quiet"):
        if wants_json(arguments):
            print(dumps(_members(found, one_filename(arguments), fixed)))
        else:
            _print_report(found)
    if found.check_errors:
        report("Check failed")
        return FAILED
    if found.corruptions:
        return CORRUPT
    return LEAKS if found.leaks else SOUND


def _repair(arguments: Arguments, name: ImageName, mode: str) -> int:
    dry_run = arguments.has("dry-run")
    force_share = arguments.has("force-share")
    with open_image_name_for_repair(name, mode, dry_run=dry_run, force_share=force_share) as image:
        from qcowlib.errors import StorageError
        from qcowlib.image.qcow2 import Qcow2Image
        from qcowlib.operations.repair import carry_out_repair, plan_repair
        from qcowlib.operations.repair_undo import next_undo_path

        if not isinstance(image, Qcow2Image):
            return _no_check()
        plan = plan_repair(image, mode)
        if plan.refusal is not None or (plan.report.stopped is not None and plan.failure is not None):
            code = _tell(arguments, plan.report, {})
            if plan.refusal is not None and not _is_told(plan):
                report(f"Nothing was repaired: {plan.refusal}")
            return code
        for line in _lines(plan, dry_run=dry_run):
            print(line, file=sys.stderr)
        if plan.failure is not None:
            report(f"Check failed: {plan.failure}")
            return FAILED
        if dry_run:
            return _tell_plan(arguments, plan)
        undo_path = next_undo_path(name.reference.path) if plan.keeps_bytes else None
        try:
            after = carry_out_repair(plan, image, undo_path)
        except (StorageError, KeyboardInterrupt) as error:
            error.add_note("what was done so far does no harm, and another repair finishes it")
            raise
    if undo_path is not None and (plan.lost or plan.lost_snapshots or plan.actions):
        print(f"What was replaced is kept in '{undo_path}'; '--undo' takes the repair back.", file=sys.stderr)
    if not plan.repairs:
        return _tell(arguments, after, {}, told_before=bool(plan.lines))
    if not (arguments.has("quiet") or wants_json(arguments)):
        print(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {plan.leaks_fixed} leaked clusters\n"
            f"    {plan.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now..."
        )
    return _tell(arguments, after, {"corruptions-fixed": plan.corruptions_fixed, "leaks-fixed": plan.leaks_fixed})


def _is_told(plan: RepairPlan) -> bool:
    """Whether a finding says by itself why nothing is repaired, with what to do instead."""
    return any(finding.code == "refcount-overflow" for finding in plan.report.findings)


def _lines(plan: RepairPlan, *, dry_run: bool) -> list[str]:
    """What a plan has to say: findings, what is lost, and what is done beyond the findings."""
    lines = [*plan.lines, *plan.actions]
    if dry_run and plan.moved:  # nothing that a reader of the image would see
        lines.append(f"{plan.moved} guest clusters lie on metadata; they are copied away")
    lines += [f"Lost: {snapshot}" for snapshot in plan.lost_snapshots]
    lines += [
        f"Lost: {lost.layer}, {lost.length} bytes at {lost.start:#x}, which read as zeroes or from the backing file now"
        for lost in plan.lost[:_SHOWN_RANGES]
    ]
    more = len(plan.lost[_SHOWN_RANGES:]) + plan.more_lost
    return [*lines, f"Lost: {more} more ranges"] if more else lines


def _tell_plan(arguments: Arguments, plan: RepairPlan) -> int:
    """The end of a dry run; the exit code is that of a check."""
    if wants_json(arguments):
        ranges: list[Value] = [{"layer": layer, "start": start, "length": length} for layer, start, length in plan.lost]
        snapshots: list[Value] = list(plan.lost_snapshots)
        actions: list[Value] = [*plan.lines, *plan.actions]
        members = _members(plan.report, one_filename(arguments), {})
        members |= {"plan": actions, "lost-ranges": ranges, "lost-snapshots": snapshots}
        print(dumps(members))
    elif not arguments.has("quiet"):
        print(f"Would repair {plan.leaks_fixed} leaked clusters and {plan.corruptions_fixed} corruptions.")
        if plan.keeps_bytes:
            print("Would keep what is replaced in an undo file beside the image.")
        print("Nothing was changed.")
    if plan.report.check_errors or plan.report.stopped is not None:
        return FAILED
    if plan.report.corruptions:
        return CORRUPT
    return LEAKS if plan.report.leaks else SOUND


def _undo(arguments: Arguments, name: ImageName, undo_path: str) -> int:
    """Take a repair back."""
    from qcowlib.operations.repair_undo import undo_repair

    if arguments.has("force-share"):
        raise CommandFailed(f"Could not open '{name.text}': force-share=on can only be used with read-only images")
    undo_repair(name.reference.path, undo_path)
    if not arguments.has("quiet"):
        print("The repair was taken back.")
    return SOUND


def _members(found: CheckReport, filename: str, fixed: dict[str, Value]) -> dict[str, Value]:
    """QEMU's ImageCheck: counters that are zero are left out, but for the check errors."""
    counters = {
        "image-end-offset": found.image_end_offset,
        "corruptions": found.corruptions,
        "leaks": found.leaks,
        **fixed,
        "total-clusters": found.total_clusters,
        "allocated-clusters": found.allocated_clusters,
        "fragmented-clusters": found.fragmented_clusters,
        "compressed-clusters": found.compressed_clusters,
    }
    members: dict[str, Value] = {"filename": filename, "format": "qcow2", "check-errors": found.check_errors}
    members.update({name: count for name, count in counters.items() if count})
    return members


def _print_report(found: CheckReport) -> None:
    if found.corruptions:
        print(
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if found.leaks:
        print(
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if found.check_errors:
        print(f"\n{found.check_errors} internal errors have occurred during the check.")
    if not (found.corruptions or found.leaks or found.check_errors):
        print("No errors were found on the image.")
    if found.total_clusters and found.allocated_clusters:
        allocated = found.allocated_clusters
        print(
            f"{allocated}/{found.total_clusters} = {allocated * 100.0 / found.total_clusters:.2f}% allocated, "
            f"{found.fragmented_clusters * 100.0 / allocated:.2f}% fragmented, "
            f"{found.compressed_clusters * 100.0 / allocated:.2f}% compressed clusters"
        )
    if found.image_end_offset:
        print(f"Image end offset: {found.image_end_offset}")
