"""QEMU's lock bytes: what each use places, which uses exclude each other, and that refusing changes nothing."""

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qcowlib.errors import ImageLocked, StorageError
from qcowlib.storage import locking
from qcowlib.storage.local import LocalFile, from_descriptor, open_local
from qcowlib.storage.locking import ImageLock, Use

fcntl = pytest.importorskip("fcntl")

USED = 'Failed to get "write" lock\nIs another process using the image [{}]?'
SHARED = 'Failed to get shared "write" lock\nIs another process using the image [{}]?'


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"content")
    return path


def held_bytes(path: Path) -> set[int]:
    """The lock bytes that somebody holds, asked with a description of our own."""
    with open(path, "rb") as file:
        held = set()
        for byte in range(300):
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            if struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
                held.add(byte)
        return held


def open_for(path: Path, use: Use) -> LocalFile:
    return open_local(path, writable=use is Use.WRITE, force_share=use is Use.FORCE_SHARE)


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (Use.WRITE, {100, 101, 103, 201, 203}),
        (Use.READ, {100, 201, 203}),
        (Use.FORCE_SHARE, {100}),
    ],
)
def test_each_use_places_the_bytes_that_qemu_places(image: Path, use: Use, expected: set[int]) -> None:
    with open_for(image, use):
        assert held_bytes(image) == expected
    assert held_bytes(image) == set()


@pytest.mark.parametrize(
    ("holder", "comer", "message"),
    [
        (Use.WRITE, Use.WRITE, USED),
        (Use.WRITE, Use.READ, SHARED),
        (Use.WRITE, Use.FORCE_SHARE, None),
        (Use.READ, Use.WRITE, USED),
        (Use.READ, Use.READ, None),
        (Use.READ, Use.FORCE_SHARE, None),
        (Use.FORCE_SHARE, Use.WRITE, None),
        (Use.FORCE_SHARE, Use.READ, None),
        (Use.FORCE_SHARE, Use.FORCE_SHARE, None),
    ],
)
def test_who_excludes_whom(image: Path, holder: Use, comer: Use, message: str | None) -> None:
    with open_for(image, holder):
        before = held_bytes(image)
        if message is None:
            open_for(image, comer).close()
        else:
            with pytest.raises(ImageLocked) as refused:
                open_for(image, comer)
            assert str(refused.value) == message.format(image)
        assert held_bytes(image) == before
    open_for(image, comer).close()


def test_whoever_does_not_share_reading_keeps_even_force_share_out(image: Path) -> None:
    with open(image, "rb") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 200, 1, 0))
        with pytest.raises(ImageLocked, match='Failed to get "consistent read" lock'):
            open_local(image, force_share=True)


def test_a_write_lock_on_a_byte_is_named(image: Path) -> None:
    with open(image, "r+b") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0))
        with pytest.raises(ImageLocked, match="Failed to get byte 100 lock"):
            open_local(image)


def test_many_readers_and_the_last_one_lets_a_writer_in(image: Path) -> None:
    with ExitStack() as stack:
        readers = [stack.enter_context(open_local(image)) for _ in range(20)]
        for reader in readers:
            with pytest.raises(ImageLocked):
                open_local(image, writable=True)
            reader.close()
        open_local(image, writable=True).close()


def test_create_does_not_empty_a_file_in_use(image: Path) -> None:
    with open_local(image), pytest.raises(ImageLocked):
        open_local(image, create=True)
    assert image.read_bytes() == b"content"
    open_local(image, create=True).close()
    assert image.read_bytes() == b""


def test_lock_false_neither_takes_nor_asks(image: Path) -> None:
    with open_local(image, writable=True), open_local(image, writable=True, lock=False) as second:
        before = held_bytes(image)
        second.close()
        assert held_bytes(image) == before == {100, 101, 103, 201, 203}


def test_closing_releases_although_a_duplicate_lives_on(image: Path) -> None:
    with open(image, "r+b") as owner:
        file = from_descriptor(owner.fileno(), writable=True)
        assert held_bytes(image) == {100, 101, 103, 201, 203}
        file.close()
        assert held_bytes(image) == set()
        assert owner.read() == b"content"


def test_a_descriptor_is_locked_as_a_path_is(image: Path) -> None:
    with open_local(image, writable=True), open(image, "r+b") as owner:
        with pytest.raises(ImageLocked):
            from_descriptor(owner.fileno())
        with pytest.raises(ImageLocked):
            from_descriptor(owner.fileno(), writable=True)
        from_descriptor(owner.fileno(), force_share=True).close()
        from_descriptor(owner.fileno(), lock=False).close()
        assert held_bytes(image) == {100, 101, 103, 201, 203}


def test_refused_opens_leak_no_descriptor(image: Path) -> None:
    with open_local(image, writable=True):
        before = os.listdir("/proc/self/fd")
        for _ in range(5):
            with pytest.raises(ImageLocked):
                open_local(image)
        assert os.listdir("/proc/self/fd") == before


def test_the_test_comes_after_the_bytes_are_placed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer that comes when the first has placed its bytes but not tested yet does not get in."""
    real_test = locking._test
    comers: list[str] = []

    def test_with_a_comer(descriptor: int, name: str, use: Use) -> None:
        monkeypatch.setattr(locking, "_test", real_test)
        with open(image, "r+b") as second, pytest.raises(ImageLocked):
            ImageLock.take(second.fileno(), "second", Use.WRITE)
        comers.append("refused")
        real_test(descriptor, name, use)

    monkeypatch.setattr(locking, "_test", test_with_a_comer)
    with open_local(image, writable=True):
        assert comers == ["refused"]
        assert held_bytes(image) == {100, 101, 103, 201, 203}


def test_never_two_writers(image: Path) -> None:
    """Writers that come at the same time: one or none gets in, and whoever is in stays until all have tried."""
    rounds, writers = 150, 4
    together = threading.Barrier(writers, timeout=60)
    inside = [0] * rounds

    def work() -> None:
        for turn in range(rounds):
            together.wait()
            try:
                file = open_local(image, writable=True)
            except ImageLocked:
                file = None
            else:
                inside[turn] += 1
            together.wait()
            if file is not None:
                file.close()

    threads = [threading.Thread(target=work) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(inside) == 1
    assert sum(inside) > 0


@pytest.fixture
def failing_lock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets the host refuse all locks with an errno."""

    def refuse(code: int) -> None:
        def set_lock(descriptor: int, byte: int, *, shared: bool) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(locking, "_set_lock", set_lock)

    return refuse


def test_a_file_system_without_locks(image: Path, failing_lock: Callable[[int], None]) -> None:
    failing_lock(errno.ENOLCK)
    for writable in (False, True):
        with pytest.raises(StorageError) as refused:
            open_local(image, writable=writable)
        assert str(refused.value) == f"Could not lock '{image}': No locks available"
        assert refused.value.cause.errno == errno.ENOLCK
    with open_local(image, lock=False) as file:
        assert file.pread(7, 0) == b"content"


def test_a_platform_without_locks_reads_but_does_not_write(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "_supported", lambda _: False)
    with open_local(image) as file:
        assert file.pread(7, 0) == b"content"
        assert held_bytes(image) == set()
    with pytest.raises(StorageError, match=r"Could not lock '.*': no open-file-description locks here"):
        open_local(image, writable=True)
    with open_local(image, writable=True, lock=False) as file:
        file.pwrite(b"C", 0)
    assert image.read_bytes() == b"Content"


def test_a_kernel_without_these_locks_is_such_a_platform(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def old_kernel(descriptor: int, byte: int) -> bool:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(locking, "_held_by_others", old_kernel)
    with open_local(image) as file:
        assert file.pread(7, 0) == b"content"
    with pytest.raises(StorageError, match="Could not lock"):
        open_local(image, writable=True)
