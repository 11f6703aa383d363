"""Snapshots of every kind, for tests that need some."""

from snapshot.model import (
    Consistency,
    DiskMode,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
)

TIME = 1_795_405_639_123_456_789

INTERNAL = DomainSnapshot(
    name="before upgrade",
    domain="guest",
    creation_time=TIME,
    state=DomainState.RUNNING,
    consistency=Consistency.CHECKPOINT,
    memory=MemorySnapshot(
        MemoryMode.INTERNAL,
        file="/images/a.qcow2",
        size=733_727,
        machine="pc-i440fx-7.2",
        ram_size=16 << 20,
        devices=("timer", "0000:00:02.0/virtio-blk"),
        digest="00ff" * 8,
    ),
    disks=(
        DiskSnapshot(
            "vda",
            DiskMode.INTERNAL,
            "/images/a.qcow2",
            "qcow2",
            internal_id="3",
            internal_name="before upgrade",
            virtual_size=8 << 20,
        ),
        DiskSnapshot(
            "vdb",
            DiskMode.INTERNAL,
            "/images/b.qcow2",
            "qcow2",
            internal_id="1",
            internal_name="before upgrade",
            virtual_size=8 << 20,
        ),
    ),
    description="two lines\nof text <&> 'quoted' \u20ac",
)

EXTERNAL = DomainSnapshot(
    name="ext1",
    domain="guest",
    creation_time=TIME + 5,
    state=DomainState.PAUSED,
    consistency=Consistency.CHECKPOINT,
    memory=MemorySnapshot(MemoryMode.EXTERNAL, file="/images/a.ext1.mem", size=700_000, machine="pc-q35-7.2"),
    disks=(
        DiskSnapshot(
            "vda",
            DiskMode.EXTERNAL,
            "/images/a.qcow2",
            "qcow2",
            overlay="/images/a.ext1.qcow2",
            digest="ab" * 16,
            virtual_size=1 << 40,
        ),
        DiskSnapshot("vdb", DiskMode.INTERNAL, "/images/b.qcow2", "qcow2", internal_id="2", internal_name="ext1"),
    ),
    parent="before upgrade",
)

DISK_ONLY = DomainSnapshot(
    name="disks",
    domain="guest",
    creation_time=TIME + 7,
    state=DomainState.DISK_SNAPSHOT,
    consistency=Consistency.QUIESCED,
    memory=MemorySnapshot(MemoryMode.NO),
    disks=(
        DiskSnapshot("system", DiskMode.EXTERNAL, "/images/a.raw", "raw", overlay="/images/a & b's <1>.qcow2"),
        DiskSnapshot("vda", DiskMode.NO, "/images/b.qcow2", "qcow2"),
    ),
    parent="ext1",
)

OFFLINE = DomainSnapshot(
    name="off",
    domain="guest",
    creation_time=TIME + 9,
    state=DomainState.SHUTOFF,
    consistency=Consistency.CLEAN,
    memory=MemorySnapshot(MemoryMode.NO),
    disks=(DiskSnapshot("vda", DiskMode.INTERNAL, "/images/b.qcow2", "qcow2", internal_id="9", internal_name="off"),),
)

ALL = (INTERNAL, EXTERNAL, DISK_ONLY, OFFLINE)
