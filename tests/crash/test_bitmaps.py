"""Power cuts while bitmaps are changed, and while guest writes are recorded in them.

    image with bitmaps -> one session under test, recorded -> every disk that a power cut may leave

Each such disk is a valid image (I1, I2) whose bitmaps are those of before or those of after, each of them whole. A
bitmap that records writes may be found in use instead (inconsistent); one that is not in use misses no change. The next
writable open leaves bitmaps and content as they are, and everything exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import crash_states
from tests.crash.bitmap_sessions import LAYOUTS, RECORDING, SESSIONS, Moment, judge, prepare, run
from tests.crash.invariants import examine_broken, examine_healed, heal
from tests.crash.second_opinion import SecondOpinion
from tests.oracle import assert_clean, image_info

Record = Callable[[str, object], None]

CASES = [
    pytest.param(layout, name, id=f"{layout}-{name}")
    for layout in LAYOUTS
    for name in SESSIONS
    if layout in ("512", "64k") or name in ("writes", "add", "remove-all")
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
    for state in crash_states(recording, initial, samples=3, seed=5):
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
