"""A disk as a file object."""

import io
import os
import zipfile

import pytest

from qcowlib.errors import OptionError
from qcowlib.image.raw import RawImage
from qcowlib.storage.buffer import BytesStorage

CONTENT = bytes(range(256)) * 8


def stream() -> io.RawIOBase:
    return RawImage(BytesStorage(CONTENT)).open_stream()


def test_reads_are_full_and_stop_at_the_end() -> None:
    with stream() as file:
        assert file.read(10) == CONTENT[:10]
        assert file.tell() == 10
        assert file.read() == CONTENT[10:]
        assert file.read(1) == b""
        file.seek(-3, os.SEEK_END)
        assert file.read(100) == CONTENT[-3:]
        file.seek(5000)
        assert file.read(10) == b""
        assert file.readinto(bytearray(4)) == 0


def test_readinto_and_seek() -> None:
    with stream() as file:
        buffer = bytearray(8)
        assert file.seek(100) == 100
        assert file.seek(-50, os.SEEK_CUR) == 50
        assert file.readinto(buffer) == 8
        assert buffer == CONTENT[50:58]
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        with pytest.raises(OptionError):
            file.seek(-1)
        with pytest.raises(OptionError):
            file.seek(0, 9)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")


def test_closing_the_stream_leaves_the_image_open() -> None:
    image = RawImage(BytesStorage(CONTENT))
    file = image.open_stream()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    assert image.read(0, 4) == CONTENT[:4]


def test_usable_by_a_buffered_reader_and_zipfile() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "hello")
    content = packed.getvalue()
    # A zip file may be followed by a comment only; put it at the end of the disk.
    disk = bytes(-len(content) % 512) + content
    with zipfile.ZipFile(RawImage(BytesStorage(disk)).open_stream()) as archive:  # type: ignore[arg-type]
        assert archive.read("a.txt") == b"hello"
    with io.BufferedReader(stream(), 64) as reader:
        reader.seek(300)
        assert reader.read(700) == CONTENT[300:1000]
        assert reader.peek(1)[:1] == CONTENT[1000:1001]
