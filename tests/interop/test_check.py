"""Check beside stock qemu-img: the same numbers, the same lines in the same order, on sound and on damaged images."""

import json
import os
import random
import shutil
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcowlib.errors import QcowError
from qcowlib.findings import CheckReport
from qcowlib.format.header import parse_header
from qcowlib.metadata.finding_list import DEFAULT_LIMIT
from qcowlib.metadata.state import Qcow2State
from qcowlib.operations.check import check_state
from qcowlib.storage.local import open_local
from tests.oracle import qemu_img, qemu_io

NO_CHECK = 63
#: What qemu-img does not look for: overlaps, and bit 0 of an L2 entry where it is reserved.
STRICTER = {"bad-zero-v2": "a zero cluster in a version 2 image, which cannot be read"}


def checked(path: Path) -> CheckReport:
    """Our report; the header is parsed as leniently as `qemu-img check` does it."""
    storage = open_local(path, force_share=True)
    try:
        header = parse_header(storage.pread(2 << 20, 0), storage.size(), for_check=True)
        return check_state(Qcow2State(storage, header))
    finally:
        storage.close()


def numbers(report: CheckReport) -> dict[str, int]:
    """The members of qemu-img's JSON, which leaves out what is 0."""
    members = {
        "image-end-offset": report.image_end_offset,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
    }
    return {name: value for name, value in members.items() if value} | {"check-errors": report.check_errors}


def exit_code(report: CheckReport) -> int:
    if report.stopped is not None or report.check_errors:
        return 1
    return 2 if report.corruptions else 3 if report.leaks else 0


def lines(report: CheckReport) -> list[str]:
    """The lines that qemu-img prints as well."""
    return [line for finding in report.findings if finding.code != "overlap" for line in finding.text.split("\n")]


@dataclass
class Stock:
    """What qemu-img said."""

    code: int
    members: dict[str, Any] | None
    lines: list[str]
    error: str


def stock(path: Path) -> Stock:
    done = qemu_img("check", "-f", "qcow2", "--output=json", path, check=False)
    members = json.loads(done.stdout) if done.stdout.strip() else None
    said = [line for line in done.stderr.split("\n") if line and not line.startswith("qemu-img:")]
    return Stock(done.returncode, members, said, done.stderr.strip().rsplit("\n", 1)[-1])


def without_names(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in ("filename", "format")}


def test_the_whole_corpus(corpus: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)
    compared = stricter = 0
    for image in manifest["images"]:
        answer = image["answers"].get("check")
        if answer is None or answer["rc"] == NO_CHECK:
            continue
        with open(image["file"], "rb") as file:
            if file.read(4) != b"QFI\xfb":
                continue
        try:
            report = checked(Path(image["file"]))
        except QcowError:
            assert answer["rc"] == 1, image["id"]
            compared += 1
            continue
        if answer.get("json") is None:
            # qemu-img could not open a backing or data file, which a check does not need, or it stopped as we do.
            refused = any("Could not open" in line for line in answer.get("stderr", []))
            assert refused or report.stopped is not None, image["id"]
            compared += 1
            continue
        expected = without_names(answer["json"])
        if image["id"] in STRICTER:
            stricter += 1
            extra = [finding for finding in report.findings if finding.text not in answer.get("stderr", [])]
            assert [finding.code for finding in extra] == ["l2-entry-reserved-bits"]
            report.findings = [finding for finding in report.findings if finding not in extra]
        assert numbers(report) == expected, image["id"]
        assert exit_code(report) == answer["rc"], image["id"]
        compared += 1
    assert compared > 230
    assert stricter == 1


BASES = {
    "plain": ("cluster_size=65536", "4M"),
    "4k": ("cluster_size=4096", "4M"),
    "512": ("cluster_size=512", "4M"),
    "1-bit": ("cluster_size=4096,refcount_bits=1", "4M"),
    "2-bit": ("cluster_size=4096,refcount_bits=2", "4M"),
    "64-bit": ("cluster_size=4096,refcount_bits=64", "4M"),
    "zstd": ("cluster_size=4096,refcount_bits=8,compression_type=zstd", "4M"),
    "extended": ("cluster_size=16384,extended_l2=on", "4M"),
    "version 2": ("cluster_size=65536,compat=0.10", "4M"),
    "2M": ("cluster_size=2097152", "64M"),
    "preallocated": ("cluster_size=512,refcount_bits=32,preallocation=metadata", "1M"),
    "bitmap": ("cluster_size=4096", "4M"),
    "data file": ("cluster_size=4096", "4M"),
}


def base_image(directory: Path, name: str) -> Path:
    """A sound image of a kind, with snapshots, zero and compressed clusters and a bitmap where they can be."""
    path = directory / "base.qcow2"
    options, size = BASES[name]
    if name == "data file":
        options += f",data_file={directory / 'base.data'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    snapshots = name not in ("1-bit", "data file")
    compressed = name not in ("1-bit", "2-bit", "data file", "preallocated")
    qemu_io(path, "write -P 1 0 300k", "write -P 2 800k 100k")
    if name != "version 2":
        qemu_io(path, "write -z 500k 128k")
    if snapshots:
        qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 3 64k 200k", "write -P 4 900k 5k")
    if compressed:
        last = 62 << 20 if size == "64M" else 3584 << 10
        qemu_io(path, f"write -c -P 5 {last} {2 << 20 if size == '64M' else 64 << 10}")
    if snapshots:
        qemu_img("snapshot", "-c", "two", path)
    qemu_io(path, "write -P 7 100k 64k")
    if name == "bitmap":
        qemu_img("bitmap", "--add", "--enable", path, "bitmap")
        qemu_io(path, "write -P 9 1M 200k")
    return path


def mutate(path: Path, choose: random.Random) -> list[str]:
    """Damage one to six pieces of metadata; returns what was done."""
    data = bytearray(path.read_bytes())
    size = len(data)
    bits, l1_size, l1 = struct.unpack(">I", data[20:24])[0], *struct.unpack(">IQ", data[36:48])
    table, snapshots, snapshot_table = struct.unpack(">Q", data[48:56])[0], *struct.unpack(">IQ", data[60:72])
    cluster = 1 << bits

    def word(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 8], "big")

    l2_tables = [word(l1 + 8 * index) & 0x00FF_FFFF_FFFF_FE00 for index in range(l1_size)]
    l2_tables = [host for host in l2_tables if host]
    block = word(table)
    done = []
    for _ in range(choose.choice((1, 1, 1, 2, 3, 6))):
        kind = choose.choice(("l1", "l2", "l2", "l2", "l2", "table", "block", "block", "snapshot", "length"))
        if kind == "block":
            offset = block + choose.randrange(min(cluster, max(1, size // cluster * 2)))
            data[offset : offset + 1] = bytes([choose.choice((0, 1, 2, 3, 255, choose.randrange(256)))])
        elif kind == "snapshot":
            if not snapshots:
                continue
            offset = snapshot_table + choose.randrange(120)
            data[offset : offset + 1] = bytes([choose.choice((0, 1, 255, choose.randrange(256)))])
        elif kind == "length":
            offset = choose.randrange(cluster, size + 5 * cluster)
            if choose.random() < 0.6:
                continue
            data = (data + bytes(5 * cluster))[:offset]
        else:
            if kind == "l1":
                offset = l1 + 8 * choose.randrange(min(l1_size, 8))
            elif kind == "table":
                offset = table + 8 * choose.choice((0, 0, 1, 2))
            else:
                host = choose.choice(l2_tables)
                used = [place for place in range(host, host + cluster, 8) if word(place)]
                offset = choose.choice(used) if used and choose.random() < 0.8 else host + 8 * choose.randrange(8)
            old = word(offset)
            new = choose.choice(
                (
                    old ^ 1 << choose.randrange(64),
                    choose.randrange(size // cluster + 3) * cluster,
                    choose.randrange(size // cluster + 3) * cluster | 1 << 63,
                    old + cluster,
                    old ^ 1 << 63,
                    choose.getrandbits(64),
                    old | 1,
                    0,
                    old + 512 * choose.randrange(1, 64),
                )
            )
            if offset + 8 <= len(data):
                data[offset : offset + 8] = (new & (1 << 64) - 1).to_bytes(8, "big")
        done.append(f"{kind} at {offset:#x}")
    path.write_bytes(data)
    return done


def compare(path: Path) -> str:
    """Check one image both ways; fails where they differ in anything but what we alone look for."""
    theirs = stock(path)
    try:
        ours = checked(path)
    except QcowError:
        assert theirs.members is None
        return "refused"
    if theirs.members is None:
        if "Could not open" in theirs.error:
            return "refused by qemu-img"
        assert ours.stopped is not None, theirs.error
        return "stopped"
    assert ours.stopped is None
    if len(ours.findings) > DEFAULT_LIMIT:  # the rest is only counted
        assert ours.corruptions >= theirs.members["corruptions"]
        return "damaged"
    said = lines(ours)
    # Bit 0 of an entry is reserved in version 2 and with subclusters; qemu-img does not look at it.
    more = Counter(said) - Counter(theirs.lines)
    allowed = Counter(
        {
            text: count
            for text, count in more.items()
            if text.startswith("ERROR found l2 entry") and int(text.rsplit(" ", 1)[1], 16) & 1
        }
    )
    assert more == allowed
    stricter = sum(finding.count for finding in ours.findings if finding.code == "overlap") + sum(allowed.values())
    left = Counter(allowed)
    kept = []
    for text in said:
        if left[text]:
            left[text] -= 1
        else:
            kept.append(text)
    if any(finding.code == "refcount-overflow" for finding in ours.findings):
        kept, theirs.lines = sorted(kept), sorted(theirs.lines)  # told at the end of the counting, not in its middle
    assert kept == theirs.lines
    expected = without_names(theirs.members)
    found = numbers(ours)
    found["corruptions"] = found.get("corruptions", 0) - stricter
    assert found == {"corruptions": 0} | expected
    assert stricter or exit_code(ours) == theirs.code
    return "damaged" if theirs.code else "sound"


@pytest.mark.parametrize("name", BASES)
def test_damaged_images_are_judged_as_by_qemu_img(tmp_path: Path, name: str) -> None:
    base = base_image(tmp_path, name)
    assert compare(base) == "sound"
    path = tmp_path / "damaged.qcow2"
    seeds = int(os.environ.get("QCOWLIB_CHECK_SEEDS", "12"))
    outcomes: Counter[str] = Counter()
    for seed in range(seeds):
        shutil.copyfile(base, path)
        done = mutate(path, random.Random(f"{name} {seed}"))
        try:
            outcomes[compare(path)] += 1
        except AssertionError as error:
            raise AssertionError(f"{name}, seed {seed}: {done}") from error
    assert outcomes["damaged"] > seeds // 3, outcomes


def test_a_sound_image_of_every_kind_has_no_findings(tmp_path: Path) -> None:
    for name in BASES:
        directory = tmp_path / name
        directory.mkdir()
        assert checked(base_image(directory, name)).findings == []


def test_leaked_clusters_of_an_old_bitmap(tmp_path: Path) -> None:
    path = base_image(tmp_path, "bitmap")
    with open(path, "r+b") as file:
        file.seek(95)
        file.write(b"\0")  # the autoclear bit: bitmaps are no longer valid, their clusters are lost
    report = checked(path)
    theirs = stock(path)
    assert theirs.members is not None
    assert report.leaks == theirs.members["leaks"] > 2
    assert exit_code(report) == theirs.code == 3
    assert {finding.code for finding in report.findings} == {"leak"}
    assert all(finding.repairable for finding in report.findings)
