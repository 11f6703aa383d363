"""What the commands share: messages, exit codes, and options that several of them have."""

from __future__ import annotations

import os
import sys

from qcowlib.cli.options import Arguments, Option, UsageError
from qcowlib.errors import OptionError, QcowError
from qcowlib.units import INT64_MAX, parse_size

FORMAT = Option("format", "f", "format", "FMT", "format of the image: qcow2 or raw (default: by its content)")
SHORT_FORMAT = FORMAT._replace(long="")
OBJECT = Option("object", "", "object", "OBJECT", "secret,id=ID,data=TEXT|file=FILE[,format=raw|base64]: a passphrase")
IMAGE_OPTS = Option("image-opts", "", "image-opts", None, "FILENAME is a list of options: driver=...,file.filename=...")
FORCE_SHARE = Option("force-share", "U", "force-share", None, "open an image in use; what is read may be torn")
OUTPUT = Option("output", "", "output", "human|json", "form of the output (default: human)")
QUIET = Option("quiet", "q", "", None, "print errors only")
PROGRESS = Option("progress", "p", "", None, "show progress")

CACHE_MODES = ("none", "off", "directsync", "writeback", "unsafe", "writethrough")

ERROR_EXIT_CODE = 1  # of every error that a command does not tell otherwise


class CommandFailed(OptionError):
    """A command ends with this message.

    Args:
        message: the text; with `repeat` each line of it is a message of its own, else further lines are hints.
        code: exit code.
        repeat: put the program's name in front of every line.
        end: what follows the message.
    """

    def __init__(self, message: str, code: int = ERROR_EXIT_CODE, *, repeat: bool = False, end: str = "\n") -> None:
        self.code = code
        self.repeat = repeat
        self.end = end
        super().__init__(message)


def program_name() -> str:
    """Name of the program in messages: the base name it was called by, so that a link named qemu-img speaks as such."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name if name and not name.endswith(".py") else "qcow"


def report(message: str, *, repeat: bool = False, end: str = "\n") -> None:
    """Print a message on stderr after the program's name.

    Args:
        message: one line, or several; further lines are hints without the name in front.
        repeat: put the name in front of every line.
        end: what follows the message.
    """
    prefix = f"{program_name()}: "
    print(prefix + (message.replace("\n", "\n" + prefix) if repeat else message), end=end, file=sys.stderr)


def stock_text(error: QcowError) -> str:
    """What qemu-img says where this error occurs; several lines when there are hints."""
    return error.stock.replace("{program}", program_name())


def stock_errno(error: QcowError) -> str | None:
    """The words for QEMU's error number, where qemu-img says nothing else; None where there is no such number."""
    return None if error.errno is None else os.strerror(error.errno)


def warn_of_sharing(arguments: Arguments) -> bool:
    """Whether -U was given; says then what that means, for verbs whose answer somebody will rely on later."""
    shared = arguments.has("force-share")
    if shared:
        report("warning: with --force-share the answer is wrong if somebody writes the image meanwhile")
    return shared


def report_error(error: QcowError) -> int:
    """Print an error that ends a command; returns the exit code for it."""
    cause = error.__cause__ or error
    text = "; ".join([stock_text(error), *getattr(cause, "__notes__", ())])  # a note says what was lost on the way
    if isinstance(error, CommandFailed):
        report(text, repeat=error.repeat, end=error.end)
        return error.code
    report(text)
    return ERROR_EXIT_CODE


def wants_json(arguments: Arguments) -> bool:
    """Whether --output=json was given.

    Raises:
        CommandFailed: another word than human and json.
    """
    output = arguments.last("output")
    if output not in (None, "human", "json"):
        raise CommandFailed("--output must be used with human or json as argument.")
    return output == "json"


def one_filename(arguments: Arguments) -> str:
    """The single operand."""
    if len(arguments.operands) != 1:
        raise UsageError("Expecting one image file name")
    return arguments.operands[0]


def size_argument(text: str, name: str, *, minimum: int = 0, maximum: int = INT64_MAX) -> int:
    """A size in bytes given as an argument, by qemu-img's rules and with its messages."""
    try:
        return parse_size(text, name, minimum=minimum, maximum=maximum)
    except OptionError as error:
        raise CommandFailed(str(error), repeat=True) from None


def cache_mode(text: str | None, default: str, message: str) -> str:
    """A cache mode by its name; `message` is completed with a name that is none."""
    mode = default if text is None else text
    if mode not in CACHE_MODES:
        raise CommandFailed(f"{message}: {mode}")
    return "none" if mode == "off" else mode
