"""What the guest expects: a disk as a plain array, its snapshots as copies, and every version since the last barrier.

    steps -> Guest.follow -> moments: the disk and its snapshots after each step
    content found after an accident -> Guest.judge -> what is wrong with it, or None

Content after an accident is right when all that was durable is there, every other sector is old or new, and an
operation on snapshots has happened wholly or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SECTOR = 512
VM_STATE = " vm state"


class Step(NamedTuple):
    """One thing a program does.

    Attributes:
        kind: "write", "packed" (a compressed cluster), "zero", "discard", "flush", "create", "apply", "delete", or
            "attach" (give a snapshot a vm state).
        offset: guest bytes.
        length: guest bytes; bytes of vm state for "create" and "attach".
        seed: start of the pseudo-random data.
        name: of the snapshot.
    """

    kind: str
    offset: int = 0
    length: int = 0
    seed: int = 0
    name: str = ""

    @property
    def whole(self) -> bool:
        """Whether it happens wholly or not at all, and is durable when it returns."""
        return self.kind in ("create", "apply", "delete", "attach")

    def data(self) -> bytes:
        """What is written."""
        choose = random.Random(f"{self.kind}/{self.seed}/{self.offset}/{self.length}")
        if self.kind != "packed":
            return choose.randbytes(self.length)
        unit = choose.randbytes(97)  # shorter than the window of 4 KiB: it packs well
        return (unit * (self.length // len(unit) + 1))[: self.length]


@dataclass(frozen=True)
class Moment:
    """Disk and snapshots at one moment.

    Attributes:
        content: the active layer.
        saved: content of each snapshot by name, and its vm state by name and VM_STATE.
        step: what led here.
    """

    content: bytes
    saved: Mapping[str, bytes]
    step: Step

    def sectors(self) -> npt.NDArray[np.uint8]:
        """The active layer, one row for each sector."""
        padded = self.content.ljust(-(-len(self.content) // SECTOR) * SECTOR, b"\0")
        return np.frombuffer(padded, dtype=np.uint8).reshape(-1, SECTOR)


class Guest:
    """The model of one image.

    Args:
        content: the disk at the start.
        cluster_size: in bytes: the unit of a discard.
        keeps_parts: a discard does nothing (version 2 above a backing file).
    """

    def __init__(self, content: bytes, cluster_size: int, *, keeps_parts: bool = False) -> None:
        self.cluster_size = cluster_size
        self.keeps_parts = keeps_parts
        self.moments = [Moment(content, {}, Step("start"))]

    @property
    def now(self) -> Moment:
        """The last moment."""
        return self.moments[-1]

    def restart(self) -> None:
        """Forget what was before: all of it is durable."""
        self.moments = [replace(self.now, step=Step("start"))]

    def follow(self, step: Step) -> None:
        """Do a step."""
        content, saved = self.now.content, dict(self.now.saved)
        if step.kind in ("create", "attach"):
            if step.kind == "create":
                saved[step.name] = content
            if step.length:
                saved[step.name + VM_STATE] = step.data()
        elif step.kind == "apply":
            content = saved[step.name]
        elif step.kind == "delete":
            del saved[step.name]
            saved.pop(step.name + VM_STATE, None)
        elif step.kind == "resize":
            content = content[: step.length].ljust(step.length, b"\0")
        elif step.kind != "flush":
            content = self._changed(content, step)
        self.moments.append(Moment(content, saved, step))

    def judge(
        self,
        content: bytes,
        saved: Mapping[str, bytes],
        first: int,
        last: int,
        floor: npt.NDArray[np.int64] | None = None,
    ) -> str | None:
        """What is wrong with a disk after an accident; None if nothing is.

        Args:
            content: the active layer as found.
            saved: content of the snapshots as found, by name.
            first: the last moment known to be durable.
            last: the last moment that can have begun.
            floor: the oldest moment that each sector may be from, where that differs from `first`.
        """
        final = self.moments[last]
        if final.step.whole and last > first:
            if content == final.content and dict(saved) == dict(final.saved):
                return None
            if final.step.kind != "apply" and saved.keys() == final.saved.keys():
                return "the operation on snapshots took effect, but contents differ"
            last -= 1
        expected = self.moments[first].saved
        if saved.keys() != expected.keys():
            return f"the snapshots are {sorted(saved)}, not {sorted(expected)}"
        for name, old in expected.items():
            if saved[name] != old:
                return f"snapshot {name} has changed"
        return self._judge_sectors(content, first, last, floor)

    def _judge_sectors(self, content: bytes, first: int, last: int, floor: npt.NDArray[np.int64] | None) -> str | None:
        if len(content) != len(self.moments[first].content):
            return f"the disk has {len(content)} bytes"
        found = replace(self.now, content=content).sectors()
        low = int(floor.min()) if floor is not None else first
        versions: dict[bytes, int] = {}
        for number in range(low, last + 1):
            versions[self.moments[number].content] = number  # equal ones: the latest counts
        arrays = [(number, self.moments[number].sectors()) for number in versions.values()]
        right = np.zeros(len(found), dtype=np.bool_)
        for number, array in arrays:
            right |= (found == array).all(axis=1) & (True if floor is None else number >= floor)
        for sector in np.flatnonzero(~right).tolist():
            least = first if floor is None else int(floor[sector])
            candidates = {array[sector].tobytes(): array[sector] for number, array in arrays if number >= least}
            # Two writes to one sector, of which the first was lost: old and new bytes side by side.
            mixed = np.any([found[sector] == candidate for candidate in candidates.values()], axis=0)
            if len(candidates) < 3 or not mixed.all():
                return f"sector {sector} is neither old nor new (versions {first} to {last})"
        return None

    def _changed(self, content: bytes, step: Step) -> bytes:
        start, stop = step.offset, step.offset + step.length
        if step.kind in ("write", "packed"):
            return content[:start] + step.data() + content[stop:]
        if step.kind == "discard":
            if self.keeps_parts:
                return content
            start = -(-start // self.cluster_size) * self.cluster_size
            stop = stop if stop == len(content) else stop // self.cluster_size * self.cluster_size
            if start >= stop:
                return content
        return content[:start] + bytes(stop - start) + content[stop:]
