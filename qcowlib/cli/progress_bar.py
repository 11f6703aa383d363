"""The progress bar on a terminal; importing this module needs the package rich."""

from __future__ import annotations

from rich.progress import BarColumn, TaskProgressColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class ProgressBar:
    """A bar with the percentage and the time that is left."""

    def __init__(self) -> None:
        self._bar = RichProgress(BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task("", total=100.0)
        self._bar.start()

    def show(self, percent: float) -> None:
        """Show a new state."""
        self._bar.update(self._task, completed=percent)

    def end(self) -> None:
        """Leave the bar as it is and go on below it."""
        self._bar.stop()
