"""Every disk that a power cut may leave while the library writes: invariants I1 to I3, and one open that heals."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import CrashState, RecordingStorage, crash_states
from tests.crash.guest import VM_STATE, Guest, Step
from tests.crash.images import Scenario, build, open_writable, run_step
from tests.crash.invariants import Content, content_by_library, examine_broken, examine_healed, heal
from tests.crash.programs import SCENARIOS
from tests.crash.second_opinion import SecondOpinion
from tests.oracle import assert_clean, content, image_check, qemu_io

Record = Callable[[str, object], None]


class Run(NamedTuple):
    """A recorded run of a scenario.

    Attributes:
        recording: what was written.
        durable: (epoch, moment): from this epoch on, the moment must not be lost; ascending, from (0, 0) on.
    """

    recording: RecordingStorage
    durable: list[tuple[int, int]]

    def moments_of(self, state: CrashState) -> tuple[int, int]:
        """The last moment that was durable when the power went, and the last that can have begun."""
        first = max(moment for epoch, moment in self.durable if epoch <= state.epoch)
        following = [moment for _, moment in self.durable if moment > first]
        return first, following[0] if following else first


def record(scenario: Scenario, initial: bytes, guest: Guest, name: str) -> Run:
    """Run a scenario's steps."""
    recording = RecordingStorage(BytesStorage(initial, name=name))
    durable = [(0, 0)]
    image = open_writable(recording)
    for step in scenario.steps:
        run_step(image, step)
        guest.follow(step)
        # What an operation on snapshots writes behind its last barrier only gives space back.
        if step.whole or step.kind == "flush":
            durable.append((len(recording.epochs) - 1, len(guest.moments) - 1))
    image.close()
    guest.follow(Step("flush"))
    durable.append((len(recording.epochs) - 1, len(guest.moments) - 1))
    return Run(recording, durable)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_crash_states(scenario: Scenario, tmp_path: Path, record_property: Record) -> None:
    initial, guest, backing = build(scenario, tmp_path)
    name = str(tmp_path / "image.qcow2")
    run = record(scenario, initial, guest, name)
    choose = random.Random(scenario.name)
    seen: set[tuple[int, int, int]] = set()
    counts = Counter(scenarios=1, operations=sum(len(epoch) for epoch in run.recording.epochs))
    for state in crash_states(run.recording, initial, samples=scenario.samples, seed=7):
        counts["states"] += 1
        data = state.storage().getvalue()
        first, last = run.moments_of(state)
        if (key := (hash(data), first, last)) in seen:
            continue
        seen.add(key)
        counts["distinct"] += 1
        try:
            found = examine_broken(data, backing, name)
            wrong = guest.judge(found.active, found.saved, first, last)
            assert wrong is None, f"I3: {wrong}"
            healed = heal(BytesStorage(data, name=name), found)
            examine_healed(healed, backing, found)
            if choose.random() < 0.2:
                counts["written at once"] += 1
                write_at_once(data, backing, found, choose, name)
            if counts["distinct"] % 40 == 20:  # each takes three processes
                counts["checked by stock QEMU"] += 1
                stock_agrees(healed, found, tmp_path)
                if SecondOpinion(data).version == 3:
                    counts["healed by stock QEMU"] += stock_heals(data, found, tmp_path)
        except Exception as error:
            error.add_note(f"{scenario.name}: epoch {state.epoch}, {state.text}, moments {first} to {last}")
            raise
    record_property("counted", ("crash states", dict(counts)))


def write_at_once(data: bytes, backing: bytes | None, found: Content, choose: random.Random, name: str) -> None:
    """The open that heals is the one that writes: nothing else may change."""
    disk = BytesStorage(data, name=name)
    image = open_writable(disk)
    expected = bytearray(found.active)
    for _ in range(4):
        length = choose.choice((1, 300, image.cluster_size, 3 * image.cluster_size))
        start = choose.randrange(len(expected) - length)
        expected[start : start + length] = new = choose.randbytes(length)
        image.write(start, new)
        if choose.random() < 0.5:
            image.flush()
    image.close()
    examine_healed(disk.getvalue(), backing, Content(bytes(expected), found.saved))


def stock_agrees(healed: bytes, found: Content, directory: Path) -> None:
    """Stock qemu-img finds nothing wrong, and reads the same."""
    path = directory / "healed.qcow2"
    path.write_bytes(healed)
    assert_clean(path)
    assert content(path, directory) == found.active
    for name, saved in found.saved.items():
        if not name.endswith(VM_STATE) and len(saved) == len(
            found.active
        ):  # stock qemu-img reads snapshots at the size of the active layer
            assert content(path, directory, snapshot=name) == saved
    path.unlink()


def stock_heals(data: bytes, found: Content, directory: Path) -> bool:
    """Version 3 says that it was cut off: stock QEMU heals it when it opens it for writing.

    Returns: whether it was marked so.
    """
    path = directory / "broken.qcow2"
    path.write_bytes(data)
    qemu_io(path, "write -P 0xab 100 5000")
    # QEMU does not look at refcounts behind the end of the file; when it grows then, these leaks show.
    opinion = SecondOpinion(data)
    behind = sum(index * opinion.cluster_size >= len(data) for index in opinion.leaks)
    report = image_check(path)
    assert (report.get("corruptions", 0), report["check-errors"]) == (0, 0)
    assert report.get("leaks", 0) <= behind
    healed = content_by_library(BytesStorage(path.read_bytes(), writable=False, name=str(path)))
    active = found.active[:100] + b"\xab" * 5000 + found.active[5100:]
    assert healed == Content(active, found.saved)
    path.unlink()
    return opinion.dirty


@pytest.mark.parametrize("scenario", SCENARIOS[::7], ids=lambda scenario: scenario.name)
def test_crash_while_healing(scenario: Scenario, tmp_path: Path, record_property: Record) -> None:
    """The power goes again during the open that heals."""
    initial, guest, backing = build(scenario, tmp_path)
    name = str(tmp_path / "image.qcow2")
    run = record(scenario, initial, guest, name)
    candidates = [state.storage().getvalue() for state in crash_states(run.recording, initial, samples=3, seed=11)]
    broken = sorted(dict.fromkeys(candidates), key=_damage, reverse=True)[:3]
    counts: Counter[str] = Counter(images=len(broken))
    for data in broken:
        expected = examine_broken(data, backing, name)
        recording = RecordingStorage(BytesStorage(data, name=name))
        open_writable(recording).close()
        for state in crash_states(recording, data, samples=6, seed=3):
            counts["states"] += 1
            cut_off = state.storage().getvalue()
            assert examine_broken(cut_off, backing, name) == expected
            examine_healed(heal(BytesStorage(cut_off, name=name), expected), backing, expected)
    record_property("counted", ("crashes while healing", dict(counts)))


def _damage(data: bytes) -> tuple[int, int]:
    """How much there is to heal: flags first, which are rarer."""
    opinion = SecondOpinion(data)
    return opinion.wrong_copied, len(opinion.leaks)
