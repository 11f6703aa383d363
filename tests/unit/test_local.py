"""Local files beyond the contract: what cannot be opened, holes and space on the host, and a host that fails."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowlib.errors import StorageError
from qcowlib.storage import hostcalls, local
from qcowlib.storage.local import from_descriptor, open_local

KIB = 1024
ROOT = os.geteuid() == 0


def python(program: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program with the library in a process of its own; it must print "done"."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "done\n", result.stdout + result.stderr
    return result


# What cannot be opened


@pytest.mark.parametrize("writable", [False, True])
def test_missing_file(tmp_path: Path, writable: bool) -> None:
    path = tmp_path / "none"
    with pytest.raises(StorageError) as failed:
        open_local(path, writable=writable)
    assert str(failed.value) == f"Could not open '{path}': No such file or directory"
    assert failed.value.cause.errno == errno.ENOENT
    assert not path.exists()


def test_create_in_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Could not open '.*/none/file': No such file or directory"):
        open_local(tmp_path / "none" / "file", create=True)


def test_directory_for_reading_and_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as failed:
        open_local(tmp_path)
    assert str(failed.value) == f"Could not open '{tmp_path}': 'file' driver requires '{tmp_path}' to be a regular file"
    with pytest.raises(StorageError) as failed:
        open_local(tmp_path, writable=True)
    assert str(failed.value) == f"Could not open '{tmp_path}': Is a directory"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("writable", [False, True])
def test_fifo_neither_blocks_nor_opens(tmp_path: Path, writable: bool) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StorageError, match=r"requires '.*fifo' to be a regular file"):
        open_local(path, writable=writable)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_character_device(path: str) -> None:
    with pytest.raises(StorageError, match=f"Could not open '{path}'"):
        open_local(path)


def test_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        with pytest.raises(StorageError, match="No such device or address"):
            open_local(path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "", b"a\0b"])
def test_impossible_names(name: str | bytes) -> None:
    with pytest.raises(StorageError, match="Could not open"):
        open_local(name)


def test_names_as_bytes_and_undecodable_ones(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    with open(path, "wb") as file:
        file.write(b"data")
    for name in (path, os.fsdecode(path)):
        with open_local(name) as storage:
            assert storage.pread(9, 0) == b"data"
            assert storage.name == os.fsdecode(path)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user can enter, as pytest's own ones are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_no_permission(public_directory: Path) -> None:
    path = public_directory / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    python(
        """
        import os, sys
        from qcowlib.errors import StorageError
        from qcowlib.storage.local import open_local
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        for use in ({}, {"writable": True}, {"create": True}):
            try:
                open_local(sys.argv[1], **use)
            except StorageError as error:
                assert str(error) == f"Could not open '{sys.argv[1]}': Permission denied", error
            else:
                raise AssertionError(use)
        print("done")
        """,
        path,
    )


def test_descriptors_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    with pytest.raises(StorageError, match="Bad file descriptor"):
        from_descriptor(987654)
    with pytest.raises(StorageError):
        from_descriptor(-1)
    with open(path, "rb") as file, pytest.raises(StorageError, match="reading only"):
        from_descriptor(file.fileno(), writable=True)
    reader, writer = os.pipe()
    with pytest.raises(StorageError, match="to be a regular file"):
        from_descriptor(reader)
    os.close(reader)
    os.close(writer)


def test_create_makes_empties_and_keeps_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "new"
    old = os.umask(0o022)
    try:
        with open_local(path, create=True) as file:
            file.pwrite(b"data", 0)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    with open_local(path, create=True) as file:
        assert file.size() == 0
        assert file.writable
    assert path.stat().st_mode & 0o777 == 0o600


# Space on the host


def test_holes_are_seen_exactly(tmp_path: Path) -> None:
    with open_local(tmp_path / "file", create=True) as file:
        file.truncate(1024 * KIB)
        file.pwrite(b"x" * 64 * KIB, 256 * KIB)
        file.pwrite(b"y" * 64 * KIB, 960 * KIB)
        file.flush()
        assert list(file.data_ranges(0, 2048 * KIB)) == [
            (0, 256 * KIB, False),
            (256 * KIB, 64 * KIB, True),
            (320 * KIB, 640 * KIB, False),
            (960 * KIB, 64 * KIB, True),
            (1024 * KIB, 1024 * KIB, False),
        ]
        assert list(file.data_ranges(300 * KIB, 10 * KIB)) == [(300 * KIB, 10 * KIB, True)]
        assert list(file.data_ranges(310 * KIB, 20 * KIB)) == [
            (310 * KIB, 10 * KIB, True),
            (320 * KIB, 10 * KIB, False),
        ]
        assert list(file.data_ranges(400 * KIB, 7)) == [(400 * KIB, 7, False)]


def test_without_hole_calls_all_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with open_local(tmp_path / "file", create=True) as file:
        file.truncate(1000)
        monkeypatch.setattr(os, "lseek", unsupported)
        assert list(file.data_ranges(100, 2000)) == [(100, 900, True), (1000, 1100, False)]


@pytest.mark.parametrize("answer", [(5, 3), (0, 0), (50, 50), (-1, -1)])
def test_a_host_that_answers_nonsense_about_holes_does_not_hang_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, int]
) -> None:
    monkeypatch.setattr(hostcalls, "next_data", lambda *_: answer)
    with open_local(tmp_path / "file", create=True) as file:
        file.truncate(100)
        assert list(file.data_ranges(50, 50)) == [(50, 50, True)]


def test_discard_gives_space_back_and_zeroes_and_allocation_keep_it(tmp_path: Path) -> None:
    with open_local(tmp_path / "file", create=True) as file:
        file.pwrite(b"x" * 1024 * KIB, 0)
        file.flush()
        full = file.allocated_size()
        assert full >= 1024 * KIB
        file.discard(256 * KIB, 512 * KIB)
        file.flush()
        assert file.allocated_size() <= full - 512 * KIB
        assert file.size() == 1024 * KIB
        file.write_zeroes(0, 1024 * KIB)
        file.flush()
        assert file.allocated_size() >= 1024 * KIB
        file.truncate(0)
        file.allocate(0, 512 * KIB)
        assert file.allocated_size() >= 512 * KIB
        assert file.pread(512 * KIB, 0) == bytes(512 * KIB)


def test_where_the_host_cannot_zero_a_range_blocks_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written.append((offset, len(data)))
        return os.pwrite(descriptor, data, offset)

    with open_local(tmp_path / "file", create=True) as file:
        file.pwrite(b"x" * (2560 * KIB), 0)
        monkeypatch.setattr(hostcalls, "zero_range", lambda *_: False)
        monkeypatch.setattr(hostcalls, "pwrite", pwrite)
        file.write_zeroes(10, 2500 * KIB)
        assert written == [(10, 1024 * KIB), (10 + 1024 * KIB, 1024 * KIB), (10 + 2048 * KIB, 452 * KIB)]
        assert file.pread(2560 * KIB, 0) == b"x" * 10 + bytes(2500 * KIB) + b"x" * (60 * KIB - 10)


def test_where_the_host_cannot_punch_discard_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_local(tmp_path / "file", create=True) as file:
        file.pwrite(b"x" * 100, 0)
        monkeypatch.setattr(hostcalls, "_fallocate", lambda *_: False)
        file.discard(0, 100)
        assert file.pread(100, 0) == b"x" * 100


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_errno_of_fallocate_that_mean_unsupported(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import ctypes

    def call(*_: int) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(hostcalls, "_libc_fallocate", call)
    assert hostcalls.zero_range(0, 0, 1) is False
    assert hostcalls.punch_hole(0, 0, 1) is False


def test_fallocate_is_repeated_after_a_signal_and_fails_with_its_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    codes = [errno.EINTR, errno.EINTR, errno.EIO]

    def call(*_: int) -> int:
        ctypes.set_errno(codes.pop(0))
        return -1

    monkeypatch.setattr(hostcalls, "_libc_fallocate", call)
    with pytest.raises(OSError, match="Input/output error"):
        hostcalls.punch_hole(0, 0, 1)
    assert codes == []


# A host that answers in pieces, or fails


def test_short_reads_and_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short_pread(descriptor: int, length: int, offset: int) -> bytes:
        return os.pread(descriptor, min(length, 7), offset)

    def short_pread_into(descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer[:5]], offset)

    def short_pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data[:3], offset)

    monkeypatch.setattr(local, "_pread", short_pread)
    monkeypatch.setattr(hostcalls, "pread", short_pread)
    monkeypatch.setattr(hostcalls, "pread_into", short_pread_into)
    monkeypatch.setattr(hostcalls, "pwrite", short_pwrite)
    content = bytes(range(100))
    with open_local(tmp_path / "file", create=True) as file:
        file.pwrite(content, 0)
        assert file.pread(90, 5) == content[5:95]
        assert file.pread(200, 50) == content[50:]
        buffer = bytearray(64)
        assert file.pread_into(buffer, 30) == 64
        assert buffer == content[30:94]
        assert file.pread_into(buffer, 90) == 10
    assert (tmp_path / "file").read_bytes() == content


def test_a_host_that_writes_nothing_does_not_hang_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostcalls, "pwrite", lambda *_: 0)
    with open_local(tmp_path / "file", create=True) as file, pytest.raises(StorageError, match="wrote nothing"):
        file.pwrite(b"x", 0)


def test_a_failed_flush_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the host may call the lost pages clean: a later success would be a lie."""

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_local(tmp_path / "file", create=True) as file:
        file.flush()
        monkeypatch.setattr(hostcalls, "sync", failing)
        with pytest.raises(StorageError, match=r"Could not flush '.*': Input/output error"):
            file.flush()
        monkeypatch.undo()
        with pytest.raises(StorageError, match="Input/output error"):
            file.flush()


def test_file_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    python(
        """
        import errno, resource, signal, sys
        from qcowlib.errors import StorageError
        from qcowlib.storage.local import open_local
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with open_local(sys.argv[1], create=True) as file:
            file.pwrite(b"a" * 65_536, 0)
            for change in (
                lambda: file.pwrite(b"b" * 65_536, 65_536),
                lambda: file.write_zeroes(65_536, 65_536),
                lambda: file.allocate(65_536, 65_536),
                lambda: file.truncate(100_001),
            ):
                try:
                    change()
                except StorageError as error:
                    assert error.cause.errno == errno.EFBIG, error
                    assert str(error).endswith("File too large"), error
                else:
                    raise AssertionError("no error")
            file.pwrite(b"c", 0)
            assert file.size() == 100_000, file.size()
        print("done")
        """,
        path,
    )
    assert path.read_bytes() == b"c" + b"a" * 65_535 + b"b" * 34_464


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    if not ROOT:
        pytest.skip("only root can mount a small file system; the file size limit is tested instead")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_full_disk(small_disk: Path) -> None:
    path = small_disk / "file"
    with open_local(path, create=True) as file:
        file.pwrite(b"a" * 128 * KIB, 0)
        for change in (
            lambda: file.write_zeroes(128 * KIB, 512 * KIB),
            lambda: file.allocate(128 * KIB, 512 * KIB),
            lambda: file.pwrite(b"b" * 512 * KIB, 128 * KIB),
        ):
            with pytest.raises(StorageError, match="No space left on device") as failed:
                change()
            assert failed.value.cause.errno == errno.ENOSPC
            file.truncate(128 * KIB)
        assert file.pread(256 * KIB, 0) == b"a" * 128 * KIB
        file.discard(0, 64 * KIB)
        file.pwrite(b"c" * 128 * KIB, 128 * KIB)
    assert path.read_bytes() == bytes(64 * KIB) + b"a" * 64 * KIB + b"c" * 128 * KIB


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device of 1 MiB."""
    if not ROOT:
        pytest.skip("only root can set up a block device")
    path = tmp_path / "disk"
    path.write_bytes(b"d" * 1024 * KIB)
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=True)
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_block_device(loop_device: str) -> None:
    with open_local(loop_device, writable=True) as device:
        assert device.is_block_device
        assert device.size() == device.allocated_size() == 1024 * KIB
        device.pwrite(b"new", 1000)
        assert device.pread(5, 999) == b"dnewd"
        assert device.pread(100, 1024 * KIB - 5) == b"ddddd"
        assert list(device.data_ranges(1000 * KIB, 100 * KIB)) == [
            (1000 * KIB, 24 * KIB, True),
            (1024 * KIB, 76 * KIB, False),
        ]
        device.write_zeroes(100, 50)
        assert device.pread(52, 99) == b"d" + bytes(50) + b"d"
        device.discard(64 * KIB, 64 * KIB)
        assert device.pread(64 * KIB, 64 * KIB) == bytes(64 * KIB)
        device.discard(1, 2)
        assert device.pread(3, 0) == b"ddd"
        device.truncate(1024 * KIB)
        for size in (0, 1024 * KIB + 1):
            with pytest.raises(StorageError, match="a block device has a fixed size"):
                device.truncate(size)
        with pytest.raises(StorageError, match="No space left on device"):
            device.pwrite(b"x", 1024 * KIB)
        device.flush()
    with open_local(loop_device, create=True) as device:
        assert device.size() == 1024 * KIB, "a device is not emptied"


def test_import_is_cheap() -> None:
    python(
        """
        import sys
        import qcowlib.storage.local
        assert not {"numpy", "ctypes", "construct"} & set(sys.modules), sys.modules.keys()
        print("done")
        """
    )
