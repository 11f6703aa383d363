"""Sizes as people write and read them, by the rules of qemu-img, and rounding to multiples."""

from __future__ import annotations

import math
import re

from qcowlib.errors import OptionError

INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1
UINT64_MAX = (1 << 64) - 1

_SUFFIXES = "bkmgtpe"
_DECIMAL = re.compile(r"\s*\+?(?P<whole>\d+)(?P<fraction>\.\d*)?(?P<suffix>[bkmgtpe])?", re.ASCII | re.IGNORECASE)
_HEXADECIMAL = re.compile(r"\s*\+?0x(?P<digits>[0-9a-f]+)(?P<suffix>[kmgtp])?", re.ASCII | re.IGNORECASE)


class SizeSyntaxError(OptionError):
    """The text is not a size at all."""


class SizeRangeError(OptionError):
    """The text is a size, but too large or too small."""


def size_value(text: str, *, default_suffix: str = "b", base: int = 1024) -> int:
    """Bytes that a size text means; decimal with fraction and suffix, or hexadecimal.

    Args:
        text: "512", "64k", "1.5G", "0x200"; the suffix may be of either case. Fractions need a suffix above byte
            and are rounded half up to whole bytes.
        default_suffix: suffix that a text without one is given.
        base: what one suffix step multiplies by, 1024 or 1000.

    Raises:
        SizeSyntaxError: not a size.
        SizeRangeError: 2^64 or more.

    Source: QEMU's size parser (qemu_strtosz).
    """
    if match := _HEXADECIMAL.fullmatch(text):
        whole, fraction = int(match["digits"], 16), 0.0
    elif match := _DECIMAL.fullmatch(text):
        whole = int(match["whole"])
        fraction = float(f"0{match['fraction']}0") if match["fraction"] else 0.0
    else:
        raise SizeSyntaxError(f"'{text}' is not a size")
    if whole > UINT64_MAX:
        raise SizeRangeError(f"'{text}' is too large")
    scale: int = base ** _SUFFIXES.index((match["suffix"] or default_suffix).lower())
    fixed_point = min(int(fraction * 2.0**64), UINT64_MAX)
    if scale == 1 and fixed_point:
        raise SizeSyntaxError(f"'{text}' is a fraction of a byte")
    value = whole * scale + ((fixed_point * scale + (1 << 63)) >> 64)
    if value > UINT64_MAX:
        raise SizeRangeError(f"'{text}' is too large")
    return value


def parse_size(text: str, name: str = "image size", *, minimum: int = 0, maximum: int = INT64_MAX) -> int:
    """Bytes of a size argument.

    Args:
        text: see `size_value`.
        name: what the size is for, as it stands in the message.
        minimum: smallest allowed value in bytes.
        maximum: largest allowed value in bytes.

    Raises:
        OptionError: not a size or outside the limits, in qemu-img's words (two lines for a text that is no size).
    """
    try:
        value = size_value(text)
    except SizeSyntaxError:
        raise OptionError(
            f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for\n"
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None
    except SizeRangeError:
        value = maximum + 1
    if not minimum <= value <= maximum:
        raise OptionError(f"Invalid {name} specified. Must be between {minimum} and {maximum}.")
    return value


def format_size(size: int) -> str:
    """A size for people, with three significant digits: "1 GiB", "196 KiB", "0.977 KiB".

    The next higher unit is used from 1000 of the lower one on. Source: QEMU's size_to_str.
    """
    exponent = math.frexp(size / (1000.0 / 1024.0))[1]
    step = max(exponent - 1, 0) // 10
    prefix = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")[step]
    return f"{size / (1 << (10 * step)):.3g} {prefix}B"


def round_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def round_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is not above `value`."""
    return value // alignment * alignment
