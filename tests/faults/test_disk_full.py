"""A file system that is really full, under the command line: one clear line, exit code 1, and the image as it was."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qcowlib.cli.common import program_name
from qcowlib.cli.main import main
from tests.crash.invariants import Content, content_by_second_opinion, examine_broken, examine_healed
from tests.crash.second_opinion import SecondOpinion
from tests.oracle import assert_clean, content, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
FULL = os.strerror(errno.ENOSPC)

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.fixture
def qcow(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command: exit code and what it says about its failure."""

    def run(*args: str | Path) -> tuple[int, str]:
        code = main([str(arg) for arg in args])
        return code, capsys.readouterr().err

    return run


def fill(directory: Path, left: int) -> None:
    """Take all room but so many bytes."""
    state = os.statvfs(directory)
    room = state.f_bavail * state.f_frsize - left
    assert room >= 0, f"no {left} bytes are left"
    with (directory / "filler").open("ab") as filler:
        os.posix_fallocate(filler.fileno(), filler.tell(), room) if room else None


def make(path: Path, *options: str) -> Content:
    """An image of 2 MiB with data, two snapshots and clusters that they share; its content."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", ",".join(("cluster_size=4096", *options)), path, "2M")
    qemu_io(path, "write -P 1 0 256k", "write -P 2 1M 64k")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 3 32k 128k", "write -z 200k 64k")
    qemu_img("snapshot", "-c", "second", path)
    qemu_io(path, "write -P 4 100k 50k")
    return content_by_second_opinion(SecondOpinion(path.read_bytes()))


def assert_told(code: int, text: str) -> None:
    """One clear line."""
    assert code == 1
    assert text.count("\n") == 1, text
    assert FULL in text


@pytest.mark.parametrize("version", ["compat=1.1", "compat=0.10"])
@pytest.mark.parametrize("verb", ["-c", "-d", "-a"])
def test_snapshot(verb: str, version: str, small: Path, qcow: Command) -> None:
    name = {"-c": "third", "-d": "first", "-a": "first"}[verb]
    failed = 0
    for pages in (0, 1, 2, 3, 5, 8):
        image = small / "image.qcow2"
        before = make(image, version)
        fill(small, pages * PAGE)
        code, text = qcow("snapshot", verb, name, image)
        if code:
            failed += 1
            assert_told(code, text)
        assert_clean(image)
        after = examine_broken(image.read_bytes(), None, str(image))
        examine_healed(image.read_bytes(), None, after)
        expected = {
            "-c": Content(before.active, before.saved | {"third": before.active}),
            "-d": Content(before.active, {"second": before.saved["second"]}),
            "-a": Content(before.saved["first"], before.saved),
        }[verb]
        assert after == (before if code else expected)
        image.unlink()
        (small / "filler").unlink()
    assert failed


@pytest.mark.parametrize("left", [0, 4 * KIB, 64 * KIB, 300 * KIB])
@pytest.mark.parametrize("options", [("compat=1.1",), ("compat=0.10",), ("compat=1.1", "refcount_bits=64")])
def test_write(options: tuple[str, ...], left: int, small: Path, qcow: Command, tmp_path: Path) -> None:
    """A conversion into an image that exists: its sectors are old or new, its snapshots as they were."""
    image, source = small / "image.qcow2", tmp_path / "source.raw"
    before = make(image, *options)
    new = np.random.default_rng(7).integers(1, 255, 2 * MIB, dtype=np.uint8)
    source.write_bytes(new.tobytes())
    fill(small, left)
    assert_told(*qcow("convert", "-n", "-f", "raw", "-O", "qcow2", source, image))
    assert_clean(image)
    after = examine_broken(image.read_bytes(), None, str(image))
    assert after.saved == before.saved
    found, old = (np.frombuffer(data, dtype=np.uint8).reshape(-1, 512) for data in (after.active, before.active))
    assert ((found == old).all(axis=1) | (found == new.reshape(-1, 512)).all(axis=1)).all()
    (small / "filler").unlink()
    assert qcow("snapshot", "-c", "third", image) == (0, "")
    assert_clean(image)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("preallocation=full", "8M"),
        ("preallocation=falloc", "8M"),
        ("preallocation=metadata,cluster_size=4096", "8G"),
        ("cluster_size=512", "8G"),
        ("cluster_size=65536", "1M"),
    ],
)
def test_create(options: str, size: str, small: Path, qcow: Command) -> None:
    """Nothing is left of a new file; an existing one keeps its content."""
    image, old = small / "new.qcow2", small / "old.qcow2"
    content = make(old)
    fill(small, 8 * KIB)
    assert_told(*qcow("create", "-q", "-f", "qcow2", "-o", options, image, size))
    assert not image.exists()
    if size != "1M":  # the space that the old file has suffices for that
        assert_told(*qcow("create", "-q", "-f", "qcow2", "-o", options, old, size))
        assert examine_broken(old.read_bytes(), None, str(old)) == content


def test_new_file(small: Path, qcow: Command, tmp_path: Path) -> None:
    """Conversions and copies to a new file."""
    source = tmp_path / "source.raw"
    source.write_bytes(np.random.default_rng(7).bytes(4 * MIB))
    assert_told(*qcow("convert", "-f", "raw", "-O", "qcow2", source, small / "one.qcow2"))
    (small / "one.qcow2").unlink(missing_ok=True)
    assert_told(*qcow("convert", "-f", "raw", "-O", "raw", source, small / "two.raw"))
    (small / "two.raw").unlink(missing_ok=True)
    assert_told(*qcow("dd", f"if={source}", f"of={small / 'three.raw'}", "bs=64k"))


def test_commit(small: Path, qcow: Command, tmp_path: Path) -> None:
    """The base cannot take it all: the overlay shows what it did; with more room the same command finishes."""
    base, overlay = small / "base.qcow2", tmp_path / "overlay.qcow2"
    make(base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    qemu_io(overlay, "write -P 9 0 1800k", "write -z 1900k 64k")
    expected = content(overlay, tmp_path)
    fill(small, 100 * KIB)
    code, text = qcow("commit", overlay)
    assert (code, text) == (1, f"{program_name()}: Block job failed: {FULL}\n")
    assert content(overlay, tmp_path) == expected
    assert_clean(base)
    (small / "filler").unlink()
    assert qcow("commit", overlay) == (0, "")
    assert content(overlay, tmp_path) == content(base, tmp_path) == expected
    assert_clean(base)


def test_rebase(small: Path, qcow: Command, tmp_path: Path) -> None:
    """The overlay cannot take what the new backing file lacks: it stays on the old one, and reads as before."""
    base, overlay = tmp_path / "base.qcow2", small / "overlay.qcow2"
    make(base)
    qemu_io(base, "write -P 9 0 1800k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
    expected = content(overlay, tmp_path)
    fill(small, 1000 * KIB)
    code, text = qcow("rebase", "-b", "", overlay)
    assert (code, text) == (1, f"{program_name()}: Error while writing to COW image: {FULL}\n")
    assert content(overlay, tmp_path) == expected
    assert_clean(overlay)
    (small / "filler").unlink()
    assert qcow("rebase", "-b", "", overlay) == (0, "")
    base.unlink()
    assert content(overlay, tmp_path) == expected
    assert_clean(overlay)
