"""Chains: what a merge leaves reads the same, whichever way it goes and wherever it is cut off; and the doctor."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib import ChainError, LocalFiles, OptionError, examine_chain, merge_layer, plan_merge
from qcowlib.operations import chain_merge
from tests.cli.side_by_side import ours
from tests.killing import survives
from tests.oracle import qemu_img, qemu_io

MIB = 1 << 20
NAMES = ("base", "one", "two", "top")


def make_chain(folder: Path, seed: int = 1, sizes: tuple[int, int, int, int] = (4, 4, 4, 4)) -> None:
    """base <- one <- two <- top, each with some data of its own."""
    chance = random.Random(seed)
    below: list[str] = []
    for name, size in zip(NAMES, sizes, strict=True):
        qemu_img("create", "-q", "-f", "qcow2", *below, name, f"{size}M", cwd=folder)
        for _ in range(5):
            offset = chance.randrange(0, size * MIB - 300_000, 512)
            kind = chance.choice([f"write -P {chance.randrange(1, 255)}", "write -z", "write -z -u"])
            qemu_io(folder / name, f"{kind} {offset} {chance.randrange(512, 300_000, 512)}")
        below = ["-b", name, "-F", "qcow2"]


def content(path: Path) -> bytes:
    with qcowlib.open_image(path, policy=LocalFiles()) as image:
        return image.read(0, image.size)


@pytest.mark.parametrize("into", ["base", "overlay"])
@pytest.mark.parametrize("layer", ["one", "two"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_above_reads_as_before(tmp_path: Path, into: str, layer: str, seed: int) -> None:
    make_chain(tmp_path, seed, ((4, 4, 4, 4), (2, 3, 4, 5), (5, 5, 4, 3))[seed])
    before = {name: content(tmp_path / name) for name in NAMES if name > layer or name == "top"}
    plan = plan_merge(str(tmp_path / "top"), str(tmp_path / layer))
    assert set(plan.costs) == {"base", "overlay"}
    assert plan.direction == min(plan.costs, key=plan.costs.__getitem__)
    merge_layer(str(tmp_path / "top"), str(tmp_path / layer), into=into)
    assert sorted(os.listdir(tmp_path)) == sorted(set(NAMES) - {layer})
    for name, data in before.items():
        assert content(tmp_path / name) == data
        qemu_img("check", tmp_path / name)
    report = examine_chain(str(tmp_path / "top"))
    assert [link.path for link in report.links] == [str(tmp_path / n) for n in reversed(NAMES) if n != layer]
    assert {problem.code for problem in report.problems} <= {"smaller-base"}


def test_the_top_is_committed(tmp_path: Path) -> None:
    make_chain(tmp_path)
    before = content(tmp_path / "top")
    plan = plan_merge(str(tmp_path / "top"), str(tmp_path / "top"))
    assert list(plan.costs) == ["base"]
    merge_layer(str(tmp_path / "top"), str(tmp_path / "top"))
    assert content(tmp_path / "two") == before
    assert not (tmp_path / "top").exists()


def other_overlay(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-b", "one", "-F", "qcow2", "other", cwd=folder)


def snapshot(name: str) -> Callable[[Path], None]:
    return lambda folder: void(qemu_img("snapshot", "-c", "s", folder / name))


def void(_: object) -> None:
    """Nothing."""


def bitmap(folder: Path) -> None:
    qemu_img("bitmap", "--add", folder / "two", "b")


def smaller(folder: Path) -> None:
    for name in NAMES:
        (folder / name).unlink()
    make_chain(folder, 1, (4, 4, 2, 4))


@pytest.mark.parametrize(
    ("change", "possible", "message"),
    [
        (other_overlay, {"overlay"}, "'{}/other' is based on '{}/one' as well"),
        (snapshot("top"), {"base"}, "internal snapshots of '{}/top' read from '{}/two'"),
        (snapshot("two"), set(), "'{}/two' has internal snapshots, which would be lost"),
        (bitmap, set(), "'{}/two' has bitmaps, which would be lost"),
        (smaller, {"overlay"}, "behind the end of '{}/two' its overlay would show"),
    ],
)
def test_who_else_would_change(
    tmp_path: Path, change: Callable[[Path], None], possible: set[str], message: str
) -> None:
    make_chain(tmp_path)
    change(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    plan = plan_merge(str(tmp_path / "top"), str(tmp_path / "two"))
    assert set(plan.costs) == possible
    text = message.replace("{}", str(tmp_path))
    for way in {"base", "overlay"} - possible:
        assert text in plan.refused[way]
        with pytest.raises(OptionError, match="into the"):
            merge_layer(str(tmp_path / "top"), str(tmp_path / "two"), into=way)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == files


@pytest.mark.parametrize("into", ["base", "overlay"])
def test_killed_at_every_step(tmp_path: Path, into: str, record_property: Callable[[str, object], None]) -> None:
    original, folder = tmp_path / "original", tmp_path / "now"
    original.mkdir()
    make_chain(original, 2)
    before = content(original / "top")
    points = 0
    while True:
        shutil.copytree(original, folder)
        if survives(lambda: merge_layer(str(folder / "top"), str(folder / "two"), into=into), points):
            break
        assert content(folder / "top") == before, f"killed before step {points}"
        if (folder / "two").exists() or (folder / "two.qcow-merge").exists():  # else nothing was left to do
            merge_layer(str(folder / "top"), str(folder / "two"))
        assert content(folder / "top") == before
        assert sorted(os.listdir(folder)) == ["base", "one", "top"]
        for name in ("base", "one", "top"):
            qemu_img("check", folder / name)
        shutil.rmtree(folder)
        points += 1
    record_property("counted", ("kills of a merge in a chain", {"kill points": points, "finished": points}))
    assert points > 8


def test_a_base_that_lives_on_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The top was written to its base, and somebody has gone on with the base before the merge was finished."""
    make_chain(tmp_path)

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chain_merge, "_rename_bases", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_layer(str(tmp_path / "top"), str(tmp_path / "top"))
    qemu_io(tmp_path / "two", "write -P 99 0 1M")
    merge_layer(str(tmp_path / "top"), str(tmp_path / "top"))
    assert content(tmp_path / "two")[:MIB] == bytes([99]) * MIB


def test_the_doctor(tmp_path: Path) -> None:
    make_chain(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "one").rename(tmp_path / "old" / "one")
    said = ours(tmp_path, "chain", "doctor", "top")
    assert said.code == 1
    assert said.out.splitlines()[-2:] == [
        "missing: 'two': its backing file 'one' is not there",
        f"    qcow rebase -u -b {tmp_path}/old/one -F qcow2 two",
    ]
    # What it says mends it.
    words = said.out.splitlines()[-1].split()[1:]
    assert ours(tmp_path, *words).code == 0
    again: dict[str, Any] = json.loads(ours(tmp_path, "chain", "doctor", "--output=json", "top").out)
    assert [image["filename"] for image in again["images"]] == ["top", "two", str(tmp_path / "old" / "one")]
    assert [problem["code"] for problem in again["problems"]] == ["missing"]  # "one" named "base" beside itself
    qemu_img("rebase", "-u", "-b", "two", "-F", "qcow2", tmp_path / "old" / "one", cwd=tmp_path)
    loop = ours(tmp_path, "chain", "doctor", "top")
    assert "missing:" in loop.out


def test_every_way_to_name_a_base_is_found(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base", "1M", cwd=tmp_path)
    base, other = tmp_path / "base", tmp_path / "elsewhere"
    other.mkdir()
    (other / "link").symlink_to(base)
    file = {"driver": "file", "filename": str(base)}
    window = {"driver": "raw", "offset": 65536, "file": file}
    names = {
        "plain": "base",
        "absolute": str(base),
        "protocol": f"file:{base}",
        "description": "json:" + json.dumps({"driver": "qcow2", "file": file}),
        "part": "json:" + json.dumps(window),
        "link": str(other / "link"),
    }
    for name, backing in names.items():
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw" if name == "part" else "qcow2", name,
                 "1M", cwd=tmp_path)  # fmt: skip
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", str(base), "-F", "qcow2", other / "known", "1M")
    users = sorted(str(tmp_path / name) for name in names)
    assert sorted(qcowlib.based_on([str(base)])[str(base)]) == users
    assert sorted(qcowlib.based_on([str(base)], [str(other / "known")])[str(base)]) == sorted(
        [*users, str(other / "known")]
    )
    below = {name: qcowlib.backing_file(str(tmp_path / name)) for name in ("base", *names)}
    found = {name: (str(base), "qcow2") for name in names}
    assert below == {**found, "base": None, "part": None, "link": (str(other / "link"), "qcow2")}


def test_loops_and_formats(tmp_path: Path) -> None:
    make_chain(tmp_path)
    qemu_img("rebase", "-u", "-b", "top", "-F", "qcow2", "base", cwd=tmp_path)
    assert [problem.code for problem in examine_chain(str(tmp_path / "top")).problems] == ["loop"]
    with pytest.raises(ChainError, match="is not whole"):
        plan_merge(str(tmp_path / "top"), str(tmp_path / "two"))
    qemu_img("rebase", "-u", "-b", "", "base", cwd=tmp_path)
    with qcowlib.open_image(tmp_path / "one", writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        with image.exclusive() as transaction:
            transaction.write_header(extensions=())
    report = examine_chain(str(tmp_path / "top"))
    assert [(problem.code, problem.fixes) for problem in report.problems] == [
        ("no-format", (f"qcow rebase -u -b base -F qcow2 {tmp_path}/one",))
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "top", "nothing"], "'nothing' is not in the chain of 'top'"),
        (["plan", "top", "base"], "'base' has no backing file"),
        (["merge", "top", "two", "--into", "both"], "--into must be base or overlay"),
        (["merge", "--output=json", "top", "two"], "--output is not for chain merge"),
        (["fix", "top"], "Expecting doctor, plan or merge"),
        (["doctor", "nothing"], "nothing"),
    ],
)
def test_refused(tmp_path: Path, words: list[str], message: str) -> None:
    make_chain(tmp_path)
    said = ours(tmp_path, "chain", *words)
    assert said.code == 1
    assert message in said.err
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)


def test_an_image_in_use_is_not_merged(tmp_path: Path) -> None:
    make_chain(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in NAMES}
    for into in ("base", "overlay"):
        with (
            qcowlib.open_image(tmp_path / "top", writable=True, open_backing=False),
            pytest.raises(qcowlib.ImageLocked),
        ):
            merge_layer(str(tmp_path / "top"), str(tmp_path / "two"), into=into)
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == before


def test_plan_and_merge_on_the_command_line(tmp_path: Path) -> None:
    make_chain(tmp_path)
    plan = json.loads(ours(tmp_path, "chain", "plan", "--output=json", "top", "one").out)
    assert plan["base"] == "base"
    assert plan["overlays"] == [str(tmp_path / "two")]
    text = ours(tmp_path, "chain", "plan", "top", "one").out.splitlines()
    assert any(line.endswith("to move (chosen)") for line in text)
    said = ours(tmp_path, "chain", "merge", "--into", plan["direction"], "--keep", "top", "one")
    assert (said.code, said.err) == (0, "")
    assert said.out == f"'one' is no longer needed; based on 'base' now: '{tmp_path}/two'\n"
    assert (tmp_path / "one").exists()
