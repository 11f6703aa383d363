"""Power cuts in a commit, in the emptying after it, and in a rebase: the overlay shows the same at every cut.

commit      the base is cut off      overlay over what is left of it     -> as before; done again: finished
make_empty  the overlay is cut off   over the finished base              -> as before
rebase      the overlay is cut off   over the backing file that it names -> as before
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import qcowlib
from qcowlib.image.opening import open_image
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import RecordingStorage, crash_states
from tests.crash.images import open_writable
from tests.crash.invariants import Content, content_by_second_opinion, examine_broken, examine_healed, heal
from tests.crash.merges import GEOMETRIES, backing_name, build, commit_to
from tests.crash.second_opinion import SecondOpinion

Record = Callable[[str, object], None]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_commit(geometry: str, tmp_path: Path, record_property: Record) -> None:
    files = build(tmp_path, GEOMETRIES[geometry])
    name = str(tmp_path / "base")
    expected = files.content(files.overlay, files.base)
    saved = content_by_second_opinion(SecondOpinion(files.base, files.raw)).saved
    recording = RecordingStorage(BytesStorage(files.base, name=name))
    commit_to(files.overlay, recording, str(tmp_path / "overlay"))
    counts = Counter[str]()
    seen = set()
    for state in crash_states(recording, files.base, samples=10, seed=7):
        counts["states"] += 1
        data = state.storage().getvalue()
        if hash(data) in seen:
            continue
        seen.add(hash(data))
        found = examine_broken(data, files.raw, name)
        assert found.saved == saved
        assert files.content(files.overlay, data).active == expected.active, state.text
        if counts["states"] % 8:
            continue
        counts["done again"] += 1
        disk = BytesStorage(data, name=name)
        commit_to(files.overlay, disk, str(tmp_path / "overlay"))
        examine_healed(disk.getvalue(), files.raw, Content(expected.active, saved))
    assert counts["done again"]
    record_property("counted", ("cuts in a commit", dict(counts)))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_make_empty(geometry: str, tmp_path: Path, record_property: Record) -> None:
    files = build(tmp_path, GEOMETRIES[geometry])
    name = str(tmp_path / "overlay")
    before = files.content(files.overlay, files.base)
    disk = BytesStorage(files.base, name=str(tmp_path / "base"))
    commit_to(files.overlay, disk, name)
    (tmp_path / "base").write_bytes(disk.getvalue())  # what the library finds
    below = SecondOpinion(disk.getvalue(), files.raw).content()
    # The snapshot in the overlay has no backing file of its own time: it shows the new base.
    expected = content_by_second_opinion(SecondOpinion(files.overlay, below))
    assert expected.active == before.active
    kept = BytesStorage(files.overlay, name=name)
    recording = RecordingStorage(kept)
    image = open_writable(recording)
    qcowlib.make_empty(image)
    image.close()
    counts = Counter[str]()
    for state in crash_states(recording, files.overlay, samples=12, seed=7):
        counts["states"] += 1
        data = state.storage().getvalue()
        assert examine_broken(data, below, name) == expected, state.text
        if counts["states"] % 5 == 0:
            examine_healed(heal(BytesStorage(data, name=name), expected), below, expected)
    final = SecondOpinion(kept.getvalue(), below)
    assert final.clean
    assert not final.dirty
    with open_image(BytesStorage(final.data, name=name), open_backing=False) as emptied:
        assert isinstance(emptied, Qcow2Image)
        assert qcowlib.allocated_bytes(emptied) == 0
    record_property("counted", ("cuts in an emptying", dict(counts)))


@pytest.mark.parametrize("target", ["raw", "other", None])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rebase(geometry: str, target: str | None, tmp_path: Path, record_property: Record) -> None:
    files = build(tmp_path, GEOMETRIES[geometry])
    name = str(tmp_path / "overlay")
    below = {
        "base": SecondOpinion(files.base, files.raw).content(),
        "raw": files.raw,
        "other": SecondOpinion(files.other, files.raw).content(),
        None: b"",
    }
    disk = BytesStorage(files.overlay, name=name)
    image = open_writable(disk)
    qcowlib.delete_snapshot(image, "kept")  # it shows whatever the backing file is, and so would change
    image.close()
    initial = disk.getvalue()
    expected = content_by_second_opinion(SecondOpinion(initial, below["base"]))
    recording = RecordingStorage(BytesStorage(initial, name=name))
    image = open_writable(recording)
    if target is None:
        qcowlib.rebase(image, None)
    else:
        with open_image(
            tmp_path / target, format="raw" if target == "raw" else None, policy=qcowlib.LocalFiles()
        ) as new:
            qcowlib.rebase(
                image,
                str(tmp_path / target),
                "raw" if target == "raw" else "qcow2",
                new=new,
                compressed=target == "other",
            )
    image.close()
    counts = Counter[str]()
    seen = set()
    for state in crash_states(recording, initial, samples=10, seed=7):
        counts["states"] += 1
        data = state.storage().getvalue()
        if hash(data) in seen:
            continue
        seen.add(hash(data))
        named = backing_name(data)
        counts[f"on {named}"] += 1
        assert examine_broken(data, below[named], name) == expected, state.text
        if counts["states"] % 8 == 0:
            examine_healed(heal(BytesStorage(data, name=name), expected), below[named], expected)
    assert counts["on base"]
    assert counts[f"on {target}"]
    record_property("counted", ("cuts in a rebase", dict(counts)))
