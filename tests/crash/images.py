"""Images for proofs: made by stock qemu-img, held in memory, changed by programs of steps through the library."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from qcowlib.image.opening import open_image
from qcowlib.image.policy import LocalFiles
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.amend import amend
from qcowlib.operations.resize import resize
from qcowlib.operations.snapshots import apply_snapshot, attach_vmstate, create_snapshot, delete_snapshot
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.protocol import ReadStorage
from tests.crash.guest import Guest, Step
from tests.oracle import qemu_img


@dataclass(frozen=True)
class Scenario:
    """An image and what is done to it.

    Attributes:
        name: for messages.
        size: of the disk in bytes.
        options: of `qemu-img create -o`.
        before: steps that make the image.
        steps: steps under test.
        backing: bytes of a backing file; 0 for none.
        samples: crash states per epoch and kind, besides all prefixes.
    """

    name: str
    size: int
    options: dict[str, str | int]
    before: Sequence[Step] = ()
    steps: Sequence[Step] = ()
    backing: int = 0
    samples: int = 5

    @property
    def version(self) -> int:
        """Of the header."""
        return 2 if self.options.get("compat") == "0.10" else 3

    @property
    def cluster_size(self) -> int:
        """In bytes."""
        return int(self.options.get("cluster_size", 65536))


def open_writable(storage: ReadStorage) -> WritableQcow2Image:
    """An image opened for writing, with its backing file."""
    return cast(WritableQcow2Image, open_image(storage, format="qcow2", writable=True, policy=LocalFiles()))


def build(scenario: Scenario, directory: Path) -> tuple[bytes, Guest, bytes | None]:
    """The image before the steps under test, its model, and the content of its backing file."""
    path = directory / f"{scenario.name}.qcow2"
    options = ",".join(f"{key}={value}" for key, value in scenario.options.items())
    args: list[str | Path] = ["create", "-q", "-f", "qcow2", "-o", options]
    backing = None
    if scenario.backing:
        backing = Step("write", 0, scenario.backing, 4711).data()
        base = directory / f"{scenario.name}.raw"
        base.write_bytes(backing)
        args += ["-b", base, "-F", "raw"]
    qemu_img(*args, path, str(scenario.size))
    storage = BytesStorage(path.read_bytes(), name=str(path))
    path.unlink()
    content = (backing or b"")[: scenario.size].ljust(scenario.size, b"\0")
    guest = Guest(content, scenario.cluster_size, keeps_parts=scenario.version == 2 and backing is not None)
    image = open_writable(storage)
    for step in scenario.before:
        if step.kind == "resize":
            image.close()
            storage = _resize(storage, step.length, path)
            image = open_writable(storage)
        else:
            run_step(image, step)
        guest.follow(step)
    image.close()
    guest.restart()
    return storage.getvalue(), guest, backing


def _resize(storage: BytesStorage, size: int, path: Path) -> BytesStorage:
    path.write_bytes(storage.getvalue())
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", path, str(size))
    resized = BytesStorage(path.read_bytes(), name=str(path))
    path.unlink()
    return resized


def run_step(image: WritableQcow2Image, step: Step) -> None:
    """Do one step to an image."""
    if step.kind == "write":
        image.write(step.offset, step.data())
    elif step.kind == "packed":
        image.write_compressed(step.offset, step.data())
    elif step.kind == "zero":
        image.write_zeroes(step.offset, step.length)
    elif step.kind == "discard":
        image.discard(step.offset, step.length)
    elif step.kind == "flush":
        image.flush()
    elif step.kind == "create":
        vmstate = io.BytesIO(step.data()) if step.length else None
        create_snapshot(image, step.name, date_ns=10**18, vmstate=vmstate)
    elif step.kind == "attach":
        attach_vmstate(image, step.name, io.BytesIO(step.data()))
    elif step.kind == "apply":
        apply_snapshot(image, step.name)
    elif step.kind == "amend":
        amend(image, **_options(step.name))
    elif step.kind in ("resize", "reserve"):
        resize(image, step.length, shrink=True, preallocation="full" if step.kind == "reserve" else "off")
    else:
        delete_snapshot(image, step.name)


def _options(text: str) -> dict[str, Any]:
    """Keyword arguments of `amend`."""
    pairs = [option.split("=") for option in text.split(",")]
    return {name: value if name == "compat" else int(value) for name, value in pairs}
