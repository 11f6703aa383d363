"""qcow bitmap, and bitmaps in convert, side by side with the stock tool: the same words, and the same marks."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowlib
from tests.cli.side_by_side import PROGRAM, Pair, ours, pair
from tests.oracle import assert_clean, image_info, qemu_io, run

__all__ = ["pair"]

#: Names of nodes are random in the stock tool; ours says the file.
NODE = r"#block\d+|[a-z0-9]+\.(?:qcow2|raw)(?=[:'])"


@pytest.fixture
def images(pair: Pair) -> Pair:
    """Images with and without bitmaps; `a` has x, y and one that is inconsistent (lost)."""
    pair.prepare("create", "-q", "-f", "qcow2", "a.qcow2", "10M")
    pair.prepare("create", "-q", "-f", "qcow2", "b.qcow2", "10M")
    pair.prepare("create", "-q", "-f", "qcow2", "c.qcow2", "20M")
    pair.prepare("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2.qcow2", "10M")
    pair.prepare("create", "-q", "-f", "raw", "r.raw", "10M")
    pair.prepare("bitmap", "--add", "a.qcow2", "lost")
    for directory in (pair.theirs, pair.ours):
        run("qemu-io", "-c", "abort", directory / "a.qcow2", check=False)
    pair.prepare("bitmap", "--add", "a.qcow2", "x")
    pair.prepare("bitmap", "--add", "--disable", "-g", "512", "a.qcow2", "y")
    pair.prepare("bitmap", "--add", "b.qcow2", "x")
    pair.prepare("bitmap", "--add", "c.qcow2", "x")
    return pair


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--add",
        "--add a.qcow2",
        "--add a.qcow2 new more",
        "-g 4k --remove a.qcow2 x",
        "-F raw --merge x a.qcow2 x",
        "-b b.qcow2 --add a.qcow2 new",
        "--frob",
        "--merge",
        "--add --granularity",
        "-g foo --add a.qcow2 new",
        "-g 1000 --add a.qcow2 new",
        "-g 256 --add a.qcow2 new",
        "-g 4G --add a.qcow2 new",
        "-g 0 --add a.qcow2 new",
        "-g 2G --add a.qcow2 new",
        "-g 1M --add a.qcow2 new",
        "--add a.qcow2 x",
        "--add nothere.qcow2 x",
        "--add --image-opts -f qcow2 driver=qcow2,file.filename=a.qcow2 new",
        "--add --image-opts driver=qcow2,file.filename=a.qcow2 new",
        "--remove a.qcow2 nothere",
        "--remove a.qcow2 lost",
        "--clear a.qcow2 nothere",
        "--clear a.qcow2 lost",
        "--enable a.qcow2 lost",
        "--disable a.qcow2 lost",
        "--merge lost a.qcow2 x",
        "--merge x a.qcow2 lost",
        "--merge nothere a.qcow2 x",
        "--merge y a.qcow2 x",
        "--merge x a.qcow2 x",
        "--add --merge nothere a.qcow2 new",
        "--add --disable --merge y -g 8k a.qcow2 new",
        "--disable --clear --enable a.qcow2 x",
        "--remove --add a.qcow2 x",
        "-b b.qcow2 -F qcow2 --merge x a.qcow2 x",
        "-b b.qcow2 --merge x a.qcow2 x",
        "-b c.qcow2 -F qcow2 --merge x a.qcow2 x",
        "-b r.raw -F raw --merge x a.qcow2 x",
        "-b nothere.qcow2 -F qcow2 --merge x a.qcow2 x",
        "-b a.qcow2 -F qcow2 --merge x a.qcow2 x",
        "--add -f raw r.raw x",
        "--add r.raw x",
        "--clear -f raw r.raw x",
        "--remove -f raw r.raw x",
        "--add v2.qcow2 x",
        "--clear v2.qcow2 x",
        f"--add a.qcow2 {'n' * 1023}",
        f"--add a.qcow2 {'n' * 1024}",
    ],
)
def test_same_words_and_bitmaps(images: Pair, arguments: str) -> None:
    images.same("bitmap", *arguments.split(), mask=NODE)
    for name in ("a", "b", "c"):
        images.same("info", f"{name}.qcow2", mask=r"disk size: .*|Image end.*")
    assert_clean(images.ours / "a.qcow2")


def test_bitmaps_that_another_program_has_left_behind(images: Pair) -> None:
    """The autoclear bit is off: the first open for writing says so and forgets them."""
    for directory in (images.theirs, images.ours):
        with (directory / "b.qcow2").open("r+b") as file:
            file.seek(88)
            file.write(bytes(8))
    images.same("info", "b.qcow2", mask=r"disk size: .*")
    images.same("bitmap", "--clear", "b.qcow2", "x")
    images.same("bitmap", "--add", "b.qcow2", "new")
    images.same("info", "b.qcow2", mask=r"disk size: .*")


def test_empty_name(images: Pair) -> None:
    images.same("bitmap", "--add", "a.qcow2", "")
    images.same("bitmap", "--remove", "a.qcow2", "")


def test_too_large(pair: Pair) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "a.qcow2", "4T")
    pair.same("bitmap", "--add", "-g", "512", "a.qcow2", "x", mask=NODE)
    pair.prepare("create", "-q", "-f", "qcow2", "b.qcow2", "2T")
    pair.same("bitmap", "--add", "-g", "512", "b.qcow2", "x")


def test_in_use_elsewhere(images: Pair) -> None:
    for directory in (images.theirs, images.ours):
        holder = qcowlib.open_image(directory / "a.qcow2", writable=True)
        said = ours(directory, "bitmap", "--add", "a.qcow2", "new")
        holder.close()
        assert said.code == 1
        assert said.err.startswith(f"{PROGRAM}: Could not open 'a.qcow2': Failed to get ")


@pytest.mark.parametrize(
    "arguments",
    [
        "--bitmaps -O qcow2 a.qcow2 new.qcow2",
        "--bitmaps --skip-broken-bitmaps -O qcow2 a.qcow2 new.qcow2",
        "--bitmaps -O qcow2 b.qcow2 new.qcow2",
        "--bitmaps -c -O qcow2 -o cluster_size=4k b.qcow2 new.qcow2",
        "--bitmaps -O raw b.qcow2 new.raw",
        "--bitmaps -O qcow2 r.raw new.qcow2",
        "--bitmaps -O qcow2 v2.qcow2 new.qcow2",
        "--bitmaps -O qcow2 -o compat=0.10 b.qcow2 new.qcow2",
        "--skip-broken-bitmaps -O qcow2 b.qcow2 new.qcow2",
        "--bitmaps -n -O qcow2 b.qcow2 c.qcow2",
        "--bitmaps -n -O qcow2 b.qcow2 a.qcow2",
        "--bitmaps --skip-broken-bitmaps -n -O qcow2 a.qcow2 b.qcow2",
        "--bitmaps -n -O qcow2 b.qcow2 v2.qcow2",
    ],
)
def test_convert(images: Pair, arguments: str) -> None:
    said = images.same("convert", *arguments.split())
    target = arguments.rsplit(maxsplit=1)[-1]
    if said.code == 0:
        images.same("info", target, mask=r"disk size: .*")
        assert_clean(images.ours / target)


def test_convert_makes_no_bitmap_of_other_sizes(images: Pair) -> None:
    images.prepare("bitmap", "--remove", "c.qcow2", "x")
    images.same("convert", "--bitmaps", "-n", "-O", "qcow2", "b.qcow2", "c.qcow2")
    images.same("info", "c.qcow2", mask=r"disk size: .*")


def test_remove_all(images: Pair) -> None:
    """What newer versions have: the bitmap's name may be left out, other actions may follow."""
    said = ours(images.ours, "bitmap", "--remove-all", "a.qcow2")
    assert said == (0, "", "")
    assert "bitmaps" not in image_info(images.ours / "a.qcow2")["format-specific"]["data"]
    assert_clean(images.ours / "a.qcow2")
    assert ours(images.ours, "bitmap", "--remove-all", "a.qcow2") == (0, "", "")
    assert ours(images.ours, "bitmap", "--remove-all", "--add", "b.qcow2", "only") == (0, "", "")
    names = [one["name"] for one in image_info(images.ours / "b.qcow2")["format-specific"]["data"]["bitmaps"]]
    assert names == ["only"]
    assert ours(images.ours, "bitmap", "--remove-all", "--add", "b.qcow2").code == 1


def test_writes_are_marked(images: Pair, tmp_path: Path) -> None:
    """A convert into an image that is there is a guest write for its bitmaps."""
    qemu_io(images.ours / "b.qcow2", "write -P 7 1M 64k")
    assert ours(images.ours, "bitmap", "--clear", "b.qcow2", "x").code == 0
    (tmp_path / "source").write_bytes(bytes(4 << 20) + b"\1" * (1 << 20) + bytes(5 << 20))
    done = ours(images.ours, "convert", "-n", "-f", "raw", "-O", "qcow2", str(tmp_path / "source"), "b.qcow2")
    assert done == (0, "", "")
    with qcowlib.open_image(images.ours / "b.qcow2") as image:
        marked = [row for batch in qcowlib.dirty_extents(image, "x") for row in zip(*batch, strict=True)]
    assert any(start <= 4 << 20 and start + length >= 5 << 20 for start, length in marked)
    assert any(start <= 1 << 20 < start + length for start, length in marked), "what became zero has changed, too"


def test_a_commit_is_marked_in_the_base(pair: Pair) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "base.qcow2", "10M")
    pair.prepare("bitmap", "--add", "base.qcow2", "x")
    pair.prepare("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    for directory in (pair.theirs, pair.ours):
        qemu_io(directory / "top.qcow2", "write -P 7 5M 100k", "write -z 8M 64k")
    pair.same("commit", "top.qcow2")
    found = []
    for directory in (pair.theirs, pair.ours):
        with qcowlib.open_image(directory / "base.qcow2") as image:
            found.append([row for batch in qcowlib.dirty_extents(image, "x") for row in zip(*batch, strict=True)])
    assert found[0] == found[1] == [(5 << 20, 128 << 10), (8 << 20, 64 << 10)]
    assert_clean(pair.ours / "base.qcow2")
