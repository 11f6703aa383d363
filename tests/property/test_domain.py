"""Random programs on a domain that is off: whatever is created, reverted and deleted, every state reads as it did.

programs of write, create, revert, delete, and overlays that others put on frozen files
--> after each step: active layers, snapshots of the catalog and the others' overlays, byte for byte
"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

import qcowlib
from snapshot.catalog import Catalog
from snapshot.cli.main import main
from snapshot.journal import Journal
from snapshot.model import DiskMode, DiskSnapshot
from tests.oracle import assert_clean, content, qemu_img

SIZE = 256 << 10
FORMATS = {"a": "qcow2", "b": "qcow2", "c": "raw"}
STEPS = 30


class Program:
    """One domain, and what each of its states must read as."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.described = {target: folder / f"{target}.{name}" for target, name in FORMATS.items()}
        self.active = dict.fromkeys(FORMATS, bytes(SIZE))
        self.snapshots: dict[str, dict[str, bytes]] = {}
        self.others: dict[Path, bytes] = {}
        self.outcomes: Counter[str] = Counter()
        lines = ['name = "vm"', 'qmp = "qmp"']
        for target, path in self.described.items():
            qcowlib.create_image(path, SIZE, format=FORMATS[target])
            lines.append(f'[disks.{target}]\npath = "{path.name}"\nformat = "{FORMATS[target]}"')
        self.domain = folder / "vm.toml"
        self.domain.write_text("\n".join(lines) + "\n")
        self.directory = f"{self.domain}.snapshots"

    def domsnap(self, verb: str, *words: str) -> bool:
        """Run a command; whether it was done. What is refused has changed nothing, as the next look shows."""
        code = main([verb, *words, "-f", str(self.domain)])
        assert code in (0, 3), f"{verb} {words}: exit code {code}"
        self.outcomes[f"{verb} {'done' if code == 0 else 'refused'}"] += 1
        return code == 0

    def top(self, target: str) -> tuple[Path, str]:
        """Active layer of a disk, and its format."""
        path = Journal(self.directory).layers().get(target)
        return (self.described[target], FORMATS[target]) if path is None else (Path(path), "qcow2")

    # -- steps

    def write(self) -> None:
        for target in self.chance.sample(sorted(FORMATS), self.chance.randrange(1, 4)):
            offset = self.chance.randrange(0, SIZE - 1, 512)
            data = self.chance.randbytes(self.chance.randrange(1, min(SIZE - offset, 20_000) + 1))
            path, name = self.top(target)
            with qcowlib.open_image(path, format=name, writable=True, policy=qcowlib.LocalFiles()) as image:
                image.write(offset, data)
            old = self.active[target]
            self.active[target] = old[:offset] + data + old[offset + len(data) :]

    def create(self) -> None:
        name = f"s{self.outcomes.total()}"
        modes = {target: self.chance.choice(["internal", "external", "external", "no"]) for target in FORMATS}
        if modes["c"] == "internal" and self.top("c")[1] == "raw":
            modes["c"] = "external"
        words = [f"--disk={target}:{mode}" for target, mode in modes.items()]
        if self.domsnap("create", name, "--disk-only", *words):
            self.snapshots[name] = {target: self.active[target] for target, mode in modes.items() if mode != "no"}

    def revert(self) -> None:
        if not self.snapshots:
            return
        name = self.chance.choice(sorted(self.snapshots))
        words = ["--discard-current"] if self.chance.random() < 0.5 else []
        if not self.domsnap("revert", name, *words):
            return
        safe = [one for one in Catalog(self.directory).load() if one.name not in self.snapshots]
        assert len(safe) == (0 if words else 1)
        for one in safe:
            kept = {disk.target for disk in one.disks if disk.mode is not DiskMode.NO}
            assert kept >= set(self.snapshots[name])
            self.snapshots[one.name] = {target: self.active[target] for target in kept}
        self.active |= self.snapshots[name]

    def delete(self) -> None:
        if not self.snapshots:
            return
        name = self.chance.choice(sorted(self.snapshots))
        words = self.chance.choice([[], ["--into=base"], ["--into=overlay"]])
        if self.domsnap("delete", name, *words):
            del self.snapshots[name]

    def overlay(self) -> None:
        """Somebody else goes on from a frozen file."""
        frozen = [disk for _, disk in self.stored() if disk.mode is DiskMode.EXTERNAL]
        if not frozen:
            return
        disk = self.chance.choice(frozen)
        path = self.folder / f"other{self.outcomes.total()}-{len(self.others)}.qcow2"
        backing = disk.file
        if self.chance.random() < 0.5:
            below = {"driver": disk.format, "file": {"driver": "file", "filename": disk.file}}
            backing = "json:" + json.dumps(below)
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", disk.format, path, str(SIZE))
        self.others[path] = content(path, self.folder)
        self.outcomes["overlays"] += 1

    # -- what there is

    def stored(self) -> list[tuple[str, DiskSnapshot]]:
        return [(one.name, disk) for one in Catalog(self.directory).load() for disk in one.disks]

    def look(self) -> None:
        """Compare every state."""
        for target, data in self.active.items():
            path, name = self.top(target)
            with qcowlib.open_image(path, format=name, policy=qcowlib.LocalFiles()) as image:
                assert image.read(0, SIZE) == data, f"active layer of {target}"
        assert {one.name for one in Catalog(self.directory).load()} == set(self.snapshots)
        found = {name: dict[str, bytes]() for name in self.snapshots}
        for name, disk in self.stored():
            if disk.mode is not DiskMode.NO:
                found[name][disk.target] = self.read(name, disk)
        assert found == self.snapshots
        for path, data in self.others.items():
            with qcowlib.open_image(path, policy=qcowlib.LocalFiles()) as image:
                assert image.read(0, SIZE) == data, path

    def read(self, name: str, disk: DiskSnapshot) -> bytes:
        with qcowlib.open_image(disk.file, format=disk.format, policy=qcowlib.LocalFiles()) as image:
            if disk.mode is DiskMode.EXTERNAL:
                return image.read(0, SIZE)
            assert isinstance(image, qcowlib.Qcow2Image)
            with image.open_snapshot(name=disk.internal_name or name) as state:
                return state.read(0, SIZE)

    def end(self) -> None:
        """The same by the stock tools, and by `info --check`."""
        for name in self.snapshots:
            assert main(["info", "--check", name, "-f", str(self.domain)]) == 0
        for path in self.folder.glob("*.qcow2"):
            assert_clean(path)
        for target, data in self.active.items():
            assert content(self.top(target)[0], self.folder) == data
        for path, data in self.others.items():
            assert content(path, self.folder) == data


@pytest.mark.parametrize("seed", range(8))
def test_every_state_reads_as_it_did(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    program = Program(tmp_path, seed)
    steps = [program.write, program.create, program.revert, program.delete, program.overlay]
    for _ in range(STEPS):
        (step,) = program.chance.choices(steps, [6, 6, 4, 5, 1])
        step()
        program.look()
    program.end()
    assert program.outcomes["create done"] >= 2
    assert program.outcomes["revert done"] + program.outcomes["delete done"] >= 2, program.outcomes
