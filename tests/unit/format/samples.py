"""Headers for the tests: a valid one to change field by field, and stock images with many options."""

import struct
from pathlib import Path
from typing import Any

from qcowlib.format.header import Header
from tests.oracle import qemu_img

#: Offset and width of the header fields, by name.
FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}


def valid_header(**changes: Any) -> Header:
    """A version 3 header of a 10 MiB disk with 64 KiB clusters."""
    values: dict[str, Any] = {
        "version": 3,
        "cluster_bits": 16,
        "size": 10 << 20,
        "l1_size": 1,
        "l1_table_offset": 0x30000,
        "refcount_table_offset": 0x10000,
        "refcount_table_clusters": 1,
    }
    return Header(**(values | changes))


def patched(data: bytes, **fields: int) -> bytes:
    """`data` with header fields overwritten."""
    changed = bytearray(data)
    for name, value in fields.items():
        offset, width = FIELDS[name]
        changed[offset : offset + width] = value.to_bytes(width, "big")
    return bytes(changed)


def extension_bytes(magic: int, data: bytes) -> bytes:
    """A header extension as it lies on disk."""
    return struct.pack(">II", magic, len(data)) + data + bytes(-len(data) % 8)


#: Creation options of stock images, each with the arguments behind the file's name.
STOCK_OPTIONS = {
    "v3": ("", "10M"),
    "v3-512": ("cluster_size=512", "3M"),
    "v3-4k": ("cluster_size=4096", "3M"),
    "v3-8k": ("cluster_size=8192", "3M"),
    "v3-2m": ("cluster_size=2M", "100G"),
    "v2": ("compat=0.10", "10M"),
    "v2-512": ("compat=0.10,cluster_size=512", "1M"),
    "refcount-1": ("refcount_bits=1", "10M"),
    "refcount-64": ("refcount_bits=64", "10M"),
    "lazy": ("lazy_refcounts=on", "10M"),
    "zstd": ("compression_type=zstd", "10M"),
    "extended": ("extended_l2=on,cluster_size=128k", "10M"),
    "data-file": ("data_file=DIR/plain.data", "10M"),
    "data-file-raw": ("data_file=DIR/raw.data,data_file_raw=on,extended_l2=on", "10M"),
    "backing": ("backing_file=DIR/base.raw,backing_fmt=raw", "10M"),
    "backing-v2": ("compat=0.10,backing_file=DIR/base.raw,backing_fmt=raw", ""),
    "backing-512": ("cluster_size=512,backing_file=DIR/base.raw,backing_fmt=raw", ""),
    "metadata": ("preallocation=metadata", "64M"),
    "odd-size": ("", "1000001"),
    "empty": ("", "0"),
}


def create_stock(name: str, directory: Path) -> Path:
    """The stock image of that name in STOCK_OPTIONS."""
    options, size = STOCK_OPTIONS[name]
    (directory / "base.raw").write_bytes(bytes(1 << 20))
    path = directory / f"{name}.qcow2"
    chosen = ["-o", options.replace("DIR", str(directory))] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *chosen, path, *([size] if size else []))
    return path


def create_rich(directory: Path) -> Path:
    """A stock image with bitmaps, snapshots and a backing file, whose header has been rewritten several times."""
    (directory / "base.raw").write_bytes(bytes(1 << 20))
    path = directory / "rich.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", directory / "base.raw", "-F", "raw", path, "8M")
    for bitmap in ("first", "second"):
        qemu_img("bitmap", "--add", path, bitmap)
    for snapshot in ("one", "two", "a longer name"):
        qemu_img("snapshot", "-c", snapshot, path)
    return path
