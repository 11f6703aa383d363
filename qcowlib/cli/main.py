"""The command qcow: finds the verb, runs it, turns errors into one message and an exit code.

    main -> cmd_VERB.run(arguments) -> exit code

Each verb is a module `cmd_VERB` with `SYNTAX` and `run`, imported when it is asked for: `qcow --help` must start fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import StringIO

from qcowlib.cli.common import CommandFailed, program_name, report, report_error
from qcowlib.cli.options import HelpWanted, Option, Syntax, UsageError, parse_arguments
from qcowlib.errors import QcowError

INTERRUPTED = 130

COMMANDS = {
    "amend": "change the options of an existing image",
    "bench": "tell how long equal requests to an image take",
    "bitmap": "add, remove, clear, enable, disable and merge the dirty bitmaps of an image",
    "chain": "examine a backing chain, plan and carry out the removal of an image from it",
    "check": "check an image for damage and leaked clusters",
    "commit": "merge an overlay into its backing file",
    "compare": "tell whether two images have the same content",
    "compact": "write a smaller image that keeps snapshots, bitmaps, encryption and backing file",
    "convert": "copy an image, or one of its snapshots, into a new image",
    "create": "create an image, or an overlay on a backing file",
    "dd": "copy blocks of an image into a new image",
    "diff": "tell in which ranges two states of a disk differ",
    "digest": "hash the content of an image and of all its snapshots, or verify it",
    "info": "show what an image is, and its backing chain",
    "map": "show where the data of an image is",
    "rebase": "give an image another backing file, or none",
    "measure": "tell how large an image file becomes",
    "resize": "change the size of a disk",
    "space": "show where the bytes of an image file are, and what deleting a snapshot would free",
    "snapshot": "create, list, apply and delete the snapshots inside an image",
}

STANDARD_SYNTAX = Syntax(
    "",
    "[standard options] command [command options]",
    (
        Option("version", "V", "version", None, "show the version and exit"),
        Option("trace", "T", "trace", "EVENTS", "not available: this program has no trace points"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after the program's name; those of the process when None.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names need not be text: their bytes are printed as they are
            stream.reconfigure(errors="surrogateescape")
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_output()
        return 0  # the reader has seen enough; qemu-img does not mind either
    except KeyboardInterrupt as stop:
        for note in getattr(stop, "__notes__", ()):  # what was left unfinished
            report(note)
        return INTERRUPTED
    except OSError as error:
        _abandon_output()
        report(f"could not write the output: {error.strerror}")
        return 1
    return code


def _dispatch(words: list[str]) -> int:
    try:
        if not words:
            raise UsageError("Not enough arguments")
        command_at = _first_operand(words)
        standard = parse_arguments(STANDARD_SYNTAX, words[:command_at])
        if standard.has("version"):
            return _print_version()
        if standard.has("trace"):
            raise CommandFailed("tracing is not available")
        if command_at == len(words):
            return 0
        return _run(words[command_at], words[command_at + 1 :])
    except HelpWanted:
        return _print_overview()
    except UsageError as error:
        report(f"{error}\nTry '{program_name()} --help' for more information")
        return 1
    except QcowError as error:
        return report_error(error)


def _run(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        raise UsageError(f"Command not found: {name}")
    module = import_module(f"qcowlib.cli.cmd_{name}")
    try:
        arguments = parse_arguments(module.SYNTAX, words)
    except HelpWanted:
        return _print_command_help(module.SYNTAX)
    code: int = module.run(arguments)
    return code


def _first_operand(words: list[str]) -> int:
    """Where the command's name is: options before it are the program's own."""
    position = 0
    while position < len(words) and words[position].startswith("-"):
        position += 2 if words[position] in {"-T", "--trace"} else 1
    return min(position, len(words))


def _print_version() -> int:
    from qcowlib import __version__

    print(f"{program_name()} version {__version__}")
    return 0


def _print_overview() -> int:
    print(f"usage: {program_name()} {STANDARD_SYNTAX.usage}\n\nOffline work on qcow2 disk images.\n\nCommands:")
    for name, summary in COMMANDS.items():
        print(f"  {name:<10}{summary}")
    print(f"\nOptions:\n{_option_lines(STANDARD_SYNTAX)}")
    print(f"\n'{program_name()} COMMAND --help' shows the options of a command.")
    return 0


def _print_command_help(syntax: Syntax) -> int:
    summary = COMMANDS[syntax.command]
    print(f"usage: {program_name()} {syntax.command} {syntax.usage}\n\n{summary[0].upper()}{summary[1:]}.\n")
    print(f"Options:\n{_option_lines(syntax)}")
    if syntax.notes:
        print(f"\n{syntax.notes}")
    return 0


def _option_lines(syntax: Syntax) -> str:
    lines = []
    for option in (Option("help", "h", "help", None, "show this help and exit"), *syntax.options):
        names = ", ".join(
            name for name in (option.short and f"-{option.short}", option.long and f"--{option.long}") if name
        )
        argument = "" if option.value is None else ("=" if option.long else " ") + option.value
        lines.append(f"  {names + argument:<28} {option.help}".rstrip())
    return "\n".join(lines)


def _abandon_output() -> None:
    """Keep the interpreter from failing once more when it flushes a stream that cannot be written."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = StringIO()  # a replaced stream without descriptor: nothing to redirect


if __name__ == "__main__":
    sys.exit(main())
