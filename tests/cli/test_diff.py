"""qcow diff: text, JSON, and what it says of states that cannot be told."""

import json
from pathlib import Path

import pytest

import qcowlib
from tests.cli.side_by_side import ours
from tests.oracle import qemu_img, qemu_io

CLUSTER = 65536


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """disk: three clusters; snapshot one; then the second cluster written anew, half of it as before. top: over it."""
    disk = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    qemu_io(disk, f"write -P 1 0 {3 * CLUSTER}")
    qemu_img("snapshot", "-c", "one", disk)
    qemu_io(disk, f"write -P 2 {CLUSTER} {CLUSTER // 2}")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk", "-F", "qcow2", tmp_path / "top")
    qemu_io(tmp_path / "top", f"write -P 3 {8 * CLUSTER} {CLUSTER}")
    return tmp_path


def test_text(folder: Path) -> None:
    said = ours(folder, "diff", "--old-snapshot", "one", "disk")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines() == [
        "changed: 64 KiB (65536 bytes)",
        "unknown: 0 B (0 bytes)",
        f"{'Offset':<20}{'Length':<20}State",
        f"{'0x10000':<20}{'0x10000':<20}changed",
    ]
    exact = ours(folder, "diff", "--exact", "--old-snapshot", "one", "disk")
    assert exact.out.splitlines()[0] == "changed: 32 KiB (32768 bytes)"
    same = ours(folder, "diff", "disk")
    assert same.out.splitlines() == ["changed: 0 B (0 bytes)", "unknown: 0 B (0 bytes)"]


def test_json_of_a_chain(folder: Path) -> None:
    said = ours(folder, "diff", "--output=json", "--old-snapshot", "one", "disk", "top")
    assert json.loads(said.out) == {
        "version": 1,
        "old": {"filename": "disk", "snapshot": "one", "virtual-size": 1 << 20},
        "new": {"filename": "top", "snapshot": None, "virtual-size": 1 << 20},
        "exact": False,
        "changed": 2 * CLUSTER,
        "unknown": 0,
        "extents": [
            {"start": CLUSTER, "length": CLUSTER, "state": "changed"},
            {"start": 8 * CLUSTER, "length": CLUSTER, "state": "changed"},
        ],
    }


def test_since_a_bitmap(folder: Path) -> None:
    qemu_img("bitmap", "--add", folder / "disk", "b")
    qemu_io(folder / "disk", f"write {4 * CLUSTER} {CLUSTER + 1}")
    said = ours(folder, "diff", "--bitmap", "b", "disk")
    assert said.out.splitlines()[0] == "changed: 128 KiB (131072 bytes)"
    shape = json.loads(ours(folder, "diff", "--bitmap", "b", "--output=json", "disk").out)
    assert shape["extents"] == [{"start": 4 * CLUSTER, "length": 2 * CLUSTER, "state": "changed"}]
    assert shape["bitmap"] == "b"
    missing = ours(folder, "diff", "--bitmap", "none", "disk")
    assert missing.code == 1
    assert "Could not read the bitmap 'none' of 'disk'" in missing.err
    assert ours(folder, "diff", "--bitmap", "b", "--exact", "disk").code == 1
    with qcowlib.open_image(folder / "disk") as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        rows = [row[:3] for table in qcowlib.changed_since_bitmap(image, "b") for row in table.rows()]
    assert rows == [(4 * CLUSTER, 2 * CLUSTER, qcowlib.ExtentKind.DATA)]


def test_a_missing_base_leaves_what_the_metadata_tells(folder: Path) -> None:
    qemu_img("snapshot", "-c", "before", folder / "top")
    qemu_io(folder / "top", f"write -P 4 {2 * CLUSTER} {CLUSTER}")
    (folder / "disk").rename(folder / "moved")
    said = ours(folder, "diff", "--output=json", "--old-snapshot", "before", "top")
    assert said.code == 0
    assert "what only the backing file could tell is unknown" in said.err
    # Over the same missing base equal places are equal; a written cluster against the base is not known.
    assert json.loads(said.out)["extents"] == [
        {"start": 2 * CLUSTER, "length": CLUSTER, "state": "unknown"},
    ]


def test_damage_is_unknown(folder: Path) -> None:
    image = folder / "disk"
    data = bytearray(image.read_bytes())
    l2 = int.from_bytes(data[0x30000:0x30008], "big") & 0x00FFFFFFFFFFFE00
    entry = int.from_bytes(data[l2 + 16 : l2 + 24], "big")
    data[l2 + 16 : l2 + 24] = (entry + 512).to_bytes(8, "big")
    image.write_bytes(data)
    said = ours(folder, "diff", "--output=json", "disk")
    assert json.loads(said.out)["extents"] == [{"start": 2 * CLUSTER, "length": CLUSTER, "state": "unknown"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--old-snapshot", "none", "disk"], "Could not open snapshot 'none' of 'disk'"),
        (["--old-snapshot", "one", "raw"], "is a raw image and has no snapshots"),
        (["nothing"], "Could not open 'nothing'"),
        (["disk", "top", "disk"], "Expecting one or two image file names"),
        (["--bogus", "disk"], "unrecognized option '--bogus'"),
    ],
)
def test_refused(folder: Path, words: list[str], message: str) -> None:
    (folder / "raw").write_bytes(bytes(1 << 20))
    said = ours(folder, "diff", *words)
    assert said.code == 1
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "words", [["diff"], ["space"], ["digest"], ["compact", "-n"], ["snapshot", "--export", "x", "-n"]]
)
def test_in_use(folder: Path, words: list[str]) -> None:
    """Refused; with -U there is an answer, and a warning."""
    operands = ["disk", "target"] if words[0] == "compact" else ["disk"]
    with qcowlib.open_image(folder / "disk", writable=True):
        refused = ours(folder, *words, *operands)
        assert refused.code in (1, 2)
        assert "lock" in refused.err
        told = ours(folder, *words, "-U", *operands)
    assert told.code == 0
    assert "warning: with --force-share the answer is wrong if somebody writes" in told.err
    assert told.out
