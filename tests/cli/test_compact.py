"""qcow compact: what it says, and what it refuses."""

import os
from pathlib import Path

import pytest

from tests.cli.side_by_side import ours
from tests.oracle import qemu_img, qemu_io


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """disk: a snapshot, and room that nothing uses; top: over it; data: with an external data file."""
    disk = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", disk, "64M")
    qemu_io(disk, "write 0 16M", "write -z -u 4M 8M")
    qemu_img("snapshot", "-c", "one", disk)
    qemu_io(disk, "write -P 7 1M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", tmp_path / "top")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=d", tmp_path / "data", "1M", cwd=tmp_path)
    return tmp_path


def test_a_smaller_image(folder: Path) -> None:
    told = ours(folder, "compact", "-n", "disk", "small")
    assert told.code == 0
    assert not (folder / "small").exists()
    size = int(told.out.split()[3])
    said = ours(folder, "compact", "disk", "small")
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith(f" ({size} bytes)\n")
    assert os.stat(folder / "small").st_size == size < os.stat(folder / "disk").st_size - (6 << 20)
    qemu_img("check", folder / "small")
    assert "Images are identical." in qemu_img("compare", folder / "disk", folder / "small").stdout
    assert qemu_img("snapshot", "-l", folder / "small").stdout == qemu_img("snapshot", "-l", folder / "disk").stdout
    quiet = ours(folder, "compact", "-q", "top", "small")  # an existing target is replaced
    assert (quiet.code, quiet.out) == (0, "")
    qemu_img("compare", folder / "top", folder / "small")


def test_convert_with_snapshots(folder: Path) -> None:
    assert ours(folder, "compact", "-q", "disk", "small").code == 0
    assert ours(folder, "convert", "-q", "--with-snapshots", "-O", "qcow2", "disk", "other") == (0, "", "")
    assert (folder / "other").read_bytes() == (folder / "small").read_bytes()
    for words, message in (
        (["-O", "raw"], "needs -O qcow2"),
        (["-O", "qcow2", "-c"], "compressed cannot be given with it"),
    ):
        said = ours(folder, "convert", "--with-snapshots", *words, "disk", "x")
        assert said.code == 1
        assert message in said.err
        assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["disk"], "Expecting an image file name and the name of the new file"),
        (["disk", "disk"], "the new file must be another one"),
        (["disk", "link"], "the new file must be another one"),
        (["data", "x"], "is in an external data file"),
        (["raw", "x"], "is a raw image"),
        (["none", "x"], "Could not open 'none'"),
        (["top", "sub/x"], "the backing file name 'disk' is relative"),
        (["disk", "nowhere/x"], "Could not compact 'disk'"),
    ],
)
def test_refused(folder: Path, words: list[str], message: str) -> None:
    (folder / "raw").write_bytes(bytes(1 << 20))
    (folder / "link").symlink_to("disk")
    (folder / "sub").mkdir()
    before = (folder / "disk").read_bytes()
    said = ours(folder, "compact", *words)
    assert said.code == 1
    assert message in said.err
    assert said.err.count("\n") <= 2
    assert (folder / "disk").read_bytes() == before
    assert not (folder / "x").exists()
    assert not list(folder.glob("**/*.qcow-incomplete"))
