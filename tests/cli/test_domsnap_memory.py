"""`domsnap memory`: the memory of a snapshot, from a file into the image and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from snapshot.catalog import Catalog
from snapshot.model import DiskMode, DiskSnapshot, DomainSnapshot, MemoryMode, MemorySnapshot
from tests.oracle import assert_clean, qemu_img
from tests.unit.snapshot.samples import DISK_ONLY, EXTERNAL, INTERNAL
from tests.unit.snapshot.test_memory import WHOLE


def with_memory(domain: Path, *, file: Path | None, name: str = "m") -> DomainSnapshot:
    """A snapshot of the qcow2 disk alone, in the file and in the catalog, with its memory in a file."""
    qemu_img("snapshot", "-c", name, domain.parent / "a.qcow2")
    mode = MemoryMode.NO if file is None else MemoryMode.EXTERNAL
    snapshot = replace(
        INTERNAL,
        name=name,
        memory=MemorySnapshot(mode, None if file is None else str(file), machine="pc-i440fx-7.2"),
        disks=(
            DiskSnapshot("vda", DiskMode.INTERNAL, str(domain.parent / "a.qcow2"), "qcow2", internal_name=name),
            DiskSnapshot("vdb", DiskMode.NO, str(domain.parent / "b.raw"), "raw"),
        ),
    )
    Catalog(f"{domain}.snapshots").add(snapshot)
    return snapshot


def test_memory_import_and_export(domsnap: Any, domain: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(WHOLE)
    with_memory(domain, file=memory)
    result = domsnap("memory", "export", "m", "-f", domain, "-o", tmp_path / "out")
    assert (result.code, (tmp_path / "out").exists()) == (3, False)
    assert "in the file" in result.err
    result = domsnap("memory", "import", "m", "-f", domain)
    assert (result.code, result.err) == (0, "")
    assert_clean(domain.parent / "a.qcow2")
    (snapshot,) = Catalog(f"{domain}.snapshots").load()
    assert snapshot.memory == MemorySnapshot(
        MemoryMode.INTERNAL,
        str(domain.parent / "a.qcow2"),
        len(WHOLE),
        "pc-i440fx-7.2",
        devices=("timer", "serial#1"),
    )
    assert domsnap("info", "m", "--check", "-f", domain).code == 0
    result = domsnap("memory", "export", "m", "-f", domain, "-o", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert (tmp_path / "out").read_bytes() == WHOLE
    result = domsnap("memory", "import", "m", "-f", domain)
    assert result.code == 3
    assert "inside already" in result.err


def test_memory_of_unknown_origin_needs_a_word(domsnap: Any, domain: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(WHOLE)
    with_memory(domain, file=None)
    before = (domain.parent / "a.qcow2").read_bytes()
    for words, text in [
        ([], "no memory file"),
        (["-i", memory], "--same-instant"),
        (["-i", memory, "--same-instant", "--disk", "vdb"], "vdb is no disk that"),
    ]:
        result = domsnap("memory", "import", "m", "-f", domain, *words)
        assert (result.code, result.out) == (3, "")
        assert text in result.err
    memory.write_bytes(WHOLE[:-1])
    result = domsnap("memory", "import", "m", "-f", domain, "-i", memory, "--same-instant")
    assert result.code == 1
    assert "cut off" in result.err
    assert (domain.parent / "a.qcow2").read_bytes() == before
    memory.write_bytes(WHOLE)
    assert domsnap("memory", "import", "m", "-f", domain, "-i", memory, "--same-instant").code == 0


def test_memory_is_not_put_into_a_frozen_file(domsnap: Any, domain: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(WHOLE)
    with_memory(domain, file=memory)
    assert domsnap("create", "later", "-f", domain, "--disk-only", "--external", "--digest").code == 0
    result = domsnap("memory", "import", "m", "-f", domain)
    assert result.code == 3
    assert "is frozen by the external snapshot 'later'" in result.err
    assert domsnap("info", "later", "--check", "-f", domain).code == 0


def test_memory_is_not_put_where_qemu_would_not_load_it(domsnap: Any, tmp_path: Path) -> None:
    for snapshot in (EXTERNAL, DISK_ONLY):
        Catalog(tmp_path).add(snapshot)
    result = domsnap("memory", "import", "ext1", "--catalog", tmp_path)
    assert result.code == 3
    assert "vda: external" in result.err
