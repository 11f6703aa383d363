"""commit, rebase, compare: the same commands on the stock tool and on ours; texts, contents and maps compared."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import oracle
from tests.cli.side_by_side import Pair, Said, assert_same, ours, pair, stock

__all__ = ["pair"]

OPTIONS = ["compat=1.1", "compat=0.10,cluster_size=4k", "extended_l2=on,cluster_size=16k", "refcount_bits=1"]


def make_chain(pair: Pair, options: str, *, sizes: tuple[str, str, str] = ("1M", "1M", "1M")) -> None:
    """base <- mid <- top, and other, each with data of its own at odd places."""
    base, mid, top = sizes
    pair.prepare("create", "-q", "-f", "qcow2", "-o", options, "base", base)
    pair.prepare("create", "-q", "-f", "qcow2", "-o", options, "other", base)
    pair.prepare("create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "qcow2", "mid", mid)
    pair.prepare("create", "-q", "-f", "qcow2", "-o", options, "-b", "mid", "-F", "qcow2", "top", top)
    for directory in (pair.theirs, pair.ours):
        oracle.qemu_io(directory / "base", "write -P 1 0 300k", "write -P 2 450k 10k")
        oracle.qemu_io(directory / "other", "write -P 1 0 200k", "write -P 7 440k 20k", "write -z 20k 30k")
        oracle.qemu_io(directory / "mid", "write -P 3 100k 90k", "write -z 200k 64k")
        oracle.qemu_io(directory / "top", "write -P 4 130k 3k", "write -P 5 300k 100k", "write -z 0 40k")


def facts(directory: Path, name: str) -> dict[str, Any]:
    """What a user can see of an image, less what depends on the host."""
    info = oracle.image_info(directory / name)
    left = {key: value for key, value in info.items() if key not in ("actual-size", "children", "filename")}
    left.pop("full-backing-filename", None)
    oracle.qemu_img("check", "-q", "-f", "qcow2", name, cwd=directory)
    data = oracle.qemu_img("map", "--output=json", "-f", "qcow2", name, cwd=directory).stdout
    return left | {"map": joined(json.loads(data)), "content": oracle.content(directory / name, directory)}


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A map without places in the host file, nor its cuts where those jump: the stock commit copies several ranges at
    a time, and which of them gets the first cluster is chance."""
    result: list[dict[str, Any]] = []
    for row in rows:
        kind = {key: row[key] for key in ("depth", "zero", "data")}
        if result and result[-1] == kind | {key: result[-1][key] for key in ("start", "length")}:
            result[-1]["length"] += row["length"]
        else:
            result.append({"start": row["start"], "length": row["length"]} | kind)
    return result


def assert_equal_files(pair: Pair, options: str, *names: str) -> None:
    """Both tools have left the same; with subclusters the stock tool copies more than it must, or in other units."""
    for name in names:
        theirs, mine = facts(pair.theirs, name), facts(pair.ours, name)
        assert mine.pop("content") == theirs.pop("content"), f"content of {name}"
        if "extended_l2" in options:
            del mine["map"], theirs["map"]
        assert mine == theirs, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *((options, []) for options in OPTIONS),
        (OPTIONS[0], ["-b", "base"]),
        (OPTIONS[1], ["-d", "-b", "mid"]),
        (OPTIONS[3], ["-d", "-q", "-p", "-t", "none"]),
    ],
)
def test_commit(pair: Pair, options: str, words: list[str]) -> None:
    make_chain(pair, options)
    assert pair.same("commit", *words, "top").code == 0
    assert_equal_files(pair, options, "top", "mid", "base")


@pytest.mark.parametrize("sizes", [("1M", "512k", "2M"), ("512k", "1M", "1M"), ("2M", "1M", "700k")])
@pytest.mark.parametrize("words", [[], ["-b", "base"]])
def test_commit_between_sizes(pair: Pair, sizes: tuple[str, str, str], words: list[str]) -> None:
    make_chain(pair, "compat=1.1", sizes=sizes)
    assert pair.same("commit", *words, "top").code == 0
    for name in ("top", "mid", "base"):
        theirs, mine = (oracle.content(directory / name, directory) for directory in (pair.theirs, pair.ours))
        assert mine == theirs, name
        oracle.assert_clean(pair.ours / name)


def test_commit_that_is_refused(pair: Pair) -> None:
    make_chain(pair, "compat=1.1")
    pair.prepare("create", "-q", "-f", "raw", "raw", "1M")
    before = {name: (pair.ours / name).read_bytes() for name in os.listdir(pair.ours)}
    for words in (
        ["base"],
        ["-f", "raw", "top"],
        ["raw"],
        ["-f", "raw", "raw"],
        ["-b", "other", "top"],
        ["-b", "top", "top"],
        ["-b", "", "top"],
        ["missing"],
        ["-f", "vmdk", "top", "-q"],
    ):
        if words[0] == "-f" and words[1] == "vmdk":
            assert ours(pair.ours, "commit", *words).code == 1
        else:
            assert pair.same("commit", *words).code == 1
    assert {name: (pair.ours / name).read_bytes() for name in os.listdir(pair.ours)} == before


def test_commit_to_a_raw_base(pair: Pair) -> None:
    for name, backing_format in (("stated", "raw"), ("guessed", None)):
        pair.prepare("create", "-q", "-f", "raw", f"{name}.raw", "1M")
        pair.prepare("create", "-q", "-f", "qcow2", "-b", f"{name}.raw", "-F", "raw", name)
        for directory in (pair.theirs, pair.ours):
            if backing_format is None:
                forget_backing_format(directory / name)
            oracle.qemu_io(directory / name, "write -P 81 64k 100k")
        assert pair.same("commit", name).code == 0
        assert (pair.ours / f"{name}.raw").read_bytes() == (pair.theirs / f"{name}.raw").read_bytes()
    for directory in (pair.theirs, pair.ours):
        (directory / "magic").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(504))
        oracle.qemu_io(directory / "guessed", f"write -s {directory / 'magic'} 0 512")
    assert pair.same("commit", "guessed").err == "qemu-img: Block job failed: Operation not permitted\n"
    assert (pair.ours / "guessed.raw").read_bytes() == (pair.theirs / "guessed.raw").read_bytes()


def forget_backing_format(path: Path) -> None:
    """Take the extension with the format of the backing file out of a header, as old overlays lack it."""
    data = bytearray(path.read_bytes())
    place = data.index(bytes.fromhex("e2792aca"))
    data[place : place + 4] = b"gone"  # unknown extensions are skipped
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("options", "target"), [*((options, "other") for options in OPTIONS), (OPTIONS[0], "base"), (OPTIONS[1], "")]
)
def test_rebase(pair: Pair, options: str, target: str) -> None:
    make_chain(pair, options)
    words = ["-F", "qcow2"] if target else []
    assert pair.same("rebase", "-b", target, *words, "top").code == 0
    assert_equal_files(pair, options, "top")


@pytest.mark.parametrize("sizes", [("1M", "512k", "2M"), ("512k", "1M", "700k")])
@pytest.mark.parametrize("target", ["base", "other", ""])
def test_rebase_between_sizes(pair: Pair, sizes: tuple[str, str, str], target: str) -> None:
    make_chain(pair, "compat=1.1", sizes=sizes)
    assert pair.same("rebase", "-p", "-q", "-b", target, *(["-F", "qcow2"] if target else []), "top").code == 0
    assert_equal_files(pair, "", "top")


def test_unsafe_rebase(pair: Pair) -> None:
    make_chain(pair, "compat=1.1")
    for words in (
        ["-b", "moved", "-F", "raw"],
        ["-b", "x" * 1000, "-F", "qcow2"],
        ["-b", "top", "-F", "qcow2"],
        ["-b", "", "-F", "qcow2"],
        [],
        ["-F", "qcow2"],
        ["-b", "nbd://host/disk", "-F", "raw"],
        ["-p", "-b", "base", "-F", "qcow2"],
    ):
        assert pair.same("rebase", "-u", *words, "top").code == 0
        theirs, mine = (oracle.image_info(directory / "top") for directory in (pair.theirs, pair.ours))
        for key in ("backing-filename", "backing-filename-format"):
            assert mine.get(key) == theirs.get(key), words


def test_rebase_that_is_refused(pair: Pair) -> None:
    make_chain(pair, "compat=1.1")
    pair.prepare("create", "-q", "-f", "raw", "raw", "1M")
    before = {name: (pair.ours / name).read_bytes() for name in os.listdir(pair.ours)}
    for words in (
        ["-b", "other", "top"],
        ["-b", "other", "-F", "nothing", "top"],
        ["-b", "missing", "-F", "qcow2", "top"],
        ["-b", "top", "-F", "qcow2", "top"],
        ["-b", "top", "-F", "qcow2", "mid"],
        ["-b", "raw", "-F", "qcow2", "top"],
        ["-u", "-b", "other", "top"],
        ["-u", "-b", "y" * 1024, "-F", "raw", "top"],
        ["-u", "-b", "other", "-F", "qcow2", "raw"],
        ["-f", "raw", "-b", "other", "-F", "qcow2", "raw"],
        ["-f", "raw", "-u", "raw"],
        ["-f", "raw", "-u", "-b", "base", "-F", "qcow2", "top"],
        ["-b", "base", "-F", "qcow2", "missing"],
    ):
        assert pair.same("rebase", *words).code == 1
    # Where the stock tool does what nobody can want.
    assert "holds a qcow2 image" in ours(pair.ours, "rebase", "-b", "other", "-F", "raw", "top").err
    assert "loop" in ours(pair.ours, "rebase", "-U", "-b", "top", "-F", "qcow2", "mid").err
    assert ours(pair.ours, "rebase", "-c", "-f", "raw", "-u", "raw").err == (
        "qemu-img: Compression not supported for this file format\n"
    )
    assert {name: (pair.ours / name).read_bytes() for name in os.listdir(pair.ours)} == before


def test_newer_option_names(pair: Pair) -> None:
    """Of qemu-img 8.2 to 10.1."""
    for words in (
        ["create", "--quiet", "--format=qcow2", "base", "1M"],
        ["create", "-q", "-f", "qcow2", "--backing", "base", "-B", "qcow2", "top"],
        ["create", "-q", "-f", "qcow2", "-b", "base", "--backing-format", "qcow2", "--backing-unsafe", "two", "1M"],
        ["rebase", "--backing", "base", "-B", "qcow2", "--compress", "--quiet", "top"],
        ["commit", "--drop", "--quiet", "--format", "qcow2", "--rate-limit", "1G", "top"],
        ["commit", "--base", "base", "-q", "top"],
        ["compare", "--a-format", "qcow2", "--b-format", "qcow2", "--strict", "--quiet", "top", "top"],
        ["snapshot", "--create", "one", "-f", "qcow2", "top"],
    ):
        assert ours(pair.ours, *words) == Said(0, "", ""), words
    assert ours(pair.ours, "snapshot", "top").out == ours(pair.ours, "snapshot", "-l", "top").out
    assert "one" in ours(pair.ours, "snapshot", "top").out
    assert oracle.image_info(pair.ours / "top")["backing-filename-format"] == "qcow2"


def test_compare(pair: Pair) -> None:
    make_chain(pair, "compat=1.1")
    folder = pair.ours
    oracle.qemu_img("create", "-q", "-f", "qcow2", "longer", "3M", cwd=folder)
    oracle.qemu_img("create", "-q", "-f", "raw", "zero", "1M", cwd=folder)
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "allocated", "1M", cwd=folder)
    oracle.qemu_img("convert", "-O", "qcow2", "top", "flat", cwd=folder)
    oracle.qemu_img("convert", "-O", "raw", "top", "flat.raw", cwd=folder)
    oracle.qemu_img("convert", "-c", "-O", "qcow2", "top", "packed", cwd=folder)
    oracle.qemu_img("create", "-q", "-f", "qcow2", "empty", "0", cwd=folder)
    oracle.qemu_io(folder / "longer", "write -P 9 2500k 1k")
    names = ["top", "mid", "base", "flat", "flat.raw", "packed", "longer", "zero", "allocated", "empty"]
    for one in names:
        for other in names[names.index(one) :]:
            assert_same(folder, "compare", one, other)
            assert_same(folder, "compare", "-s", other, one)
    for words in (
        ["-q", "-p", "top", "base"],
        ["-f", "raw", "top", "flat"],
        ["-F", "qcow2", "top", "flat.raw"],
        ["-T", "foo", "top", "flat"],
        ["top"],
        ["top", "flat", "base"],
        ["-z", "top", "flat"],
        ["top", "missing"],
        ["missing", "top"],
        ["--image-opts", "driver=qcow2,file.filename=top", "driver=raw,file.filename=flat.raw"],
        ["--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=top", "driver=raw,file.filename=flat.raw"],
        ["--object", "secret,id=s,data=x", "-U", "top", "flat"],
        ["--object", "nothing", "top", "flat"],
    ):
        assert_same(folder, "compare", *words)
    assert_same(folder, "compare", "-p", "top", "flat", mask=r"(?:    \(\d+\.\d+/100%\)\n)+")


def test_compare_tells_what_cannot_be_read(pair: Pair) -> None:
    """A damaged mapping: 3, damaged data: 4; what differs before it is told instead."""
    folder = pair.ours
    for name in ("sound", "mapping", "data"):
        oracle.qemu_img("create", "-q", "-f", "qcow2", name, "1M", cwd=folder)
        oracle.qemu_io(folder / name, *(f"write -c -P {n} {n * 64}k 64k" for n in range(1, 9)))
    entry = 0x40000 + 5 * 8  # of the first L2 table
    damaged = bytearray((folder / "mapping").read_bytes())
    damaged[entry : entry + 8] = (0x8000_0000_0000_0200).to_bytes(8, "big")
    (folder / "mapping").write_bytes(damaged)
    packed = bytearray((folder / "data").read_bytes())
    place = int.from_bytes(packed[entry : entry + 8], "big") & (1 << 54) - 1
    packed[place : place + 8] = b"\xff" * 8
    (folder / "data").write_bytes(packed)
    for name, code in (("mapping", 3), ("data", 4)):
        expected, got = stock(folder, "compare", "sound", name), ours(folder, "compare", "sound", name)
        assert got.code == expected.code == code
        assert got.err == expected.err.splitlines(keepends=True)[-1]  # the stock tool says more of the damage
    oracle.qemu_io(folder / "sound", "write -P 77 270k 1k")
    for name in ("mapping", "data"):
        assert ours(folder, "compare", name, "sound") == stock(folder, "compare", name, "sound")
        assert ours(folder, "compare", name, "sound").code == 1


def test_images_in_use_are_left_alone(pair: Pair) -> None:
    """The overlay, its base or its new base is held by a writer; the base by a reader."""
    make_chain(pair, "compat=1.1")
    for held, options in (("top", []), ("mid", []), ("mid", ["-r"]), ("other", [])):
        for directory, run in ((pair.theirs, stock), (pair.ours, ours)):
            before = {name: (directory / name).read_bytes() for name in ("base", "mid", "top")}
            with subprocess.Popen(
                ["qemu-io", "-f", "qcow2", *options, held],
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ) as holder:
                assert holder.stdin is not None
                assert holder.stdout is not None
                holder.stdin.write(b"length\n")
                holder.stdin.flush()
                holder.stdout.readline()
                said = [
                    *([run(directory, "commit", "top")] if held != "other" else []),
                    *([run(directory, "rebase", "-b", "other", "-F", "qcow2", "top")] if not options else []),
                    run(directory, "compare", "top", "other"),
                ]
                holder.stdin.close()
                holder.wait(timeout=30)
            assert {name: (directory / name).read_bytes() for name in ("base", "mid", "top")} == before
            if directory == pair.theirs:
                expected = said
        assert said == expected
        assert all(one.code for one in said)
