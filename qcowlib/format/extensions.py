"""Header extensions: kept as they are on disk, and the contents of those that are understood.

Source: qcow2.txt, "Header extensions", "Bitmaps extension", "Full disk encryption header pointer".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from qcowlib.errors import CorruptMetadata, FormatError
from qcowlib.format.constants import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_CRYPTO_HEADER,
    EXTENSION_DATA_FILE,
    EXTENSION_END,
    EXTENSION_FEATURE_NAMES,
    MAX_BITMAP_DIRECTORY_SIZE,
    MAX_BITMAPS,
    MAX_CLUSTER_SIZE_WITHOUT_FEATURE_NAMES,
)
from qcowlib.format.features import QEMU_FEATURE_NAMES, build_feature_names
from qcowlib.format.records import BITMAPS_EXTENSION, CRYPTO_EXTENSION, EXTENSION_HEADER, encode_text

# The order in which QEMU lays extensions out; unknown ones follow.
_QEMU_ORDER = (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_CRYPTO_HEADER,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_BITMAPS,
)


@dataclass(frozen=True)
class HeaderExtension:
    """One header extension.

    Attributes:
        magic: the type.
        data: its bytes, without padding.
        padding: the bytes up to the next multiple of 8 as found on disk; zeroes are written where it is short.
    """

    magic: int
    data: bytes
    padding: bytes = b""

    def build(self) -> bytes:
        """Its bytes with type, length and padding."""
        missing = -len(self.data) % 8
        head = EXTENSION_HEADER.build({"magic": self.magic, "length": len(self.data)}, "header extension")
        return head + self.data + self.padding[:missing].ljust(missing, b"\0")


@dataclass(frozen=True)
class BitmapsExtension:
    """Where the bitmap directory is.

    Attributes:
        count: number of bitmaps.
        directory_size: bytes of the directory.
        directory_offset: host offset of the directory in bytes.
    """

    count: int
    directory_size: int
    directory_offset: int

    def build(self) -> HeaderExtension:
        """The header extension that says so."""
        data = BITMAPS_EXTENSION.build({**asdict(self), "reserved": 0}, "bitmaps extension")
        return HeaderExtension(EXTENSION_BITMAPS, data)


class CryptoHeader(NamedTuple):
    """Where the encryption header (LUKS) is: host offset and length in bytes."""

    offset: int
    length: int

    def build(self) -> HeaderExtension:
        """The header extension that says so."""
        return HeaderExtension(
            EXTENSION_CRYPTO_HEADER, CRYPTO_EXTENSION.build(self._asdict(), "encryption header pointer")
        )


class ExtensionArea(NamedTuple):
    """What lies between the header and the backing file name.

    Attributes:
        extensions: those before the end marker.
        length: bytes that they take.
        end: bytes up to the end of the end marker (of the extensions, where there is none).
        error: what ended the walk, if something did; the caller decides whether it matters.
    """

    extensions: tuple[HeaderExtension, ...]
    length: int
    end: int
    error: FormatError | None


def parse_extensions(area: bytes, start: int) -> ExtensionArea:
    """The extensions in the area between the header and the backing file name (or the end of the first cluster).

    Args:
        area: the bytes of that area.
        start: its host offset, for the error.
    """
    found: list[HeaderExtension] = []
    position = 0
    while position < len(area):
        data_start = position + EXTENSION_HEADER.size
        if data_start > len(area):
            return ExtensionArea(tuple(found), position, position, _too_large(start + position))
        # By hand: a first cluster of 2 MiB can hold 262,144 empty extensions, at 14 us each through the declaration.
        magic = int.from_bytes(area[position : position + 4], "big")
        length = int.from_bytes(area[position + 4 : data_start], "big")
        data_end = data_start + length
        if data_end > len(area):
            return ExtensionArea(tuple(found), position, position, _too_large(start + position))
        if magic == EXTENSION_END:
            return ExtensionArea(tuple(found), position, data_end, None)
        padded_end = min(data_end + -length % 8, len(area))
        found.append(HeaderExtension(magic, area[data_start:data_end], area[data_end:padded_end]))
        position = padded_end
    return ExtensionArea(tuple(found), position, position, None)


def _too_large(host_offset: int) -> FormatError:
    rule = "reaches beyond the area for header extensions"
    return FormatError("header extension", host_offset, rule, stock="Header extension too large")


def parse_bitmaps_extension(data: bytes, cluster_size: int) -> BitmapsExtension:
    """The contents of a bitmaps extension.

    Raises:
        CorruptMetadata: a field breaks a rule; the limits are QEMU's.
    """
    structure = "bitmaps extension"
    if len(data) != BITMAPS_EXTENSION.size:
        raise CorruptMetadata(structure, None, f"has {len(data)} bytes instead of {BITMAPS_EXTENSION.size}")
    fields = BITMAPS_EXTENSION.parse(data, structure)
    if fields.pop("reserved"):
        stock = "bitmaps_ext: Reserved field is not zero"
        raise CorruptMetadata(structure, None, "a reserved field is not zero", stock=stock)
    extension = BitmapsExtension(**fields)
    count, offset, size = extension.count, extension.directory_offset, extension.directory_size
    if not 1 <= count <= MAX_BITMAPS:
        rule = f"the number of bitmaps, {count}, is not within 1 to {MAX_BITMAPS}"
        stock = (
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
            if count
            else "found bitmaps extension with zero bitmaps"
        )
        raise CorruptMetadata(structure, None, rule, stock=stock)
    if offset % cluster_size:
        stock = "bitmaps_ext: invalid bitmap directory offset"
        raise CorruptMetadata("bitmap directory", offset, "is not cluster aligned", stock=stock)
    if size > MAX_BITMAP_DIRECTORY_SIZE:
        rule = f"its size of {size} bytes exceeds the limit of {MAX_BITMAP_DIRECTORY_SIZE}"
        maximum = f"exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY_SIZE})"
        stock = f"bitmaps_ext: bitmap directory size ({size}) {maximum}"
        raise CorruptMetadata("bitmap directory", offset, rule, stock=stock)
    return extension


def parse_crypto_header(data: bytes, cluster_size: int) -> CryptoHeader:
    """The contents of an encryption header pointer.

    Raises:
        CorruptMetadata: the length is wrong or the offset is not cluster aligned.
    """
    structure = "encryption header pointer"
    if len(data) != CRYPTO_EXTENSION.size:
        rule = f"has {len(data)} bytes instead of {CRYPTO_EXTENSION.size}"
        stock = f"CRYPTO header extension size {len(data)}, but expected size {CRYPTO_EXTENSION.size}"
        raise CorruptMetadata(structure, None, rule, stock=stock)
    pointer = CryptoHeader(**CRYPTO_EXTENSION.parse(data, structure))
    if pointer.offset % cluster_size:
        stock = f"Encryption header offset '{pointer.offset}' is not a multiple of cluster size '{cluster_size}'"
        raise CorruptMetadata("encryption header", pointer.offset, "is not cluster aligned", stock=stock)
    return pointer


def new_extensions(
    version: int,
    cluster_size: int,
    *,
    backing_format: str | None = None,
    data_file_name: str | None = None,
    crypto_header: CryptoHeader | None = None,
    bitmaps: BitmapsExtension | None = None,
) -> tuple[HeaderExtension, ...]:
    """The extensions of a new image, as qemu-img 7.2 writes them.

    The feature name table comes with version 3 unless the clusters are so small that the backing file name needs the
    room.
    """
    found = []
    if backing_format is not None:
        found.append(HeaderExtension(EXTENSION_BACKING_FORMAT, encode_text(backing_format, "backing format")))
    if data_file_name is not None:
        found.append(HeaderExtension(EXTENSION_DATA_FILE, encode_text(data_file_name, "data file name")))
    if crypto_header is not None:
        found.append(crypto_header.build())
    if version >= 3 and cluster_size > MAX_CLUSTER_SIZE_WITHOUT_FEATURE_NAMES:
        found.append(HeaderExtension(EXTENSION_FEATURE_NAMES, build_feature_names(QEMU_FEATURE_NAMES)))
    if bitmaps is not None:
        found.append(bitmaps.build())
    return tuple(found)


def in_qemu_order(extensions: Iterable[HeaderExtension]) -> tuple[HeaderExtension, ...]:
    """Extensions in the order in which QEMU writes them, unknown ones last."""
    place = {magic: index for index, magic in enumerate(_QEMU_ORDER)}
    return tuple(sorted(extensions, key=lambda extension: place.get(extension.magic, len(place))))
