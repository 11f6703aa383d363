"""Plans of reverts: which way, what is refused, in which order."""

from dataclasses import replace
from typing import Any

import pytest

from snapshot.domain import DomainFacts, StoredSnapshot
from snapshot.model import (
    Consistency,
    DiskMode,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
    RevertOptions,
)
from snapshot.plan_revert import RevertRequest, Way, reasons, steps
from tests.unit.snapshot.facts import GIB, disk, domain

INTERNAL, EXTERNAL, NO = DiskMode.INTERNAL, DiskMode.EXTERNAL, DiskMode.NO
COMMAND = ("qemu", "-qmp", "unix:{qmp}", "-drive", "file={disk:vda}", "-drive", "file={disk:vdb}", "{incoming}")


def snapshot(*modes: DiskMode, memory: MemoryMode = MemoryMode.NO) -> DomainSnapshot:
    """Of the disks vda, vdb ..., in their files or frozen in files of the name /d/vda.base."""
    disks = tuple(
        DiskSnapshot(
            f"vd{'abc'[number]}",
            mode,
            f"/d/vd{'abc'[number]}.{'qcow2' if mode is INTERNAL else 'base'}",
            "qcow2",
            virtual_size=GIB,
        )
        for number, mode in enumerate(modes)
    )
    kept = MemorySnapshot(memory, "/d/s.mem", machine="pc-i440fx-7.2", ram_size=GIB, devices=("vda (virtio)",))
    state = DomainState.RUNNING if memory is not MemoryMode.NO else DomainState.DISK_SNAPSHOT
    return DomainSnapshot(
        "s",
        "g",
        1,
        state,
        Consistency.CHECKPOINT,
        kept if memory is not MemoryMode.NO else MemorySnapshot(memory),
        disks,
    )


def holding(target: str, memory: int = 0, **facts: Any) -> Any:
    """A disk with the internal snapshot."""
    return disk(target, snapshots=(StoredSnapshot("1", "s", memory),), **facts)


def request(what: DomainSnapshot, facts: DomainFacts, **more: Any) -> RevertRequest:
    files = [one.file for one in what.disks]
    fields: dict[str, Any] = {
        "snapshot": what, "facts": facts, "options": RevertOptions(), "described": {}, "command": COMMAND,
        "socket": "/s", "layers": {}, "current": None, "token": "t", "directory": "/c", "dependents": {},
        "missing": (), "stems": {path: path.rsplit(".")[0] for path in files},
    }  # fmt: skip
    return RevertRequest(**(fields | more))


def loadable(**more: Any) -> RevertRequest:
    what = snapshot(INTERNAL, INTERNAL, memory=MemoryMode.INTERNAL)
    facts = domain(holding("vda", 100), holding("vdb"), devices=("vda (virtio)",))
    return request(what, facts, **more)


def test_load() -> None:
    plan = steps(loadable())
    assert loadable().way is Way.LOAD
    assert reasons(loadable()) == []
    assert [step.action for step in plan] == [
        "stop",
        "save-internal",
        "load-internal",
        "switch",
        "drop-way-back",
        "settle",
    ]
    assert [step.action for step in plan if step.commits] == ["switch"]


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("vdb has 2 internal snapshots",
         {"disks": (holding("vda", 1), disk("vdb", snapshots=(StoredSnapshot("1", "s", 0),) * 2))}),
        ("vdb has 0 internal snapshots", {"disks": (holding("vda", 1), disk("vdb"))}),
        ("2 disks hold memory", {"disks": (holding("vda", 1), holding("vdb", 1))}),
        ("0 disks hold memory", {"disks": (holding("vda"), holding("vdb"))}),
        ("vdb has the dirty bitmap 'b'", {"disks": (holding("vda", 1), holding("vdb", bitmaps=("b",)))}),
        ("vdc can be written and is not in the snapshot", {"disks": (holding("vda", 1), holding("vdb"), disk("vdc"))}),
        ("vdb is on '/d/other.qcow2' now", {"disks": (holding("vda", 1), holding("vdb", path="/d/other.qcow2"))}),
        ("no disk 'vdb' any more", {"disks": (holding("vda", 1),)}),
        ("of a pc-i440fx-7.2, and the domain is a q35", {"machine": "q35"}),
        ("bytes of RAM", {"ram_size": 2 * GIB}),
        ("missing vda (virtio); new net (e1000)", {"devices": ("net (e1000)",)}),
        ("a migration is under way", {"migration": "active"}),
        ("state restore-vm", {"run_state": "restore-vm"}),
    ],
)  # fmt: skip
def test_what_is_against_a_load(text: str, changes: dict[str, Any]) -> None:
    one = loadable()
    assert any(text in reason for reason in reasons(replace(one, facts=replace(one.facts, **changes))))


def test_nothing_that_others_need_is_changed() -> None:
    one = loadable(dependents={"/d/vdb.qcow2": ["/d/later.qcow2"]})
    assert any("would destroy what is based on it" in reason for reason in reasons(one))
    frozen = request(snapshot(EXTERNAL), domain(disk("vda", path="/d/vda.base")))
    assert any("which the snapshot had frozen" in reason for reason in reasons(frozen))
    assert "'/d/x' is missing" in reasons(loadable(missing=["/d/x"]))


def test_swap() -> None:
    one = request(snapshot(EXTERNAL, EXTERNAL), domain())
    assert one.way is Way.SWAP
    assert reasons(one) == []
    actions = [step.action for step in steps(one)]
    assert actions == ["make-overlay", "add-node", "add-base"] * 2 + [
        "stop", "swap", "switch", "reset", "drop-nodes", "settle",
    ]  # fmt: skip
    assert steps(one)[-1].arguments == {"running": True}
    some = request(snapshot(EXTERNAL, EXTERNAL), domain(), options=RevertOptions(disks=("vdb",)))
    assert len([step for step in steps(some) if step.action == "make-overlay"]) == 1
    inside = request(snapshot(EXTERNAL, INTERNAL), domain())
    assert any("a running QEMU cannot go back to" in reason for reason in reasons(inside))


def test_restart() -> None:
    what = snapshot(EXTERNAL, EXTERNAL, memory=MemoryMode.EXTERNAL)
    active = request(what, domain())
    assert (active.way, reasons(active)) == (Way.RESTART, [])
    actions = [step.action for step in steps(active)]
    assert actions == ["make-overlay", "make-overlay", "stop", "start", "switch", "take-over", "settle"]
    start = next(step for step in steps(active) if step.action == "start").arguments
    assert start["command"] == [
        "qemu", "-qmp", "unix:/s.t", "-drive", "file=/d/vda.s-t.qcow2", "-drive", "file=/d/vdb.s-t.qcow2", "-S",
        "-incoming", "defer",
    ]  # fmt: skip
    assert start["sizes"] == {"/d/vda.s-t.qcow2": GIB, "/d/vdb.s-t.qcow2": GIB}
    off = request(what, domain(active=False))
    assert reasons(off) == []
    assert [step.action for step in steps(off)] == [
        "make-overlay",
        "make-overlay",
        "start",
        "switch",
        "take-over",
        "settle",
    ]


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("start command is not known", {"command": ()}),
        ("no place for the QMP socket", {"command": [word for word in COMMAND if "{qmp}" not in word]}),
        ("no place for the QMP socket", {"socket": None}),
        ("no argument {incoming}", {"command": COMMAND[:-1]}),
        ("has no {disk:vdb}", {"command": [word for word in COMMAND if "vdb" not in word]}),
    ],
)
def test_what_is_against_a_restart(text: str, changes: dict[str, Any]) -> None:
    what = snapshot(EXTERNAL, EXTERNAL, memory=MemoryMode.EXTERNAL)
    assert any(text in reason for reason in reasons(request(what, domain(), **changes)))


def test_a_running_qemu_cannot_apply_internal_snapshots_beside_a_memory_file() -> None:
    what = snapshot(INTERNAL, EXTERNAL, memory=MemoryMode.EXTERNAL)
    assert any("needs the domain shut down first" in reason for reason in reasons(request(what, domain())))
    off = request(what, domain(active=False))
    assert [step.action for step in steps(off)] == [
        "make-overlay", "hold", "create-internal", "apply-internal", "let-go", "start", "switch", "take-over",
        "drop-way-back", "settle",
    ]  # fmt: skip


def test_offline() -> None:
    one = request(snapshot(INTERNAL, EXTERNAL, NO), domain(active=False))
    assert (one.way, reasons(one)) == (Way.OFFLINE, [])
    assert [step.action for step in steps(one)] == [
        "hold", "create-internal", "apply-internal", "make-overlay", "switch", "let-go", "drop-way-back",
    ]  # fmt: skip
    used = request(snapshot(INTERNAL), domain(disk(in_use="another process"), active=False))
    assert any("give its QMP socket" in reason for reason in reasons(used))
    bitmap = request(snapshot(INTERNAL), domain(disk(bitmaps=("b",)), active=False))
    assert any("dirty bitmap 'b'" in reason for reason in reasons(bitmap))
    running = request(snapshot(INTERNAL), domain(active=False), options=RevertOptions(running=True))
    assert any("has no memory to go on running with" in reason for reason in reasons(running))
