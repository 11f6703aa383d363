"""The storage contract: one suite, inherited by a class for every implementation.

A new implementation adds a class with a `storage` fixture that yields an empty, writable storage.
"""

import array
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowlib.errors import CorruptMetadata, QcowError, StorageError
from qcowlib.image.window import WritableStorageWindow
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.helpers import read_exact, read_padded
from qcowlib.storage.local import from_descriptor, open_local
from qcowlib.storage.protocol import ReadStorage, Storage
from qcowlib.storage.recorder import FaultyStorage, RecordingStorage

KIB = 1024


def content(storage: ReadStorage) -> bytes:
    return storage.pread(storage.size(), 0)


class StorageContract:
    """What every `Storage` does; inherit it and give `storage`."""

    def test_fulfils_the_protocols(self, storage: Storage) -> None:
        assert isinstance(storage, ReadStorage)
        assert isinstance(storage, Storage)
        assert isinstance(storage.name, str)
        assert storage.name

    def test_starts_empty(self, storage: Storage) -> None:
        assert storage.size() == 0
        assert storage.pread(10, 0) == b""
        assert list(storage.data_ranges(0, 0)) == []

    def test_write_grows_and_the_gap_reads_as_zeroes(self, storage: Storage) -> None:
        storage.pwrite(b"abc", 5)
        assert storage.size() == 8
        assert content(storage) == b"\0\0\0\0\0abc"
        storage.pwrite(b"XY", 6)
        assert content(storage) == b"\0\0\0\0\0aXY"

    def test_reads_are_short_only_at_the_end(self, storage: Storage) -> None:
        storage.pwrite(bytes(range(100)), 0)
        assert storage.pread(50, 10) == bytes(range(10, 60))
        assert storage.pread(50, 80) == bytes(range(80, 100))
        assert storage.pread(50, 100) == b""
        assert storage.pread(50, 1 << 40) == b""
        assert storage.pread(0, 10) == b""

    def test_a_hostile_length_is_clipped_before_it_is_allocated(self, storage: Storage) -> None:
        storage.pwrite(b"end", 0)
        assert storage.pread(1 << 50, 1) == b"nd"
        assert storage.pread(1 << 50, 7) == b""

    def test_read_into_a_buffer(self, storage: Storage) -> None:
        storage.pwrite(b"0123456789", 0)
        buffer = bytearray(b"." * 8)
        assert storage.pread_into(buffer, 1) == 8
        assert buffer == b"12345678"
        assert storage.pread_into(memoryview(buffer)[4:], 8) == 2
        assert buffer == b"1234" + b"8978"
        assert storage.pread_into(buffer, 10) == 0
        numbers = array.array("Q", [0, 0])
        assert storage.pread_into(memoryview(numbers), 0) == 10
        assert numbers.tobytes() == b"0123456789" + bytes(6)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_writes_any_buffer(self, storage: Storage, kind: type) -> None:
        storage.pwrite(kind(b"hello"), 1)
        assert content(storage) == b"\0hello"
        storage.pwrite(kind(b""), 100)
        assert storage.size() == 6

    def test_writes_a_buffer_of_wider_items_whole(self, storage: Storage) -> None:
        numbers = array.array("Q", [1, 2, 3])
        storage.pwrite(memoryview(numbers), 0)
        assert content(storage) == numbers.tobytes()

    def test_a_written_buffer_may_change_afterwards(self, storage: Storage) -> None:
        buffer = bytearray(b"before")
        storage.pwrite(buffer, 0)
        buffer[:] = b"after!"
        assert content(storage) == b"before"

    def test_write_zeroes(self, storage: Storage) -> None:
        storage.pwrite(b"\xff" * 3000, 0)
        storage.write_zeroes(100, 2000)
        assert content(storage) == b"\xff" * 100 + bytes(2000) + b"\xff" * 900
        storage.write_zeroes(2900, 200)
        assert content(storage) == b"\xff" * 100 + bytes(2000) + b"\xff" * 800 + bytes(200)
        storage.write_zeroes(10, 0)
        assert storage.size() == 3100
        storage.write_zeroes(4000, 96)
        assert storage.size() == 4096
        assert storage.pread(1196, 2900) == bytes(1196)

    def test_write_zeroes_of_more_than_one_chunk(self, storage: Storage) -> None:
        storage.pwrite(b"\xff" * (3 * KIB * KIB), 0)
        storage.write_zeroes(7, 2 * KIB * KIB + 100)
        assert content(storage) == b"\xff" * 7 + bytes(2 * KIB * KIB + 100) + b"\xff" * (KIB * KIB - 107)

    def test_discard_reads_as_zeroes_and_keeps_the_length(self, storage: Storage) -> None:
        storage.pwrite(b"\xff" * 200 * KIB, 0)
        storage.discard(64 * KIB, 64 * KIB)
        assert content(storage) == b"\xff" * 64 * KIB + bytes(64 * KIB) + b"\xff" * 72 * KIB
        storage.discard(190 * KIB, 100 * KIB)
        assert storage.size() == 200 * KIB
        assert storage.pread(10 * KIB, 190 * KIB) == bytes(10 * KIB)
        storage.discard(300 * KIB, 10)
        storage.discard(0, 0)
        assert storage.size() == 200 * KIB
        assert storage.pread(2, 0) == b"\xff\xff"

    def test_allocate_keeps_the_content_and_grows(self, storage: Storage) -> None:
        storage.pwrite(b"abc", 0)
        storage.allocate(0, 2)
        assert content(storage) == b"abc"
        storage.allocate(2, 10 * KIB)
        assert content(storage) == b"abc" + bytes(10 * KIB - 1)
        storage.allocate(50 * KIB, 0)
        assert storage.size() == 10 * KIB + 2

    def test_truncate(self, storage: Storage) -> None:
        storage.pwrite(b"abcdef", 0)
        storage.truncate(3)
        assert content(storage) == b"abc"
        storage.truncate(6)
        assert content(storage) == b"abc\0\0\0"
        storage.truncate(0)
        assert storage.size() == 0

    def test_flush(self, storage: Storage) -> None:
        storage.pwrite(b"abc", 0)
        storage.flush()
        storage.flush()
        assert content(storage) == b"abc"

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 400 * KIB), (1, 1), (64 * KIB - 1, 2), (130 * KIB, 500 * KIB), (1 << 40, 10)]
    )
    def test_data_ranges_cover_the_range_and_holes_are_zero(self, storage: Storage, offset: int, length: int) -> None:
        storage.truncate(320 * KIB)
        storage.pwrite(b"\xaa" * 64 * KIB, 64 * KIB)
        storage.pwrite(b"\xbb" * 64 * KIB, 192 * KIB)
        position = offset
        for start, size, is_data in storage.data_ranges(offset, length):
            assert start == position
            assert size > 0
            assert is_data or not any(storage.pread(min(size, 1 << 20), start))
            assert not (is_data and start + size > 320 * KIB)
            position += size
        assert position == offset + length

    def test_wrong_offsets_are_storage_errors(self, storage: Storage) -> None:
        storage.pwrite(b"abc", 0)
        with pytest.raises(StorageError):
            storage.pread(1, -1)
        with pytest.raises(StorageError):
            storage.pread_into(bytearray(1), -1)
        with pytest.raises(StorageError):
            storage.pwrite(b"x", -1)
        with pytest.raises(StorageError):
            storage.truncate(-1)
        for huge in ((1 << 63) - 2, 1 << 63, 1 << 70):
            with pytest.raises(StorageError):
                storage.pwrite(b"abc", huge)
            with pytest.raises(StorageError):
                storage.write_zeroes(huge, 10)
            with pytest.raises(StorageError):
                storage.truncate(huge + 10)
        assert content(storage) == b"abc"

    def test_close_twice_and_use_after_close(self, storage: Storage) -> None:
        storage.pwrite(b"abc", 0)
        storage.close()
        storage.close()
        with pytest.raises(StorageError):
            storage.pread(1, 0)
        with pytest.raises(StorageError):
            storage.pwrite(b"x", 0)

    def test_threads_share_it(self, storage: Storage) -> None:
        """Eight writers in their own stripes, growing the file under each other, and reading what they wrote."""
        stripe, rounds = 777, 60

        def work(worker: int) -> None:
            for turn in range(rounds):
                offset = (turn * 8 + worker) * stripe
                data = bytes([worker * 16 + turn % 16]) * stripe
                storage.pwrite(data, offset)
                assert storage.pread(stripe, offset) == data
                buffer = bytearray(stripe)
                assert storage.pread_into(buffer, offset) == stripe
                assert buffer == data

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        expected = b"".join(bytes([w * 16 + t % 16]) * stripe for t in range(rounds) for w in range(8))
        assert content(storage) == expected

    def test_random_program_against_a_model(self, storage: Storage) -> None:
        choose = random.Random(20)
        model = bytearray()

        def grow(size: int) -> None:
            model.extend(bytes(max(0, size - len(model))))

        for step in range(400):
            offset, length = choose.randrange(40_000), choose.randrange(9_000)
            match choose.randrange(6):
                case 0 | 1:
                    data = bytes([1 + step % 255]) * length
                    storage.pwrite(data, offset)
                    if data:
                        grow(offset)
                        model[offset : offset + length] = data
                case 2:
                    storage.write_zeroes(offset, length)
                    if length:
                        grow(offset + length)
                        model[offset : offset + length] = bytes(length)
                case 3:
                    storage.discard(offset, length)
                    inside = max(0, min(offset + length, len(model)) - offset)
                    model[offset : offset + inside] = bytes(inside)
                case 4:
                    storage.allocate(offset, length)
                    grow(offset + length if length else 0)
                case _:
                    storage.truncate(offset)
                    del model[offset:]
                    grow(offset)
            assert storage.size() == len(model), step
            assert storage.pread(length, offset) == model[offset : offset + length], step
        assert content(storage) == model

    def test_read_helpers(self, storage: Storage) -> None:
        storage.pwrite(b"abcdef", 0)
        assert read_exact(storage, 2, 4, "L2 table") == b"cdef"
        assert read_exact(storage, 100, 0, "L2 table") == b""
        with pytest.raises(CorruptMetadata, match=r"L2 table at host offset 0x3: lies beyond the end of the file"):
            read_exact(storage, 3, 4, "L2 table")
        assert read_padded(storage, 4, 4) == b"ef\0\0"
        assert read_padded(storage, 50, 3) == bytes(3)
        assert read_padded(storage, 0, 6) == b"abcdef"


class TestLocalFile(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        with open_local(tmp_path / "file", create=True) as file:
            yield file


class TestLocalFileInMemory(StorageContract):
    """tmpfs has holes but not FALLOC_FL_ZERO_RANGE."""

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(dir=directory) as work, open_local(f"{work}/file", create=True) as file:
            yield file


class TestDescriptor(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        with open(tmp_path / "file", "w+b") as owner, from_descriptor(owner.fileno(), writable=True) as file:
            yield file


class TestBytesStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return BytesStorage()


class TestRecordingOfBytes(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return RecordingStorage(BytesStorage())


class TestRecordingOfLocalFile(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        with open_local(tmp_path / "file", create=True) as file:
            yield RecordingStorage(file)


class TestSlice(StorageContract):
    """The part of a file behind its first 4 KiB."""

    @pytest.fixture
    def storage(self) -> Storage:
        return WritableStorageWindow(BytesStorage(b"before" + bytes(4090)), 4096, None)


def test_a_slice_keeps_to_its_place() -> None:
    file = BytesStorage(b"a" * 3000)
    window = WritableStorageWindow(file, 1000, 500)
    window.pwrite(b"b" * 500, 0)
    window.write_zeroes(100, 100)
    window.discard(400, 4000)
    expected = b"a" * 1000 + b"b" * 100 + bytes(100) + b"b" * 200 + bytes(100) + b"a" * 1500
    assert file.getvalue() == expected
    attempts: tuple[Callable[[], None], ...] = (
        lambda: window.pwrite(b"c", 500),
        lambda: window.write_zeroes(0, 501),
        lambda: window.allocate(499, 2),
        lambda: window.truncate(600),
        lambda: window.pwrite(b"c", -1),
    )
    for beyond in attempts:
        with pytest.raises(QcowError):
            beyond()
    assert file.getvalue() == expected


class TestFaultyWithoutFaults(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return FaultyStorage(BytesStorage(), (), capacity=1 << 30)


def read_only_storages(directory: Path) -> Iterator[Storage]:
    path = directory / "file"
    path.write_bytes(b"evidence")
    yield open_local(path)
    with open(path, "rb") as owner:
        yield from_descriptor(owner.fileno())
    yield BytesStorage(b"evidence", writable=False)


def test_read_only_storages_refuse_every_change(tmp_path: Path) -> None:
    checked = 0
    for storage in read_only_storages(tmp_path):
        for change in (
            lambda s: s.pwrite(b"x", 0),
            lambda s: s.write_zeroes(0, 4),
            lambda s: s.allocate(0, 100),
            lambda s: s.truncate(0),
            lambda s: s.discard(0, 4),
        ):
            with pytest.raises(StorageError):
                change(storage)
        assert content(storage) == b"evidence"
        storage.close()
        checked += 1
    assert checked == 3
