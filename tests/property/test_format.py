"""The format layer on any input: scalar and vector forms agree, what is built parses back, what parses builds back."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowlib.addresses import Geometry
from qcowlib.errors import FormatError, OptionError
from qcowlib.format import constants as k
from qcowlib.format.bitmap_directory import (
    BitmapEntry,
    BitmapsExtension,
    build_bitmap_directory,
    check_bitmap_entry,
    parse_bitmap_directory,
)
from qcowlib.format.entries import (
    L2_OFFSET_MASK,
    ClusterType,
    classify_many,
    classify_one,
    compressed_entry,
    compressed_location,
    compressed_locations,
    invalid_bitmap,
    invalid_bitmaps,
    offsets,
    reserved_bits,
    reserved_bits_many,
)
from qcowlib.format.extensions import HeaderExtension
from qcowlib.format.features import FeatureName, build_feature_names, parse_feature_names
from qcowlib.format.header import Header, parse_header
from qcowlib.format.refcount_block import decode_refcounts, encode_refcounts
from qcowlib.format.snapshot_table import SnapshotEntry, build_snapshot_table, parse_snapshot_table

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
# Entries as they occur (flags, few low bits) and any 64 bits; hypothesis alone seldom sets bits 63, 62 and 0 together.
FLAGS = st.sampled_from([0, 1, 1 << 62, 1 << 63, 1 << 63 | 1, 1 << 62 | 1, 3 << 62, 3 << 62 | 1])
ENTRY = st.one_of(U64, st.builds(lambda flags, offset: flags | offset << 9, FLAGS, st.integers(0, 2**47 - 1)), FLAGS)
ENTRIES = st.lists(ENTRY, min_size=1, max_size=40)
ORDER = st.sampled_from([">u8", "<u8"])
CLUSTER_BITS = st.integers(9, 21)
# Names hold any bytes but the zero byte, at which QEMU ends them.
NAME = st.binary(max_size=60).map(lambda data: data.replace(b"\0", b"\xff").decode("utf-8", "surrogateescape"))


@given(ENTRIES, ORDER, st.booleans(), st.booleans())
def test_cluster_types(entries: list[int], order: str, extended_l2: bool, data_file: bool) -> None:
    array = np.array(entries, dtype=order)
    expected = [classify_one(entry, extended_l2, data_file) for entry in entries]
    assert classify_many(array, extended_l2, data_file).tolist() == expected
    assert array.tolist() == entries


@given(ENTRIES, ORDER)
def test_offsets(entries: list[int], order: str) -> None:
    assert offsets(np.array(entries, dtype=order)).tolist() == [entry & L2_OFFSET_MASK for entry in entries]


@given(ENTRIES, ORDER, CLUSTER_BITS, st.booleans(), st.sampled_from([2, 3]))
def test_reserved_bits(entries: list[int], order: str, cluster_bits: int, extended_l2: bool, version: int) -> None:
    geometry = Geometry(cluster_bits, extended_l2=extended_l2)
    found = reserved_bits_many(np.array(entries, dtype=order), geometry, version)
    assert found.tolist() == [bool(reserved_bits(entry, geometry, version)) for entry in entries]


@given(ENTRIES, ORDER, CLUSTER_BITS)
def test_compressed_locations(entries: list[int], order: str, cluster_bits: int) -> None:
    starts, lengths = compressed_locations(np.array(entries, dtype=order), cluster_bits)
    expected = [compressed_location(entry, cluster_bits) for entry in entries]
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == expected


@given(st.data(), CLUSTER_BITS)
def test_compressed_entries(data: st.DataObject, cluster_bits: int) -> None:
    limit = min(1 << 62 - (cluster_bits - 8), 1 << 56)
    offset = data.draw(st.integers(0, limit - 1))
    nbytes = data.draw(st.integers(1, 1 << cluster_bits))
    entry = compressed_entry(offset, nbytes, cluster_bits)
    assert classify_one(entry) == ClusterType.COMPRESSED
    assert not reserved_bits(entry, Geometry(cluster_bits), 3)
    start, length = compressed_location(entry, cluster_bits)
    assert start == offset
    assert nbytes <= length < nbytes + 512
    assert (start + length) % 512 == 0


@given(st.lists(st.tuples(st.sampled_from([0, 3, 4]), st.one_of(U64, FLAGS, U32)), min_size=1), ORDER)
def test_subcluster_bitmaps(rows: list[tuple[int, int]], order: str) -> None:
    kinds = np.array([kind for kind, _ in rows], dtype=np.uint8)
    bitmaps = np.array([bitmap for _, bitmap in rows], dtype=order)
    assert invalid_bitmaps(kinds, bitmaps).tolist() == [invalid_bitmap(*row) for row in rows]


@given(st.integers(0, 6), st.integers(1, 8).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n)))
def test_refcounts(order: int, block: bytes) -> None:
    counts = decode_refcounts(block, order)
    assert encode_refcounts(counts, order) == block
    width = 1 << order
    if order < 3:  # the block as one little-endian number
        number = int.from_bytes(block, "little")
        expected = [number >> place & ((1 << width) - 1) for place in range(0, len(block) * 8, width)]
    else:
        step = width // 8
        expected = [int.from_bytes(block[at : at + step], "big") for at in range(0, len(block), step)]
    assert counts.tolist() == expected


EXTENSIONS = st.lists(
    st.builds(
        HeaderExtension,
        magic=st.integers(1, 2**32 - 1).filter(
            lambda magic: magic not in (k.EXTENSION_CRYPTO_HEADER, k.EXTENSION_BITMAPS)
        ),
        data=st.binary(max_size=15),
    ),
    max_size=4,
)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    version = draw(st.sampled_from([2, 3]))
    cluster_bits = draw(CLUSTER_BITS)
    features: dict[str, Any] = {}
    if version == 3:
        known = draw(st.integers(0, 31)) & ~(8 if draw(st.booleans()) else 0) & ~(16 if cluster_bits < 14 else 0)
        length = draw(st.sampled_from([105, 112, 120, 200]))
        features = {
            "incompatible_features": known,
            "compression_type": known >> 3 & 1,
            "compatible_features": draw(U64),
            "autoclear_features": draw(U64),
            "refcount_order": draw(st.integers(0, 6)),
            "header_length": length,
            "unknown_fields": draw(st.binary(min_size=length - 105, max_size=length - 105)),
        }
    geometry = Geometry(cluster_bits, extended_l2=bool(features.get("incompatible_features", 0) & 16))
    l1_size = draw(st.integers(0, 4 << 20))
    place = st.integers(0, (1 << 40) - 1).map(lambda index: index << cluster_bits)
    return Header(
        version=version,
        cluster_bits=cluster_bits,
        size=draw(st.integers(0, min(l1_size * geometry.l2_coverage, 2**63 - 1))),
        crypt_method=draw(st.sampled_from([0, 1, 2])),
        l1_size=l1_size,
        l1_table_offset=draw(place),
        refcount_table_offset=draw(place),
        refcount_table_clusters=draw(st.integers(1, (8 << 20) >> cluster_bits)),
        nb_snapshots=draw(st.integers(0, 65536)),
        snapshots_offset=draw(place),
        backing_file=draw(st.one_of(st.none(), NAME.filter(bool))),
        extensions=tuple(draw(EXTENSIONS)),
        **features,
    )


@given(headers(), st.binary(max_size=64))
def test_headers_parse_back(header: Header, behind: bytes) -> None:
    try:
        data = header.build()
    except OptionError:
        assert header.cluster_size <= 1024  # nothing that is drawn here fills more
        return
    # Where there is no backing file, what lies behind the end marker is no part of the header.
    parsed = parse_header(data + behind)
    assert dataclasses.replace(parsed, extensions=unpadded(parsed.extensions)) == header
    assert parsed.build() == data
    assert dataclasses.replace(parsed, layout=None).build() == data


def unpadded(extensions: tuple[HeaderExtension, ...]) -> tuple[HeaderExtension, ...]:
    assert not any(extension.padding.strip(b"\0") for extension in extensions)
    return tuple(dataclasses.replace(extension, padding=b"") for extension in extensions)


@given(headers(), st.lists(st.tuples(st.integers(4, 299), st.integers(0, 255)), max_size=6), st.integers(0, 600))
def test_damaged_headers_raise_or_build_back(header: Header, damage: list[tuple[int, int]], length: int) -> None:
    try:
        data = bytearray(header.build().ljust(600, b"\0"))
    except OptionError:
        return
    for place, value in damage:
        data[place] = value
    cut = bytes(data[:length])
    try:
        parsed = parse_header(cut, len(cut))
    except FormatError:
        return
    built = parsed.build()
    assert built == cut.ljust(len(built), b"\0")[: len(built)]
    assert parsed.geometry.l1_entries_for(parsed.size) <= parsed.l1_size <= 4 << 20


SNAPSHOTS = st.lists(
    st.builds(
        SnapshotEntry,
        l1_table_offset=U64,
        l1_size=U32,
        id=NAME,
        name=NAME,
        date_sec=U32,
        date_nsec=U32,
        vm_clock_nsec=U64,
        vm_state_size=U64,
        disk_size=U64,
        icount=st.one_of(st.none(), st.integers(0, 2**64 - 2)),
        extra_data=st.binary(min_size=24, max_size=60),
    ),
    max_size=5,
)


def parse_snapshots(data: bytes, count: int) -> list[SnapshotEntry]:
    header = Header(3, 16, 0, 0, 0, 0, 1, nb_snapshots=count, snapshots_offset=0x10000)
    return parse_snapshot_table(lambda offset, length: data[offset - 0x10000 :][:length], header)


@given(SNAPSHOTS)
def test_snapshot_tables_parse_back(entries: list[SnapshotEntry]) -> None:
    data = build_snapshot_table(entries)
    parsed = parse_snapshots(data, len(entries))
    for entry, found in zip(entries, parsed, strict=True):
        assert found.extra_data[24:] == entry.extra_data[24:]
        assert dataclasses.replace(found, extra_data=entry.extra_data, padding=b"") == entry
    assert build_snapshot_table(parsed) == data


@given(st.one_of(st.binary(max_size=400), SNAPSHOTS.map(build_snapshot_table)), st.integers(0, 4), st.data())
def test_any_snapshot_table_raises_or_builds_back(data: bytes, count: int, draw: st.DataObject) -> None:
    if data:
        damaged = bytearray(data)
        for place in draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=3)):
            damaged[place] = draw.draw(st.integers(0, 255))
        data = bytes(damaged)
    try:
        entries = parse_snapshots(data, count)
    except FormatError:
        return
    built = build_snapshot_table(entries)
    assert len(entries) == count
    assert built == data[: len(built)]


BITMAPS = st.lists(
    st.builds(
        BitmapEntry,
        table_offset=U64,
        table_size=U32,
        flags=U32,
        type=st.integers(0, 255),
        granularity_bits=st.integers(0, 255),
        name=NAME,
        extra_data=st.binary(max_size=20),
    ),
    min_size=1,  # a directory that says nothing is damage
    max_size=5,
)


@given(BITMAPS)
def test_bitmap_directories_parse_back(entries: list[BitmapEntry]) -> None:
    data = build_bitmap_directory(entries)
    parsed = parse_bitmap_directory(data, BitmapsExtension(len(entries), len(data), 0x10000))
    assert [dataclasses.replace(entry, padding=b"") for entry in parsed] == entries
    assert build_bitmap_directory(parsed) == data


@given(st.one_of(st.binary(max_size=300), BITMAPS.map(build_bitmap_directory)), st.integers(1, 4), CLUSTER_BITS, U64)
def test_any_bitmap_directory_raises_or_builds_back(data: bytes, count: int, cluster_bits: int, size: int) -> None:
    try:
        entries = parse_bitmap_directory(data, BitmapsExtension(count, len(data), 0x10000))
    except FormatError:
        return
    assert build_bitmap_directory(entries) == data
    for entry in entries:
        try:
            check_bitmap_entry(entry, 1 << cluster_bits, size)
        except FormatError:
            continue
        assert entry.table_size << cluster_bits <= 512 << 20


@given(st.lists(st.builds(FeatureName, st.integers(0, 255), st.integers(0, 255), NAME.filter(lambda n: len(n) < 12))))
def test_feature_names_parse_back(names: list[FeatureName]) -> None:
    assert parse_feature_names(build_feature_names(names)) == tuple(names)


def test_numpy_would_have_made_floats() -> None:
    """Why offsets leave this layer as int64: the trap itself, so that a numpy that closes it is noticed."""
    mixed = np.array([1 << 62 | 512], dtype=np.uint64) + np.array([1], dtype=np.int64)
    assert mixed.dtype == np.dtype(np.float64)
    swapped = np.array([1], dtype=">u8").view(np.uint64)
    assert swapped.tolist() == [1 << 56]
    assert offsets(np.array([1 << 62 | 512], dtype=">u8"))[0] + 1 == 513
    with pytest.raises(OverflowError):
        np.array([1 << 64], dtype=np.uint64)
