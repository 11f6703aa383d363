"""The feature grid, both ways: what we write the stock tools find clean and read back equal, and the reverse.

The rows cover every possible pair of values of two features. Each row runs a random program of writes, zeroes,
discards, compressed clusters and snapshots, once by us and once by the stock tools.
"""

import io
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib import LocalFiles, Qcow2Image, WritableQcow2Image, create_image, open_image
from tests.model import PASSPHRASE, DiskModel, StockView, assert_equal
from tests.oracle import qemu_img, qemu_io

MIB = 1 << 20

FEATURES: dict[str, tuple[Any, ...]] = {
    "compat": ("1.1", "0.10"),
    "cluster_size": (512, 4096, 65536, 2 * MIB),
    "refcount_bits": (1, 2, 4, 8, 16, 32, 64),
    "extended_l2": (False, True),
    "compression": (None, "zlib", "zstd"),
    "backing": (None, "raw", "raw shorter", "qcow2", "qcow2 longer"),
    "data": (None, "file", "raw"),
    "snapshots": (None, "same size", "other size", "vm state"),
    "encryption": (None, "luks", "aes"),
    "lazy_refcounts": (False, True),
    "bitmap": (False, True),
}
Row = dict[str, Any]


def possible(row: Row) -> bool:
    """Whether the format allows the combination, and the program fits into the refcount width."""
    only_version_3 = (
        row["extended_l2"] or row["compression"] == "zstd" or row["data"] or row["lazy_refcounts"] or row["bitmap"]
    )
    if row["compat"] == "0.10" and (only_version_3 or row["refcount_bits"] != 16 or row["snapshots"] == "other size"):
        return False
    if row["extended_l2"] and row["cluster_size"] < 16384:
        return False
    if row["data"] and (row["compression"] or row["snapshots"] or (row["data"] == "raw" and row["backing"])):
        return False
    if row["encryption"] and (row["compression"] or row["data"] == "raw"):  # a preallocated cluster would hold noise
        return False
    if row["bitmap"] and row["snapshots"] == "other size":
        return False
    return not row["snapshots"] or row["refcount_bits"] >= (16 if row["compression"] else 4)


def pairs(row: Row) -> set[tuple[Any, ...]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)}


def rows() -> list[Row]:
    """A set of possible rows that has every pair that any possible row has."""
    deal = random.Random(7)
    row = {name: values[0] for name, values in FEATURES.items()}
    pool: list[tuple[Row, set[tuple[Any, ...]]]] = []
    while len(pool) < 2000:  # a random walk over the possible rows: most of all combinations are not
        changed = row | {name: deal.choice(FEATURES[name]) for name in deal.sample(list(FEATURES), 2)}
        if possible(changed):
            row = changed
            pool.append((row, pairs(row)))
    missing = set[tuple[Any, ...]]().union(*(covered for _, covered in pool))
    chosen = []
    while missing:
        row, covered = max(deal.sample(pool, 100), key=lambda item: len(item[1] & missing))
        if covered & missing:
            chosen.append(row)
            missing -= covered
    return chosen


ROWS = rows()


def label(row: Row) -> str:
    return "-".join(str(value) for value in row.values() if value)


def disk_size(row: Row) -> int:
    return 9 * MIB + 512 if row["cluster_size"] == 2 * MIB else 2 * MIB + 512


def make_base(directory: Path, kind: str, size: int) -> bytes:
    """A backing file "base" by the stock tools; its guest bytes."""
    name, *variant = kind.split()
    length = {"shorter": size // 2 + 300, "longer": size + 70_000}.get(variant[0] if variant else "", size)
    data = bytearray(random.Random(length).randbytes(length))
    data[150_000:400_000] = bytes(250_000)
    raw = directory / ("base" if name == "raw" else "base.raw")
    raw.write_bytes(data)
    if name != "raw":
        qemu_img("convert", "-f", "raw", "-O", name, raw, directory / "base")
        length += -length % 512
    return bytes(data).ljust(length, b"\0")


def creation_options(row: Row, directory: Path) -> dict[str, Any]:
    options = {name: row[name] for name in ("compat", "cluster_size", "refcount_bits", "extended_l2", "lazy_refcounts")}
    options["compression_type"] = row["compression"] or "zlib"
    if row["data"]:
        options |= {"data_file": str(directory / "data"), "data_file_raw": row["data"] == "raw"}
    return options


class Program:
    """A random program by us on an image and on the model.

    Args:
        path: the image.
        row: its features.
        model: what it holds.
        seed: of the random choices.
    """

    def __init__(self, path: Path, row: Row, model: DiskModel, seed: str) -> None:
        self.path, self.row, self.model = path, row, model
        self.choose = random.Random(seed)
        self.image: WritableQcow2Image
        self.open()

    def open(self) -> None:
        passphrase = PASSPHRASE if self.row["encryption"] else None
        image = open_image(self.path, writable=True, policy=LocalFiles(), passphrase=passphrase)
        assert isinstance(image, WritableQcow2Image)
        self.image = image

    def change(self, steps: int) -> None:
        for _ in range(steps):
            kind = self.choose.choice(["write", "write", "write", "zero", "discard", "compress"])
            offset, length = self.place()
            if kind == "write":
                data = self.choose.randbytes(length)
                self.image.write(offset, data)
                self.model.write(offset, data)
            elif kind == "zero":
                self.image.write_zeroes(offset, length)
                self.model.write_zeroes(offset, length)
            elif kind == "discard":
                self.image.discard(offset, length)
                self.model.discard(offset, length)
            elif self.row["compression"]:
                self.compress(offset)

    def compress(self, offset: int) -> None:
        size = self.model.cluster_size
        start = offset - offset % size
        length = min(size, self.model.size - start)
        data = (self.choose.randbytes(40) * (length // 40 + 1))[:length]
        self.image.write_compressed(start, data)
        self.model.write(start, data)

    def place(self) -> tuple[int, int]:
        """A range: anywhere or aligned, from a byte to several clusters."""
        size = self.model.size
        offset = self.choose.randrange(size)
        if self.choose.random() < 0.5:
            offset -= offset % self.choose.choice([512, 2048, self.model.cluster_size])
        length = self.choose.choice([1, 512, 4096, 65536, 300_000, 2 * self.model.cluster_size])
        return offset, min(length, size - offset)

    def take_snapshot(self, name: str) -> None:
        state = random.Random(name).randbytes(150_000) if self.row["snapshots"] == "vm state" else None
        qcowlib.create_snapshot(self.image, name, vmstate=None if state is None else io.BytesIO(state))
        self.model.snapshots[name] = bytes(self.model.content)

    def resize(self, size: int) -> None:
        """By the stock tool, between two of our sessions."""
        self.image.close()
        options = StockView(self.path, self.row["encryption"]).selector
        qemu_img("resize", "--shrink", *options, str(size))
        self.model.content[size:] = bytes(max(0, size - self.model.size))
        self.open()

    def grow_and_shrink(self) -> None:
        """By us, and back to the old size; what lay behind it is zero when it comes again."""
        size, mode = self.model.size, self.choose.choice(["off", "metadata", "falloc", "full"])
        if self.row["compat"] == "0.10" and self.row["backing"]:
            return  # zeroes that hide a longer backing file cannot be said
        for new, reserve in ((size + MIB // 2 + 512, mode), (size - 70_144, "off"), (size, "off")):
            qcowlib.resize(self.image, new, shrink=True, preallocation=reserve)
            self.model.content[new:] = bytes(max(0, new - self.model.size))
            self.change(3)

    def run(self) -> None:
        self.change(8)
        self.grow_and_shrink()
        self.change(7)
        if self.row["snapshots"]:
            self.take_snapshot("one")
            self.change(6)
            if self.row["snapshots"] == "other size":
                self.resize(self.model.size + MIB)
                self.change(6)
            self.take_snapshot("two")
            self.change(6)
            if not self.row["bitmap"]:  # a bitmap says what was written, and would not for what is applied
                qcowlib.apply_snapshot(self.image, "one")
                self.model.content[:] = self.model.snapshots["one"]
            self.change(6)
            self.take_snapshot("three")
            qcowlib.delete_snapshot(self.image, "one")
            del self.model.snapshots["one"]
        self.image.flush()
        self.change(8)
        self.assert_holds()
        self.image.close()

    def assert_holds(self) -> None:
        """As we read it ourselves."""
        assert_equal(self.image.read(0, self.image.size), self.model.content, "active layer")
        for name, expected in self.model.snapshots.items():
            snapshot = self.image.open_snapshot(name)
            assert_equal(snapshot.read(0, snapshot.size), expected, name)
            if self.row["snapshots"] == "vm state":
                state = random.Random(name).randbytes(150_000)
                assert snapshot.vmstate.read(0, snapshot.vmstate.size) == state


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_what_we_write(row: Row, tmp_path: Path) -> None:
    path, size = tmp_path / "disk.qcow2", disk_size(row)
    content = bytearray(size)
    options: dict[str, Any] = creation_options(row, tmp_path)
    if row["backing"]:
        base = make_base(tmp_path, row["backing"], size)[:size]
        content[: len(base)] = base
        options |= {"backing_file": "base", "backing_fmt": row["backing"].split()[0]}
    if row["encryption"]:
        options |= {"encrypt_format": row["encryption"], "encrypt_passphrase": PASSPHRASE}
    if row["encryption"] == "luks":
        options["encrypt_iter_time_ms"] = 0
    create_image(path, size, **options)
    stock = StockView(path, row["encryption"])
    if row["bitmap"]:
        add_bitmap(stock)
    can_discard = row["compat"] != "0.10" or not row["backing"]
    program = Program(path, row, DiskModel(content, row["cluster_size"], can_discard), seed=label(row))
    program.run()
    stock.assert_clean()
    assert_clean_by_us(path)
    assert_equal(stock.content(), program.model.content, "active layer")
    for entry in entries(path):
        assert_equal(content_of_snapshot(stock, entry.id), program.model.snapshots[entry.name], entry.name)
    if row["data"] == "raw":
        assert_equal((tmp_path / "data").read_bytes()[:size], program.model.content, "raw data file")


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_what_the_stock_tools_write(row: Row, tmp_path: Path) -> None:
    path, size = tmp_path / "disk.qcow2", disk_size(row)
    stock = StockView(path, row["encryption"])
    stock_create(stock, row, size, tmp_path)
    choose = random.Random(label(row))
    stock_change(stock, size, choose)
    if row["snapshots"]:
        snapshot_command(stock, "-c", "one")
        if row["snapshots"] == "other size":
            size += MIB
            qemu_img("resize", *stock.selector, str(size))
        stock_change(stock, size, choose)
        snapshot_command(stock, "-c", "two")
        stock_change(stock, size, choose)
    expected = stock.content()
    saved = {entry.name: content_of_snapshot(stock, entry.id) for entry in entries(path)}
    assert_clean_by_us(path)
    passphrase = PASSPHRASE if row["encryption"] else None
    with open_image(path, policy=LocalFiles(), passphrase=passphrase) as image:
        assert isinstance(image, Qcow2Image)
        assert_equal(image.read(0, image.size), expected, "active layer")
        for name, content in saved.items():
            snapshot = image.open_snapshot(name)
            assert_equal(snapshot.read(0, snapshot.size), content, name)
    # The stock tool's image is worked on here, and comes back in order.
    can_discard = row["compat"] != "0.10" or not row["backing"]
    model = DiskModel(bytearray(expected), row["cluster_size"], can_discard, saved)
    program = Program(path, row | {"snapshots": None}, model, seed=label(row))
    program.change(10)
    if row["snapshots"]:
        qcowlib.delete_snapshot(program.image, "one")
        del saved["one"]
        program.change(5)
    program.assert_holds()
    program.image.close()
    stock.assert_clean()
    assert_equal(stock.content(), model.content, "active layer")
    for entry in entries(path):
        assert_equal(content_of_snapshot(stock, entry.id), saved[entry.name], entry.name)


def test_the_rows_cover_every_pair() -> None:
    assert 40 < len(ROWS) < 120
    assert all(map(possible, ROWS))
    covered = set[tuple[Any, ...]]().union(*map(pairs, ROWS))
    every = sum(len(a) * len(b) for a, b in itertools.combinations(FEATURES.values(), 2))
    assert len(covered) > 0.8 * every  # the rest is impossible


def add_bitmap(stock: StockView) -> None:
    *options, name = stock.selector
    qemu_img("bitmap", "--add", "--disable", *options, name, "marks")


def assert_clean_by_us(path: Path) -> None:
    with open_image(path, open_backing=False) as image:
        assert isinstance(image, Qcow2Image)
        assert qcowlib.check(image).findings == []


def entries(path: Path) -> list[Any]:
    with open_image(path, open_backing=False) as image:
        return list(image.snapshots)


def content_of_snapshot(stock: StockView, snapshot_id: str) -> bytes:
    """Guest bytes of a snapshot with its own size: what a copy of the image holds after it was applied."""
    copy = StockView(stock.path.with_suffix(".copy"), stock.encryption)
    shutil.copyfile(stock.path, copy.path)
    qemu_img("bitmap", "--remove", *copy.selector, "marks", check=False)  # else it cannot be applied
    snapshot_command(copy, "-a", snapshot_id)
    data = copy.content()
    copy.path.unlink()
    return data


def snapshot_command(stock: StockView, option: str, name: str) -> None:
    *options, path = stock.selector
    options = [word for word in options if word not in ("-f", "qcow2")]  # `qemu-img snapshot` has no -f
    qemu_img("snapshot", *options, option, name, path)


def stock_create(stock: StockView, row: Row, size: int, directory: Path) -> None:
    options = creation_options(row, directory)
    backing = row["backing"].split()[0] if row["backing"] else None
    if backing:
        make_base(directory, row["backing"], size)
    if row["encryption"] == "luks":
        # The stock tool measures for seconds how fast the machine is; test_luks.py has images that it made itself.
        options |= {"encrypt_format": "luks", "encrypt_passphrase": PASSPHRASE, "encrypt_iter_time_ms": 0}
        create_image(stock.path, size, backing_file="base" if backing else None, backing_fmt=backing, **options)
    else:
        texts = [f"{k}={v if not isinstance(v, bool) else 'on' if v else 'off'}" for k, v in options.items()]
        arguments = ["-b", "base", "-F", backing] if backing else []
        if row["encryption"]:
            arguments += ["--object", f"secret,id=key,data={PASSPHRASE}"]
            texts += ["encrypt.format=aes", "encrypt.key-secret=key"]
        qemu_img("create", "-q", "-f", "qcow2", *arguments, "-o", ",".join(texts), stock.path, str(size))
    if row["bitmap"]:
        add_bitmap(stock)
    if row["compression"]:
        # First of all: QEMU compresses only where nothing is allocated.
        run_stock(stock, [f"write -q -c -P {7 + n} {n * row['cluster_size']} {row['cluster_size']}" for n in (0, 1, 3)])


def run_stock(stock: StockView, commands: list[str]) -> None:
    *options, name = stock.selector
    if stock.encryption:
        qemu_io(name, *commands, format=None, options=options)
    else:
        qemu_io(name, *commands)


def stock_change(stock: StockView, size: int, choose: random.Random) -> None:
    """Random writes, zeroes and discards by qemu-io, some of them at the start, where compressed clusters may be."""
    commands = []
    for number in range(12):
        span = size if number % 3 else size // 8
        offset = choose.randrange(span // 512) * 512
        length = min(choose.choice([512, 4096, 65536, 300_032]), size - offset)
        kind = choose.choice(["write", "write", "zero", "unmap", "discard"])
        if kind == "zero":
            commands.append(f"write -q -z {offset} {length}")
        elif kind == "unmap":
            commands.append(f"write -q -z -u {offset} {length}")
        elif kind == "discard":
            commands.append(f"discard -q {offset} {length}")
        else:
            commands.append(f"write -q -P {choose.randrange(1, 256)} {offset} {length}")
    run_stock(stock, commands)
