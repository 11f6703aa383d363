"""Chains of three images in memory, and what a guest sees of them: for commits and rebases that are cut off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import qcowlib
from qcowlib.image.opening import open_image
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.storage.buffer import BytesStorage
from tests.crash.guest import Step
from tests.crash.images import open_writable, run_step
from tests.crash.invariants import Content, content_by_second_opinion
from tests.crash.programs import create, discard, packed, scale, write, zero
from tests.crash.second_opinion import SecondOpinion

CLUSTERS = 40
BELOW = Step("write", 0, 1, 99)  # the raw image at the bottom
BASE = [write(0, 10, 40), create("old"), write(4, 3, 41), zero(9, 1), packed(11, 42), write(16, 4, 43), discard(18, 1)]
OVERLAY = [
    *(write(1.5, 3), zero(6, 2), packed(9, 1), create("kept"), write(2, 1, 5), write(20.5, 6), zero(14.2, 1.6)),
    *(packed(12, 3), write(33, 2.3, 6), zero(37, 1)),
]
OTHER = [write(3, 12, 70), zero(16, 2), write(36, 3, 71)]

GEOMETRIES: dict[str, dict[str, Any]] = {
    "v3-512": {"cluster_size": 512},
    "v2-512": {"cluster_size": 512, "compat": "0.10"},
    "v3-4k-r8": {"cluster_size": 4096, "refcount_bits": 8},
    "v3-16k-parts": {"cluster_size": 16384, "extended_l2": True},
}


class Files(NamedTuple):
    """raw <- base <- overlay, and another image on the same raw one."""

    directory: Path
    raw: bytes
    base: bytes
    overlay: bytes
    other: bytes
    size: int

    def content(self, overlay: bytes, base: bytes) -> Content:
        """The overlay over a state of its base."""
        below = SecondOpinion(base, self.raw).content()
        return content_by_second_opinion(SecondOpinion(overlay, below))


def build(directory: Path, options: dict[str, Any]) -> Files:
    cluster = options["cluster_size"]
    size = CLUSTERS * cluster
    raw = BELOW._replace(length=int(24.5 * cluster)).data()
    (directory / "raw").write_bytes(raw)
    # Version 2 cannot be enlarged when it has snapshots.
    smaller = size if options.get("compat") == "0.10" else 30 * cluster
    base = make(directory, "base", "raw", "raw", smaller, options, BASE)
    overlay = make(directory, "overlay", "base", "qcow2", size, options, OVERLAY)
    other = make(directory, "other", "raw", "raw", size, options, OTHER)
    return Files(directory, raw, base, overlay, other, size)


def make(
    directory: Path, name: str, below: str, below_format: str, size: int, options: dict[str, Any], steps: Sequence[Step]
) -> bytes:
    path = directory / name
    qcowlib.create_image(path, size, backing_file=str(directory / below), backing_fmt=below_format, **options)
    storage = BytesStorage(path.read_bytes(), name=str(path))
    image = open_writable(storage)
    for step in scale(steps, options["cluster_size"]):
        run_step(image, step)
    image.close()
    path.write_bytes(storage.getvalue())
    return storage.getvalue()


def commit_to(overlay: bytes, base: Any, name: str) -> None:
    """Commit the overlay, which is not changed, to a base."""
    with open_image(BytesStorage(overlay, writable=False, name=name), open_backing=False) as top:
        assert isinstance(top, Qcow2Image)
        bottom = open_writable(base)
        qcowlib.commit(top, bottom)
        bottom.close()


def backing_name(data: bytes) -> str | None:
    """The last part of the name in a header."""
    offset, length = int.from_bytes(data[8:16], "big"), int.from_bytes(data[16:20], "big")
    return Path(data[offset : offset + length].decode()).name if offset else None
