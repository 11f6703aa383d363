"""The images that tools/fuzz.py changes: small, made by stock QEMU, with the places of all their fields.

    seed_images(folder) -> name -> Seed(bytes, fields)

A field is (label, host offset, bytes). Fields are found by a walk of its own over the raw bytes, so that a mistake in
the library is not made here as well.
"""

import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

_OFFSET = 0x00FFFFFFFFFFFE00
_HEADER = [
    ("version", 4, 4), ("backing offset", 8, 8), ("backing size", 16, 4), ("cluster bits", 20, 4), ("size", 24, 8),
    ("encryption", 32, 4), ("l1 size", 36, 4), ("l1 offset", 40, 8), ("reftable offset", 48, 8),
    ("reftable clusters", 56, 4), ("snapshots", 60, 4), ("snapshots offset", 64, 8), ("incompatible", 72, 8),
    ("compatible", 80, 8), ("autoclear", 88, 8), ("refcount order", 96, 4), ("header length", 100, 4),
    ("compression", 104, 1),
]  # fmt: skip
_FILL = ("write -P 1 0 40k", "write -P 2 100k 1k", "write -z 200k 64k", "write -P 3 900k 100k", "discard 960k 16k")


class Field(NamedTuple):
    """A place that a rule of the format is about: what it is, host offset and width in bytes."""

    label: str
    offset: int
    width: int


class Seed(NamedTuple):
    """A valid image: its bytes, its fields, and its format's cluster size."""

    data: bytes
    fields: list[Field]
    cluster_size: int


def seed_images(folder: Path) -> dict[str, Seed]:
    """Make all seeds in a folder; the folder keeps the base image that one of them names."""

    def make(name: str, options: str, *commands: str, backing: str | None = None) -> Path:
        path = folder / name
        more = ["-b", backing, "-F", "qcow2"] if backing else []
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *more, path.name, "1M", cwd=folder)
        for command in commands:
            if command.startswith("qemu-img "):
                _run(*command.split(), path.name, *(["tag"] if "bitmap" in command else []), cwd=folder)
            else:
                _run("qemu-io", "-f", "qcow2", "-c", command, path.name, cwd=folder)
        return path

    take = "qemu-img snapshot -c taken"
    paths = [
        make("plain", "cluster_size=4k", *_FILL),
        make("v2", "cluster_size=4k,compat=0.10", *_FILL, take, "write -P 7 0 8k"),
        make("tiny-clusters", "cluster_size=512", "write -P 1 0 20k", "write -P 2 700k 9k", take, "write -P 4 1k 3k"),
        make("one-bit-refcounts", "cluster_size=4k,refcount_bits=1", *_FILL),
        make("wide-refcounts", "cluster_size=4k,refcount_bits=64", *_FILL, take, take, "write -P 9 2k 9k"),
        make("subclusters", "cluster_size=16k,extended_l2=on", *_FILL, "write -P 8 300k 512", take, "write -P 6 1k 1k"),
        make("zlib", "cluster_size=4k", *(f"write -c -P {n} {n * 4}k 4k" for n in range(8)), take, "write -P 9 5k 2k"),
        make("zstd", "cluster_size=4k,compression_type=zstd", *(f"write -c -P {n} {n * 4}k 4k" for n in range(8))),
        make("bitmap", "cluster_size=4k", "qemu-img bitmap --add -g 64k", "write -P 5 64k 90k"),
        make("lazy", "cluster_size=4k,lazy_refcounts=on", *_FILL, take, "write -P 8 16k 40k"),
    ]
    make("base", "cluster_size=4k", "write -P 11 0 1M")
    paths.append(make("overlay", "cluster_size=4k", *_FILL, take, backing="base"))
    return {path.name: _seed(path.read_bytes()) for path in paths}


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def _seed(data: bytes) -> Seed:
    """The fields of a valid image."""
    version, cluster_bits = struct.unpack_from(">I", data, 4)[0], struct.unpack_from(">I", data, 20)[0]
    cluster = 1 << cluster_bits
    fields = [Field(*field) for field in _HEADER if version > 2 or field[1] < 72]
    l1_size, l1, reftable, reftable_clusters, snapshots, table = struct.unpack_from(">IQQIIQ", data, 36)
    extensions = 112 if version > 2 else 72
    fields += [Field("extension area", offset, 4) for offset in range(extensions, extensions + 64, 4)]
    fields += _mapping(data, l1, l1_size, cluster, "active")
    fields += [Field("reftable entry", reftable + 8 * index, 8) for index in range(3)]
    for offset in {value & _OFFSET for value in _words(data, reftable, reftable_clusters * cluster // 8)} - {0}:
        fields += [Field("refcount", offset + place, 2) for place in range(0, 64, 2)]
    for _ in range(snapshots):
        fields += _snapshot(data, table, cluster)
        table = -(-(table + 40 + sum(struct.unpack_from(">HH", data, table + 12)) + _extra(data, table)) // 8) * 8
    return Seed(data, fields + _bitmaps(data, extensions, version), cluster)


def _mapping(data: bytes, l1: int, size: int, cluster: int, label: str) -> list[Field]:
    """The entries of an L1 table, and of the L2 tables under it those that say something, with some neighbours."""
    fields = [Field(f"{label} l1 entry", l1 + 8 * index, 8) for index in range(size)]
    for entry in _words(data, l1, size):
        table = entry & _OFFSET
        if table:
            used = [index for index, word in enumerate(_words(data, table, cluster // 8)) if word]
            chosen = sorted({*used, *(index + 1 for index in used if index + 1 < cluster // 8)})
            fields += [Field(f"{label} l2 entry", table + 8 * index, 8) for index in chosen]
            fields += [
                Field("compressed data", place, 1)
                for word in _words(data, table, cluster // 8)
                if word >> 62 == 1
                for place in range(word & 0xFFFFFF, (word & 0xFFFFFF) + 12)
            ]
    return fields


def _snapshot(data: bytes, at: int, cluster: int) -> list[Field]:
    widths = [("l1 offset", 8), ("l1 size", 4), ("id size", 2), ("name size", 2), ("seconds", 4), ("nanoseconds", 4)]
    widths += [("clock", 8), ("vm state size", 4), ("extra size", 4)]
    widths += [("extra", 8)] * (_extra(data, at) // 8) + [("text", 1)] * 4
    fields, place = [], at
    for label, width in widths:
        fields.append(Field(f"snapshot {label}", place, width))
        place += width
    l1, size = struct.unpack_from(">QI", data, at)
    return fields + _mapping(data, l1, size, cluster, "snapshot")


def _extra(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", data, at + 36)[0])


def _bitmaps(data: bytes, at: int, version: int) -> list[Field]:
    """Fields of the bitmaps extension, the directory and its first table."""
    while version > 2:
        magic, length = struct.unpack_from(">II", data, at)
        if not magic:
            break
        if magic == 0x23852875:
            directory = struct.unpack_from(">Q", data, at + 24)[0]
            widths = [8, 4, 4, 1, 1, 2, 4, 1]
            entry = [directory + sum(widths[:index]) for index in range(len(widths))]
            table = struct.unpack_from(">Q", data, directory)[0]
            places = [
                (at + 8, 4),
                (at + 12, 4),
                (at + 16, 8),
                (at + 24, 8),
                (table, 8),
                *zip(entry, widths, strict=True),
            ]
            return [Field("bitmap field", *place) for place in places]
        at += 8 + -(-length // 8) * 8
    return []


def _words(data: bytes, offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f">{count}Q", data.ljust(offset + 8 * count, b"\0"), offset)
