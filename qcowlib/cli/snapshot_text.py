"""Snapshots as text and JSON, in QEMU's forms."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qcowlib.units import format_size

if TYPE_CHECKING:
    from qcowlib.cli.qapi import Value
    from qcowlib.format.snapshot_table import SnapshotEntry

_NANOSECONDS = 1_000_000_000


def print_snapshot_table(snapshots: Iterable[SnapshotEntry]) -> None:
    """The table of `qemu-img snapshot -l` and `info`; times of day are local."""
    print("Snapshot list:")
    print(f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}")
    for entry in snapshots:
        icount = "" if entry.icount is None else str(_signed(entry.icount))
        print(
            f"{_padded(entry.id, 9)} {_padded(entry.name, 16)} {format_size(entry.vm_state_size):>8}"
            f"{_local_time(entry.date_sec):>20}{_clock(entry.vm_clock_nsec):>13}{icount:>11}"
        )


def snapshot_members(entry: SnapshotEntry) -> dict[str, Value]:
    """A snapshot as QEMU's SnapshotInfo."""
    members: dict[str, Value] = {
        "id": entry.id,
        "name": entry.name,
        "vm-state-size": _signed(entry.vm_state_size),
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": entry.vm_clock_nsec // _NANOSECONDS,
        "vm-clock-nsec": entry.vm_clock_nsec % _NANOSECONDS,
    }
    if entry.icount is not None:
        members["icount"] = _signed(entry.icount)
    return members


def _padded(text: str, width: int) -> str:
    """Left-aligned in a column that is counted in bytes, as C does."""
    return text + " " * (width - len(text.encode("utf-8", "surrogateescape")))


def _signed(value: int) -> int:
    """A 64-bit field as a signed integer, which is how QEMU shows it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _local_time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _clock(nanoseconds: int) -> str:
    seconds = nanoseconds // _NANOSECONDS
    milliseconds = nanoseconds // 1_000_000 % 1000
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"
