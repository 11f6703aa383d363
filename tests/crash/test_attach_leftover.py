"""A vm state attached to a snapshot in whose tables QEMU left an earlier one; the power fails at every write."""

import io
import random
from pathlib import Path

import pytest

from qcowlib.operations.snapshots import attach_vmstate, create_snapshot
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import RecordingStorage, crash_states
from tests.crash.guest import VM_STATE
from tests.crash.images import open_writable
from tests.crash.invariants import Content, content_by_library, examine_broken, examine_healed, heal
from tests.oracle import assert_clean, qemu_img

KIB = 1 << 10


def image_with_leftover(path: Path, version: str) -> bytes:
    """An image with the snapshots "full", with a vm state, and "other", without, whose L1 table still names it."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size=512,compat={version}", path, str(64 * KIB))
    storage = BytesStorage(path.read_bytes())
    image = open_writable(storage)
    image.write(0, random.Random(1).randbytes(20 * KIB))
    create_snapshot(image, "full", vmstate=io.BytesIO(random.Random(2).randbytes(70 * KIB)))
    image.write(8 * KIB, random.Random(3).randbytes(4 * KIB))
    image.close()
    path.write_bytes(storage.getvalue())
    qemu_img("snapshot", "-a", "full", path)  # the vm state is in the active layer now
    qemu_img("snapshot", "-c", "other", path)
    image = open_writable(BytesStorage(path.read_bytes()))
    image.write(8 * KIB, random.Random(4).randbytes(4 * KIB))
    image.close()
    assert_clean(path)
    return path.read_bytes()


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_power_fails_while_a_vm_state_is_attached(tmp_path: Path, version: str) -> None:
    path = tmp_path / "image.qcow2"
    initial = image_with_leftover(path, version)
    state = random.Random(5).randbytes(30 * KIB)
    before = content_by_library(BytesStorage(initial, writable=False))
    after = Content(before.active, {**before.saved, "other" + VM_STATE: state})
    disk = BytesStorage(initial, name=str(path))
    recording = RecordingStorage(disk)
    image = open_writable(recording)
    entry = next(snapshot for snapshot in image.snapshots if snapshot.name == "other")
    assert entry.l1_size > image.state.geometry.l1_entries_for(64 * KIB)
    attach_vmstate(image, "other", io.BytesIO(state))
    image.close()
    seen = set()
    for crash in crash_states(recording, initial, samples=60, seed=7):
        data = crash.storage().getvalue()
        if data in seen:
            continue
        seen.add(data)
        found = examine_broken(data, None, str(path))
        assert found in (before, after), crash
        examine_healed(heal(BytesStorage(data, name=str(path)), found), None, found)
    assert len(seen) > 50
    path.write_bytes(disk.getvalue())
    assert_clean(path)
    assert content_by_library(BytesStorage(disk.getvalue(), writable=False)) == after
    for name in ("full", "other"):
        qemu_img("snapshot", "-d", name, path)
    assert_clean(path)
