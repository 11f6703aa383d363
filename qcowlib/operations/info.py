"""What an image is: format, sizes, features, snapshots, bitmaps, encryption and the names of other files.

Only the file itself is looked at; no file that it names is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowlib.errors import CorruptMetadata
from qcowlib.image.raw import RawImage
from qcowlib.image.references import has_protocol
from qcowlib.storage.null import NullStorage

if TYPE_CHECKING:
    from qcowlib.codecs.luks_info import LuksInfo
    from qcowlib.format.bitmap_directory import BitmapEntry
    from qcowlib.format.snapshot_table import SnapshotEntry
    from qcowlib.image.interface import BlockImage
    from qcowlib.metadata.state import Qcow2State


@dataclass(frozen=True)
class Qcow2Info:
    """What only qcow2 has.

    Attributes:
        version: 2 or 3.
        compression_type: "zlib" or "zstd".
        refcount_bits: width of a refcount in bits.
        lazy_refcounts, corrupt, extended_l2: feature bits.
        bitmaps: persistent dirty bitmaps.
        data_file: name of the external data file in the header.
        data_file_raw: whether it stays valid as a raw image; None without an external data file.
        encryption: "aes", "luks" or None.
        luks: what the LUKS header tells, if there is one.
    """

    version: int
    compression_type: str
    refcount_bits: int
    lazy_refcounts: bool
    corrupt: bool
    extended_l2: bool
    bitmaps: tuple[BitmapEntry, ...]
    data_file: str | None
    data_file_raw: bool | None
    encryption: str | None
    luks: LuksInfo | None


@dataclass(frozen=True)
class ImageInfo:
    """What an image is.

    Attributes:
        filename: name of the image as it was asked for.
        format: "qcow2" or "raw".
        virtual_size: size of the virtual disk in bytes.
        actual_size: bytes that the file takes on the host; None when the host cannot say.
        encrypted: whether guest data is encrypted.
        cluster_size: bytes in a cluster; None for raw.
        dirty: whether the image was not shut down cleanly.
        backing_filename: the backing file's name in the header, unchanged.
        full_backing_filename: the same as it would be opened from here; None when that cannot be said.
        backing_format: the backing file's format in the header.
        snapshots: internal snapshots.
        qcow2: what only qcow2 has; None for raw.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None
    encrypted: bool = False
    cluster_size: int | None = None
    dirty: bool = False
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_format: str | None = None
    snapshots: tuple[SnapshotEntry, ...] = ()
    qcow2: Qcow2Info | None = None


def image_info(image: BlockImage, filename: str | None = None) -> ImageInfo:
    """What an open image is.

    Args:
        image: the image; its backing file need not be open.
        filename: the name to report, the image's own when None.

    Raises:
        FormatError: the snapshot table, the bitmap directory or the encryption header is damaged.
    """
    name = image.name if filename is None else filename
    state: Qcow2State | None = getattr(image, "state", None)
    if state is None:
        nothing = isinstance(image, RawImage) and isinstance(image.storage, NullStorage)
        return ImageInfo(name, image.format, image.size, 0 if nothing else _allocated_size(image.name))
    header = state.header
    backing = header.backing_file or None
    return ImageInfo(
        filename=name,
        format=image.format,
        virtual_size=image.size,
        actual_size=_allocated_size(image.name),
        encrypted=header.crypt_method != 0,
        cluster_size=state.geometry.cluster_size,
        dirty=header.dirty,
        backing_filename=backing,
        full_backing_filename=None if backing is None else full_backing_filename(backing, image.name),
        backing_format=None if backing is None else header.backing_format or None,
        snapshots=tuple(getattr(image, "snapshots", ())),
        qcow2=_qcow2_info(state),
    )


def full_backing_filename(backing: str, image_path: str) -> str:
    """A backing file name as it would be opened: relative names start at the image's directory.

    Source: QEMU's bdrv_get_full_backing_filename.
    """
    if backing.startswith(("/", "json:")) or has_protocol(backing):
        return backing
    return os.path.join(os.path.dirname(image_path), backing)


def _qcow2_info(state: Qcow2State) -> Qcow2Info:
    from qcowlib.format.bitmap_directory import check_bitmap_entry
    from qcowlib.format.features import Compatible

    header = state.header
    for entry in state.bitmaps:
        check_bitmap_entry(entry, state.geometry.cluster_size, header.size)
    return Qcow2Info(
        version=header.version,
        compression_type=_COMPRESSION_TYPES[header.compression_type],
        refcount_bits=state.geometry.refcount_bits,
        lazy_refcounts=bool(header.compatible_features & Compatible.LAZY_REFCOUNTS),
        corrupt=header.corrupt,
        extended_l2=state.geometry.extended_l2,
        bitmaps=tuple(state.bitmaps),
        data_file=header.data_file_name,
        data_file_raw=header.has_raw_data_file if header.has_data_file else None,
        encryption=_CRYPT_METHODS[header.crypt_method],
        luks=_luks_info(state) if _CRYPT_METHODS[header.crypt_method] == "luks" else None,
    )


_COMPRESSION_TYPES = {0: "zlib", 1: "zstd"}
_LUKS_HEADER_BYTES = 592
_CRYPT_METHODS = {0: None, 1: "aes", 2: "luks"}


def _luks_info(state: Qcow2State) -> LuksInfo:
    from qcowlib.codecs.luks_info import inspect_luks

    place = state.header.crypto_header
    if place is None:
        raise CorruptMetadata("header", None, "an image encrypted with LUKS has no encryption header extension")
    return inspect_luks(state.storage.pread(_LUKS_HEADER_BYTES, place.offset), place.offset)


def _allocated_size(path: str) -> int | None:
    try:
        return os.stat(path).st_blocks * 512
    except (OSError, AttributeError):  # no local file, or a host that counts no blocks
        return None
