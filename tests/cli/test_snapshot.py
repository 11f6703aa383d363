"""snapshot -c, -a, -d: the same programs on the stock tool and on ours, texts and states compared."""

from __future__ import annotations

import pytest

from tests import oracle
from tests.cli.side_by_side import Pair, ours, pair, stock

__all__ = ["pair"]


def states(pair: Pair) -> list[dict[str, str]]:
    """For both images: names of the snapshots with the content of each, and of the active layer."""
    found = []
    for directory in (pair.theirs, pair.ours):
        info = oracle.image_info(directory / "image")
        entries = {
            f"{entry['id']} {entry['name']}": oracle.content(
                directory / "image", directory, snapshot=f"snapshot.id={entry['id']}"
            ).hex()
            for entry in info.get("snapshots", [])
        }
        found.append(entries | {"active": oracle.content(directory / "image", directory).hex()})
    return found


@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10,cluster_size=4k", "extended_l2=on", "lazy_refcounts=on"]
)
def test_programs(pair: Pair, options: str) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "-o", options, "image", "1M")
    for step, (action, name) in enumerate(
        [
            ("-c", "one"),
            ("-c", "two"),
            ("-c", "one"),
            ("-a", "two"),
            ("-c", "2"),
            ("-a", "2"),
            ("-d", "one"),
            ("-d", "3"),
            ("-a", "one"),
            ("-d", "one"),
            ("-d", "one"),
            ("-c", "äöü"),
            ("-a", "nothing"),
            ("-c", ""),
            ("-d", ""),
        ]
    ):
        for directory in (pair.theirs, pair.ours):
            oracle.qemu_io(directory / "image", f"write -P {step + 1} {step * 30}k 50k", f"discard {step * 13}k 64k")
        pair.same("snapshot", action, name, "image")
        theirs, mine = states(pair)
        assert mine == theirs
    oracle.assert_clean(pair.ours / "image")


@pytest.mark.parametrize("words", [["-a", "x"], ["-d", "x"], ["-c", "x", "-U"], ["-q", "-d", "x"]])
def test_refused(pair: Pair, words: list[str]) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "image", "1M")
    assert pair.same("snapshot", *words, "image").code == 1


def test_one_bit_refcounts(pair: Pair) -> None:
    """No second reference fits: nothing is changed. An empty image has nothing to refer to."""
    pair.prepare("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", "image", "1M")
    assert pair.same("snapshot", "-c", "empty", "image").code == 0
    for directory in (pair.theirs, pair.ours):
        oracle.qemu_io(directory / "image", "write -P 1 0 64k")
    before = (pair.ours / "image").read_bytes()
    got = ours(pair.ours, "snapshot", "-c", "x", "image")
    assert stock(pair.theirs, "snapshot", "-c", "x", "image").code == got.code == 1
    assert got.err.startswith("qemu-img: Could not create snapshot 'x': ")
    assert got.err.count("\n") == 1
    assert (pair.ours / "image").read_bytes() == before


def test_json_is_for_lists_only(pair: Pair) -> None:
    pair.prepare("create", "-q", "-f", "qcow2", "image", "1M")
    assert ours(pair.ours, "snapshot", "-c", "x", "--output=json", "image").code == 1
    assert ours(pair.ours, "snapshot", "-l", "image").out == ""


def test_an_image_in_use_is_left_alone(pair: Pair) -> None:
    """A writer holds the image: both refuse with the same words."""
    import subprocess

    pair.prepare("create", "-q", "-f", "qcow2", "image", "1M")
    for directory, run in ((pair.theirs, stock), (pair.ours, ours)):
        with subprocess.Popen(
            ["qemu-io", "-f", "qcow2", "image"],
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
            said = run(directory, "snapshot", "-c", "x", "image")
            listed = run(directory, "snapshot", "-l", "image")
            shared = run(directory, "snapshot", "-U", "-l", "image")
            holder.stdin.close()
            holder.wait(timeout=30)
        assert said == (
            1,
            "",
            "qemu-img: Could not open 'image': Failed to get \"write\" lock\n"
            "Is another process using the image [image]?\n",
        )
        assert listed.code == 1
        assert listed.err.startswith("qemu-img: Could not open 'image': Failed to get shared \"write\" lock\n")
        assert shared == (0, "", "")
