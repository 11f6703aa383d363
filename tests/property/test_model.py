"""Random programs on an image and on a bytearray: they agree after every step, and stock QEMU agrees at the end.

A program is a geometry and a list of writes, zeroes, discards, compressed clusters, snapshots taken, applied and
deleted, bitmaps added, changed and removed, flushes and reopenings. At its end `qemu-img check` must find nothing,
qemu-img must read the model's bytes from the active layer and from each snapshot, and every bitmap must have marked
what was written since it was made, and nothing else.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import qcowlib
from qcowlib import (
    BitmapError,
    LocalFiles,
    Qcow2Image,
    SnapshotError,
    WritableQcow2Image,
    create_image,
    open_image,
)
from tests.model import PASSPHRASE, BitmapModel, DiskModel, StockView, assert_equal
from tests.oracle import qemu_img

KIB = 1 << 10
SIZE = 600 * KIB + 512

LUKS = {"encrypt_format": "luks", "encrypt_passphrase": PASSPHRASE, "encrypt_iter_time_ms": 0}
AES = {"encrypt_format": "aes", "encrypt_passphrase": PASSPHRASE}

GEOMETRIES: tuple[dict[str, Any], ...] = (
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 1024, "refcount_bits": 8},
    {"cluster_size": 4096, "refcount_bits": 2},
    {"cluster_size": 4096, "refcount_bits": 4, "compression_type": "zstd"},
    {"cluster_size": 4096, "refcount_bits": 32, "lazy_refcounts": True},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536, "extended_l2": True, "lazy_refcounts": True},
    {"cluster_size": 4096, "preallocation": "metadata"},
    {"cluster_size": 16384, "extended_l2": True, "preallocation": "metadata"},
    {"cluster_size": 512, "preallocation": "falloc", "refcount_bits": 64},
    {"cluster_size": 4096, "data_file": "data"},
    {"cluster_size": 4096, "data_file": "data", "data_file_raw": True},
    {"cluster_size": 16384, "data_file": "data", "extended_l2": True},
    {"cluster_size": 4096, **LUKS},
    {"cluster_size": 16384, "extended_l2": True, **LUKS},
    {"cluster_size": 4096, **AES},
    {"compat": "0.10", **AES},
)
# Backing files: none, or format and size. They are read only, and shared by all programs.
BACKINGS: tuple[tuple[str, int] | None, ...] = (None, ("raw", SIZE // 2 + 100), ("qcow2", SIZE), ("qcow2", SIZE + 9000))

offsets = st.one_of(
    st.integers(0, SIZE - 1),
    st.builds(
        lambda unit, jitter: min(SIZE - 1, max(0, unit * 4096 + jitter)), st.integers(0, 151), st.integers(-1, 1)
    ),
    st.builds(lambda unit: unit * 512, st.integers(0, SIZE // 512 - 1)),
)
lengths = st.one_of(st.sampled_from([1, 511, 512, 2048, 4096, 16384, 65536, SIZE]), st.integers(1, 200 * KIB))


class ImageProgram(RuleBasedStateMachine):
    """One image in a directory of its own."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.directory = Path(tempfile.mkdtemp(prefix="qcow-model-", dir=memory))
        self.path = self.directory / "disk.qcow2"
        self.image: WritableQcow2Image | None = None

    @initialize(options=st.sampled_from(GEOMETRIES), backing=st.sampled_from(BACKINGS))
    def create(self, options: dict[str, Any], backing: tuple[str, int] | None) -> None:
        self.options = dict(options)
        self.encryption: str | None = options.get("encrypt_format")
        if "data_file_raw" in options or ("preallocation" in options and "extended_l2" not in options):
            backing = None
        content = bytearray(SIZE)
        link: dict[str, Any] = {}
        if backing is not None:
            base = make_base(self.directory, *backing)[:SIZE]
            content[: len(base)] = base
            link = {"backing_file": "base", "backing_fmt": backing[0]}
        if "data_file" in options:
            self.options["data_file"] = str(self.directory / "data")
        create_image(self.path, SIZE, **link, **self.options)
        self.has_backing = backing is not None
        can_discard = backing is None or options.get("compat") != "0.10"
        self.model = DiskModel(content, options.get("cluster_size", 65536), can_discard)
        self.taken = 0
        self.open()

    def open(self) -> None:
        image = open_image(
            self.path,
            writable=True,
            policy=LocalFiles(),
            passphrase=None if self.encryption is None else PASSPHRASE,
        )
        assert isinstance(image, WritableQcow2Image)
        self.image = image

    @property
    def opened(self) -> WritableQcow2Image:
        assert self.image is not None
        return self.image

    @property
    def has_data_file(self) -> bool:
        return "data_file" in self.options

    @property
    def compresses(self) -> bool:
        return not self.has_data_file and self.encryption is None

    def assert_reads(self, offset: int, length: int, what: str) -> None:
        """The range and what lies around it."""
        start, end = max(0, offset - 5000), min(SIZE, offset + length + 5000)
        assert_equal(self.opened.read(start, end - start), self.model.content[start:end], what, start)

    @rule(offset=offsets, length=lengths, seed=st.integers(0, 255))
    def write(self, offset: int, length: int, seed: int) -> None:
        data = random.Random(seed).randbytes(min(length, SIZE - offset))
        self.opened.write(offset, data)
        self.model.write(offset, data)
        self.assert_reads(offset, len(data), "after write")

    @rule(offset=offsets, length=lengths)
    def write_zeroes(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        self.opened.write_zeroes(offset, length)
        self.model.write_zeroes(offset, length)
        self.assert_reads(offset, length, "after write_zeroes")

    @rule(offset=offsets, length=lengths)
    def discard(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        self.opened.discard(offset, length)
        self.model.discard(offset, length)
        self.assert_reads(offset, length, "after discard")

    @precondition(lambda self: self.compresses)
    @rule(offset=offsets, seed=st.integers(0, 255), repeat=st.sampled_from([1, 4, 64, 10**6]))
    def write_compressed(self, offset: int, seed: int, repeat: int) -> None:
        """One cluster; the larger `repeat`, the less it can be compressed."""
        start = offset - offset % self.model.cluster_size
        length = min(self.model.cluster_size, SIZE - start)
        unit = random.Random(seed).randbytes(repeat if repeat < length else length)
        data = (unit * (length // len(unit) + 1))[:length]
        self.opened.write_compressed(start, data)
        self.model.write(start, data)
        self.assert_reads(start, length, "after write_compressed")

    @precondition(lambda self: not self.has_data_file and len(self.model.snapshots) < 5)
    @rule()
    def create_snapshot(self) -> None:
        name = f"snap{self.taken}"
        before = [entry.name for entry in self.opened.snapshots]
        try:
            qcowlib.create_snapshot(self.opened, name)
        except SnapshotError:
            assert self.options.get("refcount_bits", 16) <= 2
            assert [entry.name for entry in self.opened.snapshots] == before
        else:
            self.taken += 1
            self.model.snapshots[name] = bytes(self.model.content)

    @precondition(lambda self: self.model.snapshots)
    @rule(number=st.integers(0, 4))
    def apply_snapshot(self, number: int) -> None:
        name = self.some_snapshot(number)
        try:
            qcowlib.apply_snapshot(self.opened, name)
        except SnapshotError:
            assert self.options.get("refcount_bits", 16) <= 2 or self.model.bitmaps
        else:
            self.model.content[:] = self.model.snapshots[name]
        self.assert_reads(0, SIZE, "after apply")

    @precondition(lambda self: self.model.snapshots)
    @rule(number=st.integers(0, 4))
    def delete_snapshot(self, number: int) -> None:
        name = self.some_snapshot(number)
        qcowlib.delete_snapshot(self.opened, name)
        del self.model.snapshots[name]
        self.assert_reads(0, SIZE, "after delete")

    @precondition(lambda self: self.model.snapshots)
    @rule(number=st.integers(0, 4), offset=offsets, length=lengths)
    def read_snapshot(self, number: int, offset: int, length: int) -> None:
        name = self.some_snapshot(number)
        length = min(length, SIZE - offset)
        expected = self.model.snapshots[name][offset : offset + length]
        assert_equal(self.opened.open_snapshot(name).read(offset, length), expected, name, offset)

    @rule(name=st.sampled_from("abc"), granularity=st.sampled_from([512, 4096, 65536, 1 << 20]), disabled=st.booleans())
    def add_bitmap(self, name: str, granularity: int, disabled: bool) -> None:
        try:
            qcowlib.add_bitmap(self.opened, name, granularity=granularity, disabled=disabled)
        except BitmapError:
            assert name in self.model.bitmaps or self.options.get("compat") == "0.10"
        else:
            self.model.bitmaps[name] = BitmapModel(granularity, not disabled)

    @precondition(lambda self: self.model.bitmaps)
    @rule(
        number=st.integers(0, 2), other=st.integers(0, 2), action=st.sampled_from(["remove", "clear", "turn", "merge"])
    )
    def change_bitmap(self, number: int, other: int, action: str) -> None:
        names = list(self.model.bitmaps)
        name, source = names[number % len(names)], names[other % len(names)]
        model = self.model.bitmaps[name]
        if action == "remove":
            qcowlib.remove_bitmap(self.opened, name)
            del self.model.bitmaps[name]
        elif action == "clear":
            qcowlib.clear_bitmap(self.opened, name)
            model.bits.clear()
        elif action == "merge":
            qcowlib.merge_bitmap(self.opened, name, source)
            model.merge(self.model.bitmaps[source], SIZE)
        else:
            (qcowlib.disable_bitmap if model.enabled else qcowlib.enable_bitmap)(self.opened, name)
            model.enabled = not model.enabled

    @precondition(lambda self: self.model.bitmaps)
    @rule(number=st.integers(0, 2))
    def read_bitmap(self, number: int) -> None:
        names = list(self.model.bitmaps)
        self.assert_marked(names[number % len(names)])

    def assert_marked(self, name: str) -> None:
        model, found = self.model.bitmaps[name], BitmapModel(self.model.bitmaps[name].granularity)
        for batch in qcowlib.dirty_extents(self.opened, name):
            for start, length in zip(batch.start.tolist(), batch.length.tolist(), strict=True):
                found.mark(start, length)
        assert found.bits == model.bits, f"{name}: {sorted(found.bits ^ model.bits)[:5]} differ"

    @rule(
        steps=st.lists(st.tuples(offsets, lengths, st.integers(0, 255)), min_size=1, max_size=3),
        cluster_size=st.sampled_from([512, 4096, 65536]),
        compat=st.sampled_from(["1.1", "0.10"]),
    )
    def commit_an_overlay(self, steps: list[tuple[int, int, int]], cluster_size: int, compat: str) -> None:
        """An overlay gets writes (of zeroes, where the seed is 0), and is committed to the image."""
        self.opened.close()
        path = self.directory / "above"
        qcowlib.create_overlay(path, str(self.path), backing_fmt="qcow2", cluster_size=cluster_size, compat=compat)
        with self.open_other(path, writable=True) as overlay:
            assert isinstance(overlay, WritableQcow2Image)
            for offset, length, seed in steps:
                data = random.Random(seed).randbytes(min(length, SIZE - offset)) if seed else bytes(length)
                data = data[: SIZE - offset]
                if seed:
                    overlay.write(offset, data)
                else:
                    overlay.write_zeroes(offset, len(data))
                self.model.content[offset : offset + len(data)] = data
            overlay.leave_out_backing()
            for row in (row for table in overlay.layer_extents(0, SIZE) for row in table):
                if row.kind is not qcowlib.ExtentKind.UNALLOCATED:
                    self.model.mark(row.start, row.length)
            self.open()
            qcowlib.commit(overlay, self.opened)
            qcowlib.make_empty(overlay)
            assert qcowlib.allocated_bytes(overlay) == 0
        self.assert_reads(0, SIZE, "after commit")
        self.opened.close()
        with self.open_other(path) as overlay:
            assert_equal(overlay.read(0, SIZE), self.model.content, "emptied overlay")
        path.unlink()
        self.open()

    # A snapshot shows whatever the backing file is; what is copied is marked in bitmaps, but does not change.
    @precondition(
        lambda self: not self.model.snapshots and not self.model.bitmaps and not self.options.get("data_file_raw")
    )
    @rule(below=st.sampled_from([None, "base", "second"]), compressed=st.booleans())
    def rebase(self, below: str | None, compressed: bool) -> None:
        """Onto nothing, the first backing file, or another one."""
        if below is None:
            qcowlib.rebase(self.opened, None, compressed=compressed and self.compresses)
        else:
            path = self.directory / below
            if not path.exists():
                path.write_bytes(random.Random(below).randbytes(SIZE // 3) + bytes(50_000) + b"x" * SIZE)
            with self.open_other(path) as new:
                qcowlib.rebase(self.opened, below, new.format, new=new, compressed=compressed and self.compresses)
        self.model.can_discard = below is None or self.options.get("compat") != "0.10"
        self.opened.close()
        self.open()
        self.assert_reads(0, SIZE, "after rebase")

    def open_other(self, path: Path, *, writable: bool = False) -> qcowlib.Qcow2Image | qcowlib.RawImage:
        passphrase = None if self.encryption is None else PASSPHRASE
        return open_image(path, writable=writable, policy=LocalFiles(), passphrase=passphrase)

    # What a shrink cuts from bitmaps is the matter of their own tests.
    @precondition(
        lambda self: (
            not self.model.bitmaps
            and not (self.options.get("compat") == "0.10" and (self.model.snapshots or self.has_backing))
        )
    )
    @rule(
        excess=st.sampled_from([512, 4096 - 512, 70_144, 400 * KIB]),
        preallocation=st.sampled_from(["off", "off", "metadata", "falloc", "full"]),
        seed=st.integers(0, 255),
    )
    def grow_and_shrink(self, excess: int, preallocation: str, seed: int) -> None:
        """Larger, with something behind the old end, and back; then smaller and back: what was there is zero."""
        qcowlib.resize(self.opened, SIZE + excess, preallocation=preallocation)
        assert_equal(self.opened.read(SIZE, excess), bytes(excess), "behind the old end", SIZE)
        behind = random.Random(seed).randbytes(min(excess, 5000))
        self.opened.write(SIZE + excess - len(behind), behind)
        assert_equal(self.opened.read(SIZE + excess - len(behind), len(behind)), behind, "behind the old end")
        qcowlib.resize(self.opened, SIZE - excess, shrink=True)
        qcowlib.resize(self.opened, SIZE)
        self.model.write_zeroes(SIZE - excess, excess)
        self.assert_reads(SIZE - excess, excess, "after shrink and growth")

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        buffer = bytearray(b"\xa5" * length)
        self.opened.readinto(offset, buffer)
        assert_equal(buffer, self.model.content[offset : offset + length], "read", offset)

    @rule()
    def flush(self) -> None:
        self.opened.flush()

    @rule()
    def reopen(self) -> None:
        self.opened.close()
        self.open()
        self.assert_reads(0, SIZE, "after reopen")

    @rule()
    def check(self) -> None:
        """What is on disk after a close is in order by our own judgement, too."""
        self.opened.close()
        with open_image(self.path, open_backing=False) as image:
            assert isinstance(image, Qcow2Image)
            report = qcowlib.check(image)
            assert not report.findings, report.findings
        self.open()

    @invariant()
    def names_agree(self) -> None:
        if self.image is not None:
            assert [entry.name for entry in self.opened.snapshots] == list(self.model.snapshots)

    def some_snapshot(self, number: int) -> str:
        names = list(self.model.snapshots)
        return names[number % len(names)]

    def teardown(self) -> None:
        try:
            if self.image is not None:
                snapshots = [(entry.id, entry.name) for entry in self.opened.snapshots]
                for name in self.model.bitmaps:
                    self.assert_marked(name)
                self.opened.close()
                StockView(self.path, self.encryption).assert_holds(self.model, snapshots)
                if self.options.get("data_file_raw"):
                    data = (self.directory / "data").read_bytes()
                    assert_equal(data[:SIZE], self.model.content, "raw data file")
        finally:
            shutil.rmtree(self.directory)


def make_base(directory: Path, kind: str, size: int) -> bytes:
    """A backing file named "base" that the stock tools made; returns its guest bytes."""
    base = directory / "base"
    data = bytearray(random.Random(size).randbytes(size))
    data[100_000:200_000] = bytes(100_000)
    if kind == "raw":
        base.write_bytes(data)
        return bytes(data)
    raw = directory / "base.raw"
    raw.write_bytes(data)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", raw, base)
    raw.unlink()
    return bytes(data)


PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "check")
TestImageProgram: Callable[[], object] = ImageProgram.TestCase
ImageProgram.TestCase.settings = hypothesis.settings(
    max_examples=60 if PROFILE == "check" else hypothesis.settings().max_examples,
    stateful_step_count=25,
    suppress_health_check=list(hypothesis.HealthCheck),
)
