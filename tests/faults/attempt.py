"""A program of steps on a host that fails, and what must hold afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from qcowlib.errors import QcowError, StorageError
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.recorder import Fault, FaultyStorage
from tests.crash.guest import VM_STATE, Guest, Step
from tests.crash.images import open_writable, run_step
from tests.crash.invariants import examine_broken, examine_healed, heal


class InterruptedStorage(FaultyStorage):
    """Somebody presses Ctrl-C where the plan has a failure."""

    def _fail(self, action: str, code: int) -> NoReturn:
        self.failures += 1
        raise KeyboardInterrupt


@dataclass
class Attempt:
    """What happened.

    Attributes:
        data: the image afterwards.
        guest: the model, as far as the steps came.
        durable: the last moment that must not be lost.
        errors: what was raised, in order; nothing is let through but `QcowError`, and the interrupts that were planned.
        storage: the host.
    """

    data: bytes
    guest: Guest
    durable: int
    errors: list[QcowError | KeyboardInterrupt]
    storage: FaultyStorage


def attempt(
    initial: bytes,
    guest: Guest,
    steps: Sequence[Step],
    plan: Iterable[Fault],
    name: str,
    *,
    capacity: int | None = None,
    host: type[FaultyStorage] = FaultyStorage,
) -> Attempt:
    """Open an image, do steps whatever fails, close it."""
    inner = BytesStorage(initial, name=name)
    storage = host(inner, plan, capacity=capacity)
    model = Guest(guest.now.content, guest.cluster_size, keeps_parts=guest.keeps_parts)
    model.moments = [guest.now]
    done = Attempt(b"", model, 0, [], storage)
    try:
        image = open_writable(storage)
    except (QcowError, KeyboardInterrupt) as error:
        done.errors.append(error)
    else:
        for step in steps:
            _try_step(image, step, done)
        try:
            usable = not image.transaction.failed
            image.close()
            if usable:  # else the step that failed has said that something is lost
                model.follow(Step("flush"))
                done.durable = len(model.moments) - 1
        except (QcowError, KeyboardInterrupt) as error:
            done.errors.append(error)
        image.close()  # a second call does nothing, not even raise
    done.data = inner.getvalue()
    return done


def _try_step(image: WritableQcow2Image, step: Step, done: Attempt) -> None:
    """One step; the model follows what took place."""
    model, usable = done.guest, not image.transaction.failed
    if step.kind in ("write", "packed", "zero", "discard") and step.offset + step.length > image.size:
        return  # a resize before it has failed
    try:
        run_step(image, step)
    except (QcowError, KeyboardInterrupt) as error:
        done.errors.append(error)
        if not usable or step.kind == "flush":
            return  # refused, as everything is after a commit that failed; or durable or not
        if not step.whole or image.transaction.failed:
            model.follow(step)
        if not image.transaction.failed:
            _look(image, step, done)
        return
    assert usable, f"{step.kind} works after a commit that failed"
    model.follow(step)
    if step.whole or step.kind == "flush":
        done.durable = len(model.moments) - 1


def _look(image: WritableQcow2Image, step: Step, done: Attempt) -> None:
    """After a step that failed without harm to the session: see how far it came, and go on from there."""
    model = done.guest
    content = _read_in_spite(image, done)
    assert {entry.name for entry in image.snapshots} == {name for name in model.now.saved if VM_STATE not in name}
    if step.kind == "resize" and len(content) == step.length:
        model.follow(step)  # the size has changed; giving back the space has failed
        done.durable = len(model.moments) - 1
    if step.whole:
        assert content == model.now.content, f"a {step.kind} that was refused has changed the disk"
        return
    last = len(model.moments) - 1
    wrong = model.judge(content, model.now.saved, last - 1, last, torn=True)
    assert wrong is None, f"after a failed {step.kind}: {wrong}"
    model.moments[-1] = replace(model.now, content=content)


def _read_in_spite(image: WritableQcow2Image, done: Attempt) -> bytes:
    for _ in range(3):
        try:
            return image.read(0, image.size)
        except StorageError as error:
            done.errors.append(error)
    raise AssertionError("the image cannot be read")


def examine(done: Attempt, backing: bytes | None, name: str) -> bytes:
    """The image is valid, its content what it must be; opened for writing once more it is exact. Its bytes then."""
    found = examine_broken(done.data, backing, name)
    wrong = done.guest.judge(found.active, found.saved, done.durable, len(done.guest.moments) - 1)
    assert wrong is None, f"{wrong}; after {[str(error) for error in done.errors]}"
    healed = heal(BytesStorage(done.data, name=name), found)
    examine_healed(healed, backing, found)
    return healed
