"""Memory files: what a migration stream says about itself, hostile ones, and conversion without a QEMU."""

import io
import os
import struct
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

import qcowlib
from snapshot import memory as memory_module
from snapshot.errors import DomainSnapshotError, MemoryFileError
from snapshot.memory import export_memory, import_memory, memory_file_facts, vmstate_facts
from snapshot.stream import StreamFacts, Window, migration_stream, read_facts
from tests.oracle import assert_clean, image_info

MIB = 1 << 20


def stream_bytes(*, machine: str = "pc-i440fx-7.2", description: bytes | None = None, filler: int = 100_000) -> bytes:
    """A stream with QEMU's start and end and noise between."""
    blocks = [("pc.ram", 4 * MIB), ("vga.vram", 16 * MIB), ("/rom@etc/acpi/tables", 128 * 1024)]
    total = sum(size for _, size in blocks)
    data = b"QEVM" + struct.pack(">I", 3)
    data += b"\x07" + struct.pack(">I", len(machine)) + machine.encode()
    data += b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">IIQ", 0, 4, total | 0x04)
    for name, size in blocks:
        data += bytes([len(name)]) + name.encode() + struct.pack(">Q", size)
    data += struct.pack(">Q", 0x10) + b"\x7e" + struct.pack(">I", 2)
    data += (b"\x00\x06\x00\x00\x00\x05{" * (filler // 7 + 1))[:filler]
    if description is None:
        description = (
            b'{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": ['
            b'{"name": "timer", "instance_id": 0}, {"name": "serial", "instance_id": 1}]}'
        )
    return data + b"\x00\x06" + struct.pack(">I", len(description)) + description


WHOLE = stream_bytes()
BLOCKS = (("pc.ram", 4 * MIB), ("vga.vram", 16 * MIB), ("/rom@etc/acpi/tables", 128 * 1024))


def facts_of(data: bytes) -> StreamFacts:
    return read_facts(migration_stream(io.BytesIO(data), "m"), "m")


def test_facts() -> None:
    assert facts_of(WHOLE) == StreamFacts(len(WHOLE), "pc-i440fx-7.2", BLOCKS, ("timer", "serial#1"), complete=True)


def test_a_stream_larger_than_what_is_read_of_it() -> None:
    data = stream_bytes(filler=6 * MIB)
    assert facts_of(data).devices == ("timer", "serial#1")


@pytest.mark.parametrize("cut", [1, 2, 50, 200, 50_000])
def test_a_cut_stream_is_not_complete(cut: int) -> None:
    facts = facts_of(WHOLE[:-cut])
    assert (facts.complete, facts.devices, facts.ram_blocks) == (False, (), BLOCKS)


@pytest.mark.parametrize(
    "description", [b"{", b'{"devices": [{"name": 5}]}', b'{"devices": [5]}', b"{" + b"[" * 100_000]
)
def test_a_description_that_is_none(description: bytes) -> None:
    assert not facts_of(stream_bytes(description=description)).complete


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"QEVM\0\0\0",
        b"QEVM\0\0\0\2" + WHOLE[8:],
        b"QFI\xfb" + bytes(1000),
        WHOLE[:12],
        WHOLE[:60],
        WHOLE[:8] + b"\x07\xff\xff\xff\xff" + WHOLE[13:],
    ],
)
def test_no_streams(data: bytes) -> None:
    with pytest.raises(MemoryFileError, match=r"^m: "):
        facts_of(data)


@hypothesis.given(st.data())
def test_any_damage_is_an_error_or_facts(data: Any) -> None:
    damaged = bytearray(stream_bytes(filler=100))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(8, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        facts_of(bytes(damaged))
    except MemoryFileError:
        return


def libvirt_file(stream: bytes, *, magic: bytes = b"LibvirtQemudSave", compressed: int = 0) -> bytes:
    xml = b"<domain/>\0".ljust(500, b"\0")
    return (magic + struct.pack("<5I", 2, len(xml), 1, compressed, 0)).ljust(92, b"\0") + xml + stream


def test_libvirt_s_memory_file() -> None:
    window = migration_stream(io.BytesIO(libvirt_file(WHOLE)), "m")
    assert window.read() == WHOLE
    assert read_facts(window, "m").complete
    for bad in (
        libvirt_file(WHOLE, magic=b"LibvirtQemudPart"),
        libvirt_file(WHOLE, compressed=1),
        libvirt_file(b""),
        libvirt_file(WHOLE)[:95],
    ):
        with pytest.raises(MemoryFileError):
            migration_stream(io.BytesIO(bad), "m")


def test_window() -> None:
    window = Window(io.BytesIO(b"0123456789"), 2, 5)
    assert (window.read(3), window.read(), window.read()) == (b"234", b"56", b"")
    assert (window.seek(-2, 2), window.read()) == (3, b"56")
    assert (window.seek(1), window.seek(1, 1), window.read(1)) == (1, 2, b"4")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "d.qcow2"
    qcowlib.create_image(path, 3 * MIB + 512)
    with qcowlib.open_image(path, writable=True) as opened:
        assert isinstance(opened, qcowlib.WritableQcow2Image)
        opened.write(0, b"before")
        qcowlib.create_snapshot(opened, "s1")
        opened.write(0, b"after ")
        qcowlib.create_snapshot(opened, "s2")
    return path


def test_import_and_export_are_inverse(image: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(libvirt_file(WHOLE))
    facts = import_memory(memory, str(image), "s1", machine="pc-i440fx-7.2")
    assert facts == vmstate_facts(str(image), "s1") == facts_of(WHOLE)
    assert_clean(image)
    assert image_info(image)["snapshots"][0]["vm-state-size"] == len(WHOLE)
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    assert export_memory(str(image), "s1", out, progress=lambda done, size: seen.append((done, size))) == facts
    assert out.read_bytes() == WHOLE
    assert seen[-1] == (len(WHOLE), len(WHOLE))
    assert out.stat().st_mode & 0o777 == 0o600
    assert memory_file_facts(out) == facts
    with qcowlib.open_image(image) as opened:
        assert opened.read(0, 6) == b"after "
        with opened.open_snapshot("s1") as view:
            assert view.read(0, 6) == b"before"


def test_import_refuses_and_changes_nothing(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    memory = tmp_path / "memory"

    def refused(data: bytes, snapshot: str = "s1", machine: str | None = None) -> str:
        memory.write_bytes(data)
        with pytest.raises((DomainSnapshotError, qcowlib.QcowError)) as caught:
            import_memory(memory, str(image), snapshot, machine=machine)
        assert image.read_bytes() == before
        return str(caught.value)

    assert "cut off" in refused(WHOLE[:-1])
    assert "not a migration stream" in refused(b"x" * 100)
    assert "the memory of a pc-i440fx-7.2" in refused(WHOLE, machine="pc-q35-7.2")
    assert "Can't find snapshot" in refused(WHOLE, "s9")
    with pytest.raises(MemoryFileError, match="No such file"):
        import_memory(tmp_path / "missing", str(image), "s1")
    memory.write_bytes(WHOLE)
    with qcowlib.open_image(image, writable=True), pytest.raises(qcowlib.ImageLocked):
        import_memory(memory, str(image), "s1")
    import_memory(memory, str(image), "s1")
    before = image.read_bytes()
    assert "already" in refused(WHOLE)


def test_export_refuses_and_leaves_no_file(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(MemoryFileError, match="has no memory"):
        export_memory(str(image), "s1", out)
    with qcowlib.open_image(image, writable=True) as opened:
        assert isinstance(opened, qcowlib.WritableQcow2Image)
        qcowlib.create_snapshot(opened, "torn", vmstate=io.BytesIO(WHOLE[:-9]))
        qcowlib.create_snapshot(opened, "good", vmstate=io.BytesIO(WHOLE))
    with pytest.raises(MemoryFileError, match="cut off"):
        export_memory(str(image), "torn", out)
    with pytest.raises(qcowlib.NoSuchSnapshot):
        export_memory(str(image), "none", out)
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(MemoryFileError, match="File exists"):
        export_memory(str(image), "good", out)
    assert out.read_text() == "precious"
    out.unlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MemoryFileError, match="No space left"):
            export_memory(str(image), "good", out)
    assert not out.exists()

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_module, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_memory(str(image), "good", out)
    assert not out.exists()
