"""qcow measure: how large an image file becomes, before it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcowlib.cli.common import (
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    SHORT_FORMAT,
    CommandFailed,
    size_argument,
    wants_json,
)
from qcowlib.cli.creation_options import FORMAT_OPTIONS, library_options, parse_creation_options, require_creatable
from qcowlib.cli.opening import image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax, join_option_lists
from qcowlib.cli.qapi import dumps
from qcowlib.cli.secrets import read_secrets
from qcowlib.cli.selected_snapshot import open_selected, snapshot_selection
from qcowlib.errors import OptionError

if TYPE_CHECKING:
    from qcowlib.operations.measure import Measurement

SYNTAX = Syntax(
    "measure",
    "[--output=OFMT] [-O OUTPUT_FMT] [-o OPTIONS] [--size N | [--object OBJECT] [--image-opts] [-f FMT] [-l SNAPSHOT] "
    "[-U] FILENAME]",
    (
        Option("target-format", "O", "", "FMT", "format of the file: raw (default) or qcow2"),
        Option("options", "o", "", "OPTIONS", "name=value,... of the format, as for create"),
        Option("size", "", "size", "N", "size of the disk of a new image"),
        SHORT_FORMAT._replace(help="format of the source: qcow2 or raw (default: by its content)"),
        Option(
            "snapshot", "l", "", "SNAPSHOT", "read this snapshot: an id or name, or snapshot.id=ID,snapshot.name=NAME"
        ),
        OUTPUT,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "Two sizes in bytes: of the file that FILENAME is converted into (or of a new one), and of that file when all of\n"
    "its disk has been written. A snapshot is taken with its own disk size. Exit codes: 0 done, 1 failed.",
)

# Formats that qemu-img makes, but whose size it cannot tell either.
_NOT_MEASURED = frozenset({"file", "host_device", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"})
_MEASURED = ("cluster_size", "compat", "refcount_bits", "extended_l2", "preallocation", "encrypt_format")
_NO_EFFECT = ("encryption", "extent_size_hint", "nocow")
_CIPHER = ("encrypt_cipher_alg", "encrypt_cipher_mode")


def run(arguments: Arguments) -> int:
    """Measure one image."""
    option_text = join_option_lists(arguments.all("options"))
    snapshot = arguments.last("snapshot")
    selection = None if snapshot is None else snapshot_selection(snapshot)
    as_json = wants_json(arguments)
    text = arguments.last("size")
    size = None if text is None else size_argument(text, "image size")
    if len(arguments.operands) > 1:
        raise CommandFailed("At most one filename argument is allowed.")
    if not arguments.operands and any(arguments.has(name) for name in ("image-opts", "format", "snapshot")):
        raise CommandFailed("--image-opts, -f, and -l require a filename argument.")
    if arguments.operands and size is not None:
        raise CommandFailed("--size N cannot be used together with a filename.")
    if not arguments.operands and size is None:
        raise CommandFailed("Either --size N or one filename must be specified.")
    found = _measured(arguments, selection, option_text, size)
    if as_json:
        members = {"required": found.required, "fully-allocated": found.fully_allocated}
        print(dumps(members if found.bitmaps is None else members | {"bitmaps": found.bitmaps}))
        return 0
    print(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
    return 0


def _measured(
    arguments: Arguments, selection: dict[str, str] | None, option_text: str | None, size: int | None
) -> Measurement:
    from qcowlib.operations.measure import measure

    if not arguments.operands:
        return measure(None, **_options(arguments, option_text, size))
    name = image_name(arguments, arguments.operands[0])
    with open_image_name(name, force_share=arguments.has("force-share"), open_backing=True) as image:
        source = image if selection is None else open_selected(image, selection)
        return measure(source, **_options(arguments, option_text, None))


def _options(arguments: Arguments, option_text: str | None, size: int | None) -> dict[str, Any]:
    """Keyword arguments of `measure`."""
    target_format = arguments.last("target-format") or "raw"
    if target_format in _NOT_MEASURED:
        raise CommandFailed(f"Block driver '{target_format}' does not support size measurement")
    require_creatable(target_format, ("raw", "qcow2", "luks"))
    try:
        values = parse_creation_options(target_format, option_text)
    except OptionError as error:
        raise CommandFailed(f"{error}\nInvalid options for file format '{target_format}'", repeat=True) from error
    if size is not None:
        values["size"] = str(size)
    options: dict[str, Any] = {"format": target_format, "size": int(values.get("size", "0"))}
    if target_format not in FORMAT_OPTIONS or target_format == "raw":
        return options
    prefix = "" if target_format == "luks" else "encrypt."
    encrypted = target_format == "luks" or values.get("encrypt.format") == "luks"
    if encrypted and f"{prefix}key-secret" not in values:
        from qcowlib.codecs.luks import luks_area_length

        luks_area_length(values.get(f"{prefix}cipher-alg", "aes-256"), values.get(f"{prefix}cipher-mode", "xts"))
        raise CommandFailed(f"Parameter '{prefix}key-secret' is required for cipher")
    known = library_options(
        {name: value for name, value in values.items() if name not in _NO_EFFECT}, read_secrets(arguments)
    )
    wanted = _MEASURED + (_CIPHER if encrypted else ())
    options |= {name: known[name] for name in wanted if name in known}
    if "backing_file" in values:
        options["backing_file"] = values["backing_file"]
    return options
