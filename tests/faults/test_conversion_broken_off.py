"""Conversions that do not come to their end: the source is whole, nothing half-made has the target's name, and doing
it again finishes the job."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcowlib import QcowError, StorageError, convert, open_image
from qcowlib.cli.main import main
from qcowlib.operations.dd import dd
from qcowlib.storage import hostcalls
from tests import oracle
from tests.cli.side_by_side import process_environment

MIB = 1 << 20
SIZE = 6 * MIB
UNFINISHED = ".qcow-incomplete"

TARGETS = [
    ("raw", []),
    ("qcow2", []),
    ("qcow2", ["-c"]),
    ("qcow2", ["-C", "-W"]),
    ("qcow2", ["-o", "cluster_size=4096,preallocation=full"]),
]
CASES = [(*target, False) for target in TARGETS] + [(*target, True) for target in TARGETS[:2]]
# A shell that starts the tests in the background has interrupts ignored.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from qcowlib.cli.main import main; sys.argv[0] = 'qcow'; sys.exit(main())"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    return path


def start(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command as a process that can be interrupted."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=directory,
        stderr=subprocess.PIPE,
        env=process_environment(),
    )


def wait_for_data(path: Path, *, not_before: bool = False) -> None:
    """Until a file has some of its data, but not what it had before."""
    deadline = time.monotonic() + 60
    while (
        not path.exists()
        or path.stat().st_blocks * 512 < MIB
        or (not_before and path.read_bytes()[-3 * MIB :] == b"old" * MIB)
    ):
        assert time.monotonic() < deadline, os.listdir(path.parent)
        time.sleep(0.01)


def assert_finishes(directory: Path, image_format: str, options: list[str]) -> None:
    done = start(directory, "convert", "-f", "raw", "-O", image_format, *options, "source.raw", "target")
    assert (done.wait(60), done.stderr and done.stderr.read()) == (0, b"")
    oracle.qemu_img("compare", "-f", "raw", "-F", image_format, directory / "source.raw", directory / "target")
    if image_format == "qcow2":
        oracle.assert_clean(directory / "target")
    assert sorted(path.name for path in directory.iterdir()) == ["source.raw", "target"]


@pytest.mark.parametrize(("image_format", "options", "existing"), CASES, ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_signals(
    source: Path, tmp_path: Path, image_format: str, options: list[str], existing: bool, number: signal.Signals
) -> None:
    target, before = tmp_path / "target", source.read_bytes()
    if existing:
        target.write_bytes(b"old" * MIB)
        target.chmod(0o640)
    slow = ["convert", "-r", "1M", "-f", "raw", "-O", image_format, *options, "source.raw", "target"]
    process = start(tmp_path, *slow)
    wait_for_data(tmp_path / f"target{UNFINISHED}", not_before=existing)
    assert not target.exists()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    names = {path.name for path in tmp_path.iterdir()} - {"source.raw"}
    if number == signal.SIGKILL:
        assert names == {f"target{UNFINISHED}"}
    elif existing:
        assert names == {"target"}
        assert target.stat().st_size == 0
        assert b"'target' existed before and has lost its content" in said
    else:
        assert names == set()
        assert b"'target' was not made" in said
    assert source.read_bytes() == before
    assert_finishes(tmp_path, image_format, options)
    if existing:
        assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_signals_in_an_existing_image(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "target"
    oracle.qemu_img("create", "-q", "-f", "qcow2", target, str(SIZE))
    oracle.qemu_io(target, f"write -q -P 7 0 {SIZE}")
    oracle.qemu_img("snapshot", "-c", "before", target)
    process = start(tmp_path, "convert", "-n", "-r", "1M", "-f", "raw", "-O", "qcow2", "source.raw", "target")
    deadline = time.monotonic() + 60
    while target.stat().st_size < SIZE + 2 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert said == b"qcow: 'target' is incomplete\n"
    oracle.qemu_img("check", "-q", "-r", "leaks", target, check=False)
    oracle.assert_clean(target)
    with open_image(target, format="qcow2") as image, image.open_snapshot("before") as snapshot:
        assert snapshot.read(0, SIZE) == b"\x07" * SIZE
    assert main(["convert", "-n", "-f", "raw", "-O", "qcow2", str(source), str(target)]) == 0
    oracle.qemu_img("compare", "-f", "raw", "-F", "qcow2", source, target)


def failing(after: int, code: int) -> Callable[..., int]:
    """pwrite that fails from some call on."""
    calls = 0

    def pwrite(fd: int, data: bytes | memoryview, offset: int, /) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return os.pwrite(fd, data, offset)

    return pwrite


def failure(action: Callable[[], None]) -> StorageError | None:
    """The error of an action."""
    try:
        action()
    except StorageError as error:
        return error
    return None


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_writes_fail(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str, existing: bool, code: int
) -> None:
    """At each write of the conversion, from the first of the creation to the last of the metadata."""
    target = tmp_path / "target"
    failed = 0
    for after in (*range(14), None):
        target.unlink(missing_ok=True)
        if existing:
            target.write_bytes(b"old" * MIB)
        with monkeypatch.context() as patch, open_image(source, format="raw") as image:
            if after is not None:
                patch.setattr(hostcalls, "pwrite", failing(after, code))
            error = failure(lambda: convert(image, target, target_format=image_format))
        if error is None:
            oracle.qemu_img("compare", "-f", "raw", "-F", image_format, source, target)
        else:
            failed += 1
            assert error.cause.errno == code
            notes = " ".join(getattr(error, "__notes__", ()))
            lost = existing and target.read_bytes() != b"old" * MIB
            assert target.exists() == existing
            assert not lost or f"'{target}' existed before and has lost its content" in notes
        assert not (tmp_path / f"target{UNFINISHED}").exists()
    assert 6 <= failed < 15


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_reads_fail(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str) -> None:
    def preadv(fd: int, buffer: memoryview, offset: int) -> int:
        if os.path.samestat(os.fstat(fd), os.stat(source)) and offset >= 2 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, [buffer], offset)

    monkeypatch.setattr(hostcalls, "pread_into", preadv)
    for verb in (convert, dd):
        with open_image(source, format="raw") as image, pytest.raises(QcowError) as caught:
            verb(image, tmp_path / "target", target_format=image_format)
        assert re.fullmatch(r"error while reading at byte \d+: Input/output error", caught.value.stock)
    assert [path.name for path in tmp_path.iterdir()] == ["source.raw"]


def test_a_target_in_the_making_is_not_made_twice(source: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "convert", "-r", "1M", "-f", "raw", "-O", "qcow2", "source.raw", "target")
    wait_for_data(tmp_path / f"target{UNFINISHED}")
    second = start(tmp_path, "convert", "-f", "raw", "-O", "qcow2", "source.raw", "target")
    _, said = second.communicate(timeout=60)
    assert second.returncode == 1
    assert b"Is another process using the image" in said
    process.kill()
    process.communicate()
    assert_finishes(tmp_path, "qcow2", [])
