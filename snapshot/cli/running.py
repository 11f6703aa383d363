"""How the commands that change something print what they did, or would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snapshot.cli.output import plain
from snapshot.cli.syntax import DONE


def finish(result: Any, describe: Callable[[Any], str]) -> int:  # noqa: ANN401 - steps, or what the operation gives
    """Print the steps of a dry run, each with its commands and its undo, or what was done."""
    if isinstance(result, list) and all(hasattr(step, "lines") for step in result):
        for number, step in enumerate(result, start=1):
            first, *rest = step.lines()
            print(f"{number:>3}. {plain(first)}")
            for line in rest:
                print(f" {plain(line)}")
    else:
        print("\n".join(plain(line) for line in describe(result).split("\n")))
    return DONE
