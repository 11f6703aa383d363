"""Encrypted disks: QEMU 7.2 dies when it writes memory into an encrypted image, so that it is never asked to."""

import json
import os
from pathlib import Path

import pytest

from snapshot import executor
from snapshot.catalog import Catalog
from snapshot.errors import NotPossible
from snapshot.model import DiskMode, DomainSnapshot, RevertOptions, SnapshotRequest
from tests import oracle
from tests.live.rig import Rig, ram_record, snapshot_record

pytestmark = pytest.mark.live

_SECRET = ("--object", "secret,id=key,data=abc")
_LUKS = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"


class Encrypted(Rig):
    """A domain whose first disk is encrypted."""

    def __init__(self, directory: Path, *formats: str) -> None:
        super().__init__(directory, *formats)
        path = self.disks[0].path
        oracle.qemu_img("convert", *_SECRET, "-O", "qcow2", "-o", _LUKS, path, f"{path}.new")
        os.replace(f"{path}.new", path)

    def command(self) -> list[str]:
        first, *rest = super().command()
        return [first, "-object", _SECRET[1], *rest]

    def _disk_options(self) -> list[str]:
        options = super()._disk_options()
        if options:
            options[1] = json.dumps(json.loads(options[1]) | {"encrypt": {"format": "luks", "key-secret": "key"}})
        return options


def test_memory_beside_an_encrypted_disk(tmp_path: Path) -> None:
    guest = Encrypted(tmp_path, "qcow2", "qcow2")
    try:
        domain = guest.start()
        catalog = Catalog(str(tmp_path / "catalog"))
        taken = executor.create(domain, catalog, SnapshotRequest("one"))
        assert isinstance(taken, DomainSnapshot)
        assert taken.memory.file == guest.disks[1].path
        assert [one.snapshots[0].vm_state_size > 0 for one in domain.facts().disks] == [False, True]
        guest.wait_for_ticks(3)
        executor.revert(domain, catalog, "one", RevertOptions(running=False, discard_current=True))
        assert ram_record(domain.qmp, tmp_path) == snapshot_record(taken)
        domain.qmp.execute("cont")
        guest.wait_for_ticks(3)
        assert not guest.complaints()
    finally:
        guest.close()


def test_all_disks_encrypted(tmp_path: Path) -> None:
    guest = Encrypted(tmp_path, "qcow2")
    try:
        domain = guest.start()
        catalog = Catalog(str(tmp_path / "catalog"))
        with pytest.raises(NotPossible, match="into an encrypted image"):
            executor.create(domain, catalog, SnapshotRequest("one"))
        with pytest.raises(NotPossible, match=r"a plain overlay would hold .*--disk vda:internal"):
            executor.create(domain, catalog, SnapshotRequest("one", disk_only=True, default_mode=DiskMode.EXTERNAL))
        for request in (SnapshotRequest("a", memory_file=str(tmp_path / "m")), SnapshotRequest("b", disk_only=True)):
            executor.create(domain, catalog, request)
        guest.wait_for_ticks(2)
        guest.quit(domain.qmp)
        executor.create(guest.inactive(), catalog, SnapshotRequest("off", disk_only=True))
        executor.revert(guest.inactive(), catalog, "b", RevertOptions(discard_current=True))
        guest.start()
        assert not guest.complaints()
    finally:
        guest.close()
