"""The header of a fresh image, from its options and its layout."""

from __future__ import annotations

from qcowlib.errors import OptionError
from qcowlib.format.constants import (
    COMPRESSION_ZLIB,
    CRYPT_AES,
    CRYPT_LUKS,
    CRYPT_NONE,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    MAX_BACKING_FILE_NAME,
    MAX_CLUSTER_SIZE_WITHOUT_FEATURE_NAMES,
)
from qcowlib.format.extensions import CryptoHeader, HeaderExtension
from qcowlib.format.features import QEMU_FEATURE_NAMES, Autoclear, Compatible, Incompatible, build_feature_names
from qcowlib.format.header import Header
from qcowlib.image.create_layout import Layout
from qcowlib.image.creation_options import Qcow2Options


def build_header(options: Qcow2Options, layout: Layout, crypto_length: int) -> bytes:
    """The bytes at the start of the first cluster, as qemu-img lays them out.

    Args:
        options: the checked options.
        layout: places of the tables.
        crypto_length: bytes of the LUKS header and its key material, 0 without one.

    Raises:
        OptionError: a name is too long for the first cluster.
    """
    try:
        return Header(
            version=options.version,
            cluster_bits=options.geometry.cluster_bits,
            size=layout.size,
            l1_size=layout.l1_entries,
            l1_table_offset=layout.l1_offset,
            refcount_table_offset=layout.refcount_table_offset,
            refcount_table_clusters=layout.space.table.clusters,
            crypt_method=_crypt_method(options),
            incompatible_features=_incompatible(options),
            compatible_features=Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
            autoclear_features=Autoclear.RAW_EXTERNAL if options.data_file_raw else 0,
            refcount_order=options.geometry.refcount_order,
            compression_type=options.compression_type,
            backing_file=options.backing_file,
            extensions=_extensions(options, layout.crypto_offset, crypto_length),
        ).build()
    except OptionError as error:
        raise OptionError(_too_long(options)) from error


def _crypt_method(options: Qcow2Options) -> int:
    if options.encryption is None:
        return CRYPT_NONE
    return CRYPT_LUKS if options.encryption.format == "luks" else CRYPT_AES


def _incompatible(options: Qcow2Options) -> int:
    features = Incompatible(0)
    if options.data_file is not None:
        features |= Incompatible.DATA_FILE
    if options.compression_type != COMPRESSION_ZLIB:
        features |= Incompatible.COMPRESSION
    if options.geometry.extended_l2:
        features |= Incompatible.EXTENDED_L2
    return features


def _extensions(options: Qcow2Options, crypto_offset: int, crypto_length: int) -> tuple[HeaderExtension, ...]:
    extensions = []
    if options.backing_fmt is not None:
        extensions.append(HeaderExtension(EXTENSION_BACKING_FORMAT, _encode(options.backing_fmt)))
    if options.data_file is not None:
        extensions.append(HeaderExtension(EXTENSION_DATA_FILE, _encode(options.data_file)))
    if crypto_length:
        extensions.append(CryptoHeader(crypto_offset, crypto_length).build())
    if options.version >= 3 and options.geometry.cluster_size > MAX_CLUSTER_SIZE_WITHOUT_FEATURE_NAMES:
        extensions.append(HeaderExtension(EXTENSION_FEATURE_NAMES, build_feature_names(QEMU_FEATURE_NAMES)))
    return tuple(extensions)


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _too_long(options: Qcow2Options) -> str:
    if options.backing_file is None:
        return "Could not update qcow2 header: No space left on device"
    too_long = len(_encode(options.backing_file)) > MAX_BACKING_FILE_NAME
    reason = "Invalid argument" if too_long else "No space left on device"
    return f"Could not assign backing file '{options.backing_file}' with format '{options.backing_fmt}': {reason}"
