"""The bitmap directory: entries by hand, what QEMU refuses, bitmap tables."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcowlib.errors import CorruptMetadata, FormatError, UnsupportedFeature
from qcowlib.format.bitmap_directory import (
    BitmapCluster,
    BitmapEntry,
    BitmapsExtension,
    bitmap_table_entries,
    build_bitmap_directory,
    check_bitmap_entry,
    classify_bitmap_table,
    invalid_bitmap_table_entries,
    parse_bitmap_directory,
)
from qcowlib.format.header import parse_header
from qcowlib.format.records import build_entry_table, parse_entry_table
from tests.oracle import image_info, qemu_img
from tests.unit.format.samples import create_rich

SOUND = BitmapEntry(table_offset=0x60000, table_size=1, flags=2, type=1, granularity_bits=16, name="bm")


def entry_bytes(name: bytes = b"bm", extra: bytes = b"", **changes: int) -> bytes:
    values = {"offset": 0x60000, "size": 1, "flags": 2, "type": 1, "bits": 16} | changes
    body = struct.pack(">QIIBBHI", *values.values(), len(name), len(extra)) + extra + name
    return body + bytes(-len(body) % 8)


def parse(data: bytes, count: int) -> list[BitmapEntry]:
    return parse_bitmap_directory(data, BitmapsExtension(count, len(data), 0x50000))


def test_entries_by_hand() -> None:
    data = entry_bytes() + entry_bytes(b"name\0rest", b"extra", flags=5) + entry_bytes(b"\xff" * 1024)
    entries = parse(data, 3)
    assert entries[0] == dataclasses.replace(SOUND, padding=bytes(6))
    assert (entries[1].name, entries[1].extra_data, entries[1].flags) == ("name", b"extra", 5)
    assert entries[2].name == "\udcff" * 1024
    assert build_bitmap_directory(entries) == data
    assert build_bitmap_directory([SOUND]) == entry_bytes()


def test_padding_is_kept() -> None:
    data = entry_bytes()[:-6] + b"abcdef"
    assert build_bitmap_directory(parse(data, 1)) == data


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 1),
        (entry_bytes(), 2),
        (entry_bytes() * 2, 1),
        (entry_bytes()[:-1], 1),
        (entry_bytes()[:-8], 1),
        (entry_bytes() + b"\0", 1),
        (entry_bytes() + bytes(8), 2),
        (struct.pack(">QIIBBHI", 0, 0, 0, 0, 0, 0, 2**32 - 1), 1),
    ],
)
def test_a_directory_that_does_not_add_up(data: bytes, count: int) -> None:
    with pytest.raises(CorruptMetadata) as caught:
        parse(data, count)
    assert caught.value.host_offset == 0x50000


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, None),
        ({"flags": 3, "table_size": 5}, None),  # in use: it may have the size of an older disk
        ({"name": "n" * 1023}, None),
        ({"granularity_bits": 9, "table_size": 1}, None),
        ({"name": "n" * 1024}, CorruptMetadata),
        ({"table_size": 0}, CorruptMetadata),
        ({"table_size": 2}, CorruptMetadata),
        ({"table_size": 2**32 - 1, "flags": 1}, CorruptMetadata),
        ({"table_size": 8193, "flags": 1}, CorruptMetadata),
        ({"table_offset": 0}, CorruptMetadata),
        ({"table_offset": 0x60200}, CorruptMetadata),
        ({"flags": 4}, UnsupportedFeature),
        ({"flags": 1 << 31}, UnsupportedFeature),
        ({"type": 0}, UnsupportedFeature),
        ({"type": 2}, UnsupportedFeature),
        ({"granularity_bits": 8}, UnsupportedFeature),
        ({"granularity_bits": 32}, UnsupportedFeature),
        ({"granularity_bits": 255}, UnsupportedFeature),
        ({"extra_data": b"x"}, UnsupportedFeature),
    ],
)
def test_what_qemu_refuses(changes: dict[str, Any], error: type[FormatError] | None, tmp_path: Path) -> None:
    """The rule, and that stock qemu-img has the same on an image whose directory holds this entry."""
    entry = dataclasses.replace(SOUND, **changes)
    if error is None:
        check_bitmap_entry(entry, 65536, 8 << 20)
    else:
        with pytest.raises(error) as caught:
            check_bitmap_entry(entry, 65536, 8 << 20)
        assert type(caught.value) is error

    path = tmp_path / "bitmap.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    qemu_img("bitmap", "--add", path, "x" * min(1023, len(entry.name)))
    data = bytearray(path.read_bytes())
    extension = parse_header(bytes(data)).bitmaps_extension
    assert extension is not None
    directory = slice(extension.directory_offset, extension.directory_offset + extension.directory_size)
    (stock,) = parse_bitmap_directory(bytes(data[directory]), extension)
    replacement = build_bitmap_directory([dataclasses.replace(stock, **{"name": entry.name} | changes)])
    assert len(replacement) == extension.directory_size
    data[directory] = replacement
    path.write_bytes(data)
    assert (qemu_img("info", path, check=False).returncode == 0) == (error is None)


def test_bitmap_table_entries() -> None:
    assert bitmap_table_entries(0, 16, 65536) == 0
    assert bitmap_table_entries(1, 16, 65536) == 1
    assert bitmap_table_entries(65536 * 8 * 65536, 16, 65536) == 1
    assert bitmap_table_entries(65536 * 8 * 65536 + 1, 16, 65536) == 2
    assert bitmap_table_entries(1 << 40, 9, 512) == (1 << 31) // 8 // 512


def test_limits_of_the_directory() -> None:
    with pytest.raises(FormatError):
        build_bitmap_directory(SOUND for _ in range(65536))
    with pytest.raises(FormatError):
        build_bitmap_directory([dataclasses.replace(SOUND, name="n" * 65536)])


def test_bitmap_tables() -> None:
    data = struct.pack(">8Q", 0, 1, 0x10000, 0x10001, 0x10200, 2, 1 << 63, 1 << 56 | 0x20000)
    table = parse_entry_table(data + b"odd end")
    assert table.dtype == np.dtype(">u8")
    assert build_entry_table(table) == data
    assert build_entry_table(table.astype(np.uint64)) == data
    zeroes, ones, there = BitmapCluster.ZEROES, BitmapCluster.ONES, BitmapCluster.DATA
    kinds = classify_bitmap_table(table)
    assert kinds.dtype == np.uint8
    assert kinds.tolist() == [zeroes, ones, there, there, there, zeroes, zeroes, there]
    assert invalid_bitmap_table_entries(table, 65536).tolist() == [False, False, False, True, True, True, True, True]
    assert invalid_bitmap_table_entries(table, 512).tolist() == [False, False, False, True, False, True, True, True]


def test_a_stock_directory(tmp_path: Path) -> None:
    path = create_rich(tmp_path)
    data = path.read_bytes()
    header = parse_header(data)
    extension = header.bitmaps_extension
    assert extension is not None
    directory = data[extension.directory_offset : extension.directory_offset + extension.directory_size]
    entries = parse_bitmap_directory(directory, extension)
    stock = image_info(path)["format-specific"]["data"]["bitmaps"]
    assert [(entry.name, 1 << entry.granularity_bits) for entry in entries] == [
        (row["name"], row["granularity"]) for row in stock
    ]
    for entry in entries:
        check_bitmap_entry(entry, header.cluster_size, header.virtual_size)
    assert build_bitmap_directory(entries) == directory
