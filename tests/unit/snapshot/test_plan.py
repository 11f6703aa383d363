"""Plans: what is decided, what is refused (everything at once), which steps come in which order."""

from dataclasses import replace
from typing import Any

import pytest

from snapshot.against import reasons
from snapshot.model import DiskMode, DiskRequest, Liveness, MemoryMode, SnapshotRequest
from snapshot.plan import PathFacts, Resolved, resolve, steps
from snapshot.step import Step
from tests.unit.snapshot.facts import GIB, disk, domain, host, stored

INTERNAL, EXTERNAL, NO = DiskMode.INTERNAL, DiskMode.EXTERNAL, DiskMode.NO


def against(request: SnapshotRequest, *, taken: tuple[str, ...] = (), **facts: Any) -> list[str]:
    resolved = resolve(request, domain(*facts.pop("disks", ()), **facts))
    return reasons(resolved, host(resolved), taken)


@pytest.mark.parametrize(
    ("request_", "memory", "modes"),
    [
        (SnapshotRequest("s"), MemoryMode.INTERNAL, [INTERNAL, INTERNAL]),
        (SnapshotRequest("s", memory_file="/m"), MemoryMode.EXTERNAL, [INTERNAL, INTERNAL]),
        (SnapshotRequest("s", liveness=Liveness.LIVE), MemoryMode.EXTERNAL, [INTERNAL, INTERNAL]),
        (SnapshotRequest("s", default_mode=EXTERNAL), MemoryMode.EXTERNAL, [EXTERNAL, EXTERNAL]),
        (SnapshotRequest("s", disks={"vdb": DiskRequest(EXTERNAL)}), MemoryMode.EXTERNAL, [INTERNAL, EXTERNAL]),
        (SnapshotRequest("s", disk_only=True), MemoryMode.NO, [INTERNAL, INTERNAL]),
    ],
)
def test_where_the_memory_goes(request_: SnapshotRequest, memory: MemoryMode, modes: list[DiskMode]) -> None:
    resolved = resolve(request_, domain())
    assert resolved.memory is memory
    assert [plan.mode for plan in resolved.disks] == modes
    assert reasons(resolved, host(resolved), ()) == []


def test_default_names() -> None:
    resolved = resolve(SnapshotRequest("s", default_mode=EXTERNAL), domain(disk("vda"), disk("vdb", "raw")))
    assert resolved.new_files() == ["/d/vda.s.qcow2", "/d/vdb.s.qcow2", "/d/vda.s.mem"]


def test_a_raw_disk_is_external_by_default_and_a_read_only_one_left_out() -> None:
    resolved = resolve(SnapshotRequest("s"), domain(disk("vda", "raw"), disk("vdb", read_only=True)))
    assert [plan.mode for plan in resolved.disks] == [EXTERNAL, NO]
    assert reasons(resolved, host(resolved), ()) == []


def test_a_guest_that_stands_is_never_taken_live() -> None:
    resolved = resolve(SnapshotRequest("s", liveness=Liveness.LIVE), domain(run_state="paused"))
    assert resolved.liveness is Liveness.PAUSED
    assert [step.action for step in steps(resolved, "t")] == [
        "make-memory-file",
        "disks",
        "save-standing",
        "keep-memory",
        "record",
    ]


@pytest.mark.parametrize(
    ("text", "request_", "facts"),
    [
        ("reads as a number", SnapshotRequest("17"), {}),
        ("the name is empty", SnapshotRequest(""), {}),
        ("cannot be part of a file name", SnapshotRequest("a/b"), {}),
        ("cannot be part of a file name", SnapshotRequest("a\nb"), {}),
        ("longer than", SnapshotRequest("x" * 300), {}),
        ("has a snapshot 's' already", SnapshotRequest("s"), {"taken": ("s",)}),
        ("vda has an internal snapshot 's'", SnapshotRequest("s"), {"disks": (disk(snapshots=stored("s")),)}),
        ("no disk 'vdz'", SnapshotRequest("s", disks={"vdz": DiskRequest(INTERNAL)}), {}),
        ("no disk takes part", SnapshotRequest("s", disk_only=True, default_mode=NO), {}),
        ("vda is raw", SnapshotRequest("s", default_mode=INTERNAL), {"disks": (disk("vda", "raw"),)}),
        ("vdb can be written and is left out", SnapshotRequest("s", disks={"vdb": DiskRequest(NO)}), {}),
        ("vda has the dirty bitmap 'b'", SnapshotRequest("s"), {"disks": (disk(bitmaps=("b",)),)}),
        ("refcounts of 1 bits", SnapshotRequest("s"), {"disks": (disk(refcount_bits=1),)}),
        ("refcounts of 2 bits", SnapshotRequest("s"), {"disks": (disk(refcount_bits=2, snapshots=stored("a", "b")),)}),
        ("external data file", SnapshotRequest("s"), {"disks": (disk(data_file=True),)}),
        ("is encrypted", SnapshotRequest("s", default_mode=EXTERNAL), {"disks": (disk(encrypted=True),)}),
        ("memory into an encrypted image", SnapshotRequest("s"), {"disks": (disk(encrypted=True),)}),
        ("by the relative name", SnapshotRequest("s"), {"disks": (disk(path="d.qcow2"),)}),
        ("top node is a 'throttle'", SnapshotRequest("s"), {"disks": (disk(driver="throttle"),)}),
        ("marked corrupt", SnapshotRequest("s"), {"disks": (disk(damaged="the image is marked corrupt"),)}),
        ("vda is in use by block job", SnapshotRequest("s"), {"disks": (disk(in_use="block job 'j'"),)}),
        ("a migration is under way", SnapshotRequest("s"), {"migration": "active"}),
        ("another domain's socket", SnapshotRequest("s"), {"stranger": True}),
        ("the job 'j' is under way", SnapshotRequest("s"), {"jobs": ("j",)}),
        ("vda is read-only", SnapshotRequest("s", disks={"vda": DiskRequest(EXTERNAL)}),
         {"disks": (disk(read_only=True),)}),
        ("quiesce needs the guest agent", SnapshotRequest("s", disk_only=True, quiesce=True), {}),
        ("quiesce is for disk-only", SnapshotRequest("s", quiesce=True), {"agent_socket": "/a"}),
        ("internal memory snapshots need QEMU 6.0", SnapshotRequest("s"), {"version": (5, 2, 0)}),
        ("a guest that stands needs QEMU 6.0", SnapshotRequest("s", memory_file="/m"),
         {"version": (5, 2, 0), "run_state": "paused"}),
        ("cannot save this machine: vfio", SnapshotRequest("s"), {"blockers": ("vfio",)}),
        ("has no memory file", SnapshotRequest("s", disk_only=True, memory_file="/m"), {}),
        ("never stops the guest", SnapshotRequest("s", disk_only=True, liveness=Liveness.LIVE), {}),
        ("quiesce needs a running guest", SnapshotRequest("s", disk_only=True, quiesce=True),
         {"agent_socket": "/a", "run_state": "paused"}),
        ("is longer than 255 bytes", SnapshotRequest("s", memory_file="/" + "m" * 256), {}),
        ("is a relative name", SnapshotRequest("s", memory_file="m"), {}),
        ("not started, so it has no memory", SnapshotRequest("s"), {"active": False}),
        ("nothing to quiesce", SnapshotRequest("s", disk_only=True, quiesce=True), {"active": False}),
        ("give its QMP socket", SnapshotRequest("s", disk_only=True),
         {"active": False, "disks": (disk(in_use="another process"),)}),
        *((f"state {state}", SnapshotRequest("s"), {"run_state": state})
          for state in ("shutdown", "guest-panicked", "inmigrate", "io-error", "save-vm", "restore-vm", "colo",
                        "finish-migrate", "internal-error", "suspended", "watchdog", "debug")),
        ("resume it first", SnapshotRequest("s"), {"run_state": "postmigrate"}),
    ],
)  # fmt: skip
def test_what_is_against_it(text: str, request_: SnapshotRequest, facts: dict[str, Any]) -> None:
    found = [reason for reason in against(request_, **facts) if text in reason]
    assert len(found) == 1, against(request_, **facts)


def test_files_and_space() -> None:
    resolved = resolve(SnapshotRequest("s", default_mode=EXTERNAL), domain())
    assert resolved.memory_file is not None
    facts = host(resolved, exists=["/d/vda.s.qcow2"])
    facts["/d/vdb.s.qcow2"] = PathFacts(False, False, 0, -1)
    facts[resolved.memory_file] = replace(facts[resolved.memory_file], device=2, free=GIB)
    assert sorted(reasons(resolved, facts, ())) == [
        "'/d/vda.s.qcow2' exists already, and would be overwritten",
        f"{GIB} bytes are free where '/d/vda.s.mem' is, and up to {GIB + (16 << 20)} are needed",
        "the directory of '/d/vdb.s.qcow2' does not exist or cannot be written",
    ]


def test_a_disk_that_only_qemu_can_see() -> None:
    resolved = resolve(SnapshotRequest("s", disk_only=True), domain())
    facts = host(resolved) | {"/d/vdb.qcow2": PathFacts(False, True, 1 << 40, 1)}
    assert [reason for reason in reasons(resolved, facts, ()) if "vdb" in reason] == [
        "disk vdb: there is no '/d/vdb.qcow2' here (another mount name space, or removed)"
    ]


def test_one_file_for_two_disks() -> None:
    files = {target: DiskRequest(EXTERNAL, "/d/x") for target in ("vda", "vdb")}
    assert "'/d/x' is to be made twice" in against(SnapshotRequest("s", disk_only=True, disks=files))


def test_all_reasons_at_once() -> None:
    disks = (disk("vda", "raw"), disk("vdb", bitmaps=("b",)), disk("vdc"))
    request = SnapshotRequest("5", default_mode=INTERNAL, disks={"vdc": DiskRequest(NO), "vdq": DiskRequest(NO)})
    assert len(against(request, disks=disks, migration="active", jobs=("j",), run_state="io-error", taken=("5",))) == 9


def order(resolved: Resolved) -> list[str]:
    return [step.action for step in steps(resolved, "t")]


@pytest.mark.parametrize(
    ("request_", "actions"),
    [
        (SnapshotRequest("s"), ["save-internal", "record"]),
        (SnapshotRequest("s", memory_file="/m"),
         ["make-memory-file", "stop", "disks", "memory", "cont", "keep-memory", "record"]),
        (SnapshotRequest("s", liveness=Liveness.LIVE),
         ["make-memory-file", "memory", "disks", "end-memory", "cont", "keep-memory", "record"]),
        (SnapshotRequest("s", liveness=Liveness.BACKGROUND),
         ["make-memory-file", "stop", "disks", "memory", "cont", "keep-memory", "record"]),
        (SnapshotRequest("s", disk_only=True, disks={"vda": DiskRequest(EXTERNAL)}),
         ["make-overlay", "add-node", "disks", "record"]),
        (SnapshotRequest("s", disk_only=True, quiesce=True), ["freeze", "disks", "thaw", "record"]),
    ],
)  # fmt: skip
def test_the_order_of_steps(request_: SnapshotRequest, actions: list[str]) -> None:
    resolved = resolve(request_, domain(agent_socket="/a"))
    assert order(resolved) == actions
    assert [step.commits for step in steps(resolved, "t")] == [False] * (len(actions) - 1) + [True]


def test_inactive() -> None:
    request = SnapshotRequest("s", disk_only=True, disks={"vda": DiskRequest(EXTERNAL)})
    resolved = resolve(request, domain(active=False))
    assert order(resolved) == ["hold", "make-overlay", "create-internal", "record"]
    assert not [step for step in steps(resolved, "t") if step.commands]


def test_steps_survive_the_journal_and_print() -> None:
    for step in steps(resolve(SnapshotRequest("s", default_mode=EXTERNAL, liveness=Liveness.LIVE), domain()), "t"):
        again = Step.from_json(step.as_json())
        assert (again.action, again.arguments, again.commits) == (step.action, step.arguments, step.commits)
        assert step.lines()[0] == step.text


def test_node_names_fit_into_qemus_limit() -> None:
    plan = steps(resolve(SnapshotRequest("s" * 100, default_mode=EXTERNAL), domain()), "0123abcd")
    names = [command["arguments"]["file"]["node-name"] for step in plan for command in step.commands
             if command["execute"] == "blockdev-add"]  # fmt: skip
    assert names == ["ds-0123abcd-0-f", "ds-0123abcd-1-f"]
    assert all(len(name) < 32 for name in names)


@pytest.mark.parametrize(
    ("liveness", "capability"),
    [("paused", None), ("live", "pause-before-switchover"), ("background", "background-snapshot")],
)
def test_the_memory_is_always_written_with_a_bandwidth_set(liveness: str, capability: str | None) -> None:
    request = SnapshotRequest("s", default_mode=EXTERNAL, liveness=Liveness(liveness))
    (step,) = [step for step in steps(resolve(request, domain()), "t") if step.action == "memory"]
    sent = {command["execute"]: command["arguments"] for command in step.commands}
    assert sent["migrate-set-parameters"]["max-bandwidth"] > 1 << 30
    wanted = sent.get("migrate-set-capabilities", {}).get("capabilities", [])
    assert wanted == ([] if capability is None else [{"capability": capability, "state": True}])
