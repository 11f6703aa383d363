"""compare as a library call: what it finds, and how little it reads for that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import qcowlib
from qcowlib import LocalFiles, Outcome, open_image
from qcowlib.image.reader import ReadableImage

SIZE = 8 << 20


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def image(stack: ExitStack, path: Path) -> ReadableImage:
    return stack.enter_context(open_image(path, format="qcow2", policy=LocalFiles()))


def overlays(directory: Path, *, size: int = SIZE) -> tuple[Path, Path]:
    """Two overlays on one base that is full of data."""
    qcowlib.create_image(directory / "base", SIZE)
    with open_image(directory / "base", writable=True) as base:
        base.write(0, random.Random(1).randbytes(SIZE))
    for name in ("one", "two"):
        qcowlib.create_overlay(directory / name, "base", backing_fmt="qcow2", size=size)
    return directory / "one", directory / "two"


def write(path: Path, offset: int, data: bytes) -> None:
    with open_image(path, writable=True, policy=LocalFiles()) as opened_image:
        opened_image.write(offset, data)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read that the comparison makes."""
    found: list[int] = []
    original = ReadableImage.readinto

    def counted(self: ReadableImage, offset: int, buffer: bytearray | memoryview) -> int:
        found.append(len(buffer))
        return original(self, offset, buffer)

    monkeypatch.setattr(ReadableImage, "readinto", counted)
    return found


def test_what_is_shared_or_zero_is_not_read(tmp_path: Path, opened: ExitStack, reads: list[int]) -> None:
    one, two = overlays(tmp_path, size=SIZE * 2)
    for path in (one, two):
        write(path, 1 << 20, b"own" * 1000)
        with open_image(path, writable=True, policy=LocalFiles()) as overlay:
            overlay.write_zeroes(2 << 20, 1 << 20)
    first, second = image(opened, one), image(opened, two)
    calls: list[tuple[int, int]] = []
    found = qcowlib.compare(first, second, progress=lambda done, total: calls.append((done, total)))
    assert found == (Outcome.IDENTICAL, None, False)
    assert sum(reads) == 2 * 65536
    assert calls[-1] == (SIZE * 2, SIZE * 2)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_many_small_pieces_are_read_together(tmp_path: Path, opened: ExitStack, reads: list[int]) -> None:
    """One image scattered, the other in a row: two reads for 2 MiB."""
    data = random.Random(3).randbytes(SIZE)
    for name in ("row", "scattered"):
        qcowlib.create_image(tmp_path / name, SIZE, cluster_size=512)
    write(tmp_path / "row", 0, data)
    with open_image(tmp_path / "scattered", writable=True) as scattered:
        places = list(range(0, SIZE, 4096))
        random.Random(4).shuffle(places)
        for place in places:
            scattered.write(place, data[place : place + 4096])
    found = qcowlib.compare(image(opened, tmp_path / "row"), image(opened, tmp_path / "scattered"))
    assert found.outcome is Outcome.IDENTICAL
    assert len(reads) == 2 * SIZE // (2 << 20)


@pytest.mark.parametrize("offset", [0, 511, 65536, (5 << 20) + 777, SIZE - 1])
def test_the_first_sector_that_differs(tmp_path: Path, opened: ExitStack, offset: int) -> None:
    one, two = overlays(tmp_path)
    write(two, offset, b"\0")
    write(two, SIZE - 300, b"\1" * 300)
    first, second = image(opened, one), image(opened, two)
    expected = next(at for at in range(0, SIZE, 512) if first.read(at, 512) != second.read(at, 512))
    assert qcowlib.compare(first, second) == (Outcome.CONTENT, expected, False)
    assert qcowlib.compare(second, first) == (Outcome.CONTENT, expected, False)


def test_sizes(tmp_path: Path, opened: ExitStack) -> None:
    one, _ = overlays(tmp_path)
    qcowlib.create_overlay(tmp_path / "long", "base", backing_fmt="qcow2", size=SIZE + 4096)
    write(tmp_path / "long", SIZE + 1000, b"\0" * 100)
    first, longer = image(opened, one), image(opened, tmp_path / "long")
    assert qcowlib.compare(first, longer) == (Outcome.IDENTICAL, None, True)
    assert qcowlib.compare(first, longer, strict=True) == (Outcome.SIZE, None, False)
    longer.close()
    write(tmp_path / "long", SIZE + 1000, b"x")
    assert qcowlib.compare(image(opened, tmp_path / "long"), first) == (Outcome.CONTENT, SIZE + 512, True)


def test_strict_tells_allocation_from_zeroes(tmp_path: Path, opened: ExitStack) -> None:
    for name in ("empty", "zero"):
        qcowlib.create_overlay(tmp_path / name, "x", backing_fmt="raw", size=SIZE, check_backing=False)
    (tmp_path / "x").write_bytes(bytes(SIZE))
    for name in ("empty", "zero"):
        write(tmp_path / name, SIZE - 1, b"e")  # as in QEMU the last range differs from others
    with open_image(tmp_path / "zero", writable=True, policy=LocalFiles()) as zero:
        zero.write_zeroes(3 << 20, 65536)
    first, second = image(opened, tmp_path / "empty"), image(opened, tmp_path / "zero")
    assert qcowlib.compare(first, second).outcome is Outcome.IDENTICAL
    assert qcowlib.compare(first, second, strict=True) == (Outcome.STATUS, 3 << 20, False)


def test_a_snapshot_with_its_own_size(tmp_path: Path, opened: ExitStack) -> None:
    path = tmp_path / "i"
    qcowlib.create_image(path, SIZE)
    write(path, 0, b"a" * 100_000)
    with open_image(path, writable=True) as disk:
        qcowlib.create_snapshot(disk, "before")
        qcowlib.resize(disk, SIZE * 2)
    disk = opened.enter_context(open_image(path))
    snapshot = disk.open_snapshot("before")
    assert qcowlib.compare(snapshot, disk) == (Outcome.IDENTICAL, None, True)
