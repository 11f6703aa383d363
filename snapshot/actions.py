"""The actions that plans are made of, by name: how each is done, and undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snapshot import active, agent, below, copies, inactive, merge, migration, records, restart, standing
from snapshot.session import Session


def _nothing(session: Session, arguments: dict[str, Any]) -> None:
    """Nothing to do."""


@dataclass(frozen=True)
class Action:
    """How a kind of step is done and undone.

    Attributes:
        do, undo: called with the session and the step's arguments.
        always: undone even when the undo of a later step has failed, because it puts only the guest right.
        apart: no other undo depends on this one, so that they go on when it fails.
    """

    do: Callable[[Session, dict[str, Any]], None]
    undo: Callable[[Session, dict[str, Any]], None] = _nothing
    always: bool = False
    apart: bool = False


ACTIONS = {
    "make-overlay": Action(active.make_overlay, active.unmake_overlay),
    "add-node": Action(active.add_node, active.remove_node),
    "stop": Action(active.stop, active.ensure_running, always=True),
    "cont": Action(active.cont),
    "disks": Action(active.disks, active.undo_disks),
    "save-internal": Action(active.save_internal, active.undo_save),
    "make-memory-file": Action(migration.make_memory_file, migration.unmake_memory_file, always=True),
    "memory": Action(migration.write_memory, migration.cancel_memory, always=True),
    "save-standing": Action(standing.save_standing, standing.end_standing, always=True),
    "end-memory": Action(migration.end_memory, migration.settle_memory, always=True),
    "keep-memory": Action(migration.keep_memory),
    "decide": Action(_nothing),
    "freeze": Action(agent.freeze, agent.unfreeze, always=True, apart=True),
    "thaw": Action(agent.thaw),
    "hold": Action(inactive.hold, inactive.let_go, always=True),
    "create-internal": Action(inactive.create_internal, inactive.delete_internal),
    "record": Action(records.record, records.unrecord),
    "load-internal": Action(active.load_internal, active.unload_internal),
    "drop-way-back": Action(active.drop_way_back),
    "add-base": Action(active.add_base, active.remove_node),
    "swap": Action(active.swap, active.unswap),
    "reset": Action(active.reset),
    "drop-nodes": Action(active.drop_nodes),
    "settle": Action(active.settle),
    "copy-state": Action(copies.copy_state, active.unmake_overlay),
    "part": Action(restart.part, restart.unpart),
    "start": Action(restart.start, restart.end_started),
    "take-over": Action(restart.take_over),
    "let-go": Action(inactive.let_go),
    "apply-internal": Action(inactive.apply_internal, inactive.unapply_internal),
    "switch": Action(records.switch, records.unswitch),
    "forget": Action(merge.forget),
    "try-writing": Action(below.try_writing, below.read_again),
    "remove-internal": Action(merge.remove_internal),
    "merge-down": Action(merge.merge_down),
    "merge-up": Action(merge.merge_up),
    "rename": Action(merge.rename),
    "remove-file": Action(merge.remove_file),
}
