#!/usr/bin/env python3
"""Change the metadata of small images at random and see that nothing but an honest error comes of it.

    python3 tools/fuzz.py [--seconds N | --cases N] [--seed S] [--minimise] [--case TEXT]

Each case is a valid image of stock QEMU with some of its fields changed. It is opened, read whole, read at random,
checked and, in memory, written. These are failures:

    fault      an exception that is no QcowError, too much memory, too much time
    bytes      stock qemu-img reads the image as well, and reads other bytes
    paths      two ways to read one range (scalar and vectorised) disagree
    missed     stock qemu-img check finds corruption where ours finds nothing wrong
    spread     an image that a check finds free of errors has other content, or errors, after writes to it
    changed    a snapshot operation was refused, and the file is not as before

Counted, no failures: "only ours" (we read it, qemu-img does not), "stricter" (the other way round). The same seed gives
the same cases. A case is shown as IMAGE:OFFSET=HEX,... and can be run again with --case.
"""

import argparse
import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple, Never

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qcowlib
from qcowlib.errors import ImageStateError, QcowError
from tools.fuzz_images import Field, Seed, seed_images

ADDRESS_SPACE = 2 << 30
CPU_SECONDS = 10.0
STOCK_DEADLINE = 30.0
LARGEST_READ = 8 << 20
HEADER_END = 200
_KIND_DATA, _KIND_ZERO, _KIND_UNALLOCATED = 0, 1, 2


class Case(NamedTuple):
    """A seed's name and what is written over it: (host offset, bytes)."""

    seed: str
    changes: tuple[tuple[int, bytes], ...]

    def __str__(self) -> str:
        return f"{self.seed}:" + ",".join(f"{offset}={data.hex()}" for offset, data in self.changes)

    @classmethod
    def parse(cls, text: str) -> "Case":
        """The case that was shown as `text`."""
        seed, _, changes = text.partition(":")
        pairs = (change.split("=") for change in changes.split(",") if change)
        return cls(seed, tuple((int(offset), bytes.fromhex(data)) for offset, data in pairs))

    def apply(self, data: bytes) -> bytes:
        """The image of the case."""
        changed = bytearray(data)
        for offset, piece in self.changes:
            changed[offset : offset + len(piece)] = piece
        return bytes(changed)


class FailureError(Exception):
    """What a case must not do."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class _TooSlow(BaseException):
    """CPU time is up; not an Exception, so that nothing on the way takes it for its own."""


def random_case(dice: random.Random, seeds: dict[str, Seed]) -> Case:
    """One to four changes to one seed."""
    name = dice.choice(sorted(seeds))
    seed = seeds[name]
    header = [field for field in seed.fields if field.offset < HEADER_END]
    tables = [field for field in seed.fields if field.offset >= HEADER_END]
    changes = []
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 4))):
        # By kind first: there are many more L2 entries than others. Most changes of the header make it a wrong one.
        label = dice.choice(sorted({field.label for field in (header if dice.random() < 0.2 else tables)}))
        field = dice.choice([field for field in seed.fields if field.label == label])
        changes.append((field.offset, _other_value(dice, seed, field)))
    return Case(name, tuple(changes))


def _other_value(dice: random.Random, seed: Seed, field: Field) -> bytes:
    """A value for a field that is near the old one, near a limit, or another field's."""
    bits = 8 * field.width
    old = int.from_bytes(seed.data[field.offset : field.offset + field.width], "big")
    other = dice.choice(seed.fields)
    clusters = len(seed.data) // seed.cluster_size
    values = [
        old ^ 1 << dice.randrange(bits), old + dice.choice((1, -1)), old + dice.choice((1, -1)) * seed.cluster_size,
        0, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, dice.getrandbits(bits), 1 << dice.randrange(bits),
        int.from_bytes(seed.data[other.offset : other.offset + other.width], "big"),
        dice.randrange(clusters + 2) * seed.cluster_size,
        dice.randrange(clusters + 2) * seed.cluster_size | 1 << 63,
        old ^ 1 << 63 | 1, len(seed.data), dice.randrange(16),
    ]  # fmt: skip
    return (dice.choice(values) & (1 << bits) - 1).to_bytes(field.width, "big")


class Fuzzer:
    """Runs cases and counts what they gave.

    Args:
        folder: for the images; the process's directory from now on, as the overlay's base is named relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds = seed_images(folder)
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def run(self, case: Case) -> None:
        """Run one case.

        Raises:
            FailureError: the case did what it must not do.
        """
        data = case.apply(self.seeds[case.seed].data)
        path = self.folder / "case.qcow2"
        path.write_bytes(data)
        number = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        self.counts["cases"] += 1
        try:
            with _cpu_limit():
                content, error = self._read(path, number)
                damage = self._check(path)
        except QcowError as refusal:
            raise FailureError("fault", f"a check must not be refused: {refusal}") from refusal
        self._compare_content(path, content, error)
        if number % 4 == 0:
            self._compare_check(path, damage)
        with _cpu_limit():
            self._change(data, path.parent, content, clean=damage == "", dice=random.Random(number))

    def _read(self, path: Path, number: int) -> tuple[bytes | None, str]:
        """Content of the whole disk, or the reason why it cannot be read; random ranges must agree with it."""
        try:
            with qcowlib.open_image(path, format="qcow2", policy=qcowlib.LocalFiles()) as image:
                self.counts["opened"] += 1
                if image.size > LARGEST_READ:
                    return None, "too large to compare"
                content, error = _whole(image)
                _compare_paths(image, content, random.Random(number))
                _use_snapshots(image)
        except QcowError as refusal:
            return None, _reason(refusal)
        return content, error

    def _check(self, path: Path) -> str | None:
        """What a check finds: "" nothing wrong (leaks are no damage), None when it cannot be opened."""
        try:
            image = qcowlib.open_image(path, format="qcow2", open_backing=False)
        except QcowError:
            return None
        with image:
            report = qcowlib.check(image)
        if report.corruptions or report.check_errors or report.stopped is not None:
            return f"{report.corruptions} corruptions, {report.check_errors} errors, {report.stopped}"
        return ""

    def _compare_content(self, path: Path, content: bytes | None, error: str) -> None:
        if error == "too large to compare":
            self.counts[error] += 1
            return
        raw = self.folder / "stock.raw"
        done = _stock("convert", "-f", "qcow2", "-O", "raw", path.name, raw.name, cwd=self.folder)
        stock = raw.read_bytes() if done is not None and done.returncode == 0 else None
        raw.unlink(missing_ok=True)
        if content is None and stock is None:
            self.counts["both refuse"] += 1
        elif content is None:
            self.counts["stricter"] += 1
            self.reasons[f"stricter: {error}"] += 1
        elif stock is None:
            self.counts["only ours"] += 1
            text = "deadline" if done is None else done.stderr.strip().splitlines()[-1].replace(path.name, "")
            self.reasons[f"only ours: {text[:150]}"] += 1
        elif content != stock:
            where = next((at for at, pair in enumerate(zip(content, stock, strict=False)) if pair[0] != pair[1]), -1)
            raise FailureError("bytes", f"first difference at {where:#x}; sizes {len(content)} and {len(stock)}")
        else:
            self.counts["equal"] += 1

    def _compare_check(self, path: Path, damage: str | None) -> None:
        done = _stock("check", "-f", "qcow2", "--output=json", path.name, cwd=self.folder)
        if done is None or not done.stdout.strip():
            return
        self.counts["checks compared"] += 1
        found = json.loads(done.stdout)
        corruptions = found.get("corruptions", 0)
        if damage == "" and corruptions:
            raise FailureError("missed", f"qemu-img check finds {corruptions} corruptions")
        if damage and not (corruptions or found.get("check-errors", 0)):
            self.reasons[f"check stricter: {damage[:80]}"] += 1

    def _change(self, data: bytes, folder: Path, content: bytes | None, *, clean: bool, dice: random.Random) -> None:
        """Writes and snapshot operations on a copy in memory."""
        storage = qcowlib.BytesStorage(data, writable=True, name=str(folder / "case.qcow2"))
        try:
            image = qcowlib.open_image(storage, format="qcow2", writable=True, policy=qcowlib.LocalFiles())
        except QcowError:
            return
        assert isinstance(image, qcowlib.WritableQcow2Image)
        model = None if content is None or not clean else bytearray(content)
        opened = storage.getvalue()
        try:
            with image:
                _snapshot_step(image, storage, opened, dice)
                for _ in range(4):
                    model = _write_step(image, model, dice)
                if model is not None:
                    self._require_content(image, model)
        except QcowError as refusal:
            recorded = isinstance(refusal, ImageStateError) and bool(image.bitmaps)  # as documented, not written
            if model is not None and not recorded:
                raise FailureError("spread", f"an image without errors cannot be written: {refusal}") from refusal
            self.counts["writes refused"] += 1
            return
        self.counts["written"] += 1
        if model is None:
            return
        after = self.folder / "after.qcow2"
        after.write_bytes(storage.getvalue())
        damage = self._check(after)
        if damage:
            raise FailureError("spread", f"after writes the check finds {damage}")
        with qcowlib.open_image(after, format="qcow2", policy=qcowlib.LocalFiles()) as again:
            self._require_content(again, model)

    def _require_content(self, image: qcowlib.BlockImage, model: bytearray) -> None:
        found = image.read(0, len(model))
        if found != model:
            where = next(at for at, pair in enumerate(zip(found, model, strict=True)) if pair[0] != pair[1])
            raise FailureError("spread", f"after writes the content differs from {where:#x} on")


def _whole(image: qcowlib.BlockImage) -> tuple[bytes | None, str]:
    try:
        return image.read(0, image.size), ""
    except QcowError as refusal:
        return None, _reason(refusal)


def _reason(refusal: QcowError) -> str:
    """A refusal without its numbers, so that equal ones count together."""
    text = "".join("#" if letter.isdigit() else letter for letter in str(refusal).splitlines()[0])
    while "##" in text:
        text = text.replace("##", "#")
    return f"{type(refusal).__name__}: {text[:150]}"


def _compare_paths(image: qcowlib.BlockImage, content: bytes | None, dice: random.Random) -> None:
    """Single reads and extents against the content of the whole disk."""
    if not image.size:
        return
    for _ in range(12):
        offset = dice.randrange(image.size)
        length = min(dice.choice((1, 512, 5000)), image.size - offset)
        try:
            piece = image.read(offset, length)
        except QcowError as refusal:
            if content is not None:
                raise FailureError("paths", f"{length} bytes at {offset:#x} are refused: {refusal}") from refusal
            continue
        if content is not None and piece != content[offset : offset + length]:
            raise FailureError("paths", f"{length} bytes at {offset:#x} differ from those of the whole")
    if content is None:
        return
    position = 0
    for table in image.extents():
        for start, length, kind in zip(table.start.tolist(), table.length.tolist(), table.kind.tolist(), strict=True):
            if start != position or length <= 0:
                raise FailureError("paths", f"extents have a gap or overlap at {position:#x}")
            position += length
            if kind in (_KIND_ZERO, _KIND_UNALLOCATED) and content[start:position].strip(b"\0"):
                raise FailureError("paths", f"the extent at {start:#x} of kind {kind} is not zero")
    if position != image.size:
        raise FailureError("paths", f"extents end at {position:#x} of {image.size:#x}")


def _use_snapshots(image: qcowlib.Qcow2Image | qcowlib.RawImage) -> None:
    """Read every snapshot, as far as it goes."""
    assert isinstance(image, qcowlib.Qcow2Image)
    for entry in image.snapshots[:4]:
        try:
            with image.open_snapshot(entry) as view:
                view.read(0, min(view.size, 1 << 20))
                view.vmstate.read(0, min(view.vmstate.size, 1 << 20))
        except QcowError:
            continue


def _snapshot_step(
    image: qcowlib.WritableQcow2Image, storage: qcowlib.BytesStorage, before: bytes, dice: random.Random
) -> None:
    """Create, or delete a snapshot, as the first thing that is done to an image: refused means unchanged."""
    operations: list[Callable[[], object]] = [lambda: qcowlib.create_snapshot(image, "new")]
    if image.snapshots:
        operations.append(lambda: qcowlib.delete_snapshot(image, image.snapshots[0]))
    operation = dice.choice([*operations, None])
    if operation is None:
        return
    try:
        operation()
    except QcowError as refusal:
        if storage.getvalue() != before:
            raise FailureError("changed", f"refused with '{refusal}'") from refusal


def _write_step(image: qcowlib.WritableQcow2Image, model: bytearray | None, dice: random.Random) -> bytearray | None:
    """One change; the model follows it. Without a model a refusal is as good as anything."""
    size = min(image.size, LARGEST_READ)
    offset = dice.randrange(max(1, size))
    length = min(dice.choice((1, 700, 4096, 50000)), size - offset)
    try:
        if dice.random() < 0.6:
            piece = bytes([dice.randrange(1, 255)]) * length
            image.write(offset, piece)
        else:
            piece = bytes(length)
            image.write_zeroes(offset, length)
        if dice.random() < 0.3:
            image.flush()
    except QcowError:
        if model is not None:
            raise
        return None
    if model is not None:
        model[offset : offset + length] = piece
    return model


@contextmanager
def _cpu_limit() -> Iterator[None]:
    """Everything but a QcowError or a found failure is a fault."""

    def stop(*_: object) -> Never:
        raise _TooSlow

    old = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    except (QcowError, FailureError):
        raise
    except _TooSlow as slow:
        raise FailureError("fault", f"more than {CPU_SECONDS} seconds of CPU time") from slow
    except Exception as error:
        raise FailureError("fault", traceback.format_exc()) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)


def _stock(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str] | None:
    """Stock qemu-img; None when it does not come to an end."""
    try:
        return subprocess.run(
            ["qemu-img", *arguments],
            cwd=cwd, check=False, capture_output=True, timeout=STOCK_DEADLINE, stdin=subprocess.DEVNULL,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


def failure_of(fuzzer: Fuzzer, case: Case) -> FailureError | None:
    """The failure that a case shows, if it does."""
    try:
        fuzzer.run(case)
    except FailureError as failure:
        return failure
    return None


def minimise(fuzzer: Fuzzer, case: Case, kind: str) -> Case:
    """The case with as few changes as still give the same kind of failure."""
    for change in case.changes:
        fewer = Case(case.seed, tuple(other for other in case.changes if other is not change))
        failure = failure_of(fuzzer, fewer)
        if failure is not None and failure.kind == kind:
            case = fewer
    return case


def cases(arguments: argparse.Namespace, seeds: dict[str, Seed]) -> Iterator[Case]:
    """The cases that were asked for."""
    if arguments.case:
        yield Case.parse(arguments.case)
        return
    until = time.monotonic() + arguments.seconds
    for number in count() if arguments.cases is None else range(arguments.cases):
        if arguments.cases is None and time.monotonic() > until:
            return
        yield random_case(random.Random(f"{arguments.seed}-{number}"), seeds)


def main() -> int:
    """Run; 1 when there was a failure."""
    parser = argparse.ArgumentParser(description="Fuzz qcowlib against stock qemu-img.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--cases", type=int, help="how many cases instead")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other cases (1)")
    parser.add_argument("--minimise", action="store_true", help="take away the changes that a failure does not need")
    parser.add_argument("--case", help="run this one case, as it was shown")
    parser.add_argument("--reasons", action="store_true", help="show why one side refused what the other read")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    failures = 0
    with tempfile.TemporaryDirectory(prefix="qcow-fuzz-") as name:
        fuzzer = Fuzzer(Path(name))
        for case in cases(arguments, fuzzer.seeds):
            failure = failure_of(fuzzer, case)
            if failure is None:
                continue
            failures += 1
            if arguments.minimise:
                case = minimise(fuzzer, case, failure.kind)  # noqa: PLW2901
            print(f"{failure}\n  --case '{case}'", flush=True)
    print(", ".join(f"{number} {label}" for label, number in fuzzer.counts.items()) + f", {failures} failures")
    if arguments.reasons:
        for reason, number in fuzzer.reasons.most_common():
            print(f"{number:6} {reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
