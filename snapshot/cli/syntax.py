"""The command line of domsnap: commands, options, help texts, exit codes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

#: Exit codes. A command ended by SIGINT or SIGTERM has undone its work and exits with 130 or 143.
DONE, FAILED, USAGE, NOT_POSSIBLE, RECOVER, OCCUPIED = range(6)

_EPILOG = """\
The domain is chosen with --qmp SOCKET (it runs), or with --domain FILE: a domain file (TOML), libvirt's domain XML or
Xen's xl.cfg; whether it runs is found out. Both may be given.

exit codes: 0 done; 1 failed, everything undone; 2 wrong arguments; 3 not possible, nothing touched; 4 `domsnap recover`
is needed; 5 somebody else works on the domain or holds its socket; 130, 143 stopped by a signal, everything undone.
"""

_CREATE = """\
Take a snapshot of a domain: memory and disks at one instant, or, with --disk-only, the disks alone, the only kind that
a domain has that is off. Disks are snapshotted internally where they can be, and the memory goes where the disks go,
unless told otherwise.
"""


class _Parser(argparse.ArgumentParser):
    """Options may be followed by a name: `--live NAME` is not `--live=NAME`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401 - argparse's types
        words = list(args) if args is not None else None
        return super().parse_known_args(words and _with_values(words), namespace)


def _with_values(words: Sequence[str]) -> list[str]:
    end = words.index("--") if "--" in words else len(words)
    return ["--live=live" if word == "--live" and at < end else word for at, word in enumerate(words)]


def build_parser() -> argparse.ArgumentParser:
    """The parser; a parsed command has the name of its module in `module`."""
    parser = _Parser(
        prog="domsnap",
        description="Snapshots of virtual machines: memory and disks at one instant, and back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = _common()
    _create(_command(commands, "create", "take a snapshot", common, _CREATE))
    _list(_command(commands, "list", "list the snapshots", common))
    _info(_command(commands, "info", "show one snapshot, and whether everything it needs is there", common))
    _revert(_command(commands, "revert", "go back to a snapshot", common))
    _delete(_command(commands, "delete", "delete a snapshot", common))
    _command(commands, "recover", "undo or finish an operation that was cut off", common)
    _memory(commands, common)
    return parser


class _Version(argparse.Action):
    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's types
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from qcowlib import __version__

        print(f"domsnap {__version__}")
        parser.exit()


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = common.add_argument_group("which domain")
    group.add_argument("-s", "--qmp", metavar="SOCKET", help="QMP socket of a running QEMU")
    group.add_argument("-f", "--domain", metavar="FILE", help="domain file, libvirt domain XML or xl.cfg")
    group.add_argument("--catalog", metavar="DIR", help="directory of the snapshots' records")
    group.add_argument(
        "--wait", type=_seconds, default=30.0, metavar="SECONDS", help="for a busy domain or socket (default: 30)"
    )
    group.add_argument("-v", "--verbose", action="store_true", help="say each step")
    return common


def _command(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    name: str,
    summary: str,
    common: argparse.ArgumentParser,
    description: str | None = None,
) -> argparse.ArgumentParser:
    text = description or f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=text, parents=[common], allow_abbrev=False
    )
    parser.set_defaults(module=f"cmd_{name}")
    return parser


def _create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the snapshot (default: from the time)")
    parser.add_argument("--disk-only", action="store_true", help="the disks without the memory")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--internal", dest="mode", action="store_const", const="internal", help="in the qcow2 files")
    kind.add_argument("--external", dest="mode", action="store_const", const="external", help="in overlays and a file")
    parser.add_argument(
        "--disk",
        dest="disks",
        action="append",
        default=[],
        type=disk_request,
        metavar="TARGET:internal|external|no[,file=OVERLAY]",
        help="how one disk takes part; repeatable",
    )
    live = parser.add_mutually_exclusive_group()
    live.add_argument(
        "--live",
        nargs="?",
        const="live",
        choices=["live", "background"],
        metavar="background",
        help="let the guest run while its memory is written; =background: copy pages before the guest changes them",
    )
    live.add_argument("--paused", action="store_true", help="stop the guest meanwhile (the default)")
    parser.add_argument("--memory", metavar="FILE", help="where the memory goes, outside the disks")
    parser.add_argument("--quiesce", action="store_true", help="freeze the guest's file systems by its agent")
    parser.add_argument("--description", default="", metavar="TEXT", help="free text")
    parser.add_argument("--digest", action="store_true", help="record digests of frozen files, for info --check")
    _dry_run(parser)


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-l", "--long", action="store_true", help="more about each")
    parser.add_argument("--tree", action="store_true", help="show which comes from which")
    _output(parser)


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--check", action="store_true", help="verify chains, frozen files, memory and digests")
    _output(parser)


def _revert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--running", dest="running", action="store_const", const=True, help="run the guest afterwards")
    state.add_argument("--paused", dest="running", action="store_const", const=False, help="leave it paused")
    parser.add_argument("--disk", dest="disks", action="append", metavar="TARGET", help="only this disk; repeatable")
    parser.add_argument("--discard-current", action="store_true", help="give the present state up")
    parser.add_argument("--safety", metavar="NAME", help="name of the snapshot that keeps the present state")
    _dry_run(parser)


def _delete(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--children", action="store_true", help="all that come from it as well")
    parser.add_argument("--metadata-only", action="store_true", help="only the record; the files stay as they are")
    parser.add_argument("--into", choices=["base", "overlay"], help="where external data goes (default: the cheaper)")
    _dry_run(parser)


def _memory(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 - see _command
    parser = commands.add_parser("memory", help="convert the memory of a snapshot", allow_abbrev=False)
    verbs = parser.add_subparsers(metavar="export|import", required=True)
    export = _command(verbs, "export", "write the memory of an internal snapshot into a file", common)
    export.add_argument("name", metavar="NAME")
    export.add_argument("-o", "--output", required=True, metavar="FILE", help="the new file; -incoming loads it")
    export.set_defaults(module="cmd_memory", verb="export")
    take = _command(verbs, "import", "put a memory file into the qcow2 file of an internal snapshot", common)
    take.add_argument("name", metavar="NAME")
    take.add_argument("-i", "--input", metavar="FILE", help="the memory file (default: the snapshot's own)")
    take.add_argument("--disk", metavar="TARGET", help="the disk that takes it (default: the first)")
    take.add_argument(
        "--same-instant",
        action="store_true",
        help="say that FILE and the disks are of one instant: nobody can check it",
    )
    take.set_defaults(module="cmd_memory", verb="import")


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--dry-run", action="store_true", help="only print the steps, with their QMP commands")


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", choices=["human", "json"], default="human", help="(default: human)")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e7:
        raise argparse.ArgumentTypeError("not a number of seconds")
    return value


def disk_request(text: str) -> tuple[str, str, str | None]:
    """Target, mode and file of a --disk option; the file is the rest of the text, commas and all."""
    found = re.fullmatch(r"(.+?):(internal|external|no)(?:,file=(.+))?", text, re.DOTALL)
    if found is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not TARGET:internal|external|no[,file=OVERLAY]")
    target, mode, file = found.groups()
    if file is not None and mode != "external":
        raise argparse.ArgumentTypeError(f"'{text}': only an external disk has an overlay")
    return target, mode, file
