"""Measure: how large an image file becomes, before it is made.

    options, and the data of a source -> bytes that its conversion needs, bytes when every cluster is allocated

Metadata is counted as for a disk whose clusters are all allocated, so that the answer is an upper bound.

Source: the formulas and texts of QEMU 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcowlib.addresses import Geometry
from qcowlib.errors import OptionError
from qcowlib.extents import ExtentKind
from qcowlib.format.constants import DEFAULT_CLUSTER_BITS, L1_ENTRY_SIZE, MAX_L1_SIZE
from qcowlib.image.creation_options import PREALLOCATION_MODES, SECTOR_SIZE, VERSIONS, cluster_bits_of
from qcowlib.image.holes import HoleFinder
from qcowlib.image.qcow2 import Qcow2Image, SnapshotView
from qcowlib.image.reader import ReadableImage
from qcowlib.operations.bitmaps import bitmaps_size
from qcowlib.units import round_up


@dataclass(frozen=True)
class Measurement:
    """Sizes in bytes.

    Attributes:
        required: what the file takes when the source is converted, or when it is new.
        fully_allocated: what it takes when all of the disk has been written.
        bitmaps: what the source's bitmaps take besides; None where source or target can have none.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure(
    source: ReadableImage | None = None,
    *,
    size: int | None = None,
    format: str = "raw",
    cluster_size: int = 1 << DEFAULT_CLUSTER_BITS,
    compat: str = "1.1",
    refcount_bits: int = 16,
    extended_l2: bool = False,
    preallocation: str = "off",
    backing_file: str | None = None,
    encrypt_format: str | None = None,
    encrypt_cipher_alg: str = "aes-256",
    encrypt_cipher_mode: str = "xts",
) -> Measurement:
    """How much space an image file takes.

        with qcowlib.open_image("disk.raw", format="raw") as source:
            print(qcowlib.measure(source, format="qcow2").required)

    Args:
        source: the image or snapshot to be converted; None for a new, empty image.
        size: bytes of the disk of a new image; with a source its own size counts.
        format: of the file: "raw", "qcow2", or "luks" (an encrypted volume).
        cluster_size, compat, refcount_bits, extended_l2, preallocation, backing_file: as in `CreationOptions`.
        encrypt_format: "luks" adds its header.
        encrypt_cipher_alg, encrypt_cipher_mode: decide on the header's length.

    Raises:
        OptionError: an option has an invalid value, or the size is too large.
        CorruptMetadata: the source's mapping is damaged.
    """
    if format == "raw":
        length = round_up(size or 0, SECTOR_SIZE) if source is None else source.size
        return Measurement(length, length)
    if format == "luks":
        from qcowlib.codecs.luks import luks_area_length

        length = (size or 0) if source is None else source.size
        length += luks_area_length(encrypt_cipher_alg, encrypt_cipher_mode)
        return Measurement(length, length)
    if format != "qcow2":
        raise OptionError(f"Unknown file format '{format}'")
    cluster_bits = cluster_bits_of(cluster_size, extended_l2)
    version = VERSIONS.get(compat)
    if version is None:
        raise OptionError(f"Invalid compatibility level: '{compat}'")
    geometry = Geometry(cluster_bits, _refcount_order(refcount_bits, version), extended_l2)
    if preallocation not in PREALLOCATION_MODES:
        raise OptionError(f"invalid parameter value: {preallocation}")
    luks = _luks_size(encrypt_cipher_alg, encrypt_cipher_mode, geometry) if encrypt_format == "luks" else 0
    virtual = round_up(size or 0, cluster_size)
    if geometry.l1_entries_for(virtual) * L1_ENTRY_SIZE > MAX_L1_SIZE:
        raise OptionError("The image size is too large (try using a larger cluster size)")
    required = 0
    if source is not None:
        virtual = round_up(source.size, cluster_size)
        # With a backing file all may differ from it.
        required = virtual if backing_file is not None else _data_clusters(source, cluster_bits) << cluster_bits
    if preallocation in ("falloc", "full"):
        required = virtual
    metadata = luks + _metadata_size(geometry, virtual)
    bitmaps = None
    image = source.image if isinstance(source, SnapshotView) else source
    if version >= 3 and isinstance(image, Qcow2Image) and image.header.version >= 3:
        bitmaps = bitmaps_size(image, cluster_size)
    return Measurement(metadata + required, metadata + virtual, bitmaps)


def _refcount_order(refcount_bits: int, version: int) -> int:
    order = refcount_bits.bit_length() - 1
    if not 1 <= refcount_bits <= 64 or refcount_bits != 1 << order:
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and refcount_bits != 16:
        raise OptionError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or "
            "greater)"
        )
    return order


def _luks_size(cipher_alg: str, cipher_mode: str, geometry: Geometry) -> int:
    from qcowlib.codecs.luks import luks_area_length

    return round_up(luks_area_length(cipher_alg, cipher_mode), geometry.cluster_size)


def _data_clusters(source: ReadableImage, cluster_bits: int) -> int:
    """Clusters of the target that data of the source falls into."""
    finder = HoleFinder(source)
    total = counted = 0
    for batch in source.extents(0, source.size):
        table, holes = finder.split(batch)
        data = ((table.kind == ExtentKind.DATA) | (table.kind == ExtentKind.COMPRESSED)) & ~holes
        if not data.any():
            continue
        first = table.start[data] >> cluster_bits
        stop = (table.start[data] + table.length[data] + (1 << cluster_bits) - 1) >> cluster_bits
        before = np.maximum.accumulate(np.concatenate(([counted], stop[:-1])))
        total += int(np.maximum(stop - np.maximum(first, before), 0).sum())
        counted = max(counted, int(stop[-1]))
    return total


def _metadata_size(geometry: Geometry, virtual: int) -> int:
    """Bytes of header, L2 and L1 tables, refcount blocks and refcount table for a disk that is wholly allocated."""
    size = geometry.cluster_size
    tables = geometry.clusters_for(virtual) * geometry.l2_entry_size
    l2 = round_up(tables, size)
    meta = size + l2 + round_up(l2 // size * L1_ENTRY_SIZE, size)
    clusters = (meta + virtual) >> geometry.cluster_bits
    blocks = table = 0
    total = -1
    while total != clusters + blocks + table:
        total = clusters + blocks + table
        blocks = -(-total // geometry.refcount_block_entries)
        table = -(-blocks // (size // 8))
    return meta + (blocks + table) * size
