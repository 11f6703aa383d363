"""The programs that can be asked the corpus's questions: ours, and the stock tools as proof that these are right."""

import contextlib
import io
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tests import oracle
from tests.corpus.digests import Digests, digest

#: Names this program for a development run: "qemu-img" asks the stock tools instead of ours.
CHOICE = "QCOWLIB_CORPUS_PROGRAM"


class Reply(NamedTuple):
    """What a command answered."""

    rc: int
    stdout: str
    stderr: str


class Target(NamedTuple):
    """An image as it is to be opened: file, format (None probes) and passphrase."""

    file: str
    format: str | None = None
    secret: str | None = None

    def arguments(self) -> list[str]:
        """qemu-img's arguments that open it."""
        if self.secret is not None:
            options = f"driver=qcow2,file.filename={self.file},encrypt.key-secret=s0"
            return ["--object", f"secret,id=s0,data={self.secret}", "--image-opts", options]
        return [*(["-f", self.format] if self.format else []), self.file]


class Refused(Exception):
    """The program refused to read; the text is its message."""


class Program(Protocol):
    """What the questions need of a program."""

    def command(self, *args: str) -> Reply:
        """Run one qemu-img command line in the current directory."""

    def content(self, target: Target, *, snapshot: str | None, whole: bool) -> Digests | None:
        """Digests of the active layer or of the snapshot with this id; raises Refused; None: cannot be asked."""

    def vmstate(self, target: Target, snapshot: str) -> Digests | None:
        """Size and SHA-256 of the vm state of the snapshot with this id; raises Refused; None: cannot be asked."""

    def snapshots(self, target: Target) -> Sequence[dict[str, Any]] | None:
        """The snapshots' fields, named as in the manifest; raises Refused; None: cannot be asked."""

    def dirty(self, target: Target, bitmap: str) -> list[list[int]] | None:
        """[offset, length] of what a bitmap has marked; raises Refused; None: cannot be asked."""


class Ours:
    """`qcow` run inside this process, and the library."""

    def command(self, *args: str) -> Reply:
        from qcowlib.cli.main import main

        # Text over bytes: the command may write to either.
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                rc = main(list(args))
            except SystemExit as end:
                rc = end.code if isinstance(end.code, int) else 1
            except Exception:
                # Nothing but an exit code may leave the command: no answer has this one.
                rc = -1
                traceback.print_exc()
        return Reply(rc, _text(out), _text(err))

    def content(self, target: Target, *, snapshot: str | None, whole: bool) -> Digests | None:
        with self._opened(target) as image:
            if snapshot is None:
                return digest(image, _ranges(image), whole=whole)
            with image.open_snapshot(snapshot) as state:
                return digest(state, _ranges(state), whole=whole)

    def vmstate(self, target: Target, snapshot: str) -> Digests | None:
        with self._opened(target) as image, image.open_snapshot(snapshot) as state:
            memory = state.vmstate
            return digest(memory, [(0, memory.size)], whole=True)

    def snapshots(self, target: Target) -> Sequence[dict[str, Any]] | None:
        with self._opened(target, open_backing=False) as image:
            return [
                {
                    "id": entry.id,
                    "name": entry.name,
                    "vm_state_size": entry.vm_state_size,
                    "date_sec": entry.date_sec,
                    "date_nsec": entry.date_nsec,
                    "vm_clock_sec": entry.vm_clock_nsec // 10**9,
                    "vm_clock_nsec": entry.vm_clock_nsec % 10**9,
                    "disk_size": entry.disk_size,
                    "l1_size": entry.l1_size,
                }
                for entry in image.snapshots
            ]

    def dirty(self, target: Target, bitmap: str) -> list[list[int]] | None:
        import qcowlib

        with self._opened(target, open_backing=False) as image:
            batches = qcowlib.dirty_extents(image, bitmap)
            return [[*row] for batch in batches for row in zip(*(column.tolist() for column in batch), strict=True)]

    @contextlib.contextmanager
    def _opened(self, target: Target, *, open_backing: bool = True) -> Iterator[Any]:
        import qcowlib
        from qcowlib.image.policy import LocalFiles

        try:
            with qcowlib.open_image(
                target.file,
                format=target.format,
                policy=LocalFiles(),
                passphrase=target.secret,
                open_backing=open_backing,
            ) as image:
                yield image
        except qcowlib.QcowError as error:
            raise Refused(f"{type(error).__name__}: {error}") from error


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("utf-8", "surrogateescape")


def _ranges(image: Any) -> Iterator[tuple[int, int]]:
    """Ranges of an image that may hold other than zeroes, by its own account."""
    from qcowlib.extents import ExtentKind

    for table in image.extents():
        held = (table.kind == ExtentKind.DATA) | (table.kind == ExtentKind.COMPRESSED)
        yield from zip(table.start[held].tolist(), table.length[held].tolist(), strict=True)


class Stock:
    """The stock tools, as the manifest's answers came from them."""

    #: A raw copy of a larger disk does not fit into the host's file system.
    LARGEST = 1 << 42

    def __init__(self, work: Path) -> None:
        self.work = work

    def command(self, *args: str) -> Reply:
        done = oracle.run("qemu-img", *args, check=False, open_files=256)
        return Reply(done.returncode, done.stdout, done.stderr)

    def content(self, target: Target, *, snapshot: str | None, whole: bool) -> Digests | None:
        copy = self.work / f"content-{os.getpid()}.raw"
        select = ["-l", f"snapshot.id={snapshot}"] if snapshot is not None else []
        size = json.loads(self.command("info", "-U", "--output=json", target.file).stdout or "{}").get(
            "virtual-size", 0
        )
        if size > self.LARGEST:
            return None
        reply = self.command("convert", "-O", "raw", *select, *target.arguments(), str(copy))
        try:
            if reply.rc != 0:
                raise Refused(reply.stderr)
            raw = _RawCopy(copy)
            return digest(raw, raw.ranges(), whole=whole)
        finally:
            copy.unlink(missing_ok=True)

    def vmstate(self, target: Target, snapshot: str) -> Digests | None:
        return None

    def snapshots(self, target: Target) -> Sequence[dict[str, Any]] | None:
        return None

    def dirty(self, target: Target, bitmap: str) -> list[list[int]] | None:
        return None


class _RawCopy:
    """A sparse raw file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def ranges(self) -> Iterator[tuple[int, int]]:
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self._file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            at = os.lseek(self._file.fileno(), start, os.SEEK_HOLE)
            yield start, at - start


def chosen(work: Path) -> Program:
    """The program that this run asks."""
    return Stock(work) if os.environ.get(CHOICE) == "qemu-img" else Ours()
