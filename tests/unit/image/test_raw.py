"""Raw images and slices of files."""

from pathlib import Path

import pytest

from qcowlib.errors import ChainError, NoSuchSnapshot, OutOfRange
from qcowlib.extents import ExtentKind
from qcowlib.image.raw import RawImage, StorageWindow, WritableRawImage
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.local import open_local


def test_the_size_is_rounded_up_to_a_sector_and_the_tail_reads_as_zeroes() -> None:
    image = RawImage(BytesStorage(b"abc"))
    assert (image.size, image.format, image.cluster_size, image.backing) == (512, "raw", 512, None)
    assert image.read(0, 512) == b"abc".ljust(512, b"\0")
    buffer = bytearray(b"\xff" * 10)
    assert image.readinto(1, buffer) == 10
    assert buffer == b"bc".ljust(10, b"\0")
    (table,) = image.extents()
    assert list(table.rows()) == [(0, 3, ExtentKind.DATA, 0, 3, 0), (3, 509, ExtentKind.ZERO, 3, 0, 0)]


def test_an_empty_file() -> None:
    image = RawImage(BytesStorage(b""))
    assert image.size == 0
    assert image.read(0, 0) == b""
    assert list(image.extents()) == []


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 513), (512, 1), (0, -1)])
def test_ranges_outside_are_refused(offset: int, length: int) -> None:
    image = WritableRawImage(BytesStorage(bytes(512)))
    with pytest.raises(OutOfRange):
        image.read(offset, length)
    with pytest.raises(OutOfRange):
        list(image.extents(offset, length))
    with pytest.raises(OutOfRange):
        image.write_zeroes(offset, length)


def test_holes_of_the_host_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"x" * 4096)
    with RawImage(open_local(path)) as image:
        (table,) = image.extents()
        kinds = [(row.start, row.kind) for row in table]
        assert kinds == [(0, ExtentKind.ZERO), (4 << 20, ExtentKind.DATA), ((4 << 20) + 4096, ExtentKind.ZERO)]


def test_a_window_shows_a_slice() -> None:
    inner = BytesStorage(bytes(range(256)) * 16)
    window = StorageWindow(inner, 1024, 512)
    assert window.size() == 512
    assert window.pread(1000, 100) == inner.getvalue()[1124:1536]
    assert window.pread(10, 600) == b""
    nested = StorageWindow(StorageWindow(inner, 512, None), 256, 1024)
    assert nested.host_base == 768
    image = RawImage(nested)
    assert image.read(0, 1024) == inner.getvalue()[768:1792]
    (table,) = image.extents(512, 512)
    assert list(table.rows()) == [(512, 512, ExtentKind.DATA, 1280, 512, 0)]
    assert image.lookup(512) == (ExtentKind.DATA, 1280, 512)


@pytest.mark.parametrize(("offset", "size"), [(4097, None), (4096, 1), (0, 4097), (4095, 2)])
def test_a_window_must_lie_inside(offset: int, size: int | None) -> None:
    with pytest.raises(ChainError):
        StorageWindow(BytesStorage(bytes(4096)), offset, size)


def test_writing() -> None:
    storage = BytesStorage(b"\xff" * 2048)
    with WritableRawImage(storage) as image:
        assert image.writable
        image.write(512, b"abc")
        image.write_zeroes(515, 10)
        image.discard(1024, 512)
        image.flush()
        assert image.read(510, 18) == b"\xff\xffabc" + bytes(10) + b"\xff" * 3
        assert image.read(1024, 512) == bytes(512)
        assert image.snapshots == []
        assert image.bitmaps == []
        with pytest.raises(NoSuchSnapshot):
            image.open_snapshot("x")
