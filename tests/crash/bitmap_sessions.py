"""Sessions that change bitmaps, or are recorded in them, and what may be found when one of them is cut off."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import qcowlib
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.resize import resize
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import RecordingStorage
from tests.crash.images import open_writable
from tests.crash.second_opinion import Marked, SecondOpinion
from tests.oracle import qemu_img

KIB = 1 << 10
IN_USE, AUTO = 1, 2
Step = Callable[[WritableQcow2Image], object]


def data(length: int) -> bytes:
    """Bytes that differ from what is there, in every sector."""
    return random.Random(length).randbytes(length)


# Name -> the steps of one session
SESSIONS: dict[str, list[Step]] = {
    "writes": [
        lambda image: image.write(3000, data(20 * KIB)),
        lambda image: image.write_zeroes(60 * KIB, 30 * KIB),
        lambda image: image.flush(),
        lambda image: image.write(3500, data(100)),
        lambda image: image.discard(20 * KIB, 50 * KIB),
        lambda image: image.write_compressed(0, bytes(image.cluster_size)),
    ],
    "in-place": [lambda image: image.write(1000, b"in place")],
    "write-clear-write": [
        lambda image: image.write(200 * KIB, b"first"),
        lambda image: qcowlib.clear_bitmap(image, "auto"),
        lambda image: image.write(300 * KIB, b"second"),
    ],
    "add-many": [lambda image, n=number: qcowlib.add_bitmap(image, f"new{n}") for number in range(3)],  # type: ignore[misc]
    "add": [lambda image: qcowlib.add_bitmap(image, "new", granularity=512)],
    "remove": [lambda image: qcowlib.remove_bitmap(image, "fine")],
    "remove-all": [qcowlib.remove_all_bitmaps],
    "clear": [lambda image: qcowlib.clear_bitmap(image, "fine")],
    "enable": [lambda image: qcowlib.enable_bitmap(image, "off")],
    "merge": [lambda image: qcowlib.merge_bitmap(image, "off", "fine")],
    "grow": [lambda image: resize(image, 900 * KIB)],
    "shrink": [lambda image: resize(image, 30 * KIB, shrink=True)],
}
RECORDING = {"writes", "in-place", "write-clear-write", "grow", "shrink"}

# Name -> (options, format of a backing file): the extension lies in the first sector, across its end, behind it.
LAYOUTS: dict[str, tuple[str, str | None]] = {
    "512": ("cluster_size=512", None),
    "4k": ("cluster_size=4k", None),
    "64k": ("cluster_size=64k", None),
    "64k-backing": ("cluster_size=64k", "raw"),
    "16k-parts": ("cluster_size=16k,extended_l2=on", "qcow2"),
}


@dataclass(frozen=True)
class Moment:
    """An image: what the guest reads, and the bitmaps (None: there are none)."""

    content: bytes
    bitmaps: dict[str, Marked] | None

    @staticmethod
    def of(image: bytes, backing: bytes | None) -> Moment:
        opinion = SecondOpinion(image, backing)
        return Moment(opinion.content(), opinion.bitmaps)


def prepare(layout: str, directory: Path, *, bitmaps: bool) -> tuple[BytesStorage, bytes | None]:
    """An image that stock qemu-img made, with some content and three bitmaps; the content of its backing file."""
    options, kind = LAYOUTS[layout]
    path, size = directory / "image.qcow2", 400 * KIB
    arguments: list[str | Path] = ["create", "-q", "-f", "qcow2", "-o", options]
    backing = None
    if kind is not None:
        qemu_img("create", "-q", "-f", kind, directory / "base", str(size))
        backing = bytes(size)
        arguments += ["-b", directory / "base", "-F", kind]
    qemu_img(*arguments, path, str(size))
    if bitmaps:
        qemu_img("bitmap", "--add", "-g", "64k", path, "auto")
        qemu_img("bitmap", "--add", "-g", "512", path, "fine")
        qemu_img("bitmap", "--add", "--disable", path, "off")
    storage = BytesStorage(path.read_bytes(), name=str(path))
    image = open_writable(storage)
    image.write(500, data(60 * KIB))
    image.close()
    return storage, backing


def run(initial: bytes, steps: list[Step], name: str) -> tuple[RecordingStorage, bytes]:
    """A session with these steps: what it did to the file, and the file at its end."""
    disk = BytesStorage(initial, name=name)
    recording = RecordingStorage(disk)
    image = open_writable(recording)
    for step in steps:
        step(image)
    image.close()
    return recording, disk.getvalue()


def judge(found: Moment, moments: list[Moment], *, recording: bool) -> None:
    """The bitmaps of a disk that was cut off.

    Whatever a bitmap says that is not in use, the guest's data is that of the moment when it was stored: every later
    write is preceded by the mark.
    """
    assert (found.bitmaps or {}).keys() in [(moment.bitmaps or {}).keys() for moment in moments]
    if not recording:
        assert found.bitmaps in [moment.bitmaps for moment in moments], "the bitmaps of no moment"
    for name, marked in (found.bitmaps or {}).items():
        if marked.flags & IN_USE:
            assert recording, f"{name} is in use"
            continue
        stored = [moment for moment in moments if (moment.bitmaps or {}).get(name) == marked]
        assert stored, f"{name} is as at no moment"
        if marked.flags & AUTO:
            assert any(moment.content == found.content for moment in stored), f"{name} misses a change"


def misses(found: Moment, before: Moment) -> list[str]:
    """Bitmaps that are not in use, record writes, and lack a bit where the content differs from that of before."""
    end = min(len(found.content), len(before.content))
    changed = [at for at in range(0, end, 512) if found.content[at : at + 512] != before.content[at : at + 512]]
    wrong = []
    for name, marked in (found.bitmaps or {}).items():
        old = (before.bitmaps or {}).get(name)
        if marked.flags == AUTO and old is not None and old.flags == AUTO:
            needed = {at >> marked.granularity_bits for at in changed}
            wrong += [name] if needed - marked.bits else []
    return wrong
