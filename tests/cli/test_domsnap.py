"""The command domsnap without a QEMU: what it prints, its exit codes, domains that are off."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from snapshot.catalog import Catalog
from snapshot.journal import Journal, Operation
from snapshot.model import DomainSnapshot
from tests.oracle import assert_clean, qemu_img
from tests.unit.snapshot.samples import ALL, INTERNAL, OFFLINE

MIB = 1 << 20


def filled(directory: Path, *snapshots: DomainSnapshot) -> Catalog:
    catalog = Catalog(directory)
    for snapshot in snapshots:
        catalog.add(snapshot)
    return catalog


# --- Start-up and usage


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom snapshot.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "bad = {'numpy', 'construct', 'qemu', 'defusedxml', 'xml', 'asyncio', 'tomllib', 'json'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    for words in (["--help"], ["create", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


def test_the_command_is_installed() -> None:
    program = Path(sys.executable).with_name("domsnap")
    done = subprocess.run([program, "--help"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("create", "list", "info", "revert", "delete", "recover", "memory"):
        assert f"    {verb} " in done.stdout


def test_list_of_a_catalog_loads_no_qmp(tmp_path: Path) -> None:
    filled(tmp_path, *ALL)
    code = (
        "import sys\nfrom snapshot.cli.main import main\nassert main(sys.argv[1:]) == 0\n"
        "bad = {'numpy', 'construct', 'qemu', 'asyncio'} & set(sys.modules)\nassert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code, "list", "--catalog", str(tmp_path)], check=True, stdout=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice"),
        (["list", "more"], "unrecognized"),
        (["create", "--internal", "--external"], "not allowed with"),
        (["create", "--live", "--paused"], "not allowed with"),
        (["create", "--live=fast"], "invalid choice"),
        (["create", "--disk", "vda"], "is not TARGET:internal"),
        (["create", "--disk", "vda:internal,file=/x"], "only an external disk"),
        (["create", "--wait", "-1"], "not a number of seconds"),
        (["info"], "NAME"),
        (["memory"], "export|import"),
        (["memory", "export", "x"], "--output"),
    ],
)
def test_wrong_arguments(domsnap: Any, words: list[str], text: str) -> None:
    result = domsnap(*words)
    assert (result.code, result.out) == (2, "")
    assert text in result.err


def test_version(domsnap: Any) -> None:
    assert domsnap("--version").out == f"domsnap {qcowlib.__version__}\n"


def test_one_line_errors(domsnap: Any, tmp_path: Path) -> None:
    for words, text in [
        (["list"], "domsnap: which domain? Give --qmp SOCKET or --domain FILE\n"),
        (["create", "x", "--catalog", tmp_path], "domsnap: which domain? Give --qmp SOCKET or --domain FILE\n"),
        (["list", "-f", tmp_path / "none"], f"domsnap: {tmp_path}/none: No such file or directory\n"),
        (["info", "x", "--catalog", tmp_path], "domsnap: there is no snapshot 'x'\n"),
    ]:
        result = domsnap(*words)
        assert (result.code, result.out, result.err) == (1, "", text)
    result = domsnap("list", "-s", tmp_path / "none", "--wait", "0.1")
    assert result.code in {1, 5}
    assert result.err.startswith("domsnap: ")
    assert result.err.count("\n") == 1


# --- Listing


def test_list(domsnap: Any, tmp_path: Path) -> None:
    assert domsnap("list", "--catalog", tmp_path).out == ""
    filled(tmp_path, *ALL).set_current("ext1")
    assert domsnap("list", "--catalog", tmp_path).out.splitlines() == [
        "   NAME            CREATED              CONSISTENCY  STATE",
        "   before upgrade  2026-11-23 03:47:19  checkpoint   running",
        "*  ext1            2026-11-23 03:47:19  checkpoint   paused",
        "   disks           2026-11-23 03:47:19  quiesced     disk-snapshot",
        "   off             2026-11-23 03:47:19  clean        shutoff",
    ]
    long = domsnap("list", "-l", "--catalog", tmp_path).out.splitlines()
    assert "internal 717 KiB  vda:internal vdb:internal  -               two lines" in long[1]
    assert "external 684 KiB  vda:external vdb:internal  before upgrade" in long[2]


def test_list_as_json(domsnap: Any, tmp_path: Path) -> None:
    filled(tmp_path, *ALL)
    value = json.loads(domsnap("list", "--output=json", "--catalog", tmp_path).out)
    assert value["current"] == "off"
    assert [each["name"] for each in value["snapshots"]] == [each.name for each in ALL]
    first = value["snapshots"][0]
    assert first["creation-time"] == INTERNAL.creation_time
    assert first["memory"]["ram-size"] == 16 << 20
    assert first["disks"][1]["internal-name"] == "before upgrade"


def test_tree(domsnap: Any, tmp_path: Path) -> None:
    one = replace(OFFLINE, name="one", parent="ext1", creation_time=1)
    deep = replace(OFFLINE, name="deep", parent="one", creation_time=2)
    lost = replace(OFFLINE, name="lost", parent="gone", creation_time=3)
    round_a = replace(OFFLINE, name="round a", parent="round b", creation_time=4)
    round_b = replace(OFFLINE, name="round b", parent="round a", creation_time=5)
    filled(tmp_path, *ALL, one, deep, lost, round_a, round_b).set_current("deep")
    assert domsnap("list", "--tree", "--catalog", tmp_path).out.splitlines() == [
        "lost",
        "before upgrade",
        "+- ext1",
        "   +- one",
        "   |  +- deep (current)",
        "   +- disks",
        "off",
        "round a",
        "+- round b",
    ]


def test_control_characters_of_others_do_not_reach_the_terminal(domsnap: Any, tmp_path: Path) -> None:
    qcowlib.create_image(tmp_path / "a.qcow2", MIB)
    with qcowlib.open_image(tmp_path / "a.qcow2", writable=True) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        qcowlib.create_snapshot(image, "\x1b[31mred\r\n")
    path = tmp_path / "vm.toml"
    path.write_text(f'name = "vm"\n[disks.vda]\npath = "{tmp_path}/a.qcow2"\nformat = "qcow2"\n')
    for words in (["list"], ["list", "--tree"], ["list", "-l"]):
        result = domsnap(*words, "-f", path)
        assert result.code == 0
        assert "\\x1b[31mred\\r\\n" in result.out
        assert "\x1b" not in result.out + result.err


def test_a_damaged_catalog_is_said_with_its_file(domsnap: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.xml").write_text("<!DOCTYPE a><a/>")
    result = domsnap("list", "--catalog", tmp_path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"domsnap: {tmp_path}/bad.xml: document types and entities are not allowed")


# --- A domain that is off


def test_create_list_info_of_a_domain_that_is_off(domsnap: Any, domain: Path) -> None:
    with qcowlib.open_image(domain.parent / "a.qcow2", writable=True) as image:
        image.write(0, b"first")
    before = sorted(os.listdir(domain.parent))
    dry = domsnap("create", "s1", "-f", domain, "--disk-only", "--dry-run")
    assert dry.code == 0
    assert dry.out.startswith("  1. ")
    assert "undo: " in dry.out
    assert sorted(os.listdir(domain.parent)) == before
    result = domsnap("create", "s1", "-f", domain, "--disk-only", "--description", "the first", "--digest")
    assert (result.code, result.out) == (0, "created snapshot 's1': clean, vda:internal vdb:external\n")
    assert "s1" in qemu_img("snapshot", "-l", domain.parent / "a.qcow2").stdout
    listing = domsnap("list", "-l", "-f", domain)
    assert listing.code == 0
    assert [line.split("  ")[0] for line in listing.out.splitlines()] == ["", "*"]
    info = domsnap("info", "s1", "--check", "-f", domain)
    assert info.code == 0, info.out + info.err
    assert "consistency:  clean\n" in info.out
    assert f"frozen  {domain.parent}/b.raw (raw)\n" in info.out
    assert info.out.endswith("problems:     none (checked)\n")
    with open(domain.parent / "b.raw", "r+b") as file:  # what must never happen to a frozen file
        file.write(b"changed")
    assert domsnap("info", "s1", "-f", domain).code == 0
    info = domsnap("info", "s1", "--check", "-f", domain)
    assert info.code == 1
    assert f"  - vdb: '{domain.parent}/b.raw' has changed since the snapshot was taken\n" in info.out


def test_default_name_and_files(domsnap: Any, domain: Path) -> None:
    result = domsnap("create", "--disk-only", "--external", "-f", domain)
    assert result.code == 0, result.err
    (name,) = [snapshot.name for snapshot in Catalog(f"{domain}.snapshots").load()]
    assert name.startswith("snapshot-20")
    assert set(os.listdir(domain.parent)) == {
        "a.qcow2", "b.raw", "vm.toml", "vm.toml.snapshots", f"a.{name}.qcow2", f"b.{name}.qcow2",
    }  # fmt: skip
    assert_clean(domain.parent / f"a.{name}.qcow2")


def test_made_names_of_one_second_are_told_apart(domsnap: Any, domain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cli.cmd_create", "gather"):
        monkeypatch.setattr(f"snapshot.{module}.name_from_time", lambda prefix: f"{prefix}-now")
    for _ in range(3):
        result = domsnap("create", "--disk-only", "-f", domain)
        assert result.code == 0, result.err
    for _ in range(2):
        result = domsnap("revert", "snapshot-now-2", "-f", domain)
        assert result.code == 0, result.err
    assert [snapshot.name for snapshot in Catalog(f"{domain}.snapshots").load()] == [
        "snapshot-now", "snapshot-now-2", "snapshot-now-3", "before-revert-now", "before-revert-now-2",
    ]  # fmt: skip
    assert domsnap("create", "snapshot-now", "--disk-only", "-f", domain).code == 3  # a name that is given is kept


def test_everything_that_is_against_it_is_listed(domsnap: Any, domain: Path) -> None:
    (domain.parent / "there.qcow2").write_text("precious")
    result = domsnap(
        "create", "7", "-f", domain, "--disk-only", "--disk", "vdb:internal", "--disk", "vdz:no",
        "--disk", f"vda:external,file={domain.parent}/there.qcow2",
    )  # fmt: skip
    assert (result.code, result.out) == (3, "")
    first, *reasons = result.err.splitlines()
    assert first == "domsnap: cannot create snapshot '7':"
    for text in ("reads as a number", "raw", "vdz", "exists"):
        assert any(text in reason for reason in reasons), (text, reasons)
    assert (domain.parent / "there.qcow2").read_text() == "precious"
    result = domsnap("create", "\ufffe", "-f", domain, "--disk-only", "--description", "bell \x07", "--disk", "x:no")
    assert result.code == 3
    first, *reasons = result.err.splitlines()
    for text in ("the name", "the description", "'x'"):
        assert any(text in reason for reason in reasons), (text, reasons)
    result = domsnap("create", "good", "-f", domain, "--disk-only", "--description", "bell \x07")
    assert (result.code, result.out) == (3, "")
    assert not os.path.exists(domain.parent / "b.good.qcow2")


def test_the_snapshot_of_an_image_in_use_is_refused(domsnap: Any, domain: Path) -> None:
    with qcowlib.open_image(domain.parent / "a.qcow2", writable=True):
        result = domsnap("create", "s1", "-f", domain, "--disk-only")
        assert result.code == 3
        listing = domsnap("list", "-f", domain)
        assert listing.code == 0
        assert "vda is used by another process" in listing.err
    assert Catalog(f"{domain}.snapshots").load() == []


def test_exit_codes_of_busy_and_cut_off(domsnap: Any, domain: Path) -> None:
    journal = Journal(f"{domain}.snapshots")
    with journal.locked(1):
        result = domsnap("create", "s1", "-f", domain, "--disk-only", "--wait", "0.1")
        assert result.code == 5, result.err
    operation = Operation("create", "s0", "vm", "token", None, None, False, ())
    journal.start(operation)
    journal.leave()
    result = domsnap("create", "s1", "-f", domain, "--disk-only")
    assert result.code == 4
    assert "recover" in result.err
    assert "the create of 's0' was cut off" in domsnap("list", "-f", domain).err
    result = domsnap("recover", "-f", domain)
    assert (result.code, result.out) == (0, "undid the create of 's0'\n")
    assert domsnap("recover", "-f", domain).out == "nothing to recover\n"
    assert domsnap("create", "s1", "-f", domain, "--disk-only").code == 0


def test_info_says_what_is_missing(domsnap: Any, domain: Path) -> None:
    assert domsnap("create", "s1", "-f", domain, "--disk-only").code == 0
    qemu_img("snapshot", "-d", "s1", domain.parent / "a.qcow2")
    os.rename(domain.parent / "b.raw", domain.parent / "moved.raw")
    result = domsnap("info", "s1", "--catalog", f"{domain}.snapshots")
    assert result.code == 1
    assert result.out.splitlines()[-3:] == [
        "problems:     2",
        f"  - vda: '{domain.parent}/a.qcow2' has the snapshot 's1' no more",
        f"  - vdb: '{domain.parent}/b.raw' is missing",
    ]
    value = json.loads(domsnap("info", "s1", "--catalog", f"{domain}.snapshots", "--output=json").out)
    assert len(value["problems"]) == 2
    assert value["current"] is True


def test_snapshots_of_qemu_img_are_shown_and_marked(domsnap: Any, domain: Path) -> None:
    qemu_img("snapshot", "-c", "theirs", domain.parent / "a.qcow2")
    lines = domsnap("list", "-f", domain).out.splitlines()
    assert lines[1].split()[:2] == ["+", "theirs"]
    assert "unknown" in lines[1]
    assert "theirs (only in the files)" in domsnap("list", "--tree", "-f", domain).out
    assert "origin:       found in the files\n" in domsnap("info", "theirs", "-f", domain).out


def first_bytes(path: Path) -> bytes:
    with qcowlib.open_image(path, policy=qcowlib.LocalFiles()) as image:
        return image.read(0, 5)


def test_revert_and_delete_of_a_domain_that_is_off(domsnap: Any, domain: Path) -> None:
    disk = domain.parent / "a.qcow2"

    def write(data: bytes) -> None:
        with qcowlib.open_image(disk, writable=True) as image:
            image.write(0, data)

    where = ["-f", domain]
    write(b"first")
    assert domsnap("create", "s1", "--disk-only", "--internal", "--disk", "vdb:no", *where).code == 0
    write(b"later")
    dry = domsnap("revert", "s1", "--dry-run", *where)
    assert dry.out.startswith("  1. "), dry.err
    assert first_bytes(disk) == b"later"
    result = domsnap("revert", "s1", *where)
    assert (result.code, result.out) == (0, "reverted to snapshot 's1'\n"), result.err
    assert first_bytes(disk) == b"first"
    # The state that was given up is in a snapshot of its own.
    names = [snapshot.name for snapshot in Catalog(f"{domain}.snapshots").load()]
    assert len(names) == 2
    (safety,) = set(names) - {"s1"}
    assert domsnap("revert", safety, "--discard-current", *where).code == 0
    assert first_bytes(disk) == b"later"
    result = domsnap("revert", "nothing", *where)
    assert (result.code, result.err) == (1, "domsnap: there is no snapshot 'nothing'\n")
    result = domsnap("delete", "s1", *where)
    assert (result.code, result.out) == (0, "deleted snapshot 's1'\n"), result.err
    assert first_bytes(disk) == b"later"
    result = domsnap("delete", safety, "--metadata-only", *where)
    assert result.code == 0
    assert Catalog(f"{domain}.snapshots").load() == []
    listing = domsnap("list", *where).out
    assert safety in listing  # its entry in the file is still there
    assert "+" in listing
    assert_clean(disk)


def test_a_base_is_not_changed_under_an_overlay_that_describes_it(domsnap: Any, domain: Path) -> None:
    disk, where = domain.parent / "a.qcow2", ["-f", domain]
    with qcowlib.open_image(disk, writable=True) as image:
        image.write(0, b"first")
    assert domsnap("create", "s1", "--disk-only", "--external", "--disk", "vdb:no", *where).code == 0
    overlay = domain.parent / "a.s1.qcow2"
    with qcowlib.open_image(overlay, writable=True, policy=qcowlib.LocalFiles()) as image:
        image.write(0, b"later")
    backing = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}})
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", domain.parent / "other.qcow2", "1M")
    result = domsnap("delete", "s1", *where)
    assert (result.code, result.out) == (0, "deleted snapshot 's1'\n"), result.err
    states = [first_bytes(path) for path in (disk, domain.parent / "other.qcow2", overlay)]
    assert states == [b"first", b"first", b"later"]


@pytest.fixture
def forged(domain: Path) -> Path:
    """The raw disk of the domain, to which its guest has written a qcow2 image with a backing file and a snapshot."""
    victim, image = domain.parent / "victim", domain.parent / "forged.qcow2"
    victim.write_bytes(b"secret" + bytes(MIB - 6))
    qemu_img("create", "-q", "-f", "qcow2", "-b", victim, "-F", "raw", image, "512k")
    qemu_img("snapshot", "-c", "s0", image)
    disk = domain.parent / "b.raw"
    disk.write_bytes(image.read_bytes().ljust(MIB, b"."))
    image.unlink()
    return disk


@pytest.mark.parametrize("into", ["base", "overlay"])
def test_what_a_guest_writes_to_a_raw_disk_is_never_taken_for_an_image(
    domsnap: Any, domain: Path, forged: Path, into: str
) -> None:
    where, content = ["-f", domain], bytearray(forged.read_bytes())
    victim = forged.parent / "victim"
    secret = victim.read_bytes()
    assert "s0" not in domsnap("list", *where).out
    assert domsnap("create", "s1", "--disk-only", "--external", "--disk", "vda:no", *where).code == 0
    assert domsnap("create", "s2", "--disk-only", "--external", "--disk", "vda:no", *where).code == 0
    overlays = [forged.parent / f"b.s{number}.qcow2" for number in (1, 2)]
    with qcowlib.open_image(overlays[1], writable=True, policy=qcowlib.LocalFiles()) as image:
        image.write(70_000, b"later")
        content[70_000:70_005] = b"later"
    listing = domsnap("list", *where)
    assert (listing.code, "s0" in listing.out) == (0, False)
    result = domsnap("delete", "s2", f"--into={into}", *where)
    assert result.code == 0, result.err
    (left,) = [path for path in overlays if path.exists()] if into == "base" else [overlays[1]]
    with qcowlib.open_image(left, policy=qcowlib.LocalFiles()) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        assert image.header.backing_format in ("raw", "qcow2")
        assert image.read(0, MIB) == content
    result = domsnap("delete", "s1", f"--into={into}", *where)
    assert result.code == 0, result.err
    if into == "base":
        assert forged.read_bytes() == content
    else:
        with qcowlib.open_image(left, policy=qcowlib.LocalFiles()) as image:
            assert image.read(0, MIB) == content
    assert victim.read_bytes() == secret
