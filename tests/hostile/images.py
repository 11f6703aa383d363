"""Images that try to take all memory, all time, or a wrong byte: by name, each a function that writes a file."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.hostile.draft import (
    COPIED,
    END_OF_EXTENSIONS,
    Draft,
    compressed_entry,
    extension,
    snapshot_entry,
    words,
)

MIB = 1 << 20
BITMAPS_MAGIC, CRYPTO_MAGIC, DATA_FILE_MAGIC, BACKING_FORMAT_MAGIC = 0x23852875, 0x0537BE77, 0x44415441, 0xE2792ACA
EXTENDED_L2, DATA_FILE, COMPRESSION_BIT = 16, 4, 8

#: Images that must be refused when they are opened, by name: fields of the header that make them so.
REFUSED_HEADERS: dict[str, dict[str, int]] = {
    "l1-2^31-entries": {"l1_size": 1 << 31},
    "l1-2^32-1-entries": {"l1_size": (1 << 32) - 1},
    "l1-beyond-2^63": {"l1_table_offset": (1 << 64) - 65536},
    "l1-too-small": {"size": 1 << 40},
    "refcount-table-2^32-1-clusters": {"refcount_table_clusters": (1 << 32) - 1},
    "refcount-table-none": {"refcount_table_clusters": 0},
    "refcount-table-beyond-2^63": {"refcount_table_offset": (1 << 64) - 65536},
    "refcount-order-7": {"refcount_order": 7},
    "refcount-order-2^32-1": {"refcount_order": (1 << 32) - 1},
    "cluster-bits-0": {"cluster_bits": 0},
    "cluster-bits-63": {"cluster_bits": 63},
    "cluster-bits-2^32-1": {"cluster_bits": (1 << 32) - 1},
    "snapshots-2^32-1": {"nb_snapshots": (1 << 32) - 1, "snapshots_offset": 0x60000},
    "snapshots-65537": {"nb_snapshots": 65537, "snapshots_offset": 0x60000},
    "snapshots-beyond-2^63": {"nb_snapshots": 1, "snapshots_offset": (1 << 64) - 65536},
    "size-2^63-1": {"size": (1 << 63) - 1},
    "size-2^64-1": {"size": (1 << 64) - 1},
    "backing-name-2^31": {"backing_file_offset": 200, "backing_file_size": 1 << 31},
    "backing-name-at-2^63": {"backing_file_offset": 1 << 63, "backing_file_size": 10},
    "header-length-2^32-1": {"header_length": (1 << 32) - 1},
    "header-length-0": {"header_length": 0},
    "extended-l2-small-clusters": {"incompatible_features": EXTENDED_L2, "cluster_bits": 9},
    "encryption-3": {"crypt_method": 3},
    "compression-type-255": {"compression_type": 255, "incompatible_features": COMPRESSION_BIT},
    "unknown-features": {"incompatible_features": 1 << 63},
}


def _l1_all_one_table(path: Path) -> None:
    """32 MiB of L1 table, each entry the same L2 table: 2^31 mapped clusters."""
    draft = Draft(fields={"l1_size": 1 << 22, "size": 1 << 51, "l1_table_offset": 1 << 20})
    draft.pieces[1 << 20] = words(0x40000) * (1 << 22)
    draft.pieces[0x40000] = words(0x50000) * 8192
    draft.refcounts = [1, 1, 1, 0, 65535, 65535, *[0] * 10, *[1] * 512]
    draft.write(path)


def _l1_few_tables(path: Path) -> None:
    """Four million L1 entries that name the same 4096 L2 tables over and over, all of them zeroes."""
    draft = Draft(fields={"l1_size": 1 << 22, "size": 1 << 51, "l1_table_offset": 1 << 20})
    draft.pieces[1 << 20] = b"".join(words((1 << 30) + (index << 16)) for index in range(1 << 12)) * (1 << 10)
    draft.file_size = (1 << 30) + (1 << 28)
    draft.write(path)


def _huge_sparse(path: Path) -> None:
    """The largest disk that a 32 MiB L1 table of 2 MiB clusters can say, in a file that has nothing of it."""
    draft = Draft(cluster_bits=21, fields={"l1_size": 1 << 22, "size": 1 << 61})
    draft.fields["l1_table_offset"] = 32 << 21
    draft.file_size = 64 << 21
    draft.write(path)


def _l2_everywhere(path: Path) -> None:
    """L2 entries that point at each kind of metadata, between clusters, beyond the end, and at 2^56."""
    places = [0, 0x10000, 0x20000, 0x30000, 0x40000, 0x50200, 1 << 40, (1 << 56) - 65536, (1 << 56) - 512]
    draft = Draft()
    draft.pieces[0x40000] = words(*(place | COPIED for place in places[1:]), *(place | 1 for place in places), 1 << 58)
    draft.write(path)


def _l2_in_metadata(path: Path) -> None:
    """L1 entries that name the header, the refcount table, the refcount block and the L1 table as L2 tables."""
    draft = Draft(fields={"l1_size": 6, "size": 6 << 29})
    draft.pieces[0x30000] = words(*((place << 16 | COPIED) for place in (4, 1, 2, 3)), 0x40200, 1 << 50)
    draft.write(path)


def _refcounts_all_zero(path: Path) -> None:
    """Every refcount is zero, so that a writer who trusts them would allocate the header."""
    draft = Draft(refcounts=[0] * 6)
    draft.write(path)


def _refcount_block_twice(path: Path) -> None:
    draft = Draft()
    draft.pieces[0x10000] = words(*[0x20000] * 8192)
    draft.write(path)


def _refcount_blocks_everywhere(path: Path) -> None:
    """8 MiB of refcount table with an own block for each entry, in a sparse file."""
    draft = Draft(fields={"refcount_table_clusters": 128, "refcount_table_offset": 1 << 20})
    draft.pieces[1 << 20] = b"".join(words((1 << 30) + (index << 16)) for index in range(1 << 20))
    draft.file_size = (1 << 30) + (1 << 36)
    draft.write(path)


def _refcounts_saturated(path: Path) -> None:
    """Every cluster is in use as often as 16 bits can say; no cluster is free for 2 GiB, and no block can grow."""
    draft = Draft(refcounts=[65535] * 32768)
    draft.write(path)


def _snapshots(count: int, l1_size: int, l1_offset: int = 1 << 20, **entry: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        draft = Draft(fields={"nb_snapshots": count, "snapshots_offset": 0x60000 + (40 << 20)})
        entries = b"".join(
            snapshot_entry(l1_offset, l1_size, **({"number": b"%d" % (index + 1)} | entry)) for index in range(count)
        )
        draft.pieces[0x60000 + (40 << 20)] = entries
        draft.pieces[1 << 20] = words(0x40000)
        draft.refcounts[4:6] = [2, 2]
        draft.write(path)

    return write


def _bitmap_directory(count: int, size: int, offset: int, directory: bytes = b"") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = struct.pack(">IIQQ", count, 0, size, offset)
        draft = Draft(extensions=extension(BITMAPS_MAGIC, data) + END_OF_EXTENSIONS, fields={"autoclear_features": 1})
        draft.refcounts.append(1)
        draft.pieces[0x60000] = directory or bytes(24)
        draft.file_size = max(1 << 20, min(size + offset, 1 << 28))
        draft.write(path)

    return write


def _bitmap(table_offset: int, entries: int, *, granularity: int = 16, name: bytes = b"b", extra: int = 0) -> bytes:
    head = struct.pack(">QIIBBHI", table_offset, entries, 2, 1, granularity, len(name), extra)
    return head + name + bytes(-(len(head) + len(name)) % 8)


def _one_bitmap(entry: bytes) -> Callable[[Path], None]:
    return _bitmap_directory(1, len(entry), 0x60000, entry)


def _extension(magic: int, data: bytes, length: int | None = None, **fields: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Draft(extensions=extension(magic, data, length) + END_OF_EXTENSIONS, fields=fields).write(path)

    return write


def _many_extensions(path: Path) -> None:
    """A first cluster of 2 MiB full of empty extensions."""
    draft = Draft(cluster_bits=21, extensions=extension(0x12345678, b"") * 262000 + END_OF_EXTENSIONS)
    draft.write(path)


def _compressed(stream: bytes, *, zstd: bool = False, sectors: int | None = None) -> Callable[[Path], None]:
    """Guest cluster 0 is a compressed one."""

    def write(path: Path) -> None:
        draft = Draft()
        if zstd:
            draft.fields |= {"compression_type": 1, "incompatible_features": COMPRESSION_BIT}
        count = (len(stream) + 511) // 512 - 1 if sectors is None else sectors
        draft.pieces[0x40000] = words(compressed_entry(0x50000, count))
        draft.pieces[0x50000] = stream
        draft.refcounts = [1] * 5 + [1] * (-(-len(stream) // 65536))
        draft.write(path)

    return write


def _deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -12)
    return encoder.compress(data) + encoder.flush()


def _zstd(data: bytes) -> bytes:
    from backports import zstd

    return bytes(zstd.compress(data))


def _zstd_window(path: Path) -> None:
    """A zstd frame that asks for a window of 2^41 bytes and says that its content is as long."""
    frame = struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0xF8, 1 << 41)
    _compressed(frame + b"\3\0\0" + b"a", zstd=True)(path)


def _luks(**fields: int) -> Callable[[Path], None]:
    """A LUKS header whose key slots ask for the most iterations."""

    def write(path: Path) -> None:
        slots = b"".join(
            struct.pack(">II32sII", 0xAC71F3, fields.get("iterations", 0xFFFFFFFF), b"s" * 32, 8 + 512 * slot, 4000)
            for slot in range(8)
        )
        head = struct.pack(
            ">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256",
            fields.get("payload", 8 + 512 * 8), fields.get("key", 64), b"d" * 20, b"s" * 32, 0xFFFFFFFF, b"uuid",
        )  # fmt: skip
        pointer = words(0x100000, fields.get("length", 4 * MIB))
        draft = Draft(extensions=extension(CRYPTO_MAGIC, pointer) + END_OF_EXTENSIONS, fields={"crypt_method": 2})
        draft.pieces[0x100000] = head + slots
        draft.file_size = 8 * MIB
        draft.write(path)

    return write


def _with_backing(name: bytes, **fields: int) -> Callable[[Path], None]:
    """An image that names a backing file; the name may be as long as the first cluster."""

    def write(path: Path) -> None:
        draft = Draft(fields={"backing_file_offset": 1024, "backing_file_size": len(name)} | fields)
        draft.pieces[1024] = name[: draft.cluster_size - 1024]
        draft.write(path)

    return write


def _own_data_file(path: Path) -> None:
    """The data file is the image itself."""
    name = os.fsencode(path.name)
    fields = {"incompatible_features": DATA_FILE}
    Draft(extensions=extension(DATA_FILE_MAGIC, name) + END_OF_EXTENSIONS, fields=fields).write(path)


def _extended(*pairs: int) -> Callable[[Path], None]:
    """Extended L2 entries: (entry, bitmap) pairs."""

    def write(path: Path) -> None:
        draft = Draft(fields={"incompatible_features": EXTENDED_L2})
        draft.pieces[0x40000] = words(*pairs)
        draft.write(path)

    return write


def _feature_names(path: Path) -> None:
    """Thousands of feature names, each an escape sequence for a terminal."""
    name = b"\0\0" + b"\x1b[2J\n".ljust(46, b"A")
    Draft(extensions=extension(0x6803F857, name * 1300) + END_OF_EXTENSIONS).write(path)


_TEXT = "".join(chr(32 + index % 90) for index in range(1 << 16)).encode()
_ALL = 0xFFFFFFFF

#: Every other hostile image, by name.
BUILDERS: dict[str, Callable[[Path], None]] = {
    "l1-32-mib-one-table": _l1_all_one_table,
    "l1-32-mib-4096-tables": _l1_few_tables,
    "disk-2^61-in-nothing": _huge_sparse,
    "l2-entries-everywhere": _l2_everywhere,
    "l2-tables-in-metadata": _l2_in_metadata,
    "refcounts-all-zero": _refcounts_all_zero,
    "refcount-block-8192-times": _refcount_block_twice,
    "refcount-blocks-2^20": _refcount_blocks_everywhere,
    "refcounts-saturated": _refcounts_saturated,
    "snapshots-65536-with-max-l1": _snapshots(65536, 1 << 22),
    "snapshot-l1-2^32-1": _snapshots(1, (1 << 32) - 1),
    "snapshot-l1-is-the-active-one": _snapshots(1, 1, 0x30000),
    "snapshot-l1-is-the-header": _snapshots(1, 1, 0),
    "snapshot-l1-is-the-refcount-table": _snapshots(1, 1, 0x10000),
    "snapshot-l1-is-the-refcount-block": _snapshots(1, 1, 0x20000),
    "snapshot-l1-is-a-data-cluster": _snapshots(1, 1, 0x50000),
    "snapshot-l1-is-the-snapshot-table": _snapshots(1, 1, 0x60000 + (40 << 20)),
    "snapshot-id-of-60000-digits": _snapshots(1, 1, number=b"9" * 60000),
    "snapshot-id-without-end": _snapshots(2, 1, number=b"4294967296000000000000000000"),
    "snapshot-name-of-65535-bytes": _snapshots(1, 1, name=b"\xff" * 65535),
    "snapshot-disk-2^64-1": _snapshots(1, 1, extra=words((1 << 64) - 1, (1 << 64) - 1, 0)),
    "bitmap-directory-2^64-1": _bitmap_directory(1, (1 << 64) - 1, 0x60000),
    "bitmap-directory-64-mib-of-nothing": _bitmap_directory(65535, 65535 * 1024, 0x60000),
    "bitmaps-2^32-1": _bitmap_directory((1 << 32) - 1, 24, 0x60000),
    "bitmap-directory-at-2^63": _bitmap_directory(1, 24, 1 << 63),
    "bitmap-table-2^32-1": _one_bitmap(_bitmap(0x70000, (1 << 32) - 1)),
    "bitmap-table-2^27": _one_bitmap(_bitmap(0x70000, 1 << 27)),
    "bitmap-table-beyond-end": _one_bitmap(_bitmap(1 << 50, 1)),
    "bitmap-granularity-255": _one_bitmap(_bitmap(0x70000, 1, granularity=255)),
    "bitmap-extra-2^32-1": _one_bitmap(_bitmap(0x70000, 1, extra=(1 << 32) - 1)),
    "extension-length-2^32-1": _extension(0x12345678, b"", (1 << 32) - 1),
    "extension-backing-format-2^31": _extension(BACKING_FORMAT_MAGIC, b"raw", 1 << 31),
    "extensions-262000": _many_extensions,
    "extension-bitmaps-of-one-byte": _extension(BITMAPS_MAGIC, b"x", autoclear_features=1),
    "extension-crypto-of-one-byte": _extension(CRYPTO_MAGIC, b"x", crypt_method=2),
    "extension-crypto-at-2^64": _extension(CRYPTO_MAGIC, words((1 << 64) - 65536, (1 << 64) - 1), crypt_method=2),
    "feature-names-with-escapes": _feature_names,
    "deflate-bomb": _compressed(_deflate(bytes(256 * MIB))[: 500 * 512]),
    "deflate-too-little": _compressed(_deflate(b"x" * 65535)),
    "deflate-empty": _compressed(_deflate(b"")),
    "deflate-cut": _compressed(_deflate(_TEXT)[:100]),
    "deflate-noise": _compressed(bytes(range(256)) * 8),
    "compressed-all-sectors": _compressed(_deflate(_TEXT), sectors=255),
    "zstd-bomb": _compressed(_zstd(bytes(256 * MIB)), zstd=True),
    "zstd-too-little": _compressed(_zstd(b"x" * 65535), zstd=True),
    "zstd-empty-frames": _compressed(_zstd(b"") * 13000, zstd=True),
    "zstd-skippable-frames": _compressed(struct.pack("<II", 0x184D2A50, 0) * 16000, zstd=True),
    "zstd-skippable-4-gib": _compressed(struct.pack("<II", 0x184D2A50, (1 << 32) - 1), zstd=True),
    "zstd-window-2^41": _zstd_window,
    "luks-2^32-iterations": _luks(),
    "luks-key-2^32-1": _luks(key=(1 << 32) - 1, payload=(1 << 32) - 1),
    "luks-length-2^64-1": _luks(length=(1 << 64) - 1),
    "backing-nested-10000": _with_backing(b'json:{"file":' + b'{"file":' * 120),
    "backing-self": _with_backing(b"image.qcow2"),
    "backing-nul": _with_backing(b"image\0.qcow2"),
    "data-file-self": _own_data_file,
    "extended-both-bits": _extended(0x50000 | COPIED, _ALL << 32 | _ALL),
    "extended-allocated-nowhere": _extended(0, _ALL),
    "extended-zero-flag": _extended(0x50000 | COPIED | 1, _ALL),
    "extended-compressed-with-bitmap": _extended(compressed_entry(0x50000, 0), _ALL),
}


def make(name: str, path: Path) -> Path:
    """Write the named image."""
    if name in REFUSED_HEADERS:
        fields = REFUSED_HEADERS[name]
        draft = Draft(fields=fields)
        draft.file_size = 1 << 20
        draft.write(path)
    else:
        BUILDERS[name](path)
    return path


def nested_description(depth: int) -> str:
    """A json: name of that many drivers inside each other."""
    return "json:" + '{"driver":"raw","file":' * depth + '{"driver":"file","filename":"x"}' + "}" * depth


def long_description(length: int) -> str:
    """A json: name of about `length` characters."""
    return "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "x" * length}})
