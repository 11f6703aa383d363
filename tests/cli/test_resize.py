"""qcow resize beside the stock qemu-img: words, exit codes, and what is in the image afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import oracle
from tests.cli.side_by_side import Pair, ours, pair

__all__ = ["pair"]

SIZES = [
    "9223372036854775807", "9223372036854774784", "8E", "7E", "1P", "2M", "+512k", "-512k", "-2M", "abc", "-1", "+0",
    "0", "1000", "2000000", "+9223372036854774784", "", "+", "1Q", "16E",
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes(pair: Pair, size: str) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "a", "1M")
    pair.same("resize", "-f", "qcow2", "a", size)
    pair.same("info", "--output=json", "a", mask=r'"actual-size": \d+|"file-length": \d+')


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a"],
        ["a", "b", "1M"],
        ["--preallocation=foo", "a", "1M"],
        ["--preallocation=metadata", "a", "512K"],
        ["--preallocation=metadata", "a", "3M"],
        ["-q", "a", "3M"],
        ["-f", "raw", "--preallocation=metadata", "r", "3M"],
        ["-f", "raw", "--preallocation=full", "r", "3M"],
        ["-f", "raw", "r", "1000"],
        ["-f", "raw", "--shrink", "r", "1000"],
        ["r", "2M"],
        ["missing", "1M"],
        ["-f", "qcow2", "r", "2M"],
        ["--shrink", "--image-opts", "driver=qcow2,file.filename=a", "-512k"],
        ["--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=a", "2M"],
        ["v2", "1M"],
        ["--preallocation=metadata", "v2", "1M"],
        ["--preallocation=full", "v2", "1M"],
        ["kept", "2M"],
        ["stale", "2M"],
    ],
)
def test_arguments(pair: Pair, words: list[str]) -> None:
    for directory in (pair.theirs, pair.ours):
        (directory / "r").write_bytes(b"raw" * 100_000)
    pair.prepare("create", "-q", "-f", "qcow2", "a", "1M")
    pair.prepare("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", "r", "-F", "raw", "v2", "100k")
    pair.prepare("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "kept", "1M")
    pair.prepare("snapshot", "-c", "s", "kept")
    pair.prepare("create", "-q", "-f", "qcow2", "stale", "1M")
    pair.prepare("bitmap", "--add", "stale", "b0")
    for directory in (pair.theirs, pair.ours):
        oracle.qemu_io(directory / "stale", "write 0 64k", "abort", check=False)
    pair.same("resize", *words)
    for directory in (pair.theirs, pair.ours):
        for name in ("a", "v2", "kept"):
            oracle.assert_clean(directory / name)
    assert (pair.ours / "r").stat().st_size == (pair.theirs / "r").stat().st_size


def test_another_format_than_stated_is_refused(tmp_path: Path) -> None:
    oracle.qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    before = (tmp_path / "a").read_bytes()
    said = ours(tmp_path, "resize", "-f", "raw", "a", "2M")
    assert said.code == 1
    assert said.err == "qemu-img: 'a' holds a qcow2 image: as a raw image it is not resized\n"
    assert (tmp_path / "a").read_bytes() == before
