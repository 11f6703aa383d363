"""The overlay shows what was written, lists it in order, and holds back what is staged."""

import pytest

from qcowlib.errors import ImageStateError
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.overlay import OverlayStorage


def test_reads_see_the_writes_and_the_file_stays() -> None:
    base = BytesStorage(bytes(range(256)) * 64)
    overlay = OverlayStorage(base)
    overlay.pwrite(b"x" * 5000, 4000)
    overlay.pwrite(b"end", 20000)
    expected = bytearray(base.getvalue().ljust(20003, b"\0"))
    expected[4000:9000] = b"x" * 5000
    expected[20000:] = b"end"
    assert overlay.size() == 20003
    assert overlay.pread(1 << 20, 0) == bytes(expected)
    assert overlay.pread(10, 3995) == bytes(expected[3995:4005])
    assert overlay.pread(10, 30000) == b""
    assert base.getvalue() == bytes(range(256)) * 64
    overlay.replay(base)
    assert base.getvalue() == bytes(expected)


def test_epochs() -> None:
    overlay = OverlayStorage(BytesStorage(bytes(100)))
    overlay.pwrite(b"a", 1)
    overlay.pwrite(b"b", 2)
    overlay.flush()
    overlay.flush()
    overlay.pwrite(b"c", 3)
    assert overlay.epochs == [[(1, b"a"), (2, b"b")], [(3, b"c")]]


def test_what_is_staged_is_seen_at_once_and_written_at_last() -> None:
    overlay = OverlayStorage(BytesStorage(b"0123456789"))
    overlay.stage(b"AB", 2)
    staged_before = overlay.has_staged
    overlay.pwrite(b"abcdef", 0)  # over the staged bytes too: what lies on disk for now stays there
    overlay.stage(b"C", 3)
    assert overlay.pread(10, 0) == b"abcCef6789"
    overlay.link()
    assert (staged_before, overlay.has_staged) == (True, False)
    assert overlay.epochs == [[(0, b"ab23ef")], [(2, b"cC"), (3, b"C")], []]


def test_holes_that_were_written_into_are_data() -> None:
    base = BytesStorage(bytes(1 << 16))
    overlay = OverlayStorage(base)
    overlay.pwrite(b"x", 40000)
    assert any(start <= 40000 < start + length for start, length, data in overlay.data_ranges(0, 1 << 16) if data)


def test_the_file_is_not_cut() -> None:
    with pytest.raises(ImageStateError):
        OverlayStorage(BytesStorage(bytes(10))).truncate(5)
