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
        kind: "write", "packed" (a compressed cluster), "zero", "discard", "flush", "create", "apply", "delete",
            "attach" (give a snapshot a vm state), "resize", "reserve" (grow with preallocated space),
            or "amend" (`name` holds the options).
        offset: guest bytes.
        length: guest bytes; bytes of vm state for "create" and "attach"; the new size for "resize" and "reserve".
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
        return self.kind in ("create", "apply", "delete", "attach", "resize", "reserve", "amend")

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
        elif step.kind in ("resize", "reserve"):
            content = content[: step.length].ljust(step.length, b"\0")
        elif step.kind not in ("flush", "amend"):
            content = self._changed(content, step)
        self.moments.append(Moment(content, saved, step))

    def judge(
        self, content: bytes, saved: Mapping[str, bytes], first: int, last: int, *, torn: bool = False
    ) -> str | None:
        """What is wrong with a disk after an accident; None if nothing is.

        Args:
            content: the active layer as found.
            saved: content of the snapshots as found, by name.
            first: the last moment known to be durable.
            last: the last moment that can have begun.
            torn: a write may have ended inside a sector, as short writes do; a power cut does not do that.
        """
        final = self.moments[last]
        if final.step.whole and last > first:
            if content == final.content and dict(saved) == dict(final.saved):
                return None
            if final.step.kind not in ("apply", "resize", "reserve", "amend") and saved.keys() == final.saved.keys():
                return "the operation on snapshots took effect, but contents differ"
            last -= 1
        expected = self.moments[first].saved
        if saved.keys() != expected.keys():
            return f"the snapshots are {sorted(saved)}, not {sorted(expected)}"
        for name, old in expected.items():
            if saved[name] != old:
                return f"snapshot {name} has changed"
        return self._judge_sectors(content, first, last, torn)

    def _judge_sectors(self, content: bytes, first: int, last: int, torn: bool) -> str | None:
        if len(content) != len(self.moments[first].content):
            return f"the disk has {len(content)} bytes"
        found = replace(self.now, content=content).sectors()
        distinct = {moment.content: moment for moment in self.moments[first : last + 1]}
        versions = [moment.sectors() for moment in distinct.values()]
        right = np.any([(found == version).all(axis=1) for version in versions], axis=0)
        for sector in np.flatnonzero(~right).tolist():
            candidates = {version[sector].tobytes() for version in versions}
            mixed = np.any([found[sector] == version[sector] for version in versions], axis=0)
            # Two writes to one sector, of which the first was lost: old and new bytes side by side.
            if not mixed.all() or not (torn or len(candidates) > 2):
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
