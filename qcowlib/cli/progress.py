"""Progress of long commands (-p): qemu-img's line, or a bar on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class _Display(Protocol):
    def show(self, percent: float) -> None:
        """Show a new state."""

    def end(self) -> None:
        """Nothing more comes."""


class Progress:
    """Shows how far a command is; to be called with (bytes done, bytes to do).

    Args:
        enabled: whether -p was given.
        bytes_per_second: limit the rate of the work by sleeping in each call; 0 is no limit.
        step: percent between two lines of qemu-img's, which differ from verb to verb.
    """

    def __init__(self, *, enabled: bool, bytes_per_second: int = 0, step: float = 1.0) -> None:
        self._display = _display(step) if enabled else None
        self._rate = bytes_per_second
        self._started = time.monotonic()

    def start(self) -> None:
        """Show that nothing is done yet."""
        if self._display is not None:
            self._display.show(0.0)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        if self._display is not None and total:
            self._display.show(100.0 * done / total)
        if self._rate:
            time.sleep(max(0.0, self._started + done / self._rate - time.monotonic()))

    def end(self, *, complete: bool) -> None:
        """Show the last state; qemu-img's line is ended after the message of an error."""
        if self._display is not None:
            if complete:
                self._display.show(100.0)
            self._display.end()


class _Line:
    """qemu-img's line, for pipes and files: rewritten in place after so many percent, up or down."""

    def __init__(self, step: float) -> None:
        self._step = step
        self._last = -step

    def show(self, percent: float) -> None:
        if abs(percent - self._last) > self._step or percent in (0.0, 100.0):
            self._last = percent
            print(f"    ({percent:3.2f}/100%)\r", end="", flush=True)

    def end(self) -> None:
        print()


def _display(step: float) -> _Display:
    if not sys.stdout.isatty():
        return _Line(step)
    try:
        from qcowlib.cli.progress_bar import ProgressBar
    except ImportError:  # rich is not installed
        return _Line(step)
    return ProgressBar()
