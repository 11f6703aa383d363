"""Snapshot tables: entries by hand, damage, limits, and stock tables."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest

from qcowlib.errors import CorruptMetadata, FormatError
from qcowlib.format.header import parse_header
from qcowlib.format.snapshot_table import ReadAt, SnapshotEntry, build_snapshot_table, parse_snapshot_table
from tests.oracle import image_info
from tests.unit.format.samples import create_rich, valid_header

TABLE_OFFSET = 0x50000


def reader(data: bytes, start: int = TABLE_OFFSET) -> ReadAt:
    """Reads of a host file that holds `data` at `start`."""

    def read(offset: int, length: int) -> bytes:
        assert offset >= start
        return data[offset - start : offset - start + length]

    return read


def parse(data: bytes, count: int, *, pad: bool = False) -> list[SnapshotEntry]:
    return parse_snapshot_table(reader(data), valid_header(nb_snapshots=count, snapshots_offset=TABLE_OFFSET), pad=pad)


def entry_bytes(
    *,
    extra: bytes = b"",
    name: bytes = b"n",
    snapshot_id: bytes = b"1",
    size_32: int = 0,
    extra_size: int | None = None,
) -> bytes:
    """An entry as the specification draws it."""
    sizes = (len(snapshot_id), len(name))
    extra_size = len(extra) if extra_size is None else extra_size
    head = struct.pack(">QIHHIIQII", 0x30000, 7, *sizes, 1_700_000_000, 999, 1 << 40, size_32, extra_size)
    return head + extra + snapshot_id + name


@pytest.mark.parametrize(
    ("extra", "size_32", "expected"),
    [
        (b"", 77, (77, None, None)),
        (b"\1\2\3\4", 77, (77, None, None)),
        (struct.pack(">Q", 5 << 32), 0, (5 << 32, None, None)),
        (struct.pack(">Q", 9), 77, (9, None, None)),  # the 32-bit field is ignored
        (struct.pack(">Q", 9) + b"\1\2\3", 9, (9, None, None)),
        (struct.pack(">QQ", 9, 1 << 30), 9, (9, 1 << 30, None)),
        (struct.pack(">QQQ", 0, 1 << 30, 2**64 - 1), 0, (0, 1 << 30, None)),
        (struct.pack(">QQQ", 0, 1 << 30, 12345), 0, (0, 1 << 30, 12345)),
        (struct.pack(">QQQ", 0, 0, 0) + b"x" * 1000, 0, (0, 0, 0)),
    ],
)
def test_extra_data_of_any_length(extra: bytes, size_32: int, expected: tuple[int, int | None, int | None]) -> None:
    data = entry_bytes(extra=extra, size_32=size_32)
    (entry,) = parse(data, 1)
    assert (entry.vm_state_size, entry.disk_size, entry.icount) == expected
    assert (entry.l1_table_offset, entry.l1_size, entry.id, entry.name) == (0x30000, 7, "1", "n")
    assert (entry.date_sec, entry.date_nsec, entry.vm_clock_nsec) == (1_700_000_000, 999, 1 << 40)
    assert build_snapshot_table([entry]) == data


def test_a_new_entry_has_the_extra_data_that_qemu_writes() -> None:
    entry = SnapshotEntry(
        0x30000, 7, "1", "n", 1_700_000_000, 999, 1 << 40, vm_state_size=(5 << 32) + 7, disk_size=1 << 30
    )
    extra = struct.pack(">QQQ", (5 << 32) + 7, 1 << 30, 2**64 - 1)
    assert build_snapshot_table([entry]) == entry_bytes(extra=extra, size_32=0)
    # The 32-bit field is 0 then: an old reader must see no VM state rather than a cut one.
    small = dataclasses.replace(entry, vm_state_size=5, icount=3)
    assert build_snapshot_table([small]) == entry_bytes(extra=struct.pack(">QQQ", 5, 1 << 30, 3), size_32=5)


def test_fields_that_old_entries_lack_are_added_when_they_are_set() -> None:
    (old,) = parse(entry_bytes(size_32=7), 1)
    assert build_snapshot_table([dataclasses.replace(old, disk_size=4096)]) == entry_bytes(
        extra=struct.pack(">QQ", 7, 4096), size_32=7
    )
    assert build_snapshot_table([dataclasses.replace(old, vm_state_size=1 << 32)]) == entry_bytes(
        extra=struct.pack(">Q", 1 << 32)
    )


def test_unknown_extra_data_stays_when_known_fields_change() -> None:
    (entry,) = parse(entry_bytes(extra=struct.pack(">QQQ", 1, 2, 3) + b"unknown"), 1)
    changed = dataclasses.replace(entry, disk_size=99, name="renamed")
    expected = entry_bytes(extra=struct.pack(">QQQ", 1, 99, 3) + b"unknown", name=b"renamed")
    assert build_snapshot_table([changed]) == expected


def test_entries_start_at_multiples_of_eight_and_padding_is_kept() -> None:
    first = entry_bytes(name=b"na", snapshot_id=b"12")  # 44 bytes
    data = first + b"\xaa\xbb\xcc\xdd" + entry_bytes(name=b"b") + b"behind the table"
    entries = parse(data, 2)
    assert [entry.name for entry in entries] == ["na", "b"]
    built = build_snapshot_table(entries)
    assert built == data[: len(built)]
    assert len(built) == len(first) + 4 + 42
    # In another place the padding of the last one is written as zeroes.
    assert build_snapshot_table([entries[1], entries[0]])[42:48] == bytes(6)


def test_names_are_bytes_that_end_at_a_zero_byte() -> None:
    data = entry_bytes(name=b"caf\xc3\xa9 \xff\0rest\0", snapshot_id=b"\0")
    (entry,) = parse(data, 1)
    assert entry.name == "caf\u00e9 \udcff"
    assert entry.id == ""
    assert build_snapshot_table([entry]) == data


def test_many_entries_read_in_chunks() -> None:
    one = entry_bytes(name=b"n" * 1000, extra=bytes(24))
    data = b"".join(one.ljust(len(one) + -len(one) % 8, b"\0") for _ in range(1000))
    entries = parse(data, 1000)
    assert len(entries) == 1000
    built = build_snapshot_table(entries)
    assert built == data[: len(built)]


@pytest.mark.parametrize("length", [0, 1, 39, 40, 41, 43])
def test_a_table_cut_by_the_end_of_the_file(length: int) -> None:
    data = entry_bytes(name=b"nam")
    assert len(data) == 44
    with pytest.raises(CorruptMetadata) as caught:
        parse(data[:length], 1)
    assert caught.value.host_offset == TABLE_OFFSET
    (entry,) = parse(data[:length], 1, pad=True)  # as QEMU reads it
    assert "nam".startswith(entry.name)


def test_limits() -> None:
    with pytest.raises(CorruptMetadata) as caught:
        parse(entry_bytes(extra_size=1025) + bytes(2000), 1)
    assert caught.value.host_offset == TABLE_OFFSET
    assert len(parse(entry_bytes(extra=bytes(1024)), 1)[0].extra_data) == 1024
    with pytest.raises(FormatError):
        parse(b"", 65537)
    with pytest.raises(FormatError):
        parse_snapshot_table(reader(b""), valid_header(nb_snapshots=1, snapshots_offset=512))
    assert parse(b"", 0) == []


def test_a_table_of_more_than_64_mib_is_refused() -> None:
    largest = entry_bytes(extra=bytes(1024), name=b"n" * 65535, snapshot_id=b"i" * 65535)
    stride = len(largest) + -len(largest) % 8

    def read(offset: int, length: int) -> bytes:
        at = (offset - TABLE_OFFSET) % stride
        return (largest.ljust(stride, b"\0") * 2)[at : at + length]

    with pytest.raises(CorruptMetadata, match="limit"):
        parse_snapshot_table(read, valid_header(nb_snapshots=65536, snapshots_offset=TABLE_OFFSET))
    entry = SnapshotEntry(0, 0, "i", "n" * 65535, 0, 0, 0, disk_size=0)
    with pytest.raises(FormatError, match="limit"):
        build_snapshot_table(entry for _ in range(1100))


def test_what_cannot_be_written() -> None:
    entry = SnapshotEntry(0x30000, 7, "1", "n", 0, 0, 0, disk_size=1)
    refused: list[dict[str, Any]] = [
        {"name": "n" * 65536},
        {"name": "\ud800"},
        {"l1_size": 1 << 32},
        {"date_sec": -1},
        {"vm_state_size": 1 << 64},
        {"disk_size": 1 << 64},
        {"disk_size": None},
    ]
    for changes in refused:
        with pytest.raises(FormatError):
            dataclasses.replace(entry, **changes).build()


def test_a_stock_table(tmp_path: Path) -> None:
    path = create_rich(tmp_path)
    data = path.read_bytes()
    header = parse_header(data)
    entries = parse_snapshot_table(reader(data, 0), header)
    stock = image_info(path)["snapshots"]
    assert [(entry.id, entry.name, entry.vm_state_size, entry.date_sec, entry.date_nsec) for entry in entries] == [
        (row["id"], row["name"], row["vm-state-size"], row["date-sec"], row["date-nsec"]) for row in stock
    ]
    assert [entry.disk_size for entry in entries] == [8 << 20] * 3
    built = build_snapshot_table(entries)
    assert built == data[header.snapshots_offset : header.snapshots_offset + len(built)]
