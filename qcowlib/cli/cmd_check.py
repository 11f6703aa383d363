"""qcow check: damage and leaked clusters, in qemu-img's words and with its exit codes."""

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
    report,
    wants_json,
)
from qcowlib.cli.opening import image_name, open_image_name_for_check
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.qapi import Value, dumps

if TYPE_CHECKING:
    from qcowlib.findings import CheckReport

SOUND, FAILED, CORRUPT, LEAKS, NO_CHECK = 0, 1, 2, 3, 63

SYNTAX = Syntax(
    "check",
    "[--object OBJECT] [--image-opts] [-q] [-f FMT] [--output=human|json] [-r leaks|all] [-T CACHE] [-U] FILENAME",
    (
        FORMAT,
        OUTPUT,
        Option("repair", "r", "repair", "leaks|all", "not available yet: says so and changes nothing"),
        Option("source-cache", "T", "", "CACHE", "cache mode for reading; reading is the same in all of them"),
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "Exit codes: 0 sound, 1 could not be done, 2 corrupt, 3 leaked clusters only, 63 the format has no check.",
)


def run(arguments: Arguments) -> int:
    """Check one image."""
    repair = arguments.last("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {repair}")
    filename = one_filename(arguments)
    as_json = wants_json(arguments)
    cache_mode(arguments.last("source-cache"), "writeback", "Invalid source cache option")
    if repair is not None:
        raise CommandFailed("repair is not available yet; nothing was changed")
    name = image_name(arguments, filename)
    with open_image_name_for_check(name, force_share=arguments.has("force-share")) as image:
        from qcowlib.findings import Severity
        from qcowlib.image.qcow2 import Qcow2Image
        from qcowlib.operations.check import check

        if not isinstance(image, Qcow2Image):
            report("This image format does not support checks")
            return NO_CHECK
        found = check(image)
    # The findings go to stderr in both forms, as qemu-img has it; scripts read the JSON from stdout.
    told = found.findings
    reason = found.stopped
    if reason is not None and told and told[-1].severity is Severity.CHECK_ERROR:
        told, reason = told[:-1], told[-1].text.removeprefix("ERROR ")  # what could not be looked at, in one line
    for finding in told:
        print(finding.text, file=sys.stderr)
    if reason is not None:
        report(f"Check failed: {reason}")
        return FAILED
    if not arguments.has("quiet"):
        if as_json:
            print(dumps(_members(found, filename)))
        else:
            _print_report(found)
    if found.check_errors:
        report("Check failed")
        return FAILED
    if found.corruptions:
        return CORRUPT
    return LEAKS if found.leaks else SOUND


def _members(found: CheckReport, filename: str) -> dict[str, Value]:
    """QEMU's ImageCheck: counters that are zero are left out, but for the check errors."""
    counters = {
        "image-end-offset": found.image_end_offset,
        "corruptions": found.corruptions,
        "leaks": found.leaks,
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
