"""qcow amend: options of an image that exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcowlib.cli.common import (
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHORT_FORMAT,
    CommandFailed,
    cache_mode,
    report_error,
)
from qcowlib.cli.creation_options import (
    FILE_OPTIONS,
    FORMAT_OPTIONS,
    CreationOption,
    is_on,
    parse_option_list,
    print_options,
)
from qcowlib.cli.opening import image_name, open_image_name_for_writing, with_known_format
from qcowlib.cli.options import Arguments, Option, Syntax, UsageError, help_wanted, join_option_lists
from qcowlib.cli.progress import Progress
from qcowlib.cli.secrets import read_secrets
from qcowlib.errors import OptionError, QcowError
from qcowlib.image.drivers import KNOWN_FORMATS

if TYPE_CHECKING:
    from qcowlib.image.writable import WritableQcow2Image
    from qcowlib.operations.amend import KeySlotChange

SYNTAX = Syntax(
    "amend",
    "[--object OBJECT] [--image-opts] [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILENAME",
    (
        Option("options", "o", "", "OPTIONS", "name=value,... to be changed; -o help lists them"),
        SHORT_FORMAT,
        Option("cache", "t", "", "CACHE", "cache mode; the change is on disk at the end in all of them"),
        Option("force", "", "force", None, "overwrite a key slot in use; erase the last one: the data is lost then"),
        PROGRESS,
        QUIET,
        OBJECT,
        IMAGE_OPTS,
    ),
    "Exit codes: 0 done, 1 not done, or not all of it.",
)

_COMMON = (
    "size", "compat", "backing_file", "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits",
)  # fmt: skip
_OPTIONS = (
    CreationOption("encrypt.state", "str", "Select new state of affected keyslots (active/inactive)"),
    CreationOption("encrypt.keyslot", "num", "Select a single keyslot to modify explicitly"),
    CreationOption("encrypt.old-secret", "str", "Select all keyslots that match this password"),
    CreationOption("encrypt.new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    CreationOption("encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    *(option for option in FORMAT_OPTIONS["qcow2"] if option.name in _COMMON),
)


def run(arguments: Arguments) -> int:
    """Amend one image."""
    option_text = join_option_lists(arguments.all("options"))
    if option_text is None:
        raise UsageError("Must specify options (-o)")
    enabled = arguments.has("progress") and not arguments.has("quiet")
    progress = Progress(enabled=enabled)
    try:
        return _amend(arguments, option_text, progress)
    finally:
        progress.end(complete=False)


def _amend(arguments: Arguments, option_text: str, progress: Progress) -> int:
    image_format, wants_help = arguments.last("format"), help_wanted(option_text)
    if image_format is not None and wants_help:
        return _print_help(image_format)
    if len(arguments.operands) != 1:
        raise CommandFailed("Expecting one image file name")
    cache_mode(arguments.last("cache"), "writeback", "Invalid cache option")
    name = with_known_format(image_name(arguments, arguments.operands[0]))
    with open_image_name_for_writing(name, open_backing=True) as image:
        from qcowlib.image.writable import WritableQcow2Image

        if wants_help:
            return _print_help(image.format)
        if not isinstance(image, WritableQcow2Image):
            raise CommandFailed(f"Format driver '{image.format}' does not support option amendment")
        values = _values(option_text)
        progress.start()
        try:
            _change(image, values, read_secrets(arguments), name.passphrase, arguments.has("force"), progress)
        except QcowError as error:
            progress(1, 1)
            return report_error(error)
        progress(1, 1)
    return 0


def _print_help(image_format: str) -> int:
    if image_format not in KNOWN_FORMATS:
        raise CommandFailed(f"Unknown file format '{image_format}'")
    if image_format != "qcow2":
        raise CommandFailed(f"Format driver '{image_format}' does not support option amendment")
    print(f"Amend options for '{image_format}':")
    print_options(_OPTIONS)
    return 0


def _values(option_text: str) -> dict[str, str]:
    try:
        return parse_option_list(_OPTIONS, option_text)
    except OptionError as error:
        try:
            parse_option_list((*_OPTIONS, *FORMAT_OPTIONS["qcow2"], *FILE_OPTIONS["qcow2"]), option_text)
        except OptionError:
            raise error from None
        raise CommandFailed(f"{error}\nThis option is only supported for image creation") from None


def _change(
    image: WritableQcow2Image,
    values: dict[str, str],
    secrets: dict[str, bytes],
    passphrase: bytes | None,
    force: bool,
    progress: Progress,
) -> None:
    from qcowlib.format.constants import CRYPT_LUKS
    from qcowlib.operations.amend import amend

    def on(option: str) -> bool | None:
        return is_on(values[option]) if option in values else None

    def number(option: str) -> int | None:
        return int(values[option]) if option in values else None

    amend(
        image,
        compat=values.get("compat"),
        size=number("size"),
        backing_file=values.get("backing_file"),
        backing_fmt=values.get("backing_fmt"),
        data_file=values.get("data_file"),
        data_file_raw=on("data_file_raw"),
        lazy_refcounts=on("lazy_refcounts"),
        refcount_bits=number("refcount_bits"),
        key_slots=_key_slots(values, secrets, passphrase, encrypted=image.header.crypt_method == CRYPT_LUKS),
        force=force,
        progress=progress,
    )


def _key_slots(
    values: dict[str, str], secrets: dict[str, bytes], passphrase: bytes | None, *, encrypted: bool
) -> KeySlotChange | None:
    from qcowlib.operations.amend import KeySlotChange

    if not any(name.startswith("encrypt.") for name in values):
        return None
    if not encrypted:
        return KeySlotChange(active=True)  # to be refused, whatever it says
    state = values.get("encrypt.state")
    if state is None:
        raise CommandFailed("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise CommandFailed(f"Parameter 'state' does not accept value '{state}'")

    def secret(option: str) -> bytes | None:
        name = values.get(option)
        if name is not None and name not in secrets:
            raise CommandFailed(f"No secret with id '{name}'")
        return None if name is None else secrets[name]

    return KeySlotChange(
        active=state == "active",
        passphrase=passphrase,
        new_secret=secret("encrypt.new-secret"),
        old_secret=secret("encrypt.old-secret"),
        keyslot=int(values["encrypt.keyslot"]) if "encrypt.keyslot" in values else None,
        iter_time_ms=int(values["encrypt.iter-time"]) if "encrypt.iter-time" in values else None,
    )
