"""Steps: what a plan consists of and what the journal keeps; JSON values only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step of an operation.

    Attributes:
        action: which of the executor's actions carries it out, and undoes it.
        arguments: JSON values; with them alone the step can be undone, by another process too.
        text: what it does, for people.
        commands: the QMP commands that it sends, as far as they are known beforehand.
        undo: how it is undone, for people; empty when there is nothing to undo.
        paused: it runs between stopping and resuming the guest, where every millisecond counts.
        commits: once it is done the operation is finished rather than undone.
        program: the command line that it runs.
    """

    action: str
    arguments: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    commands: tuple[dict[str, Any], ...] = ()
    undo: str = ""
    paused: bool = False
    commits: bool = False
    program: str = ""

    def lines(self) -> list[str]:
        """The printed form, for --dry-run."""
        found = [self.text]
        if self.program:
            found.append(f"    run: {self.program}")
        found += [f"    qmp: {json.dumps(command)}" for command in self.commands]
        if self.undo:
            found.append(f"    undo: {self.undo}")
        return found

    def as_json(self) -> dict[str, Any]:
        """The step as the journal keeps it."""
        return {"action": self.action, "arguments": self.arguments, "text": self.text, "commits": self.commits}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Step:
        """A step from the journal."""
        return cls(value["action"], value["arguments"], value["text"], commits=value["commits"])


def qmp_command(name: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """A QMP command as it goes over the wire; underscores in argument names become hyphens."""
    command: dict[str, Any] = {"execute": name}
    if arguments:
        command["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
    return command
