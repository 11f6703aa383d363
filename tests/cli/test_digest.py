"""qcow digest and qcow space: text, JSON, manifests, exit codes."""

import json
from pathlib import Path

import pytest

from tests.cli.side_by_side import ours
from tests.oracle import qemu_img, qemu_io

CLUSTER = 65536


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """disk: three clusters of data, snapshot one, then one cluster written anew."""
    disk = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    qemu_io(disk, f"write -P 1 0 {3 * CLUSTER}")
    qemu_img("snapshot", "-c", "one", disk)
    qemu_io(disk, f"write -P 2 {CLUSTER} {CLUSTER}")
    return tmp_path


def test_a_manifest_is_verified(folder: Path) -> None:
    said = ours(folder, "digest", "--output=json", "disk")
    assert (said.code, said.err) == (0, "")
    manifest = json.loads(said.out)
    assert manifest["version"] == 1
    assert [state["snapshot"] for state in manifest["states"]] == [None, {"id": "1", "name": "one"}]
    assert all(set(state["digests"]) == {"sha256", "xxh3-128"} for state in manifest["states"])
    (folder / "m").write_text(said.out)
    same = ours(folder, "digest", "--verify", "m", "disk")
    assert (same.code, same.out) == (0, "active layer is the same\nsnapshot 1 (one) is the same\n")
    qemu_io(folder / "disk", "write -P 9 0 1")
    changed = ours(folder, "digest", "--verify", "m", "disk")
    assert (changed.code, changed.out) == (1, "active layer DIFFERS\nsnapshot 1 (one) is the same\n")
    qemu_img("snapshot", "-d", "one", folder / "disk")
    gone = ours(folder, "digest", "--algorithm", "sha256", "--verify", "m", "disk")
    assert (gone.code, gone.out) == (1, "active layer DIFFERS\nsnapshot 1 (one) is not there\n")


def test_text_and_damage(folder: Path) -> None:
    said = ours(folder, "digest", "--algorithm", "sha256", "disk")
    lines = said.out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["active layer", "snapshot 1 (one)"]
    assert all(line.startswith("sha256    ") and len(line.split()[1]) == 64 for line in lines)
    data = bytearray((folder / "disk").read_bytes())
    l2 = int.from_bytes(data[0x30000:0x30008], "big") & 0x00FFFFFFFFFFFE00
    data[l2 + 6] |= 2  # the first cluster of the active layer: unaligned
    (folder / "disk").write_bytes(data)
    damaged = ours(folder, "digest", "--algorithm", "sha256", "disk")
    assert damaged.code == 1
    assert damaged.out == lines[1] + "\n"
    assert "active layer cannot be read: L2 table" in damaged.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithm", "md5", "disk"], "unknown digest 'md5'"),
        (["--verify", "disk", "disk"], "is no manifest of version 1"),
        (["--verify", "none", "disk"], "Could not read 'none'"),
        (["none"], "Could not open 'none'"),
    ],
)
def test_refused(folder: Path, words: list[str], message: str) -> None:
    said = ours(folder, "digest", *words)
    assert said.code == 2
    assert message in said.err
    assert said.out == ""


def test_space(folder: Path) -> None:
    said = ours(folder, "space", "disk")
    assert said.code == 0
    assert said.out.splitlines()[:3] == [
        "ID        TAG                    EXCLUSIVE      SHARED      TABLES     VMSTATE",
        "-         (active layer)           192 KiB     128 KiB     128 KiB         0 B",
        "1         one                      192 KiB     128 KiB     128 KiB         0 B",
    ]
    shape = json.loads(ours(folder, "space", "--output=json", "disk").out)
    assert shape["states"][1]["freed-by-delete"] == 3 * CLUSTER
    assert shape["leaked"] == 0
    (folder / "raw").write_bytes(bytes(CLUSTER))
    assert ours(folder, "space", "raw").code == 1
