"""commit and rebase are ended by a signal in the middle: the overlay reads as before, and the same command finishes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import oracle
from tests.cli.side_by_side import process, process_environment

MIB = 1 << 20
SIZE = 24 * MIB


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """base <- top with 10 MiB of its own, and other."""
    for name, seed in (("base", 1), ("other", 2)):
        (tmp_path / "raw").write_bytes(random.Random(seed).randbytes(SIZE))
        oracle.qemu_img("convert", "-f", "raw", "-O", "qcow2", "raw", name, cwd=tmp_path)
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", cwd=tmp_path)
    oracle.qemu_io(tmp_path / "top", "write -q -P 3 1M 10M", "write -q -z 12M 1M")
    (tmp_path / "raw").unlink()
    return tmp_path


def start_and_end(directory: Path, changing: Path, ending: signal.Signals, *words: str) -> int:
    """Run a command until it has changed a file, then send it a signal; returns its exit code."""
    before = changing.stat().st_mtime_ns
    command = [sys.executable, "-m", "qcowlib", *words]
    with subprocess.Popen(command, cwd=directory, env=process_environment(), stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 60
        while changing.stat().st_mtime_ns == before and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(ending)
        _, said = child.communicate(timeout=60)
    assert said == b""
    return child.returncode


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_commit(images: Path, ending: signal.Signals) -> None:
    wanted = oracle.content(images / "top", images)
    overlay = (images / "top").read_bytes()
    code = start_and_end(images, images / "base", ending, "commit", "-r", "4M", "top")
    assert code == (130 if ending is signal.SIGINT else -signal.SIGKILL)
    assert oracle.content(images / "top", images) == wanted
    assert oracle.content(images / "base", images) != wanted
    assert oracle.image_info(images / "top")["virtual-size"] == SIZE
    assert len((images / "top").read_bytes()) == len(overlay)  # not emptied
    assert process(images, "commit", "top").returncode == 0
    for name in ("top", "base"):
        assert oracle.content(images / name, images) == wanted
        oracle.assert_clean(images / name)
    assert (images / "top").stat().st_size < MIB


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_rebase(images: Path, ending: signal.Signals) -> None:
    wanted = oracle.content(images / "top", images)
    words = ("rebase", "-b", "other", "-F", "qcow2", "top")
    start_and_end(images, images / "top", ending, *words)
    assert oracle.content(images / "top", images) == wanted
    done = process(images, *words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert oracle.image_info(images / "top")["backing-filename"] == "other"
    assert oracle.content(images / "top", images) == wanted
    oracle.assert_clean(images / "top")
