"""A host that fails at any one change of a commit, of an emptying, of a rebase: the guest sees no difference, and doing
it again finishes the job."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import StorageError
from qcowlib.image.opening import open_image
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import Fault, FaultyStorage
from tests.crash.images import open_writable
from tests.crash.invariants import Content, content_by_second_opinion, examine_broken, examine_healed
from tests.crash.merges import GEOMETRIES, Files, backing_name, build, commit_to
from tests.crash.second_opinion import SecondOpinion
from tests.faults.attempt import InterruptedStorage

Record = Callable[[str, object], None]
Work = Callable[[FaultyStorage], None]

CHOSEN = ["v3-512", "v2-512", "v3-16k-parts"]


def failing(initial: bytes, name: str, work: Work, counts: Counter[str]) -> Iterator[bytes]:
    """Do some work once for each change that it makes, which then fails; what is in the file afterwards.

    Then with a host that is full after so many bytes.
    """
    inner = BytesStorage(initial, name=name)
    storage = FaultyStorage(inner)
    work(storage)
    changes, final = storage.counts["change"], len(inner.getvalue())
    for nth in range(1, changes + 1):
        others = (
            ("short writes", Fault("change", nth, errno.ENOSPC, written=300), FaultyStorage),
            ("EIO from then on", Fault("change", nth, lasting=True), FaultyStorage),
            ("interrupts", Fault("change", nth), InterruptedStorage),
        )
        for label, fault, host in (("EIO", Fault("change", nth), FaultyStorage), others[nth % 3]):
            counts[label] += 1
            yield from _attempt(BytesStorage(initial, name=name), work, [fault], None, host)
    for capacity in range(len(initial), final, max(256, (final - len(initial)) // 6)):
        counts["disk full"] += 1
        yield from _attempt(BytesStorage(initial, name=name), work, [], capacity, FaultyStorage)


def _attempt(
    inner: BytesStorage,
    work: Work,
    plan: list[Fault],
    capacity: int | None,
    host: type[FaultyStorage],
) -> Iterator[bytes]:
    storage = host(inner, plan, capacity=capacity)
    try:
        work(storage)
    except (StorageError, KeyboardInterrupt):
        pass
    else:
        return  # it was a discard that failed, or the heal at the end
    yield inner.getvalue()


def made_again(data: bytes, name: str, work: Callable[[BytesStorage], None]) -> bytes:
    disk = BytesStorage(data, name=name)
    work(disk)
    return disk.getvalue()


@pytest.mark.parametrize("geometry", CHOSEN)
def test_commit(geometry: str, tmp_path: Path, record_property: Record) -> None:
    files = build(tmp_path, GEOMETRIES[geometry])
    overlay, name = str(tmp_path / "overlay"), str(tmp_path / "base")
    expected = files.content(files.overlay, files.base).active
    saved = content_by_second_opinion(SecondOpinion(files.base, files.raw)).saved
    counts: Counter[str] = Counter()

    def work(disk: FaultyStorage | BytesStorage) -> None:
        commit_to(files.overlay, disk, overlay)

    for number, data in enumerate(failing(files.base, name, work, counts)):
        assert examine_broken(data, files.raw, name).saved == saved
        assert files.content(files.overlay, data).active == expected
        if number % 5 == 0:
            examine_healed(made_again(data, name, work), files.raw, Content(expected, saved))
    record_property("counted", ("failing calls in commits", dict(counts)))


@pytest.mark.parametrize("geometry", CHOSEN)
def test_make_empty(geometry: str, tmp_path: Path, record_property: Record) -> None:
    files = build(tmp_path, GEOMETRIES[geometry])
    name = str(tmp_path / "overlay")
    base = BytesStorage(files.base, name=str(tmp_path / "base"))
    commit_to(files.overlay, base, name)
    (tmp_path / "base").write_bytes(base.getvalue())
    below = SecondOpinion(base.getvalue(), files.raw).content()
    expected = content_by_second_opinion(SecondOpinion(files.overlay, below))
    counts: Counter[str] = Counter()

    def work(disk: FaultyStorage | BytesStorage) -> None:
        with open_writable(disk) as image:
            qcowlib.make_empty(image)

    for number, data in enumerate(failing(files.overlay, name, work, counts)):
        assert examine_broken(data, below, name) == expected
        if number % 3 == 0:
            examine_healed(made_again(data, name, work), below, expected)
    record_property("counted", ("failing calls in emptyings", dict(counts)))


@pytest.mark.parametrize("geometry", CHOSEN)
def test_rebase(geometry: str, tmp_path: Path, record_property: Record) -> None:
    files = build(tmp_path, GEOMETRIES[geometry])
    name = str(tmp_path / "overlay")
    initial = without_snapshot(files, name)
    below = {"base": SecondOpinion(files.base, files.raw).content(), "other": other_content(files)}
    expected = content_by_second_opinion(SecondOpinion(initial, below["base"]))
    counts: Counter[str] = Counter()

    def work(disk: FaultyStorage | BytesStorage) -> None:
        with open_writable(disk) as image, open_image(tmp_path / "other", policy=qcowlib.LocalFiles()) as new:
            qcowlib.rebase(image, str(tmp_path / "other"), "qcow2", new=new)

    for number, data in enumerate(failing(initial, name, work, counts)):
        named = backing_name(data)
        assert named is not None
        assert examine_broken(data, below[named], name) == expected
        if number % 5 == 0:
            examine_healed(made_again(data, name, work), below["other"], expected)
    record_property("counted", ("failing calls in rebases", dict(counts)))


def other_content(files: Files) -> bytes:
    return SecondOpinion(files.other, files.raw).content()


def without_snapshot(files: Files, name: str) -> bytes:
    """The overlay without its snapshot, which shows whatever the backing file is."""
    disk = BytesStorage(files.overlay, name=name)
    with open_writable(disk) as image:
        qcowlib.delete_snapshot(image, "kept")
    return disk.getvalue()
