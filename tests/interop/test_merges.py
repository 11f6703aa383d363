"""commit and rebase over the feature grid, both ways: one side makes the chain, the other merges, both judge.

made by the stock tools -> merged by us               -> stock check clean, content as before
made by us              -> merged by the stock tool   -> our check clean, content as before
"""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib import LocalFiles, Qcow2Image, WritableQcow2Image, create_image, open_image
from tests.model import assert_equal
from tests.oracle import assert_clean, content, image_info, qemu_img, qemu_io

KIB = 1 << 10
SIZE = 1536 * KIB + 512

# Of one image; the chain has two of them.
FEATURES: dict[str, tuple[Any, ...]] = {
    "compat": ("1.1", "0.10"),
    "cluster_size": (512, 4096, 65536, 1 << 20),
    "refcount_bits": (16, 1, 64),
    "extended_l2": (False, True),
    "data": (False, True),
    "packed": (False, True),
    "snapshot": (False, True),
    "bitmap": (False, True),
    "size": (SIZE, SIZE - 400_896, SIZE + 300 * KIB),
}
Row = dict[str, Any]


def possible(row: Row) -> bool:
    only_version_3 = row["extended_l2"] or row["data"] or row["bitmap"] or row["refcount_bits"] != 16
    if row["compat"] == "0.10" and (only_version_3 or row["snapshot"]):
        return False
    if row["extended_l2"] and row["cluster_size"] < 16384:
        return False
    if row["data"] and (row["packed"] or row["snapshot"]):
        return False
    return row["refcount_bits"] > 1 or not (row["snapshot"] or row["packed"])


def rows(seed: int) -> list[Row]:
    """Possible rows in which each value occurs, and most pairs of values do."""
    deal = random.Random(seed)
    pool = [
        row for _ in range(600) if possible(row := {name: deal.choice(values) for name, values in FEATURES.items()})
    ]
    missing = {pair for row in pool for pair in pairs(row)}
    chosen = []
    while len(chosen) < 8:
        row = max(pool, key=lambda one: len(pairs(one) & missing))
        missing -= pairs(row)
        chosen.append(row)
    return chosen


def pairs(row: Row) -> set[tuple[Any, ...]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)}


CHAINS = list(zip(rows(1), rows(2), strict=True))


def label(chain: tuple[Row, Row]) -> str:
    return "_on_".join("-".join(str(value) for value in row.values() if value) for row in reversed(chain))


class Chain:
    """base <- overlay, and another image that may take the base's place.

    Args:
        directory: where they are.
        chain: features of the base and of the overlay.
        stock: whether the stock tools make them.
    """

    def __init__(self, directory: Path, chain: tuple[Row, Row], *, stock: bool) -> None:
        self.directory, self.stock = directory, stock
        self.choose = random.Random(label(chain))
        below, above = chain
        self.base = self.make("base", below, None)
        self.other = self.make("other", below | {"size": SIZE, "bitmap": False}, None)
        self.overlay = self.make("overlay", above, "base")

    def make(self, name: str, row: Row, backing: str | None) -> Path:
        path = self.directory / name
        options = {key: row[key] for key in ("compat", "cluster_size", "refcount_bits", "extended_l2")}
        if row["data"]:
            options["data_file"] = str(self.directory / f"{name}.data")
        if self.stock:
            texts = [f"{k}={v if not isinstance(v, bool) else 'on' if v else 'off'}" for k, v in options.items()]
            link = ["-b", backing, "-F", "qcow2"] if backing else []
            words = ["create", "-q", "-f", "qcow2", *link, "-o", ",".join(texts), name, str(row["size"])]
            qemu_img(*words, cwd=self.directory)
        else:
            create_image(path, row["size"], backing_file=backing, backing_fmt="qcow2" if backing else None, **options)
        if row["packed"]:
            self.pack(path, row)
        self.change(path, row["size"])
        if row["snapshot"]:
            self.snapshot(path)
            self.change(path, row["size"])
        if row["bitmap"]:
            if self.stock:
                qemu_img("bitmap", "--add", "-f", "qcow2", path, "marks")
            else:
                with writable(path, open_backing=False) as image:
                    qcowlib.add_bitmap(image, "marks")
            self.change(path, row["size"])
        return path

    def change(self, path: Path, size: int) -> None:
        """Some data, some zeroes, some of it given back."""
        places = [(self.choose.randrange(size - 200 * KIB), self.choose.randrange(1, 150 * KIB)) for _ in range(4)]
        if self.stock:
            commands = [f"write -q -P {n + 1} {at} {length}" for n, (at, length) in enumerate(places[:2])]
            commands += [f"write -q -z -u {places[2][0]} {places[2][1]}", f"discard -q {places[3][0]} {places[3][1]}"]
            qemu_io(path, *commands)
            return
        with writable(path) as image:
            for at, length in places[:2]:
                image.write(at, self.choose.randbytes(length))
            image.write_zeroes(*places[2])
            image.discard(*places[3])

    def pack(self, path: Path, row: Row) -> None:
        unit = row["cluster_size"]
        clusters = self.choose.sample(range(row["size"] // unit), min(3, row["size"] // unit))
        if self.stock:
            qemu_io(path, *(f"write -q -c -P {n % 250 + 1} {n * unit} {unit}" for n in clusters))
            return
        with writable(path) as image:
            for cluster in clusters:
                image.write_compressed(cluster * unit, bytes([cluster % 250 + 1]) * unit)

    def snapshot(self, path: Path) -> None:
        if self.stock:
            qemu_img("snapshot", "-c", "kept", path)
            return
        with writable(path, open_backing=False) as image:
            qcowlib.create_snapshot(image, "kept")

    def content(self) -> bytes:
        """What the overlay shows, by the side that did not merge."""
        return read(self.overlay) if self.stock else content(self.overlay, self.directory)


def writable(path: Path, *, open_backing: bool = True) -> WritableQcow2Image:
    image = open_image(path, writable=True, policy=LocalFiles(), open_backing=open_backing)
    assert isinstance(image, WritableQcow2Image)
    return image


def read(path: Path) -> bytes:
    with open_image(path, format="qcow2", policy=LocalFiles()) as image:
        return image.read(0, image.size)


def assert_sound(path: Path) -> None:
    """By both sides."""
    assert_clean(path)
    with open_image(path, format="qcow2", open_backing=False) as image:
        assert isinstance(image, Qcow2Image)
        assert qcowlib.check(image).findings == []


def commit(chain: Chain) -> None:
    if not chain.stock:
        qemu_img("commit", "-q", "-f", "qcow2", chain.overlay)
        return
    with writable(chain.overlay) as overlay:
        overlay.leave_out_backing()
        with writable(chain.base) as base:
            qcowlib.commit(overlay, base)
        qcowlib.make_empty(overlay)


def rebase(chain: Chain, below: Path | None) -> None:
    if not chain.stock:
        words = ["-b", below.name, "-F", "qcow2"] if below else ["-b", ""]
        qemu_img("rebase", "-q", "-f", "qcow2", *words, chain.overlay)
        return
    if changes_snapshot(chain, below):
        # Stock changes what the snapshot reads; here nothing happens before it is deleted.
        before = chain.overlay.read_bytes()
        with pytest.raises(qcowlib.OptionError, match="internal snapshot 'kept' would read other bytes"):
            rebase_ours(chain, below)
        assert chain.overlay.read_bytes() == before
        with writable(chain.overlay, open_backing=False) as overlay:
            qcowlib.delete_snapshot(overlay, "kept")
    rebase_ours(chain, below)


def rebase_ours(chain: Chain, below: Path | None) -> None:
    with writable(chain.overlay) as overlay:
        if below is None:
            qcowlib.rebase(overlay, None)
        else:
            with open_image(below, format="qcow2", policy=LocalFiles()) as new:
                qcowlib.rebase(overlay, below.name, "qcow2", new=new)


def changes_snapshot(chain: Chain, below: Path | None) -> bool:
    """Whether the snapshot in the overlay would read other bytes, as qemu-img shows it on a copy."""
    if not any(one["name"] == "kept" for one in image_info(chain.overlay).get("snapshots", ())):
        return False
    copy = chain.directory / "renamed.qcow2"
    shutil.copy(chain.overlay, copy)
    words = ["-b", below.name, "-F", "qcow2"] if below else ["-b", ""]
    qemu_img("rebase", "-u", "-f", "qcow2", *words, copy)
    one, other = (content(path, chain.directory, snapshot="kept") for path in (chain.overlay, copy))
    copy.unlink()
    return one != other


@pytest.mark.parametrize("stock", [True, False], ids=["ours merges", "stock merges"])
@pytest.mark.parametrize("features", CHAINS, ids=label)
def test_merges(features: tuple[Row, Row], stock: bool, tmp_path: Path) -> None:
    chain = Chain(tmp_path, features, stock=stock)
    expected = chain.content()
    for below in (chain.other, None, chain.base):
        rebase(chain, below)
        assert_equal(read(chain.overlay), expected, f"after a rebase to {below}")
        assert_equal(content(chain.overlay, tmp_path), expected, f"after a rebase to {below}")
        assert_sound(chain.overlay)
    commit(chain)
    for side in (read(chain.overlay), content(chain.overlay, tmp_path)):
        assert_equal(side, expected, "overlay after a commit")
    for side in (read(chain.base), content(chain.base, tmp_path)):
        assert_equal(side[: len(expected)], expected, "base after a commit")
    assert_sound(chain.base)
    assert_sound(chain.overlay)
    with open_image(chain.overlay, format="qcow2", open_backing=False) as overlay:
        assert isinstance(overlay, Qcow2Image)
        assert qcowlib.allocated_bytes(overlay) == 0


def test_the_rows_cover_every_value() -> None:
    for row_list in (rows(1), rows(2)):
        assert all(map(possible, row_list))
        for name, values in FEATURES.items():
            assert {row[name] for row in row_list} == set(values)
