"""Feature bits and the feature name table.

Source: qcow2.txt, "Header" (incompatible, compatible and autoclear features) and "Feature name table".
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import KEEP, IntEnum, IntFlag
from typing import NamedTuple

from qcowlib.format.records import FEATURE_NAME, decode_text, encode_text

_STRUCTURE = "feature name table"


class Incompatible(IntFlag, boundary=KEEP):
    """Bits that a reader must understand to open the image."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag, boundary=KEEP):
    """Bits that a reader may ignore."""

    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag, boundary=KEEP):
    """Bits that a writer clears where it does not understand them."""

    BITMAPS = 1
    RAW_EXTERNAL = 2


KNOWN_INCOMPATIBLE = 0x1F
KNOWN_AUTOCLEAR = 0x3


class FeatureKind(IntEnum):
    """Which bitmask an entry of the feature name table names a bit of; other values are kept as plain integers."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


class FeatureName(NamedTuple):
    """One entry of the feature name table.

    Attributes:
        kind: a `FeatureKind` value.
        bit: number of the bit in that bitmask, 0 to 63.
        name: at most 46 bytes in UTF-8; undecodable bytes as surrogate escapes.
    """

    kind: int
    bit: int
    name: str


# What qemu-img 7.2 writes into each version 3 image, in its order.
QEMU_FEATURE_NAMES: tuple[FeatureName, ...] = (
    FeatureName(0, 0, "dirty bit"),
    FeatureName(0, 1, "corrupt bit"),
    FeatureName(0, 2, "external data file"),
    FeatureName(0, 3, "compression type"),
    FeatureName(0, 4, "extended L2 entries"),
    FeatureName(1, 0, "lazy refcounts"),
    FeatureName(2, 0, "bitmaps"),
    FeatureName(2, 1, "raw external data"),
)


def parse_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """Entries of a feature name table; a last entry that is cut short is completed with zeroes, as QEMU does."""
    names = []
    for start in range(0, len(data), FEATURE_NAME.size):
        entry = data[start : start + FEATURE_NAME.size].ljust(FEATURE_NAME.size, b"\0")
        fields = FEATURE_NAME.parse(entry, _STRUCTURE)
        name = decode_text(fields["name"])[0]
        if name or start + FEATURE_NAME.size <= len(data):
            names.append(FeatureName(fields["kind"], fields["bit"], name))
    return tuple(names)


def build_feature_names(names: Iterable[FeatureName]) -> bytes:
    """The data of a feature name table extension.

    Raises:
        FormatError: a name is longer than 46 bytes, or a number does not fit into a byte.
    """
    return b"".join(FEATURE_NAME.build(_fields(entry), _STRUCTURE) for entry in names)


def _fields(entry: FeatureName) -> dict[str, int | bytes]:
    return {"kind": entry.kind, "bit": entry.bit, "name": encode_text(entry.name, _STRUCTURE).ljust(46, b"\0")}


def describe_unknown_incompatible(bits: int, names: Iterable[FeatureName]) -> str:
    """The unknown incompatible bits by name, those without one as a hexadecimal mask; QEMU's text.

    Args:
        bits: the incompatible features that are not understood.
        names: the image's own feature name table.
    """
    found = []
    for kind, bit, name in names:
        if not name:  # QEMU's table ends at the first empty name
            break
        if kind == FeatureKind.INCOMPATIBLE and bit < 64 and bits >> bit & 1:
            found.append(name)
            bits &= ~(1 << bit)
    if bits:
        found.append(f"Unknown incompatible feature: {bits:x}")
    return f"Unsupported qcow2 feature(s): {', '.join(found)}"
