"""The same arguments for the stock qemu-img and for our command, and the difference of what they say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import qcowlib
from qcowlib.cli.main import main
from tests import oracle

#: Name under which our command runs: messages start with it.
PROGRAM = "qemu-img"


class Said(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def stock(directory: Path, *arguments: str) -> Said:
    """The stock qemu-img, run in a directory."""
    done = oracle.qemu_img(*arguments, check=False, cwd=directory)
    return Said(done.returncode, done.stdout, done.stderr)


def ours(directory: Path, *arguments: str) -> Said:
    """Our command in this process, called as qemu-img."""
    out, err = io.StringIO(), io.StringIO()
    name, sys.argv[0] = sys.argv[0], PROGRAM
    try:
        with working_directory(directory), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    except Exception:
        return Said(-1, out.getvalue(), err.getvalue() + traceback.format_exc())
    finally:
        sys.argv[0] = name
    # As the stock tool's output is read: carriage returns become line ends.
    return Said(code, out.getvalue().replace("\r\n", "\n").replace("\r", "\n"), err.getvalue())


def process(directory: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    """Our command as a process of its own, with `extra` in its environment."""
    command = [sys.executable, "-m", "qcowlib", *arguments]
    return subprocess.run(
        command, cwd=directory, capture_output=True, check=False, timeout=60, env=process_environment() | extra
    )


def process_environment() -> dict[str, str]:
    """The environment of a Python process that finds the package under test, wherever it runs."""
    return os.environ | {"PYTHONPATH": str(Path(qcowlib.__file__).parent.parent)}


def assert_same(directory: Path, *arguments: str, mask: str | None = None) -> Said:
    """A command that only reads: both say the same on the same files; returns what they said.

    Args:
        directory: where both run.
        arguments: the arguments of both.
        mask: a regular expression whose matches are left out of the comparison.
    """
    expected, got = stock(directory, *arguments), ours(directory, *arguments)
    _compare(expected, got, arguments, mask)
    return got


class Pair:
    """Two directories with equal files: the stock tool writes in one, our command in the other."""

    def __init__(self, path: Path) -> None:
        self.theirs, self.ours = path / "theirs", path / "ours"
        self.theirs.mkdir()
        self.ours.mkdir()

    def prepare(self, *arguments: str) -> None:
        """Let the stock tool do something in both directories."""
        for directory in (self.theirs, self.ours):
            oracle.qemu_img(*arguments, cwd=directory)

    def copy(self, source: Path, name: str) -> None:
        """Put a copy of a file into both directories."""
        for directory in (self.theirs, self.ours):
            (directory / name).write_bytes(source.read_bytes())

    def same(self, *arguments: str, mask: str | None = None) -> Said:
        """Run both, each in its directory; both say the same and leave files of the same names.

        After a failure ours may leave fewer: the stock tool forgets an empty raw file.
        """
        expected, got = stock(self.theirs, *arguments), ours(self.ours, *arguments)
        _compare(expected, got, arguments, mask)
        left, left_by_stock = set(os.listdir(self.ours)), set(os.listdir(self.theirs))
        assert left == left_by_stock or (got.code != 0 and left < left_by_stock), arguments
        return got


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def _compare(expected: Said, got: Said, arguments: tuple[str, ...], mask: str | None) -> None:
    if mask is not None:
        expected, got = (Said(s.code, re.sub(mask, "*", s.out), re.sub(mask, "*", s.err)) for s in (expected, got))
    assert got == expected, arguments
