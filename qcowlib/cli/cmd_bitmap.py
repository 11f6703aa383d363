"""qcow bitmap: the persistent dirty bitmaps of an image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from qcowlib.cli.common import FORMAT, IMAGE_OPTS, OBJECT, CommandFailed, size_argument, stock_text
from qcowlib.cli.opening import ImageName, image_name, open_image_name, open_image_name_for_writing, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.errors import QcowError

if TYPE_CHECKING:
    from qcowlib.image.interface import BlockImage
    from qcowlib.operations.bitmap_changes import BitmapChanges

SYNTAX = Syntax(
    "bitmap",
    "(--add | --remove | --remove-all | --clear | --enable | --disable | --merge SOURCE)... [-b SOURCE_FILE "
    "[-F SOURCE_FMT]]\n       [-g GRANULARITY] [--object OBJECT] [--image-opts | -f FMT] FILENAME [BITMAP]",
    (
        Option("add", "", "add", None, "add the bitmap: nothing is marked in it, and writes are recorded"),
        Option("remove", "", "remove", None, "remove it; the only action for an inconsistent one"),
        Option("remove-all", "", "remove-all", None, "remove all bitmaps; BITMAP may be left out then"),
        Option("clear", "", "clear", None, "let nothing be marked in it"),
        Option("enable", "", "enable", None, "record writes"),
        Option("disable", "", "disable", None, "record no writes"),
        Option("merge", "", "merge", "SOURCE", "mark in it what the bitmap SOURCE has marked"),
        Option("source-file", "b", "source-file", "FILE", "with --merge: the image that has SOURCE"),
        Option("source-format", "F", "source-format", "FMT", "format of that image"),
        Option("granularity", "g", "granularity", "BYTES", "with --add: bytes of the disk for one bit, a power of 2"),
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
    ),
    "Several actions are done in the order given; one that fails ends the command, those before it stay done.\n"
    "The backing file is not opened. Exit codes: 0 done, 1 an action failed.",
)

_ACTIONS = ("add", "remove", "remove-all", "clear", "enable", "disable", "merge")


def run(arguments: Arguments) -> int:
    """Do all actions, one after the other."""
    text = arguments.last("granularity")
    granularity = size_argument(text, "granularity") if text is not None else 0
    actions = [(name, value) for name, value in arguments.options if name in _ACTIONS]
    source = arguments.last("source-file")
    for wrong, message in (
        (not actions, "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"),
        (granularity and not arguments.has("add"), "granularity only supported with --add"),
        (arguments.has("source-format") and source is None, "-F only supported with -b"),
        (source is not None and not arguments.has("merge"), "Merge bitmap source file only supported with --merge"),
    ):
        if wrong:
            raise CommandFailed(message)
    filename, bitmap = _operands(arguments, needs_name=any(name != "remove-all" for name, _ in actions))
    target = with_known_format(image_name(arguments, filename))
    with (
        open_image_name_for_writing(target, open_backing=False) as image,
        _source_image(source, arguments.last("source-format")) as other,
    ):
        from qcowlib.operations.bitmap_changes import change_bitmaps

        with change_bitmaps(image) as changes:
            for name, value in actions:
                try:
                    _act(changes, name, bitmap, value, other, granularity or None)
                except QcowError as error:
                    about = "all bitmaps" if name == "remove-all" else f"bitmap {bitmap}"
                    raise CommandFailed(f"Operation {name} on {about} failed: {stock_text(error)}") from error
    return 0


def _operands(arguments: Arguments, *, needs_name: bool) -> tuple[str, str]:
    operands = arguments.operands
    if len(operands) == 1 and not needs_name:
        return operands[0], ""
    if len(operands) != 2:
        raise CommandFailed("Expecting filename and bitmap name")
    return operands[0], operands[1]


def _source_image(source: str | None, image_format: str | None) -> BlockImage | nullcontext[None]:
    if source is None:
        return nullcontext()
    return open_image_name(ImageName.of_file(source, image_format), force_share=False, open_backing=False)


def _act(
    changes: BitmapChanges, action: str, bitmap: str, value: str, source: BlockImage | None, granularity: int | None
) -> None:
    if action == "add":
        changes.add(bitmap, granularity)
    elif action == "merge":
        changes.merge(bitmap, value, source)
    elif action == "remove-all":
        changes.remove_all()
    else:
        change = {
            "remove": changes.remove,
            "clear": changes.clear,
            "enable": changes.enable,
            "disable": changes.disable,
        }[action]
        change(bitmap)
