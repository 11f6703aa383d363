"""qcow check -r, --dry-run and --undo beside the stock tool, and where ours does more or less on purpose."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import oracle
from tests.cli.side_by_side import Said, ours, stock
from tests.oracle import assert_clean, content, qemu_img, qemu_io

REFCOUNT_BLOCK, L1, L2 = 0x20000, 0x30000, 0x40000


def put(path: Path, offset: int, layout: str, *values: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">" + layout, *values))


def image(path: Path, *commands: str, options: str = "compat=1.1") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, str(path), "1M")
    qemu_io(path, *(commands or ("write -P 1 0 64k", "write -P 2 192k 100k")))
    return path


def both(tmp_path: Path, damage: Callable[[Path], None], *arguments: str) -> tuple[Said, Said]:
    """What the stock tool and ours say of the same image; each repairs a copy of its own."""
    said = []
    for program, name in ((stock, "stock"), (ours, "ours")):
        folder = tmp_path / name
        folder.mkdir()
        image(folder / "image")
        damage(folder / "image")
        said.append(program(folder, "check", *arguments, "image"))
    return said[0], said[1]


def same_l2_entry_twice(path: Path) -> None:
    put(path, L2 + 8, "Q", 1 << 63 | 0x50000)


def leaks_and_flags(path: Path) -> None:
    put(path, REFCOUNT_BLOCK, "H", 2)
    put(path, L1, "Q", L2)


@pytest.mark.parametrize("form", [[], ["--output=json"], ["-q"]], ids=["human", "json", "quiet"])
@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: put(path, REFCOUNT_BLOCK + 10, "H", 0), id="refcount zero"),
        pytest.param(lambda path: put(path, REFCOUNT_BLOCK + 40, "H", 1), id="leak"),
        pytest.param(lambda path: put(path, REFCOUNT_BLOCK + 10, "H", 3), id="refcount too high"),
        pytest.param(lambda path: put(path, 0x10000, "Q", 0), id="no refcount block"),
        pytest.param(lambda path: put(path, L2, "Q", 0x50000), id="flag"),
        pytest.param(lambda path: put(path, 72, "Q", 1), id="dirty"),
        pytest.param(lambda path: put(path, 72, "Q", 2), id="corrupt"),
        pytest.param(lambda path: put(path, 88, "Q", 1 << 63), id="unknown autoclear bit"),
        pytest.param(lambda path: put(path, 80, "Q", 0), id="sound"),
        same_l2_entry_twice,
        leaks_and_flags,
    ],
)
def test_as_the_stock_tool(tmp_path: Path, damage: Callable[[Path], None], mode: str, form: list[str]) -> None:
    theirs, mine = both(tmp_path, damage, "-r", mode, *form)
    assert mine.code == theirs.code
    assert mine.err == theirs.err
    if form == ["--output=json"] and theirs.out:
        # The new refcount blocks may lie elsewhere.
        place = "image-end-offset"
        assert {**json.loads(mine.out), place: 0} == {**json.loads(theirs.out), place: 0}
    else:
        assert [line for line in mine.out.splitlines() if "end offset" not in line] == [
            line for line in theirs.out.splitlines() if "end offset" not in line
        ]
    paths = [tmp_path / name / "image" for name in ("stock", "ours")]
    assert [oracle.image_check(path)["rc"] for path in paths] in ([0, 0], [2, 2])
    headers = [path.read_bytes()[72:96] for path in paths]
    assert headers[0] == headers[1], "feature bits"
    assert content(paths[0], tmp_path) == content(paths[1], tmp_path)
    assert os.listdir(tmp_path / "ours") == ["image"], "what can be computed again needs no undo file"


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("entry", [1 << 63 | 1 << 40, 1 << 63 | L2 | 0x200], ids=["beyond the end", "unaligned"])
def test_one_damaged_l1_entry(tmp_path: Path, mode: str, entry: int) -> None:
    """The stock tool gives all clusters back. Ours finds the L2 table again, or leaves the image as it is."""
    path = image(tmp_path / "image")
    wanted = content(path, tmp_path)
    put(path, L1, "Q", entry)
    before = path.read_bytes()
    said = ours(tmp_path, "check", "-r", mode, "image")
    if mode == "leaks":
        assert said.code == 2
        assert path.read_bytes() == before
        assert "Nothing was repaired: the mapping is damaged" in said.err
    else:
        assert said.code == 0, said
        assert "was found again" in said.err
        assert_clean(path)
        assert content(path, tmp_path) == wanted


def test_leaks_stay_while_a_refcount_is_too_low(tmp_path: Path) -> None:
    """The cluster that nothing refers to may be the one that the wrong entry named."""
    path = image(tmp_path / "image")
    put(path, L2, "Q", 1 << 63 | 0x60000)
    before = path.read_bytes()
    said = ours(tmp_path, "check", "-r", "leaks", "image")
    assert said.code == 2
    assert said.err.endswith("Nothing was repaired: refcounts are too low, so that nothing may be given back\n")
    assert path.read_bytes() == before


def test_lost_ranges_are_listed(tmp_path: Path) -> None:
    path = image(tmp_path / "image", "write -P 1 0 64k", "write -P 2 192k 128k")
    qemu_img("snapshot", "-c", "taken", str(path))
    put(path, L2 + 3 * 8, "QQ", 1 << 40, 1 << 41)
    said = ours(tmp_path, "check", "-r", "all", "image")
    assert said.code == 0, said
    lost = [line for line in said.err.splitlines() if line.startswith("Lost: ")]
    assert lost == [
        f"Lost: {layer}, 131072 bytes at 0x30000, which read as zeroes or from the backing file now"
        for layer in ("active layer", "snapshot 1 (taken)")
    ]
    assert "kept in 'image.repair-undo'" in said.err
    assert_clean(path)
    assert content(path, tmp_path) == b"\1" * 65536 + bytes((1 << 20) - 65536)


def test_dry_run_and_undo(tmp_path: Path) -> None:
    path = image(tmp_path / "image")
    put(path, L2, "Q", 1 << 40)
    put(path, 72, "Q", 2)
    damaged = path.read_bytes()
    said = ours(tmp_path, "check", "-r", "all", "--dry-run", "image")
    assert said.code == 2
    assert "Lost: active layer, 65536 bytes at 0x0" in said.err
    assert said.out.endswith("Nothing was changed.\n")
    assert path.read_bytes() == damaged
    assert os.listdir(tmp_path) == ["image"]
    told = json.loads(ours(tmp_path, "check", "-r", "all", "--dry-run", "--output=json", "image").out)
    assert told["lost-ranges"] == [{"layer": "active layer", "start": 0, "length": 65536}]
    assert path.read_bytes() == damaged

    assert ours(tmp_path, "check", "-q", "-r", "all", "image").code == 0
    repaired = path.read_bytes()
    assert repaired != damaged
    assert struct.unpack_from(">Q", repaired, 72) == (0,)
    assert sorted(os.listdir(tmp_path)) == ["image", "image.repair-undo"]
    assert ours(tmp_path, "check", "--undo", "image.repair-undo", "image") == (0, "The repair was taken back.\n", "")
    assert path.read_bytes() == damaged
    # An undo file is never replaced.
    first = (tmp_path / "image.repair-undo").read_bytes()
    assert ours(tmp_path, "check", "-q", "-r", "all", "image").code == 0
    assert path.read_bytes() == repaired
    assert (tmp_path / "image.repair-undo").read_bytes() == first
    assert (tmp_path / "image.repair-undo.1").exists()


def test_undo_refuses(tmp_path: Path) -> None:
    path = image(tmp_path / "image")
    put(path, L2, "Q", 1 << 40)
    assert ours(tmp_path, "check", "-q", "-r", "all", "image").code == 0
    qemu_io(path, "write -P 7 512k 64k")
    changed = path.read_bytes()
    image(tmp_path / "other")
    for name in ("image", "other"):
        said = ours(tmp_path, "check", "--undo", "image.repair-undo", name)
        assert said.code == 1
        assert f"'{name}' has been changed since the repair, or the undo file is of another image ('image')" in said.err
    assert path.read_bytes() == changed
    undo = bytearray((tmp_path / "image.repair-undo").read_bytes())
    undo[200] ^= 1
    (tmp_path / "image.repair-undo").write_bytes(undo)
    assert "its checksum is wrong" in ours(tmp_path, "check", "--undo", "image.repair-undo", "image").err
    assert "is not one" in ours(tmp_path, "check", "--undo", "other", "image").err
    assert "Could not read" in ours(tmp_path, "check", "--undo", "missing", "image").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-r", "some"], "Unknown option value for -r (expecting 'leaks' or 'all'): some"),
        (["--dry-run"], "--dry-run belongs to -r"),
        (["-r", "all", "--undo", "x"], "-r and --undo are mutually exclusive"),
        (["-U", "-r", "all"], "Could not open 'image': force-share=on can only be used with read-only images"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_arguments(tmp_path: Path, words: list[str], message: str) -> None:
    path = image(tmp_path / "image")
    before = path.read_bytes()
    said = ours(tmp_path, "check", *words, "image")
    assert said.code == 1
    assert message in said.err
    assert path.read_bytes() == before


def test_raw_has_no_check(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 16))
    said = ours(tmp_path, "check", "-f", "raw", "-r", "all", "image")
    assert said == (63, "", "qemu-img: This image format does not support checks\n")


def test_image_in_use(tmp_path: Path) -> None:
    import qcowlib

    path = image(tmp_path / "image")
    put(path, REFCOUNT_BLOCK + 40, "H", 1)
    with qcowlib.open_image(path, format="qcow2"):
        before = path.read_bytes()
        said = ours(tmp_path, "check", "-r", "all", "image")
    assert said.code == 1
    assert "Is another process using the image" in said.err
    assert path.read_bytes() == before


def test_corrupt_bit_stays_while_something_is_damaged(tmp_path: Path) -> None:
    """More references than a refcount of one bit can hold: neither tool can repair that."""
    path = image(tmp_path / "image", options="refcount_bits=1")
    same_l2_entry_twice(path)
    put(path, 72, "Q", 2)
    before = path.read_bytes()
    said = ours(tmp_path, "check", "-r", "all", "image")
    assert said.code == 2
    assert "Use qemu-img amend to increase the refcount entry width" in said.err
    assert path.read_bytes() == before
