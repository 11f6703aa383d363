"""Internal snapshots as a chain of overlays and back: every state is equal, and a run that is cut off is done again."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qcowlib
from qcowlib import LocalFiles, digest_states, export_chain, import_chain, plan_export
from tests.cli.side_by_side import ours
from tests.killing import survives
from tests.oracle import qemu_img, qemu_io
from tests.property.test_compact import open_whole, random_image

Record = Callable[[str, object], None]


def digests(path: Path) -> list[dict[str, str]]:
    """Of all states of an image."""
    with open_whole(path, {}) as image:
        return [state.digests for state in digest_states(image)]


def facts(path: Path) -> list[tuple[object, ...]]:
    with open_whole(path, {}) as image:
        return [
            (one.id, one.name, one.date_sec, one.date_nsec, one.vm_clock_nsec, one.icount, one.disk_size)
            for one in image.snapshots
        ]


UNENCRYPTED = [seed for seed in range(24) if seed % 8 < 6]


@pytest.mark.parametrize("seed", UNENCRYPTED)
def test_there_and_back(tmp_path: Path, seed: int) -> None:
    path = Path(random_image(tmp_path, seed)[0])
    chain, back = tmp_path / "chain", tmp_path / "back"
    before = path.read_bytes()
    active, *snapshots = digests(path)
    with open_whole(path, {}) as image:
        states = export_chain(image, str(chain))
        assert states == plan_export(image)
    assert path.read_bytes() == before
    for state, expected in zip(states, [*snapshots, active], strict=True):
        assert digests(chain / state.file) == [expected]
        qemu_img("check", chain / state.file)
    # What two states share is not in both files.
    data = [_data_bytes(chain / state.file) for state in states]
    assert data == [state.data for state in states]
    import_chain(str(chain), str(back))
    assert digests(back) == [active, *snapshots]
    known = 2 if seed % 8 == 1 else None  # version 2 says the id and the name, not the disk's size
    assert [fact[:known] for fact in facts(back)] == [fact[:known] for fact in facts(path)]
    qemu_img("check", back)
    assert not list(tmp_path.glob("*.qcow-incomplete"))


def _data_bytes(path: Path) -> int:
    with qcowlib.open_image(path, open_backing=False) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        return qcowlib.allocated_bytes(image)


def make_image(folder: Path) -> Path:
    """Two snapshots of different sizes, one with memory; a bitmap."""
    path = folder / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "3M")
    qemu_io(path, "write -P 1 0 1M")
    with qcowlib.open_image(path, writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        (folder / "memory").write_bytes(random.Random(1).randbytes(100_000))
        with open(folder / "memory", "rb") as stream:
            qcowlib.create_snapshot(image, "with/memory", vmstate=stream, vm_clock_ns=77, icount=None, snapshot_id="5")
    qemu_img("resize", "-q", path, "4M")
    qemu_io(path, "write -P 2 3500k 100k", "write -z 200k 200k")
    qemu_img("snapshot", "-c", "two", path)
    qemu_io(path, "write -P 3 64k 64k")
    qemu_img("bitmap", "--add", path, "b")
    qemu_io(path, "write -P 4 128k 64k")
    return path


def test_memory_sizes_and_bitmaps(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    with open_whole(path, {}) as image:
        states = export_chain(image, str(tmp_path / "chain"))
    assert [state.file for state in states] == ["000-with_memory.qcow2", "001-two.qcow2", "active.qcow2"]
    assert (tmp_path / "chain" / "000-with_memory.vmstate").read_bytes() == (tmp_path / "memory").read_bytes()
    import_chain(str(tmp_path / "chain"), str(tmp_path / "back"))
    assert digests(tmp_path / "back") == digests(path)
    assert facts(tmp_path / "back") == facts(path)
    with open_whole(tmp_path / "back", {}) as image:
        memory = image.open_snapshot("with/memory").vmstate
        assert memory.read(0, memory.size) == (tmp_path / "memory").read_bytes()
        dirty = [(t.start.tolist(), t.length.tolist()) for t in qcowlib.dirty_extents(image, "b")]
    assert dirty == [([131072], [65536])]


def test_any_chain_is_imported(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(random.Random(2).randbytes(300_032))
    below, image_format = "base.raw", "raw"
    expected = []
    for number, name in enumerate(("monday.qcow2", "tuesday.qcow2", "now.qcow2")):
        qemu_img("create", "-q", "-f", "qcow2", "-b", below, "-F", image_format, name, "1M", cwd=tmp_path)
        qemu_io(tmp_path / name, f"write -P {number + 1} {number * 100}k 200k")
        below, image_format = name, "qcow2"
    for name in ("now.qcow2", "monday.qcow2", "tuesday.qcow2"):
        expected += digests(tmp_path / name)
    import_chain(str(tmp_path / "now.qcow2"), str(tmp_path / "one"))
    active, base, *others = digests(tmp_path / "one")
    assert [active, *others] == expected
    with qcowlib.open_image(tmp_path / "base.raw", format="raw") as raw:
        assert [base] == [state.digests for state in digest_states(raw)]
    assert [fact[1] for fact in facts(tmp_path / "one")] == ["base", "monday", "tuesday"]
    qemu_img("check", tmp_path / "one")


def run_verb(folder: Path, verb: str) -> None:
    if verb == "import":
        import_chain(str(folder / "chain"), str(folder / "result"))
        return
    with open_whole(folder / "image", {}) as image:
        export_chain(image, str(folder / "result"))


@pytest.mark.parametrize("verb", ["export", "import"])
def test_killed_at_every_step(tmp_path: Path, verb: str, record_property: Record) -> None:
    """The source stays whole, the result has its name only when all of it is there, and the same call makes it."""
    path = make_image(tmp_path)
    with open_whole(path, {}) as image:
        export_chain(image, str(tmp_path / "chain"))
    wanted, before = digests(path), path.read_bytes()
    result = tmp_path / "result"
    points = 0
    while not survives(lambda: run_verb(tmp_path, verb), points):
        points += 1
        assert path.read_bytes() == before
        if result.exists():  # killed behind the last name: nothing is left to do
            assert_result(result, verb, wanted)
            (shutil.rmtree if result.is_dir() else os.unlink)(result)
    assert_result(result, verb, wanted)
    assert not list(tmp_path.glob("*.qcow-incomplete"))
    assert points > 30
    record_property("counted", (f"kills of a chain's {verb}", {"kill points": points, "finished": points}))


def assert_result(result: Path, verb: str, wanted: list[dict[str, str]]) -> None:
    if verb == "export":
        assert digests(result / "active.qcow2") == wanted[:1]
        assert json.loads((result / "chain.json").read_text())["complete"] is True
    else:
        assert digests(result) == wanted
        qemu_img("check", result)


def test_the_command_line(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    told = ours(tmp_path, "snapshot", "--export", "chain", "-n", "image")
    assert told.code == 0
    assert not (tmp_path / "chain").exists()
    said = ours(tmp_path, "snapshot", "--export", "chain", "image")
    assert (said.code, said.err, said.out) == (0, "", told.out)
    assert said.out.splitlines()[0].startswith("000-with_memory.qcow2: snapshot 5 (with/memory), 1 MiB (1048576 bytes)")
    planned = ours(tmp_path, "snapshot", "--import", "chain", "-n", "back")
    assert [line.split(": ")[1].split(",")[0] for line in planned.out.splitlines()] == [
        "snapshot with/memory",
        "snapshot two",
        "active layer",
    ]
    assert not (tmp_path / "back").exists()
    assert ours(tmp_path, "snapshot", "--import", "chain", "-q", "back") == (0, "", "")
    assert digests(tmp_path / "back") == digests(path)


def damage(folder: Path) -> None:
    (folder / "chain" / "chain.json").write_text(json.dumps({"version": 1, "states": []}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--export", "chain", "image"], "'chain' exists already"),
        (["--export", "x", "raw"], "is a raw image"),
        (["--export", "x", "luks"], "luks"),
        (["--import", "none", "x"], "none"),
        (["--import", "raw", "x"], "there is no chain to import"),
        (["--import", "image", "x"], "has internal snapshots itself"),
        (["--import", "broken", "x"], "is no chain.json"),
        (["--export", "x", "-c", "y", "image"], "Cannot mix"),
        (["--import", "chain", "--output=json", "x"], "--output cannot be used with --import"),
        (["-l", "-n", "image"], "--dry-run is for"),
    ],
)
def test_refused(tmp_path: Path, words: list[str], message: str) -> None:
    make_image(tmp_path)
    with qcowlib.open_image(tmp_path / "image", policy=LocalFiles()) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        export_chain(image, str(tmp_path / "chain"))
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "chain.json").write_text(json.dumps({"version": 1, "complete": True, "states": [{}]}))
    qcowlib.create_image(
        tmp_path / "luks", 1 << 20, encrypt_format="luks", encrypt_passphrase="x", encrypt_iter_time_ms=0
    )
    before = (tmp_path / "image").read_bytes()
    said = ours(tmp_path, "snapshot", *words)
    assert said.code == 1
    assert message in said.err
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "image").read_bytes() == before
