"""An image that cannot be opened: qemu-img's own sentence for each rule that its header breaks, to the letter."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.side_by_side import assert_same, ours
from tests.oracle import qemu_img

Change = Callable[[bytearray], None]


def field(offset: int, form: str, value: int) -> Change:
    """Put one big-endian field."""

    def change(data: bytearray) -> None:
        struct.pack_into(f">{form}", data, offset, value)

    return change


def extension(magic: int, data: bytes, length: int | None = None) -> Change:
    """Make this the first header extension, followed by the end marker."""

    def change(image: bytearray) -> None:
        start = struct.unpack_from(">I", image, 100)[0]
        head = struct.pack(">II", magic, len(data) if length is None else length)
        padded = head + data.ljust(-(-len(data) // 8) * 8, b"\0")
        image[start : start + len(padded) + 8] = padded + bytes(8)

    return change


def all_of(*changes: Change) -> Change:
    def change(image: bytearray) -> None:
        for one in changes:
            one(image)

    return change


def bitmaps(count: int, size: int, offset: int, reserved: int = 0) -> Change:
    """A bitmaps extension, with the bit that says that it is valid."""
    data = struct.pack(">IIQQ", count, reserved, size, offset)
    return all_of(field(88, "Q", 1), extension(0x23852875, data))


def directory(entry: bytes, count: int = 1) -> Change:
    """A bitmap directory at the end of the image."""

    def change(image: bytearray) -> None:
        image.extend(bytes(-len(image) % 65536))
        bitmaps(count, len(entry), len(image))(image)
        image.extend(entry.ljust(65536, b"\0"))

    return change


def bitmap_entry(flags: int = 0, kind: int = 1, bits: int = 16, extra: int = 0, table: int = 65536) -> bytes:
    """One entry of a bitmap directory for the bitmap "b0"."""
    head = struct.pack(">QIIBBHI", table, 1, flags, kind, bits, 2, extra)
    return (head + bytes(extra) + b"b0").ljust(-(-(26 + extra) // 8) * 8, b"\0")


FEATURE_TABLE = 0x6803F857
RULES: dict[str, Change] = {
    "version": field(4, "I", 4),
    "cluster bits": field(20, "I", 22),
    "short header": field(100, "I", 96),
    "long header": field(100, "I", 1 << 20),
    "backing file offset": field(8, "Q", 1 << 20),
    "backing file size": all_of(field(8, "Q", 4096), field(16, "I", 1024)),
    "compression type": field(104, "B", 7),
    "compression type without its bit": field(104, "B", 1),
    "compression bit without its type": field(72, "Q", 8),
    "unknown feature": field(72, "Q", 1 << 63),
    "unknown feature with a name": all_of(field(72, "Q", 3 << 62), extension(FEATURE_TABLE, b"\0\x3fTest feature")),
    "small subclusters": all_of(field(20, "I", 13), field(72, "Q", 16)),
    "refcount order": field(96, "I", 7),
    "no refcount table": field(56, "I", 0),
    "large refcount table": field(56, "I", 0x20001),
    "unaligned refcount table": field(48, "Q", 0x1234567890ABCDEF),
    "refcount table behind any file": all_of(field(48, "Q", (1 << 64) - 65536), field(56, "I", 0x7F)),
    "many snapshots": field(60, "I", (1 << 32) - 1),
    "unaligned snapshot table": all_of(field(60, "I", 1), field(64, "Q", 512)),
    "large L1 table": field(36, "I", (1 << 32) - 1),
    "unaligned L1 table": field(40, "Q", 512),
    "small L1 table": field(36, "I", 0),
    "large disk": field(24, "Q", 1 << 60),
    "large extension": extension(0x12345678, b"", 1 << 30),
    "backing format": extension(0xE2792ACA, b"x" * 16),
    "encryption header without encryption": extension(0x0537BE77, bytes(16)),
    "short encryption header": all_of(field(32, "I", 2), extension(0x0537BE77, bytes(8))),
    "unaligned encryption header": all_of(field(32, "I", 2), extension(0x0537BE77, struct.pack(">QQ", 512, 4096))),
    "no bitmaps": bitmaps(0, 32, 0),
    "many bitmaps": bitmaps(65536, 32, 0),
    "unaligned bitmap directory": bitmaps(1, 32, 512),
    "large bitmap directory": bitmaps(1, 1 << 40, 0),
    "empty bitmap directory": bitmaps(1, 0, 0),
    "cut bitmap directory": directory(bitmap_entry()[:16]),
    "fewer bitmaps": directory(bitmap_entry(), 2),
    "more bitmaps": directory(bitmap_entry() + bitmap_entry(), 1),
    "bitmap flags": directory(bitmap_entry(flags=6)),
    "bitmap type": directory(bitmap_entry(kind=2)),
    "bitmap granularity": directory(bitmap_entry(bits=40)),
    "bitmap table": directory(bitmap_entry(table=512)),
    "bitmap extra data": directory(bitmap_entry(extra=8)),
    "extra data of a snapshot": all_of(
        field(60, "I", 1),
        field(64, "Q", 1 << 16),
        lambda image: image.__setitem__(slice(1 << 16, None), b"\xff" * 4096),
    ),
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    qemu_img("create", "-q", "-f", "qcow2", "image", "4M", cwd=folder)
    return folder / "image"


@pytest.mark.parametrize("rule", RULES)
def test_same_words(rule: str, image: Path, tmp_path: Path) -> None:
    data = bytearray(image.read_bytes())
    RULES[rule](data)
    (tmp_path / "image").write_bytes(data)
    assert assert_same(tmp_path, "info", "-f", "qcow2", "image").code == 1
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "image", "-F", "qcow2", "top", "4M", cwd=tmp_path)
    assert assert_same(tmp_path, "map", "top").code == 1


def test_the_hint_names_the_program_that_was_called(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(image.read_bytes())
    RULES["extra data of a snapshot"](data)
    (tmp_path / "image").write_bytes(data)
    monkeypatch.setattr("tests.cli.side_by_side.PROGRAM", "qcow")
    said = ours(tmp_path, "info", "image")
    assert said.err.splitlines()[1] == "You can force-remove this extra metadata with qcow check -r all"
