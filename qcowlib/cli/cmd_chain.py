"""qcow chain: examine a backing chain; plan and carry out the removal of an image from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qcowlib.cli.common import OUTPUT, PROGRESS, QUIET, CommandFailed, wants_json
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError
from qcowlib.cli.progress import Progress
from qcowlib.errors import QcowError
from qcowlib.units import format_size

if TYPE_CHECKING:
    from qcowlib.operations.chain_merge import MergePlan

SYNTAX = Syntax(
    "chain",
    "doctor [--output=human|json] TOP | plan [--output=human|json] TOP IMAGE | "
    "merge [--into base|overlay] [--keep] [-p] [-q] TOP IMAGE",
    (
        Option("into", "", "into", "WHERE", "base or overlay: where what IMAGE has goes (default: the cheaper way)"),
        Option("keep", "", "keep", None, "do not remove IMAGE when nothing needs it any more"),
        OUTPUT,
        PROGRESS,
        QUIET,
    ),
    "doctor  follow the chain of TOP; say what is missing, moved, looping or without a format, and what would mend it\n"
    "plan    say what taking IMAGE out of the chain of TOP would move in either direction, and what stands against it\n"
    "merge   take IMAGE out; everything that is based on it reads as before. After an interruption the chain is\n"
    "        whole, and the same command goes on. With IMAGE = TOP the top is committed to its base.\n"
    "Exit codes: 0 done, or a chain without faults; 1 failed, or faults found.",
)

SHAPE_VERSION = 1


def run(arguments: Arguments) -> int:
    """Run one of the three."""
    action, *names = arguments.operands or [""]
    wanted = {"doctor": 1, "plan": 2, "merge": 2}
    if action not in wanted:
        raise UsageError("Expecting doctor, plan or merge")
    if len(names) != wanted[action]:
        raise UsageError(f"Expecting {'one image file name' if action == 'doctor' else 'two image file names'}")
    allowed = {"merge": {"into", "keep", "progress", "quiet"}}.get(action, {"output"})
    for name, _ in arguments.options:
        if name not in allowed:
            raise CommandFailed(f"--{name} is not for chain {action}")
    try:
        if action == "doctor":
            return _doctor(names[0], as_json=wants_json(arguments))
        if action == "plan":
            return _plan(names[0], names[1], as_json=wants_json(arguments))
        return _merge(arguments, names[0], names[1])
    except CommandFailed:
        raise
    except QcowError as error:
        raise CommandFailed(str(error)) from error


def _doctor(top: str, *, as_json: bool) -> int:
    from dataclasses import asdict

    from qcowlib.operations.chain_walk import examine_chain

    report = examine_chain(top)
    if as_json:
        shape = {"version": SHAPE_VERSION, "images": [], "problems": [asdict(problem) for problem in report.problems]}
        shape["images"] = [
            {
                "filename": link.path,
                "format": link.format,
                "virtual-size": link.size,
                "backing-filename": link.stated,
                "backing-filename-format": link.stated_format,
            }
            for link in report.links
        ]
        print(json.dumps(shape, indent=4))
    else:
        for link in report.links:
            print(f"{link.path}: {link.format}, {format_size(link.size)}")
        for problem in report.problems:
            print(f"{problem.code}: {problem.text}")
            for fix in problem.fixes:
                print(f"    {fix}")
    return int(bool(report.problems))


def _plan(top: str, image: str, *, as_json: bool) -> int:
    from qcowlib.operations.chain_merge import plan_merge

    plan = plan_merge(top, image)
    if as_json:
        shape = {
            "version": SHAPE_VERSION,
            "image": plan.layer,
            "base": plan.base,
            "overlays": list(plan.overlays),
            "bytes": plan.costs,
            "refused": plan.refused,
            "unfinished": plan.unfinished,
            "direction": plan.direction,
        }
        print(json.dumps(shape, indent=4))
        return 0
    print(f"base: {plan.base}")
    for path in plan.overlays:
        print(f"overlay: {path}")
    for way, size in plan.costs.items():
        print(f"into the {way}: {format_size(size)} ({size} bytes) to move{_mark(plan, way)}")
    for way, reason in plan.refused.items():
        print(f"into the {way}: not possible: {reason}")
    if plan.unfinished is not None:
        print(f"a merge into the {plan.unfinished} was cut off: chain merge goes on with it")
    return 0


def _mark(plan: MergePlan, way: str) -> str:
    return " (chosen)" if way == plan.direction else ""


def _merge(arguments: Arguments, top: str, image: str) -> int:
    from qcowlib.operations.chain_merge import BASE, OVERLAY, merge_layer

    into = arguments.last("into")
    if into not in (None, BASE, OVERLAY):
        raise CommandFailed("--into must be base or overlay")
    quiet = arguments.has("quiet")
    progress = Progress(enabled=arguments.has("progress") and not quiet)
    progress.start()
    complete = False
    try:
        plan = merge_layer(top, image, into=into, keep=arguments.has("keep"), progress=progress)
        complete = True
    finally:
        progress.end(complete=complete)
    if not quiet:
        kept = "is no longer needed" if arguments.has("keep") else "is removed"
        users = ", ".join(f"'{path}'" for path in plan.overlays)
        print(f"'{plan.layer}' {kept}" + (f"; based on '{plan.base}' now: {users}" if users else ""))
    return 0
