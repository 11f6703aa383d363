"""What domsnap prints: text without control characters, tables, JSON values, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from enum import Enum
from typing import Any

from snapshot.model import DiskMode, DomainSnapshot, MemoryMode


def plain(text: str) -> str:
    """A text from a file, safe for a terminal: control characters are shown, not sent."""
    return "".join(
        char if char.isprintable() or "\udc80" <= char <= "\udcff" else char.encode("unicode_escape").decode()
        for char in text
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two blanks apart; the last one is as long as it is."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def when(nanoseconds: int) -> str:
    """Local time, to the second."""
    try:
        return datetime.fromtimestamp(nanoseconds // 10**9).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "?"


def size(number: int) -> str:
    """Bytes as people read them."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def memory_text(snapshot: DomainSnapshot) -> str:
    """Where the memory is, and how large."""
    memory = snapshot.memory
    if memory.mode is MemoryMode.NO:
        return "-"
    return f"{memory.mode.value} {size(memory.size)}"


def disks_text(snapshot: DomainSnapshot) -> str:
    """Each disk with its kind."""
    return " ".join(f"{disk.target}:{disk.mode.value}" for disk in snapshot.disks if disk.mode is not DiskMode.NO)


def as_json(snapshot: DomainSnapshot) -> dict[str, Any]:
    """A snapshot as JSON values; the keys are the model's, with hyphens."""
    return {key.replace("_", "-"): _json(value) for key, value in asdict(snapshot).items()}


def _json(value: Any) -> Any:  # noqa: ANN401 - any field's value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key.replace("_", "-"): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    return value


class Progress:
    """What the engine reports, on standard error: notes always, steps with -v, a running line on a terminal.

    Args:
        verbose: say each step.
    """

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._last = ""
        self._line = ""
        self._next = 0.0

    def __call__(self, text: str, done: int, total: int) -> None:
        """A note when `total` is 0, else how much of it is done."""
        if total <= 0 or (self._verbose and text != self._last):
            self._last = text
            self.clear()
            print(plain(text), file=sys.stderr, flush=True)
        elif not self._verbose and sys.stderr.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self.clear()
            self._line = f"{plain(text)[:60]} {100 * done // total} %"
            print(self._line, end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the running line away."""
        if self._line:
            print("\r" + " " * len(self._line) + "\r", end="", file=sys.stderr, flush=True)
            self._line = ""
