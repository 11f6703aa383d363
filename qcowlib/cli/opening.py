"""From the name on the command line to an open image.

    FILENAME                       a path, or json:{...}; -f says the format
    --image-opts driver=qcow2,...  the same options as a list; encrypt.key-secret names an --object secret

Failures are told as qemu-img does: Could not open 'FILENAME as given': reason.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.cli.common import CommandFailed, program_name, report, stock_text
from qcowlib.cli.options import Arguments, parse_key_values
from qcowlib.cli.qapi import Value, dumps
from qcowlib.cli.secrets import read_secrets
from qcowlib.errors import ChainError, OptionError, QcowError, StorageError
from qcowlib.image.drivers import KNOWN_FORMATS

if TYPE_CHECKING:
    from qcowlib.image.qcow2 import Qcow2Image
    from qcowlib.image.raw import RawImage, WritableRawImage
    from qcowlib.image.references import Reference
    from qcowlib.image.writable import WritableQcow2Image


class ImageName(NamedTuple):
    """An image to open.

    Attributes:
        text: the name as given, for messages.
        shown: the name that info shows.
        reference: the local file and the way to look at it.
    """

    text: str
    shown: str
    reference: Reference

    @property
    def passphrase(self) -> bytes | None:
        """The passphrase; None when no secret is named.

        Raises:
            CommandFailed: a secret that is named, for this layer or one below it, does not exist.
        """
        layer: Reference | None = self.reference
        while layer is not None:
            if layer.key_secret is not None and layer.passphrase is None:
                raise CommandFailed(f"Could not open '{self.text}': No secret with id '{layer.key_secret}'")
            layer = layer.backing.reference if layer.backing is not None else None
        return self.reference.passphrase

    @staticmethod
    def of_file(text: str, image_format: str | None = None) -> ImageName:
        """A name that is a path or json: text."""
        return _parsed(text, text, image_format, {})


def image_name(arguments: Arguments, text: str) -> ImageName:
    """An image named on the command line, with the options that say how to open it.

    Args:
        arguments: --object, --image-opts and --format are taken from here.
        text: the file name, or the list of options with --image-opts.

    Raises:
        CommandFailed: the name or the options cannot be used.
    """
    image_format = arguments.last("format")
    secrets = read_secrets(arguments)
    if not arguments.has("image-opts"):
        return _parsed(text, text, image_format, secrets)
    if image_format is not None:
        raise CommandFailed("--image-opts and --format are mutually exclusive")
    return options_name(text, secrets, force_share=arguments.has("force-share"))


def options_name(text: str, secrets: dict[str, bytes], *, force_share: bool = False) -> ImageName:
    """An image described by a list of options.

    Args:
        text: the list.
        secrets: passphrases by id.
        force_share: whether -U is given; the options must not say otherwise.

    Raises:
        CommandFailed: the options cannot be used.
    """
    options: dict[str, Value] = {element.name: element.value for element in parse_key_values(text, first="file")}
    if isinstance(options.get("file"), str):
        node = options["file"]
        raise CommandFailed(f"Could not open '{text}': Cannot find device='{node}' nor node-name='{node}'")
    if force_share and options.get("force-share", "on") != "on":
        raise CommandFailed("--force-share/-U conflicts with image options")
    if not any(name == "driver" or name.startswith("file.") for name in options):
        raise CommandFailed(f"Could not open '{text}': Must specify either driver or file")
    return _parsed(text, "json:" + dumps(options, pretty=False), None, secrets)


def open_image_name(
    name: ImageName, *, force_share: bool, open_backing: bool, with_key: bool = False
) -> Qcow2Image | RawImage:
    """Open an image for reading.

    Args:
        name: what to open.
        force_share: read although somebody else writes.
        open_backing: follow the names of local files inside the image; False opens nothing but the file itself.
        with_key: use the passphrase in that case, too.

    Raises:
        CommandFailed: it cannot be opened.
    """
    from qcowlib.image.opening import open_image
    from qcowlib.image.policy import LocalFiles

    passphrase = name.passphrase if open_backing or with_key else None
    try:
        image = open_image(
            name.reference,
            policy=LocalFiles(),
            force_share=force_share,
            passphrase=passphrase,
            open_backing=open_backing,
        )
    except QcowError as error:
        raise not_opened(name, error) from error
    _warn_of_stale_bitmaps(image)
    return image


def open_image_name_for_check(name: ImageName, *, force_share: bool) -> Qcow2Image | RawImage:
    """Open an image to be checked; see `open_image_name`."""
    from qcowlib.image.opening import open_for_check

    try:
        image = open_for_check(name.reference, force_share=force_share)
    except QcowError as error:
        raise not_opened(name, error) from error
    _warn_of_stale_bitmaps(image)
    return image


def open_image_name_for_repair(
    name: ImageName, mode: str, *, dry_run: bool, force_share: bool
) -> Qcow2Image | RawImage:
    """Open an image to be repaired, for reading only where the repair is but planned; see `open_image_name`."""
    from qcowlib.image.opening import open_for_repair

    if force_share and not dry_run:
        raise CommandFailed(f"Could not open '{name.text}': force-share=on can only be used with read-only images")
    try:
        image = open_for_repair(name.reference, mode, dry_run=dry_run, force_share=force_share)
    except QcowError as error:
        raise not_opened(name, error) from error
    _warn_of_stale_bitmaps(image)
    return image


def open_image_name_for_writing(name: ImageName, *, open_backing: bool) -> WritableQcow2Image | WritableRawImage:
    """Open an image for reading and writing; see `open_image_name`."""
    from qcowlib.image.opening import open_image
    from qcowlib.image.policy import LocalFiles

    passphrase = name.passphrase if open_backing else None
    try:
        image = open_image(
            name.reference,
            writable=True,
            policy=LocalFiles(),
            passphrase=passphrase,
            open_backing=open_backing,
        )
    except QcowError as error:
        raise not_opened(name, error) from error
    _warn_of_stale_bitmaps(image)
    return image


def with_known_format(name: ImageName) -> ImageName:
    """The name with a format, for verbs that write: that an image is raw is only guessed, with a warning.

    Raises:
        CommandFailed: it cannot be opened.
    """
    from dataclasses import replace

    from qcowlib.image.probe import probe_format
    from qcowlib.storage.local import open_local

    if name.reference.format is not None or name.reference.windows:
        return name
    try:
        with open_local(name.reference.path, writable=False, force_share=True) as storage:
            found = probe_format(storage)
    except QcowError:
        return name  # whoever opens it for writing says why that is not possible
    if found == "raw":
        print(
            f"WARNING: Image format was not specified for '{name.reference.path}' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will "
            "be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions.",
            file=sys.stderr,
        )
    return name._replace(reference=replace(name.reference, format=found))


def _warn_of_stale_bitmaps(image: Qcow2Image | RawImage) -> None:
    from qcowlib.format.constants import EXTENSION_BITMAPS
    from qcowlib.format.features import Autoclear
    from qcowlib.image.raw import RawImage

    if isinstance(image, RawImage):
        return
    header = image.header
    if header.extension(EXTENSION_BITMAPS) is None or header.autoclear_features & Autoclear.BITMAPS:
        return
    reason = (
        "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
        if header.version >= 3
        else "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent "
        "bitmap support; so now they must all be considered inconsistent"
    )
    hint = f"Some clusters may be leaked, run '{program_name()} check -r' on the image file to fix."
    report(f"warning: {reason}\n{hint}", end="")


def not_opened(name: ImageName, error: QcowError) -> CommandFailed:
    """The message for an image that cannot be opened."""
    if isinstance(error, StorageError) and "driver requires" in str(error.cause.strerror):
        error = OptionError(str(error.cause.strerror))  # what is no file at all: qemu-img says so without a prefix
    return CommandFailed(f"Could not open '{name.text}': {stock_text(error)}")


def _parsed(text: str, name: str, image_format: str | None, secrets: dict[str, bytes]) -> ImageName:
    from dataclasses import replace

    from qcowlib.image.references import parse_image_name, with_passphrases

    if image_format is not None and image_format not in KNOWN_FORMATS:
        raise CommandFailed(f"Could not open '{text}': Unknown driver '{image_format}'")
    try:
        reference = parse_image_name(name)
    except ChainError as error:
        raise CommandFailed(f"Could not open '{text}': {stock_text(error)}") from None
    if image_format is not None:
        if reference.format not in (None, image_format):
            raise CommandFailed(f"Could not open '{text}': Driver specified twice")
        reference = replace(reference, format=image_format)
    if not reference.path:
        raise CommandFailed(f"Could not open '{text}': The 'file' block driver requires a file name")
    shown = _shown(reference, as_texts=not text.startswith("json:"))
    return ImageName(text, shown, with_passphrases(reference, secrets))


def _shown(reference: Reference, *, as_texts: bool) -> str:
    """The path, or driver options as JSON where the path alone does not say what is opened.

    Args:
        reference: what is opened.
        as_texts: numbers came as texts, from an option list, and are shown as such.
    """
    described: dict[str, Value] = {"driver": "file", "filename": reference.path}
    plain = True
    for window in reference.windows:
        described = {"driver": "raw", "file": described}
        described["offset"] = str(window.offset) if as_texts else window.offset
        if window.size is not None:
            described["size"] = str(window.size) if as_texts else window.size
        plain = False
    if reference.key_secret is not None:
        secret = reference.key_secret
        described = {"driver": reference.format or "qcow2", "encrypt.key-secret": secret, "file": described}
        plain = False
    return reference.path if plain else "json:" + dumps(described, pretty=False)
