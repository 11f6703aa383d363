"""info, check, map and snapshot -l: text, JSON and exit codes beside the stock tool, over images of many kinds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.images import BROKEN, ENCRYPTED, SECRET, make_broken, make_images
from tests.cli.side_by_side import assert_same, ours, process, stock
from tests.oracle import qemu_img, qemu_io

NAMES = [
    "plain", "v2", "small-clusters", "large-clusters", "wide-refcounts", "lazy", "subclusters", "zstd", "preallocated",
    "odd-size", "zero-size", "data-file", "data-file-raw", "snapshots", "overlay", "top", "on-raw", "sub/relative",
    "absolute", "missing", "json", "json-slice", "bitmaps", "luks", "aes128", "raw",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    assert sorted(make_images(path)) == sorted(NAMES)
    make_broken(path)
    return path


@pytest.mark.parametrize("output", [[], ["--output=human"], ["--output=json"], ["-U"]])
@pytest.mark.parametrize("name", NAMES)
def test_info(folder: Path, name: str, output: list[str]) -> None:
    assert assert_same(folder, "info", *output, name).code == 0


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("name", NAMES)
def test_info_of_a_chain(folder: Path, name: str, output: str) -> None:
    said = assert_same(folder, "info", "--backing-chain", f"--output={output}", name)
    assert said.code == (1 if name == "missing" else 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ENCRYPTED])
@pytest.mark.parametrize("output", ["human", "json"])
def test_map(folder: Path, name: str, output: str) -> None:
    assert_same(folder, "map", f"--output={output}", name)


@pytest.mark.parametrize(
    "limits",
    [
        ["-s", "64k"],
        ["--start-offset=100k", "--max-length=1000"],
        ["-l", "0"],
        ["-s", "1M", "-l", "1G"],
        ["-s", "1G"],
        ["-s", "65535", "-l", "2"],
    ],
)
@pytest.mark.parametrize("name", ["overlay", "raw", "subclusters"])
def test_map_of_a_part(folder: Path, name: str, limits: list[str]) -> None:
    for output in ("human", "json"):
        assert_same(folder, "map", f"--output={output}", *limits, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("missing", *ENCRYPTED)])
@pytest.mark.parametrize("output", ["human", "json"])
def test_check(folder: Path, name: str, output: str) -> None:
    said = assert_same(folder, "check", f"--output={output}", name)
    assert said.code == (63 if name == "raw" else 0)


def test_check_and_snapshots_need_the_top_file_alone(folder: Path) -> None:
    """Where the stock tool refuses because of a backing file that is missing, we need not open it."""
    assert ours(folder, "check", "missing").code == 0
    assert ours(folder, "snapshot", "-l", "missing") == (0, "", "")
    assert stock(folder, "check", "missing").code == 1


@pytest.mark.parametrize("name", ENCRYPTED)
@pytest.mark.parametrize("command", [["map"], ["map", "--output=json"], ["check"], ["check", "--output=json"]])
def test_encrypted(folder: Path, name: str, command: list[str]) -> None:
    image = f"driver=qcow2,encrypt.key-secret=s0,file.filename={name}"
    assert_same(folder, *command, *SECRET, "--image-opts", image)
    assert_same(folder, "map", name)


@pytest.mark.parametrize("arguments", [["-l"], ["-q", "-l"], ["-U", "-l"]])
def test_snapshot_list(folder: Path, arguments: list[str]) -> None:
    for name in ("snapshots", "plain", "raw"):
        assert assert_same(folder, "snapshot", *arguments, name).code == 0
        assert ours(folder, "snapshot", name) == ours(folder, "snapshot", *arguments, name)  # as newer qemu-img


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/New_York"])
def test_times_are_local(folder: Path, zone: str) -> None:
    got = process(folder, "snapshot", "-l", "snapshots", TZ=zone)
    expected = subprocess.run(
        ["qemu-img", "snapshot", "-l", "snapshots"],
        cwd=folder,
        capture_output=True,
        check=True,
        timeout=60,
        env=os.environ | {"TZ": zone},
    )
    assert got.stdout == expected.stdout


def test_snapshot_list_as_json(folder: Path) -> None:
    """The list that info shows as `snapshots`, in the same form."""
    said = ours(folder, "snapshot", "-l", "--output=json", "snapshots")
    info = json.loads(stock(folder, "info", "--output=json", "snapshots").out)
    assert json.loads(said.out) == info["snapshots"]
    assert [entry["name"] for entry in info["snapshots"]][1] == "two words"
    assert ours(folder, "snapshot", "-l", "--output=json", "plain").out == "[\n]\n"


@pytest.mark.parametrize("name", [*BROKEN, "not-there", ""])
@pytest.mark.parametrize("command", [["info"], ["info", "--output=json"], ["map"], ["check"], ["snapshot", "-l"]])
def test_what_is_no_image(folder: Path, name: str, command: list[str]) -> None:
    """Exit codes are equal; so are the texts, but where ours names structure, offset and rule."""
    got, expected = ours(folder, *command, name), stock(folder, *command, name)
    assert got.code == expected.code
    if name == "cut":
        assert got.err.startswith("qemu-img: Could not open 'cut': header")
        assert got.err.count("\n") == 1
    else:
        assert got == expected


IMAGE_OPTIONS = [
    "driver=qcow2,file.filename=plain",
    "driver=qcow2,file.driver=file,file.filename=plain",
    "file.filename=plain",
    "driver=raw,file.filename=plain",
    "driver=raw,file.driver=file,file.filename=raw,offset=65536",
    "driver=raw,file.driver=file,file.filename=raw,offset=65536,size=1024",
    "driver=qcow2,lazy-refcounts=on,file.filename=plain",
    "driver=qcow2,file.filename=nowhere",
    "plain",
    "filename=plain",
    "driver=qcow2,encrypt.key-secret=s0,file.filename=luks",
    "driver=qcow2,encrypt.key-secret=s1,file.filename=luks",
]


@pytest.mark.parametrize("options", IMAGE_OPTIONS)
@pytest.mark.parametrize("command", [["info"], ["info", "--output=json"], ["map", "--output=json"]])
def test_image_options(folder: Path, options: str, command: list[str]) -> None:
    assert_same(folder, *command, *SECRET, "--image-opts", options)


def test_image_options_exclude_a_format(folder: Path) -> None:
    assert_same(folder, "info", "-f", "qcow2", "--image-opts", "driver=qcow2,file.filename=plain")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain"}}',
        'json:{"driver":"qcow2","file.filename":"plain"}',
        'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"raw"}}',
        "file:plain",
    ],
)
def test_names_that_are_descriptions(folder: Path, name: str) -> None:
    assert_same(folder, "info", name)
    assert_same(folder, "info", "--output=json", name)
    assert_same(folder, "map", name)


def test_formats_by_option(folder: Path) -> None:
    assert_same(folder, "info", "-f", "raw", "plain")
    assert_same(folder, "info", "--format=qcow2", "plain")
    assert_same(folder, "info", "-f", "nonsense", "plain")
    assert_same(folder, "map", "-f", "raw", "--output=json", "plain")
    assert_same(folder, "check", "-f", "raw", "plain")


def test_damaged_images(folder: Path, tmp_path: Path) -> None:
    """Leaks, and a refcount that is too low: texts, JSON and the exit codes 3 and 2."""
    for name, offset, value in (("leak", 0x20000 + 2 * 60, 1), ("low", 0x20000 + 2 * 4, 0)):
        data = bytearray((folder / "plain").read_bytes())
        data[offset : offset + 2] = value.to_bytes(2, "big")
        data += bytes(max(0, 61 * 65536 - len(data)))
        (tmp_path / name).write_bytes(data)
        for output in ("human", "json"):
            assert_same(tmp_path, "check", f"--output={output}", name)
            assert_same(tmp_path, "check", "-q", f"--output={output}", name)
    assert ours(tmp_path, "check", "leak").code == 3
    assert ours(tmp_path, "check", "low").code == 2


def test_dirty_image(tmp_path: Path) -> None:
    """`cleanly shut down: no`."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "lazy", "1M", cwd=tmp_path)
    qemu_io(tmp_path / "lazy", "write 0 64k", "flush", "abort", check=False)
    said = assert_same(tmp_path, "info", "lazy")
    assert "cleanly shut down: no\n" in said.out
    assert_same(tmp_path, "info", "--output=json", "lazy")


def test_stale_bitmaps_are_told(folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "bitmaps").read_bytes())
    data[88:96] = bytes(8)
    (tmp_path / "stale").write_bytes(data)
    said = assert_same(tmp_path, "info", "stale")
    assert "considered inconsistent" in said.err


def test_chain_that_is_a_loop(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "a", "1M", cwd=tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b", cwd=tmp_path)
    qemu_img("rebase", "-u", "-b", "b", "-F", "qcow2", "a", cwd=tmp_path)
    assert assert_same(tmp_path, "info", "--backing-chain", "a").code == 1
