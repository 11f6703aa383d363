"""A file system that is really full, under compact, export, import and merge: the source is whole, nothing looks
finished that is not, and the same command does it once there is room."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowlib import LocalFiles, digest_states, open_image
from tests.faults.test_disk_full import PAGE, Command, assert_told, fill, make, qcow, small

__all__ = ["qcow", "small"]  # fixtures


def digests(path: Path) -> list[dict[str, str]]:
    with open_image(path, policy=LocalFiles()) as image:
        return [state.digests for state in digest_states(image, ["sha256"])]


def by_compact(folder: Path) -> tuple[list[object], Path]:
    return ["compact", "-q", folder / "image.qcow2", folder / "result"], folder / "result"


def by_export(folder: Path) -> tuple[list[object], Path]:
    return ["snapshot", "-q", "--export", folder / "result", folder / "image.qcow2"], folder / "result"


def by_import(folder: Path) -> tuple[list[object], Path]:
    return ["snapshot", "-q", "--import", folder / "chain", folder / "result"], folder / "result"


@pytest.mark.parametrize("verb", [by_compact, by_export, by_import])
def test_something_new(verb: Callable[[Path], tuple[list[object], Path]], small: Path, qcow: Command) -> None:
    image = small / "image.qcow2"
    make(image)
    wanted, before = digests(image), image.read_bytes()
    if verb is by_import:
        assert qcow("snapshot", "-q", "--export", small / "chain", image)[0] == 0
    words, result = verb(small)
    failed = 0
    for pages in (0, 1, 3, 10, 40):
        fill(small, pages * PAGE)
        code, text = qcow(*words)
        if code == 0:
            break
        failed += 1
        assert_told(code, text)
        assert image.read_bytes() == before
        assert not result.exists(), "nothing has the result's name"
        (small / "filler").unlink()
    assert failed >= 3
    (small / "filler").unlink(missing_ok=True)
    assert qcow(*words)[0] == 0
    found = result / "active.qcow2" if result.is_dir() else result
    assert digests(found) == (wanted[:1] if result.is_dir() else wanted)
    assert not [name for name in os.listdir(small) if name.endswith(".qcow-incomplete")]


@pytest.mark.parametrize("into", ["base", "overlay"])
def test_merge(into: str, small: Path, qcow: Command) -> None:
    from tests.oracle import qemu_img, qemu_io

    for name, below in (("base", []), ("middle", ["-b", "base"]), ("top", ["-b", "middle"])):
        options = ["-F", "qcow2", *below] if below else []
        qemu_img("create", "-q", "-f", "qcow2", *options, name, "2M", cwd=small)
        offset = {"base": "0 64k", "middle": "64k 300k", "top": "1M 64k"}[name]
        qemu_io(small / name, f"write -P {ord(name[0])} {offset}")
    wanted = digests(small / "top")
    failed = 0
    for pages in (0, 1, 3, 10):
        fill(small, pages * PAGE)
        code, text = qcow("chain", "merge", "-q", "--into", into, small / "top", small / "middle")
        assert code == 1
        failed += 1
        assert_told(code, text)
        assert digests(small / "top") == wanted
        (small / "filler").unlink()
    assert failed == 4
    assert qcow("chain", "merge", "-q", small / "top", small / "middle")[0] == 0
    assert digests(small / "top") == wanted
    assert sorted(os.listdir(small)) == ["base", "top"]
