"""What the fields of a header must satisfy, in the order in which QEMU 7.2 checks them when it opens an image.

Rules on the header only: tables may still lie beyond the end of the file, which is found when they are read.
Limits are checked before anything is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from errno import EFBIG, EINVAL
from typing import Any

from qcowlib.addresses import SUBCLUSTERS_PER_CLUSTER, Geometry
from qcowlib.errors import CorruptMetadata, FormatError, UnsupportedFeature
from qcowlib.format import constants as k
from qcowlib.format.extensions import HeaderExtension, parse_bitmaps_extension, parse_crypto_header
from qcowlib.format.features import (
    KNOWN_INCOMPATIBLE,
    Autoclear,
    Incompatible,
    describe_unknown_incompatible,
    parse_feature_names,
)

Fields = Mapping[str, Any]


def check_structure(fields: Fields) -> None:
    """Cluster size, header length and the place of the backing file name.

    Raises:
        FormatError: one of them is out of bounds.
    """
    cluster_bits = fields["cluster_bits"]
    if not k.MIN_CLUSTER_BITS <= cluster_bits <= k.MAX_CLUSTER_BITS:
        rule = f"Unsupported cluster size: 2^{cluster_bits}"
        raise UnsupportedFeature("header", 20, rule, stock=rule)
    cluster_size = 1 << cluster_bits
    header_length = fields["header_length"]
    if fields["version"] > 2 and header_length < k.V3_MIN_HEADER_LENGTH:
        rule = f"the header length {header_length} is less than {k.V3_MIN_HEADER_LENGTH}"
        raise FormatError("header", 100, rule, stock="qcow2 header too short")
    if header_length > cluster_size:
        rule = f"the header length {header_length} exceeds the cluster size"
        raise FormatError("header", 100, rule, stock="qcow2 header exceeds cluster size")
    if fields["backing_file_offset"] > cluster_size:
        rule = "the backing file name lies outside of the first cluster"
        raise FormatError("header", 8, rule, stock="Invalid backing file offset")


def check_features(fields: Fields, extensions: Iterable[HeaderExtension]) -> None:
    """Compression type, incompatible features, and the fields that depend on them.

    Raises:
        UnsupportedFeature: something valid that is not known here.
        FormatError: the fields contradict each other.
    """
    compression_type = fields.get("compression_type", k.COMPRESSION_ZLIB)
    incompatible = fields.get("incompatible_features", 0)
    if compression_type not in (k.COMPRESSION_ZLIB, k.COMPRESSION_ZSTD):
        rule = f"the compression type {compression_type} is not known"
        stock = f"qcow2: unknown compression type: {compression_type}"
        raise UnsupportedFeature("header", k.COMPRESSION_TYPE_OFFSET, rule, stock=stock)
    wanted = compression_type != k.COMPRESSION_ZLIB
    if wanted != bool(incompatible & Incompatible.COMPRESSION):
        rule = f"the compression type bit contradicts the compression type {compression_type}"
        stock = f"qcow2: Compression type incompatible feature bit must {'' if wanted else 'not '}be set"
        raise FormatError("header", 72, rule, stock=stock)
    unknown = incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        tables = [extension.data for extension in extensions if extension.magic == k.EXTENSION_FEATURE_NAMES]
        names = parse_feature_names(tables[-1]) if tables else ()
        rule = describe_unknown_incompatible(unknown, names)
        raise UnsupportedFeature("header", 72, rule, stock=rule)
    if incompatible & Incompatible.EXTENDED_L2 and fields["cluster_bits"] < k.MIN_EXTENDED_L2_CLUSTER_BITS:
        rule = f"clusters of 2^{fields['cluster_bits']} bytes are too small for subclusters"
        stock = f"Unsupported subcluster size: {(1 << fields['cluster_bits']) // SUBCLUSTERS_PER_CLUSTER}"
        raise FormatError("header", 20, rule, stock=stock)
    if fields["refcount_order"] > k.MAX_REFCOUNT_ORDER:
        stock = "Reference count entry width too large; may not exceed 64 bits"
        raise FormatError("header", 96, "refcounts are wider than 64 bits", stock=stock)
    if fields["crypt_method"] > k.CRYPT_LUKS:
        rule = f"the encryption method {fields['crypt_method']} is not known"
        stock = f"Unsupported encryption method {fields['crypt_method']}"
        raise UnsupportedFeature("header", 32, rule, stock=stock)


def check_tables(fields: Fields, *, for_check: bool) -> None:
    """Descriptors of the refcount table, the snapshot table and the active L1 table, and the L1 table's reach.

    Args:
        fields: the header's fields.
        for_check: leave to the check what it reports: no refcount table, an unusable snapshot table.

    Raises:
        FormatError: a table is too large, not aligned or too small.
    """
    cluster_size = 1 << fields["cluster_bits"]
    if not fields["refcount_table_clusters"] and not for_check:
        stock = "Image does not contain a reference count table"
        raise FormatError("header", 56, "the image has no refcount table", stock=stock)
    _check_table(
        "refcount table",
        fields["refcount_table_offset"],
        fields["refcount_table_clusters"],
        cluster_size,
        k.MAX_REFCOUNT_TABLE_SIZE // cluster_size,
        cluster_size,
    )
    if not for_check:
        check_snapshot_table_place(fields["snapshots_offset"], fields["nb_snapshots"], cluster_size)
    l1_size = fields["l1_size"]
    _check_table("L1 table", fields["l1_table_offset"], l1_size, k.L1_ENTRY_SIZE, k.MAX_L1_ENTRIES, cluster_size)

    extended_l2 = bool(fields.get("incompatible_features", 0) & Incompatible.EXTENDED_L2)
    needed = Geometry(fields["cluster_bits"], extended_l2=extended_l2).l1_entries_for(fields["size"])
    if fields["size"] > k.MAX_INT64 or needed > l1_size:
        rule = f"the L1 table's {l1_size} entries are too few for a disk of {fields['size']} bytes"
        stock = "Image is too big" if needed > k.MAX_INT32 else "L1 table is too small"
        raise FormatError("header", 36, rule, stock=stock)


def check_snapshot_table_place(offset: int, count: int, cluster_size: int) -> None:
    """The snapshot table's descriptor: number of entries and alignment (its length in bytes is not in the header).

    Raises:
        FormatError: more snapshots than QEMU's limit, or an unusable offset.
    """
    _check_table("snapshot table", offset, count, k.SNAPSHOT_HEADER_SIZE, k.MAX_SNAPSHOTS, cluster_size)


def _check_table(structure: str, offset: int, count: int, entry_size: int, limit: int, cluster_size: int) -> None:
    name = _STOCK_TABLE_NAMES[structure]
    if count > limit:
        rule = f"its size of {count} exceeds the limit of {limit}"
        raise FormatError(structure, offset, rule, stock=f"{name} too large", errno=EFBIG)
    invalid = f"{name} offset invalid"
    if offset + count * entry_size > k.MAX_INT64:
        raise FormatError(structure, offset, "lies beyond any file", stock=invalid, errno=EINVAL)
    if offset % cluster_size:
        raise FormatError(structure, offset, "is not cluster aligned", stock=invalid, errno=EINVAL)


_STOCK_TABLE_NAMES = {
    "refcount table": "Reference count table",
    "snapshot table": "Snapshot table",
    "L1 table": "Active L1 table",
    "snapshot L1 table": "Snapshot L1 table",
}


def check_extensions(fields: Fields, extensions: Iterable[HeaderExtension]) -> None:
    """The contents of the extensions that are understood.

    Raises:
        CorruptMetadata: one of them breaks a rule.
    """
    cluster_size = 1 << fields["cluster_bits"]
    for extension in extensions:
        length = len(extension.data)
        if extension.magic == k.EXTENSION_BACKING_FORMAT and length > k.MAX_BACKING_FORMAT_NAME:
            stock = f"ERROR: ext_backing_format: len={length} too large (>={k.MAX_BACKING_FORMAT_NAME + 1})"
            raise CorruptMetadata("backing format", None, f"its name of {length} bytes is too long", stock=stock)
        if extension.magic == k.EXTENSION_CRYPTO_HEADER:
            if fields["crypt_method"] != k.CRYPT_LUKS:
                rule = "is there though the encryption is not LUKS"
                stock = "CRYPTO header extension only expected with LUKS encryption method"
                raise CorruptMetadata("encryption header pointer", None, rule, stock=stock)
            parse_crypto_header(extension.data, cluster_size)
        if extension.magic == k.EXTENSION_BITMAPS:
            if length != k.BITMAPS_EXTENSION_SIZE:
                rule = f"has {length} bytes, not {k.BITMAPS_EXTENSION_SIZE}"
                raise CorruptMetadata("bitmaps extension", None, rule, stock="bitmaps_ext: Invalid extension length")
            if fields.get("autoclear_features", 0) & Autoclear.BITMAPS:  # else its contents are not to be trusted
                parse_bitmaps_extension(extension.data, cluster_size)
