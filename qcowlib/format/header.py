"""The qcow2 header with its extensions and the backing file name: bytes to a value and back.

    data --parse_header--> Header --dataclasses.replace--> Header --build--> bytes

A header that is built unchanged gives the very bytes it was parsed from, unknown fields and extensions included. When
the extensions, the backing file name or the header's length change, everything behind the fixed fields is laid out
afresh as QEMU does: header, extensions, end marker, backing file name.

Source: qcow2.txt, "Header"; what is refused follows QEMU 7.2's open.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qcowlib.addresses import Geometry, HostOffset
from qcowlib.errors import FormatError, OptionError, UnsupportedFeature
from qcowlib.format import constants as k
from qcowlib.format.extensions import (
    BitmapsExtension,
    CryptoHeader,
    HeaderExtension,
    in_qemu_order,
    parse_bitmaps_extension,
    parse_crypto_header,
    parse_extensions,
)
from qcowlib.format.features import Autoclear, FeatureName, Incompatible, parse_feature_names
from qcowlib.format.header_rules import check_extensions, check_features, check_structure, check_tables
from qcowlib.format.records import HEADER_V2, HEADER_V3, decode_text, encode_text


@dataclass(frozen=True)
class _Layout:
    """How the bytes behind the fixed fields lay on disk, and for which values that holds.

    Attributes:
        key: the header length, extensions and backing file name that were laid out so.
        extensions_length: bytes of the extensions, without the end marker.
        tail: end marker, gap and backing file name.
        backing_file_offset: host offset of the name as in the header field.
        backing_file_size: length of the name as in the header field.
    """

    key: tuple[int, tuple[HeaderExtension, ...], str | None]
    extensions_length: int
    tail: bytes
    backing_file_offset: int
    backing_file_size: int


@dataclass(frozen=True)
class Header:
    """A qcow2 header.

    Attributes:
        version: 2 or 3.
        cluster_bits: log2 of the cluster size in bytes.
        size: virtual disk size in bytes.
        l1_size: entries of the active L1 table.
        l1_table_offset: host offset of the active L1 table in bytes.
        refcount_table_offset: host offset of the refcount table in bytes.
        refcount_table_clusters: clusters of the refcount table.
        crypt_method: 0 none, 1 AES, 2 LUKS.
        nb_snapshots: entries of the snapshot table.
        snapshots_offset: host offset of the snapshot table in bytes.
        incompatible_features, compatible_features, autoclear_features: the feature bits, 0 in version 2.
        refcount_order: log2 of the refcount width in bits, 4 in version 2.
        header_length: bytes of the header structure, 72 in version 2.
        compression_type: 0 zlib, 1 zstd.
        unknown_fields: the header's bytes behind compression_type.
        backing_file: name of the backing file (undecodable bytes as surrogate escapes), None when there is none.
        extensions: the header extensions in their order on disk, without the end marker.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    crypt_method: int = k.CRYPT_NONE
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = k.V2_REFCOUNT_ORDER
    header_length: int = k.V3_HEADER_LENGTH
    compression_type: int = k.COMPRESSION_ZLIB
    unknown_fields: bytes = b""
    backing_file: str | None = None
    extensions: tuple[HeaderExtension, ...] = ()
    layout: _Layout | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.version == 2:  # by definition, whatever was asked for
            object.__setattr__(self, "header_length", k.V2_HEADER_LENGTH)

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes that follow from the header."""
        return Geometry(self.cluster_bits, self.refcount_order, self.extended_l2)

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def l1_offset(self) -> HostOffset:
        """Host offset of the active L1 table."""
        return HostOffset(self.l1_table_offset)

    @property
    def virtual_size(self) -> int:
        """The disk size that QEMU shows a guest: whole 512-byte sectors."""
        return self.size & -512

    @property
    def dirty(self) -> bool:
        """Refcounts may be wrong: the image was not closed."""
        return bool(self.incompatible_features & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        """Some structure is known to be damaged; the image must not be written."""
        return bool(self.incompatible_features & Incompatible.CORRUPT)

    @property
    def has_data_file(self) -> bool:
        """Guest clusters are in an external data file."""
        return bool(self.incompatible_features & Incompatible.DATA_FILE)

    @property
    def has_raw_data_file(self) -> bool:
        """The external data file is a raw image of the disk as well."""
        return self.has_data_file and bool(self.autoclear_features & Autoclear.RAW_EXTERNAL)

    @property
    def extended_l2(self) -> bool:
        """L2 entries have subcluster bitmaps."""
        return bool(self.incompatible_features & Incompatible.EXTENDED_L2)

    def extension(self, magic: int) -> bytes | None:
        """Data of the extension of this type; of the last one where a type is repeated, as QEMU takes it."""
        return next((extension.data for extension in reversed(self.extensions) if extension.magic == magic), None)

    @property
    def backing_format(self) -> str | None:
        """Name of the backing file's format."""
        return _text(self.extension(k.EXTENSION_BACKING_FORMAT))

    @property
    def data_file_name(self) -> str | None:
        """Name of the external data file."""
        return _text(self.extension(k.EXTENSION_DATA_FILE))

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """The image's own feature name table."""
        return parse_feature_names(self.extension(k.EXTENSION_FEATURE_NAMES) or b"")

    @property
    def bitmaps_extension(self) -> BitmapsExtension | None:
        """Where the bitmap directory is; None where the autoclear bit says that it is not to be trusted."""
        data = self.extension(k.EXTENSION_BITMAPS)
        if data is None or not self.autoclear_features & Autoclear.BITMAPS:
            return None
        return parse_bitmaps_extension(data, self.cluster_size)

    @property
    def crypto_header(self) -> CryptoHeader | None:
        """Where the LUKS header is."""
        data = self.extension(k.EXTENSION_CRYPTO_HEADER)
        return None if data is None else parse_crypto_header(data, self.cluster_size)

    def check_content_rules(self) -> None:
        """What must hold to read guest data, though not to show the header; QEMU checks it at the same point.

        Raises:
            FormatError: a rule does not hold.
        """
        if self.autoclear_features & Autoclear.RAW_EXTERNAL and not self.has_data_file:
            rule = "the raw external data bit is set without an external data file"
            raise FormatError("header", 88, rule, stock="data-file-raw requires a data file")
        if self.crypt_method == k.CRYPT_LUKS and self.crypto_header is None:
            rule = "the encryption method LUKS needs an encryption header pointer"
            raise FormatError("header", 32, rule, stock="Missing CRYPTO header for crypt method 2")

    def extension_place(self, magic: int) -> int | None:
        """Host offset of the extension of this type (the last one, as in `extension`); None when there is none."""
        place, found = self.header_length, None
        for extension in self.extensions:
            found = place if extension.magic == magic else found
            place += len(extension.build())
        return found

    @property
    def extensions_end(self) -> int:
        """Host offset behind the last extension, where the end marker is."""
        if self.layout is not None and self.layout.key == self._layout_key:
            return self.header_length + self.layout.extensions_length
        return self.header_length + sum(len(extension.build()) for extension in self.extensions)

    def with_extension(self, magic: int, extension: HeaderExtension | None) -> tuple[HeaderExtension, ...]:
        """The extensions with those of a type replaced by one (or by none), in QEMU's order.

        Use: `replace(header, extensions=header.with_extension(magic, new))`.
        """
        kept = [old for old in self.extensions if old.magic != magic]
        return in_qemu_order(kept if extension is None else [*kept, extension])

    def build(self) -> bytes:
        """The bytes at host offset 0: header, extensions, end marker and backing file name.

        The rest of the first cluster holds nothing; after a change of layout it is to be written as zeroes, since what
        lies there may be a part of the old layout.

        Raises:
            OptionError: they do not fit into the first cluster.
            FormatError: a value does not fit into its field.
        """
        if self.layout is not None and self.layout.key == self._layout_key:
            return self._build(self.layout)
        end_marker = HeaderExtension(k.EXTENSION_END, b"").build()
        name = b"" if self.backing_file is None else encode_text(self.backing_file, "backing file name")
        if len(name) > k.MAX_BACKING_FILE_NAME:
            raise OptionError(f"the backing file name is longer than {k.MAX_BACKING_FILE_NAME} bytes")
        extensions_length = sum(len(extension.build()) for extension in self.extensions)
        name_offset = self.header_length + extensions_length + len(end_marker) if name else 0
        built = self._build(_Layout(self._layout_key, extensions_length, end_marker + name, name_offset, len(name)))
        if len(built) > self.cluster_size:
            raise OptionError("the header extensions and the backing file name do not fit into the first cluster")
        return built

    def with_backing_name_at(self, offset: int) -> Header:
        """The same header with its backing file name at a chosen place in the first cluster, behind the extensions.

        So a new name can be made durable before the first sector, which points to it, is written.

        Args:
            offset: host bytes.

        Raises:
            OptionError: it would overlap the extensions or leave the first cluster.
        """
        end_marker = HeaderExtension(k.EXTENSION_END, b"").build()
        name = encode_text(self.backing_file or "", "backing file name")
        extensions_length = sum(len(extension.build()) for extension in self.extensions)
        end = self.header_length + extensions_length + len(end_marker)
        if offset < end or offset + len(name) > self.cluster_size or len(name) > k.MAX_BACKING_FILE_NAME:
            raise OptionError(f"the backing file name does not fit at {offset} into the first cluster")
        tail = end_marker + bytes(offset - end) + name
        return replace(self, layout=_Layout(self._layout_key, extensions_length, tail, offset, len(name)))

    @property
    def _layout_key(self) -> tuple[int, tuple[HeaderExtension, ...], str | None]:
        return self.header_length, self.extensions, self.backing_file

    def _build(self, layout: _Layout) -> bytes:
        fields = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        fields["magic"] = k.MAGIC
        fields["backing_file_offset"] = layout.backing_file_offset
        fields["backing_file_size"] = layout.backing_file_size
        record = HEADER_V2 if self.version == 2 else HEADER_V3
        fixed = record.build(fields, "header")
        if self.version > 2:
            more = bytes((self.compression_type,)) + self.unknown_fields
            fixed += more[: self.header_length - len(fixed)].ljust(self.header_length - len(fixed), b"\0")
        extensions = b"".join(extension.build() for extension in self.extensions)
        return fixed + extensions[: layout.extensions_length] + layout.tail


_PLAIN_FIELDS = (
    "version",
    "cluster_bits",
    "size",
    "crypt_method",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "refcount_order",
    "header_length",
)


def header_span(start: bytes) -> int:
    """Bytes from the start of the file that `parse_header` needs to see.

    Args:
        start: the first bytes of the file, at least 512 where it is that long.
    """
    cluster_bits = int.from_bytes(start[20:24], "big")
    return 1 << cluster_bits if k.MIN_CLUSTER_BITS <= cluster_bits <= k.MAX_CLUSTER_BITS else len(start)


def parse_header(data: bytes, file_size: int | None = None, *, for_check: bool = False) -> Header:
    """The header that a file starts with.

    What lies behind the end of the file counts as zeroes, as for QEMU: a file that was cut inside its first cluster
    can still be looked at.

    Args:
        data: the first cluster, or all that the file has of it; more does no harm.
        file_size: bytes of the file; None when `data` is all of it.
        for_check: accept what a check must be able to report: no refcount table, an unusable snapshot table.

    Raises:
        UnsupportedFeature: another version, or incompatible features that are not known.
        FormatError: a field breaks a rule of the format or exceeds QEMU's limits.
    """
    fields = _parse_fields(data)
    check_structure(fields)
    cluster_size = 1 << fields["cluster_bits"]
    header_length = fields["header_length"]
    cluster = data[:cluster_size].ljust(cluster_size, b"\0")
    if header_length > k.COMPRESSION_TYPE_OFFSET:
        fields["compression_type"] = cluster[k.COMPRESSION_TYPE_OFFSET]
        fields["unknown_fields"] = cluster[k.COMPRESSION_TYPE_OFFSET + 1 : header_length]

    name_offset, name_size = fields.pop("backing_file_offset"), fields.pop("backing_file_size")
    area = parse_extensions(cluster[header_length : name_offset or cluster_size], header_length)
    check_features(fields, area.extensions)
    check_tables(fields, for_check=for_check)
    if area.error is not None:
        raise area.error
    check_extensions(fields, area.extensions)
    if name_offset and name_size > min(k.MAX_BACKING_FILE_NAME, cluster_size - name_offset):
        rule = f"its {name_size} bytes are too long"
        raise FormatError("backing file name", name_offset, rule, stock="Backing file name too long")

    area_end = header_length + area.end
    name_end = name_offset + name_size if name_offset else 0
    if file_size is not None and len(data) < min(file_size, max(area_end, name_end)):
        raise FormatError("header", len(data), "reaches beyond the bytes that were read")
    backing_file = _text(cluster[name_offset:name_end]) or None
    tail = cluster[header_length + area.length : max(area_end, name_end)]
    layout = _Layout((header_length, area.extensions, backing_file), area.length, tail, name_offset, name_size)
    return Header(**fields, backing_file=backing_file, extensions=area.extensions, layout=layout)


def _parse_fields(data: bytes) -> dict[str, Any]:
    """The fields of the fixed part; version 2 gets the values that it implies."""
    if data[:4] != k.MAGIC:
        raise FormatError("header", 0, "is not that of a qcow2 image", stock="Image is not in qcow2 format")
    fields = HEADER_V2.parse(data, "header", 0)
    version = fields["version"]
    if version == 3:
        fields = HEADER_V3.parse(data, "header", 0)
    elif version == 2:
        fields |= {"refcount_order": k.V2_REFCOUNT_ORDER, "header_length": k.V2_HEADER_LENGTH}
    else:
        rule = f"Unsupported qcow2 version {version}"
        raise UnsupportedFeature("header", 4, rule, stock=rule)
    del fields["magic"]
    return fields


def _text(data: bytes | None) -> str | None:
    """A string of the header; QEMU ends it at the first zero byte."""
    return None if data is None else decode_text(data)[0]
