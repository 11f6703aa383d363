"""Plans of reverts: which way, what is refused, in which order."""

from dataclasses import replace
from typing import Any

import pytest

from snapshot.domain import DomainFacts, StoredSnapshot
from snapshot.model import (
    Consistency,
    DiskMode,
    DiskRequest,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
    RevertOptions,
    SnapshotRequest,
)
from snapshot.plan import resolve
from snapshot.plan_revert import steps
from snapshot.plan_revert_reasons import reasons
from snapshot.plan_revert_request import RevertRequest, StateFacts, Way, after_keeping
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
        "socket": "/s", "layers": {}, "current": None, "token": "t", "directory": "/c", "dependents": {}, "frozen": (),
        "missing": (), "stems": {path: path.rsplit(".")[0] for path in files}, "states": {},
        "stored": {one.file: in_file(facts, one.target) for one in what.disks},
    }  # fmt: skip
    return RevertRequest(**(fields | more))


def in_file(facts: DomainFacts, target: str) -> tuple[StoredSnapshot, ...]:
    """What the domain's facts say, or the snapshot alone for a disk that they do not name."""
    found = [one.snapshots for one in facts.disks if one.disk.target == target]
    return found[0] if found else (StoredSnapshot("1", "s", 0),)


def loadable(**more: Any) -> RevertRequest:
    what = snapshot(INTERNAL, INTERNAL, memory=MemoryMode.INTERNAL)
    what = replace(what, memory=replace(what.memory, file="/d/vda.qcow2"))
    facts = domain(holding("vda", 100), holding("vdb"), devices=("vda (virtio)",))
    return request(what, replace(facts, **more.pop("facts", {})), **more)


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
        ("no disk 'vdb' any more", {"disks": (holding("vda", 1),)}),
        ("of a pc-i440fx-7.2, and the domain is a q35", {"machine": "q35"}),
        ("bytes of RAM", {"ram_size": 2 * GIB}),
        ("missing vda (virtio); new net (e1000)", {"devices": ("net (e1000)",)}),
        ("a migration is under way", {"migration": "active"}),
        ("state restore-vm", {"run_state": "restore-vm"}),
    ],
)  # fmt: skip
def test_what_is_against_a_load(text: str, changes: dict[str, Any]) -> None:
    assert any(text in reason for reason in reasons(loadable(facts=changes)))


def test_disks_in_other_places_do_not_fit_the_memory() -> None:
    one = loadable()
    placed = tuple(
        replace(each, place=f"virtio-blk-pci addr={number}") for number, each in enumerate(one.snapshot.disks)
    )
    taken = replace(one.snapshot, disks=placed)
    same = [replace(facts, place=each.place) for facts, each in zip(one.facts.disks, placed, strict=True)]
    other = [replace(facts, place=each.place) for facts, each in zip(one.facts.disks, placed[::-1], strict=True)]
    assert reasons(replace(one, snapshot=taken, facts=replace(one.facts, disks=tuple(same)))) == []
    assert reasons(replace(one, snapshot=taken)) == []  # not known
    swapped = reasons(replace(one, snapshot=taken, facts=replace(one.facts, disks=tuple(other))))
    assert [reason.split(":")[0] for reason in swapped] == [
        "disk vda is a virtio-blk-pci addr=1 now, and was a virtio-blk-pci addr=0",
        "disk vdb is a virtio-blk-pci addr=0 now, and was a virtio-blk-pci addr=1",
    ]


def test_a_choice_of_disks_and_damaged_ones() -> None:
    choice = RevertOptions(disks=("vda", "vdz"))
    assert "the snapshot has no disk 'vdz'" in reasons(request(snapshot(EXTERNAL), domain(disk("vda")), options=choice))
    damaged = domain(disk("vda", damaged="marked corrupt"), active=False)
    assert "disk vda: marked corrupt" in reasons(request(snapshot(EXTERNAL), damaged))


@pytest.mark.parametrize(
    "needed",
    [
        {"dependents": {"/d/vdb.qcow2": ["/d/later.qcow2"]}},
        {"frozen": {"/d/vdb.qcow2"}},
    ],
)
def test_a_state_in_a_file_that_others_need_is_copied(needed: dict[str, Any]) -> None:
    states = {"/d/vdb.qcow2": StateFacts(4096, GIB, "/d/below.raw", "raw", free=8192)}
    one = loadable(**needed, states=states)
    assert (one.way, reasons(one)) == (Way.RESTART, [])  # the memory is put back by a new QEMU
    plan = steps(one)
    assert [step.action for step in plan] == [
        "copy-state", "make-overlay", "part", "hold", "create-internal", "apply-internal", "let-go", "start", "switch",
        "take-over", "drop-way-back", "settle",
    ]  # fmt: skip
    assert plan[0].text.endswith("(4096 bytes)")
    assert plan[0].arguments["path"] == plan[1].arguments["backing"] == "/d/vdb.s-t.state.qcow2"
    assert plan[0].arguments["backing"] == "/d/below.raw"
    start = next(step for step in plan if step.action == "start").arguments
    assert (start["memory"], start["state"]) == ("/d/vda.qcow2", "s")
    assert "file=/d/vdb.s-t.qcow2" in start["command"]
    switch = next(step for step in plan if step.action == "switch").arguments
    assert switch["layers"] == {"vda": "/d/vda.qcow2", "vdb": "/d/vdb.s-t.qcow2"}
    assert switch["made"] == ["/d/vdb.s-t.qcow2", "/d/vdb.s-t.state.qcow2"]


def test_a_copy_without_the_start_command() -> None:
    states = {path: StateFacts(4096, GIB, free=8192) for path in ("/d/vda.qcow2", "/d/vdb.qcow2")}
    dependents = {path: ["/d/later.qcow2"] for path in states}
    what, facts = snapshot(INTERNAL, INTERNAL), domain(holding("vda"), holding("vdb"))
    one = request(what, facts, dependents=dependents, states=states, command=())
    assert (one.way, reasons(one)) == (Way.SWAP, [])
    assert [step.action for step in steps(one)] == ["copy-state", "make-overlay", "add-node", "add-base"] * 2 + [
        "stop", "swap", "switch", "reset", "drop-nodes", "settle",
    ]  # fmt: skip
    full = replace(one, states={path: replace(state, free=4095) for path, state in states.items()})
    assert any("4095 bytes are free for a copy" in reason for reason in reasons(full))
    broken = replace(one, states={path: StateFacts(problem="it is encrypted") for path in states})
    assert any("cannot be copied out of '/d/vda.qcow2': it is encrypted" in reason for reason in reasons(broken))


def test_nothing_that_others_need_is_changed() -> None:
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
    old = request(snapshot(EXTERNAL, EXTERNAL), domain(version=(6, 0, 0)))
    assert reasons(old) == ["going back on a running domain needs QEMU 6.1 (blockdev-reopen)"]


def test_disks_alone_that_a_running_qemu_cannot_go_back_to() -> None:
    what, facts = snapshot(INTERNAL, EXTERNAL), domain(holding("vda"), disk("vdb"))
    one = request(what, facts)
    assert (one.way, reasons(one)) == (Way.RESTART, [])
    plan = steps(one)
    assert [step.action for step in plan] == [
        "make-overlay", "part", "hold", "create-internal", "apply-internal", "let-go", "start", "switch", "take-over",
        "drop-way-back", "settle",
    ]  # fmt: skip
    start = next(step for step in plan if step.action == "start")
    assert "-incoming" not in start.arguments["command"]
    assert start.program.endswith("-drive file=/d/vda.qcow2 -drive file=/d/vdb.s-t.qcow2 -S")
    assert (start.arguments["memory"], start.arguments["machine"]) == (None, None)
    assert plan[-1].arguments == {"running": True}
    paused = request(what, replace(facts, run_state="paused"))
    assert steps(paused)[-1].arguments == {"running": False}
    assert any("that needs the domain's start command" in reason for reason in reasons(replace(one, command=())))
    blocked = replace(one, facts=replace(facts, blockers=("a device",)))
    assert any("cannot let go of its disks: a device" in reason for reason in reasons(blocked))
    # Of a subset, the other disks go on under the new QEMU too.
    some = request(what, facts, options=RevertOptions(disks=("vda",)))
    assert some.parting
    assert "file=/d/vdb.qcow2" in next(step for step in steps(some) if step.action == "start").arguments["command"]


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
        ("needs the domain's start command", {"command": ()}),
        ("no place for the QMP socket", {"command": [word for word in COMMAND if "{qmp}" not in word]}),
        ("no place for the QMP socket", {"socket": None}),
        ("no argument {incoming}", {"command": COMMAND[:-1]}),
        ("has no {disk:vdb}", {"command": [word for word in COMMAND if "vdb" not in word]}),
    ],
)
def test_what_is_against_a_restart(text: str, changes: dict[str, Any]) -> None:
    what = snapshot(EXTERNAL, EXTERNAL, memory=MemoryMode.EXTERNAL)
    assert any(text in reason for reason in reasons(request(what, domain(), **changes)))


def test_internal_snapshots_beside_a_memory_file() -> None:
    what = snapshot(INTERNAL, EXTERNAL, memory=MemoryMode.EXTERNAL)
    facts = domain(holding("vda"), disk("vdb"))
    files = ["hold", "create-internal", "apply-internal", "let-go"]
    end = ["start", "switch", "take-over", "drop-way-back", "settle"]
    assert [step.action for step in steps(request(what, facts))] == ["make-overlay", "part", *files, *end]
    off = request(what, replace(facts, active=False))
    assert [step.action for step in steps(off)] == ["make-overlay", *files, *end]


def test_present_layers_that_a_running_qemu_keeps_are_not_locked() -> None:
    """The snapshot's file is none of QEMU's any more: it parts from nothing, and has its layers until it ends."""
    what = snapshot(INTERNAL, INTERNAL, memory=MemoryMode.EXTERNAL)
    one = request(what, domain(disk("vda", path="/d/vda.other"), disk("vdb", path="/d/vdb.other")))
    (hold,) = [step for step in steps(one) if step.action == "hold"]
    assert not one.parting
    assert hold.arguments["disks"] == [
        {"path": path, "format": "qcow2", "writable": True} for path in ("/d/vda.qcow2", "/d/vdb.qcow2")
    ]


def test_a_kept_state_is_what_the_revert_starts_from() -> None:
    one = request(snapshot(EXTERNAL, INTERNAL), domain(disk("vda", path="/d/vda.top"), holding("vdb")))
    keep = SnapshotRequest("safe", disk_only=True, disks={"vda": DiskRequest(EXTERNAL), "vdb": DiskRequest(INTERNAL)})
    after = after_keeping(one, resolve(keep, one.facts), "k")
    vda, vdb = after.facts.disks
    assert (vda.disk.path, vda.node, vda.disk.backing_chain, vda.chain_nodes) == (
        "/d/vda.safe.qcow2", "ds-k-0", ("/d/vda.top",), ("d0",),
    )  # fmt: skip
    assert [stored.name for stored in vdb.snapshots] == ["s", "safe"]
    assert (after.current, after.layers) == ("safe", {"vda": "/d/vda.safe.qcow2"})


def test_offline() -> None:
    one = request(snapshot(INTERNAL, EXTERNAL, NO), domain(holding("vda"), disk("vdb"), active=False))
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
