"""Plans of deletions: which direction, what is refused, which files go."""

from typing import Any

from snapshot.model import (
    Consistency,
    DeleteOptions,
    DiskMode,
    DiskSnapshot,
    DomainSnapshot,
    DomainState,
    MemoryMode,
    MemorySnapshot,
)
from snapshot.plan_delete import DeleteRequest, FileFacts, merges, reasons, steps
from tests.unit.snapshot.facts import disk, domain

BASE, TOP = "/d/base.qcow2", "/d/top.qcow2"


def snapshot(name: str = "s", *, file: str = BASE, overlay: str = TOP, **more: Any) -> DomainSnapshot:
    disks = (DiskSnapshot("vda", DiskMode.EXTERNAL, file, "qcow2", overlay=overlay),)
    fields: dict[str, Any] = {"memory": MemorySnapshot(MemoryMode.NO), "disks": disks} | more
    return DomainSnapshot(name, "g", 1, DomainState.SHUTOFF, Consistency.CLEAN, **fields)


def files(*, base: dict[str, Any] | None = None, top: dict[str, Any] | None = None) -> dict[str, FileFacts]:
    """Base <- top, the base with ten times the data."""
    return {
        BASE: FileFacts(
            **({"exists": True, "format": "qcow2", "dependents": [TOP], "size": 9, "data": 1000} | (base or {}))
        ),
        TOP: FileFacts(**({"exists": True, "format": "qcow2", "backing": BASE, "size": 9, "data": 100} | (top or {}))),
    }


def request(**more: Any) -> DeleteRequest:
    facts = domain(disk("vda", path=TOP), active=False)
    fields: dict[str, Any] = {
        "snapshot": snapshot(), "others": (), "facts": facts, "options": DeleteOptions(), "layers": {},
        "files": files(), "described": {"vda": BASE}, "raw": (), "made": {TOP}, "token": "t",
    }  # fmt: skip
    return DeleteRequest(**(fields | more))


def actions(one: DeleteRequest) -> list[str]:
    return [step.action for step in steps(one)]


def test_the_cheaper_direction_is_chosen_and_shown() -> None:
    (merge,) = merges(request())
    assert (merge.into, merge.moved) == ("base", {"base": 100, "overlay": 1000})
    assert actions(request()) == ["decide", "forget", "merge-down", "rename", "remove-file"]
    assert "(100 bytes)" in steps(request())[2].text
    assert steps(request())[0].commits
    other_way = request(files=files(top={"data": 5000}))
    assert merges(other_way)[0].into == "overlay"
    assert actions(other_way) == ["decide", "forget", "merge-up"]  # the first file is not ours to remove


def test_an_overlay_of_ours_goes_with_the_merge() -> None:
    previous = snapshot("before", file="/d/first.qcow2", overlay=BASE)
    one = request(options=DeleteOptions(into="overlay"), others=(previous,), made={BASE, TOP})
    assert actions(one) == ["decide", "forget", "merge-up", "rename", "remove-file"]
    needed = snapshot("other", file=BASE, overlay="/d/branch.qcow2")
    assert actions(request(options=DeleteOptions(into="overlay"), others=(previous, needed), made={BASE, TOP})) == [
        "decide", "forget", "merge-up",
    ]  # fmt: skip


def test_what_is_against_the_base() -> None:
    into = DeleteOptions(into="base")
    for text, more in {
        "'/d/x.qcow2' is based on": {"files": files(base={"dependents": [TOP, "/d/x.qcow2"]})},
        "the snapshot 'o' needs": {"others": (snapshot("o", overlay="/d/x"),)},
        "is a larger disk": {"files": files(top={"size": 10})},
        "which the domain writes": {"files": files(top={"dependents": ["/d/x"]})},
        "uses '/d/base.qcow2' without": {"facts": domain(disk("vda", path=BASE), active=False), "made": ()},
    }.items():
        assert any(text in reason for reason in reasons(request(options=into, **more))), text
        # The other direction stays open.
        assert reasons(request(**more)) == []
        assert merges(request(**more))[0].into == "overlay"


def test_an_overlay_with_internal_snapshots_is_not_merged() -> None:
    """Into the base they are lost, into the overlay they would read another disk where they read the base."""
    for into, text in {"base": "which would be lost", "overlay": "which reads from it"}.items():
        one = request(options=DeleteOptions(into=into), files=files(top={"snapshots": ["i"]}))
        (reason,) = reasons(one)
        assert f"'{TOP}' holds the internal snapshot 'i', {text}" in reason
    assert reasons(request(files=files(top={"snapshots": ["i"]}))) != []


def test_metadata_only_asks_nothing() -> None:
    used = domain(disk("vda", path=TOP, in_use="another process"), active=False)
    assert reasons(request(facts=used)) != []
    alone = request(facts=used, options=DeleteOptions(metadata_only=True))
    assert reasons(alone) == []
    assert actions(alone) == ["decide", "forget"]


def test_memory_files_and_internal_snapshots() -> None:
    inside = (DiskSnapshot("vda", DiskMode.INTERNAL, TOP, "qcow2", internal_id="3", internal_name="s"),)
    one = snapshot(disks=inside, memory=MemorySnapshot(MemoryMode.EXTERNAL, "/d/s.mem"))
    plan = steps(request(snapshot=one))
    assert [(step.action, step.arguments) for step in plan[2:]] == [
        ("remove-internal", {"name": "s", "id": "3", "path": TOP}),
        ("remove-file", {"path": "/d/s.mem", "image": False}),
    ]


def test_a_running_qemu_s_commands_are_shown() -> None:
    one = disk("vda", path=TOP, backing_chain=(BASE,), chain_nodes=("base",))
    down = request(facts=domain(one))
    up = request(facts=domain(one), options=DeleteOptions(into="overlay"))
    assert [command for step in steps(down) for command in step.commands] == [
        {"execute": "block-commit", "arguments": {"job-id": "ds-t-0", "device": "d0", "base-node": "base"}}
    ]
    assert [command for step in steps(up) for command in step.commands] == [
        {"execute": "block-stream", "arguments": {"job-id": "ds-t-0", "device": "d0"}}
    ]
    assert not [step for step in steps(request()) if step.commands]  # off


def test_an_overlay_from_which_nothing_goes_on_is_removed_with_its_snapshot() -> None:
    """The domain has left it by a revert: merging it would move bytes that nobody can read any more."""
    elsewhere = domain(disk("vda", path="/d/branch.qcow2", backing_chain=(BASE,)), active=False)
    left = {"facts": elsewhere, "files": files(base={"dependents": [TOP, "/d/branch.qcow2"]})}
    assert merges(request(**left)) == []
    assert [(step.action, step.arguments.get("path")) for step in steps(request(**left))][2:] == [("remove-file", TOP)]
    for more in (
        {"made": set()},  # not ours
        {"files": files(top={"snapshots": ["i"]})},
        {"files": files(top={"dependents": ["/d/x.qcow2"]})},
        {"others": (snapshot("o", file=TOP, overlay="/d/x.qcow2"),)},
        {"described": {"vda": TOP}},
    ):
        (merge,) = merges(request(**(left | more)))
        assert merge.overlay == TOP


def test_a_file_that_stays_for_an_internal_snapshot_is_merged_into() -> None:
    inside = DiskSnapshot("vda", DiskMode.INTERNAL, BASE, "qcow2", internal_name="i", internal_id="1")
    other = snapshot("i", disks=(inside,))
    cheaper = {"files": files(top={"data": 5000}), "others": (other,)}
    assert merges(request(**cheaper))[0].into == "base"
    assert merges(request(**cheaper, options=DeleteOptions(into="overlay")))[0].into == "overlay"


def test_two_of_one_name_in_a_backing_file_are_not_told_apart_by_qemu() -> None:
    inside = DiskSnapshot("vda", DiskMode.INTERNAL, BASE, "qcow2", internal_name="i", internal_id="1")
    active = domain(disk("vda", path=TOP, backing_chain=(BASE,), chain_nodes=("base",)))
    for names, refused in ((["i"], False), (["i", "i"], True)):
        one = request(snapshot=snapshot("i", disks=(inside,)), facts=active, files=files(base={"snapshots": names}))
        assert any("holds 2 internal snapshots 'i'" in reason for reason in reasons(one)) is refused
