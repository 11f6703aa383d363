"""Power cuts while bitmaps are changed, and while guest writes are recorded in them.

    image with bitmaps -> one session under test, recorded -> every disk that a power cut may leave

Each such disk is a valid image (I1, I2) whose bitmaps are those of before or those of after, each of them whole. A
bitmap that records writes may be found in use instead (inconsistent); one that is not in use misses no change. The next
writable open leaves bitmaps and content as they are, and everything exact.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcowlib
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.resize import resize
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import RecordingStorage, crash_states
from tests.crash.images import open_writable
from tests.crash.invariants import examine_broken, examine_healed, heal
from tests.crash.second_opinion import Marked, SecondOpinion
from tests.oracle import assert_clean, image_info, qemu_img

KIB = 1 << 10
IN_USE, AUTO = 1, 2
Record = Callable[[str, object], None]
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


CASES = [
    pytest.param(layout, name, id=f"{layout}-{name}")
    for layout in LAYOUTS
    for name in SESSIONS
    if layout in ("512", "64k", "64k-backing") or name in ("writes", "add", "remove-all", "grow")
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_power_cut(layout: str, name: str, tmp_path: Path, record_property: Record) -> None:
    explore(layout, name, tmp_path, record_property, bitmaps=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_power_cut_around_the_first_bitmap(layout: str, tmp_path: Path, record_property: Record) -> None:
    explore(layout, "add", tmp_path, record_property, bitmaps=False)


def explore(layout: str, name: str, directory: Path, record_property: Record, *, bitmaps: bool) -> None:
    steps = SESSIONS[name]
    storage, backing = prepare(layout, directory, bitmaps=bitmaps)
    initial, file_name = storage.getvalue(), storage.name
    prefixes = [run(initial, steps[:count], file_name)[1] for count in range(1, len(steps) + 1)]
    moments = [Moment.of(each, backing) for each in (initial, *prefixes)]
    recording, _ = run(initial, steps, file_name)
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    for state in crash_states(recording, initial, samples=4, seed=5):
        broken = state.storage().getvalue()
        counts["states"] += 1
        if broken in seen:
            continue
        seen.add(broken)
        counts["distinct"] += 1
        try:
            expected = examine_broken(broken, backing, file_name)
            found = Moment.of(broken, backing)
            judge(found, moments, recording=name in RECORDING)
            healed = heal(BytesStorage(broken, name=file_name), expected)
            examine_healed(healed, backing, expected)
            assert SecondOpinion(healed, backing).bitmaps == found.bitmaps, "healing has changed the bitmaps"
            if counts["distinct"] % 25 == 7:
                counts["opened by stock QEMU"] += 1
                stock_opens(healed, found, directory)
        except Exception as error:
            error.add_note(f"{layout}: epoch {state.epoch}, {state.text}")
            raise
    record_property("counted", ("crash states with bitmaps", dict(counts)))


def stock_opens(healed: bytes, found: Moment, directory: Path) -> None:
    """Stock qemu-img loads all bitmaps, and finds nothing wrong."""
    path = directory / "healed.qcow2"
    path.write_bytes(healed)
    assert_clean(path)
    listed = image_info(path)["format-specific"]["data"].get("bitmaps", [])
    assert [one["name"] for one in listed] == list(found.bitmaps or {})
    path.unlink()
