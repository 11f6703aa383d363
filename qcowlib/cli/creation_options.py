"""The options of new images (-o name=value): which there are, their help, how they are printed, what they mean.

texts -> parse_creation_options -> {name: text} -> formatting_line (what create prints)
                                                -> library_options (keywords of create_image)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from qcowlib.cli.common import CommandFailed
from qcowlib.cli.options import escape_commas, parse_key_values
from qcowlib.errors import OptionError
from qcowlib.image.drivers import KNOWN_FORMATS
from qcowlib.units import SizeRangeError, SizeSyntaxError, size_value

_TYPE_WORDS = {"str": "str", "bool": "bool (on/off)", "num": "num", "size": "size"}


class CreationOption(NamedTuple):
    """One option; `default` is shown by create when the option is not given."""

    name: str
    type: str
    help: str
    default: str | None = None


_SIZE = CreationOption("size", "size", "Virtual disk size")
_NOCOW = CreationOption("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)")
_EXTENT_SIZE_HINT = CreationOption("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable")
_CIPHER_OPTIONS = (
    CreationOption("cipher-alg", "str", "Name of encryption cipher algorithm"),
    CreationOption("cipher-mode", "str", "Name of encryption cipher mode"),
    CreationOption("ivgen-alg", "str", "Name of IV generator algorithm"),
    CreationOption("ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    CreationOption("hash-alg", "str", "Name of encryption hash algorithm"),
    CreationOption("iter-time", "num", "Time to spend in PBKDF in milliseconds"),
)
_RAW_PREALLOCATION = CreationOption("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)")

# In the order in which create prints them; the second half of each belongs to the host file, not to the format.
FORMAT_OPTIONS: dict[str, tuple[CreationOption, ...]] = {
    "raw": (_SIZE,),
    "file": (_SIZE, _NOCOW, _RAW_PREALLOCATION, _EXTENT_SIZE_HINT),
    "luks": (
        _SIZE,
        CreationOption("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
        *_CIPHER_OPTIONS,
    ),
    "qcow2": (
        CreationOption(
            "encryption",
            "bool",
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        ),
        CreationOption("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
        CreationOption("encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"),
        *(option._replace(name=f"encrypt.{option.name}") for option in _CIPHER_OPTIONS),
        CreationOption("cluster_size", "size", "qcow2 cluster size", "65536"),
        CreationOption("extended_l2", "bool", "Extended L2 tables", "off"),
        CreationOption("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
        CreationOption("compression_type", "str", "Compression method used for image cluster compression", "zlib"),
        _SIZE,
        CreationOption("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
        CreationOption("backing_file", "str", "File name of a base image"),
        CreationOption("backing_fmt", "str", "Image format of the base image"),
        CreationOption("data_file", "str", "File name of an external data file"),
        CreationOption("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
        CreationOption("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
        CreationOption("refcount_bits", "num", "Width of a reference count entry in bits", "16"),
    ),
}
FILE_OPTIONS = {
    "raw": (_NOCOW, _RAW_PREALLOCATION, _EXTENT_SIZE_HINT),
    "file": (),
    "luks": (_NOCOW, _RAW_PREALLOCATION, _EXTENT_SIZE_HINT),
    "qcow2": (_NOCOW, _EXTENT_SIZE_HINT),
}

# A LUKS volume has the options of encryption under shorter names.
_LUKS_NAMES = frozenset(("key-secret", *(option.name for option in _CIPHER_OPTIONS)))
_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
_NUMBER = re.compile(r"\s*([-+]?)(0x[0-9a-f]+|[0-9]+)", re.ASCII | re.IGNORECASE)


def require_creatable(image_format: str, formats: Collection[str] = ("raw", "qcow2")) -> None:
    """Refuse a format that no image can be made in.

    Args:
        image_format: its name.
        formats: what the command can make: by default, images to copy data into.

    Raises:
        OptionError: unknown, or known and not creatable here.
    """
    if image_format not in KNOWN_FORMATS:
        raise OptionError(f"Unknown file format '{image_format}'")
    if image_format not in formats:
        raise OptionError(f"Format driver '{image_format}' does not support image creation")


def print_option_help(image_format: str, filename: str | None) -> None:
    """The list of -o help; with a file name the options of the host file are in it.

    Raises:
        CommandFailed: the format has no such options.
    """
    try:
        require_creatable(image_format, FORMAT_OPTIONS)
    except OptionError as error:
        raise CommandFailed(str(error)) from None
    options = FORMAT_OPTIONS[image_format]
    if filename is not None:
        options += FILE_OPTIONS[image_format]
    print("Supported options:" if filename is not None else f"Supported {image_format} options:")
    print_options(options)
    if filename is None:
        print(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options."
        )


def print_options(options: Iterable[CreationOption]) -> None:
    """The lines of -o help, sorted."""
    for line in sorted(f"  {f'{option.name}=<{_TYPE_WORDS[option.type]}>':<22} - {option.help}" for option in options):
        print(line)


def parse_option_list(known: Iterable[CreationOption], text: str) -> dict[str, str]:
    """Values by option name; sizes and numbers are normalised to decimal.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
    """
    options = {option.name: option for option in known}
    values: dict[str, str] = {}
    for element in parse_key_values(text):
        if element.name == "id":
            continue  # QEMU takes the name of an option list out of it
        if element.name not in options:
            raise OptionError(f"Invalid parameter '{element.name}'")
        values[element.name] = _checked(options[element.name], element.value)
    return values


def is_on(value: str) -> bool:
    """Whether the value of a bool option means on."""
    return value in _TRUE


def parse_creation_options(image_format: str, text: str | None) -> dict[str, str]:
    """Values by option name; sizes and numbers are normalised to decimal.

    Raises:
        OptionError: an unknown option or a value of the wrong type.
    """
    return parse_option_list(FORMAT_OPTIONS[image_format] + FILE_OPTIONS[image_format], text or "")


def formatting_line(filename: str, image_format: str, values: dict[str, str]) -> str:
    """What create prints: all options that are given or have a default."""
    words = [f"Formatting '{filename}', fmt={image_format}"]
    for option in FORMAT_OPTIONS[image_format] + FILE_OPTIONS[image_format]:
        value = values.get(option.name, option.default)
        if value is not None:
            words.append(f"{option.name}={escape_commas(value) if option.type == 'str' else value}")
    return " ".join(words)


def library_options(values: dict[str, str], secrets: dict[str, bytes]) -> dict[str, object]:
    """Keyword arguments of `create_image` for all options but size and backing file.

    Args:
        values: what `parse_creation_options` gave.
        secrets: passphrases by id, for encrypt.key-secret.

    Raises:
        OptionError: the secret is not there, or an option has no effect here.
    """
    options: dict[str, object] = {}
    for option, value in values.items():
        name = f"encrypt.{option}" if option in _LUKS_NAMES else option
        if name in {"size", "backing_file", "backing_fmt", "encryption", "encrypt.key-secret"}:
            continue
        if name == "extent_size_hint":
            if value != "0":
                raise OptionError("extent_size_hint is not available: the host's own allocation is used")
        elif name == "encrypt.iter-time":
            options["encrypt_iter_time_ms"] = int(value)
        elif name in {"cluster_size", "refcount_bits"}:
            options[name] = int(value)
        elif name in {"extended_l2", "data_file_raw", "lazy_refcounts", "nocow"}:
            options[name] = value in _TRUE
        else:
            options[name.replace(".", "_").replace("-", "_")] = value
    if values.get("encryption") in _TRUE:
        if "encrypt_format" in options:
            raise OptionError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
        options["encrypt_format"] = "aes"
    key_secret = values.get("encrypt.key-secret", values.get("key-secret"))
    if key_secret is not None:
        if key_secret not in secrets:
            raise OptionError(f"No secret with id '{key_secret}'")
        options["encrypt_passphrase"] = secrets[key_secret]
    return options


def size_parameter(text: str) -> int:
    """The size that an option named "size" stands for; as for QEMU, from 2^63 on it is negative.

    Raises:
        OptionError: no size.
    """
    return _signed(_size("size", text))


def _checked(option: CreationOption, value: str) -> str:
    if option.type == "bool" and value not in _TRUE + _FALSE:
        raise OptionError(f"Parameter '{option.name}' expects 'on' or 'off'")
    if option.type == "num":
        return str(_number(option.name, value))
    if option.type == "size":
        return str(_signed(_size(option.name, value)))
    return value


def _number(name: str, value: str) -> int:
    match = _NUMBER.fullmatch(value)
    digits = match[2].lower() if match else ""
    octal = len(digits) > 1 and digits.startswith("0") and not digits.startswith("0x")
    try:
        number = int(digits, 16 if digits.startswith("0x") else 8 if octal else 10)
    except ValueError:
        raise OptionError(f"Parameter '{name}' expects a number") from None
    if number >= 1 << 64:
        raise OptionError(f"Value '{value}' is too large for parameter '{name}'")
    # As C does it, a minus sign counts modulo 2^64, and 2^63 and more is shown as negative.
    return _signed(-number % (1 << 64) if match and match[1] == "-" else number)


def _size(name: str, value: str) -> int:
    try:
        return size_value(value)
    except SizeSyntaxError:
        raise OptionError(
            f"Parameter '{name}' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        ) from None
    except SizeRangeError:
        raise OptionError(f"Value '{value}' is out of range for parameter '{name}'") from None


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
