"""The stock QEMU tools, run as the oracle that our results are compared with.

Every call runs with a fixed environment and a deadline. A tool that is not installed fails the test: the oracle is
part of the test, so that its absence must never look like success.
"""

import functools
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

#: Seconds that one call of a stock tool may take.
DEADLINE = 120.0

#: The Debian package that has each tool.
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "strace": "strace",
    "xmllint": "libxml2-utils",
    "virsh": "libvirt-clients",
}

Completed = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    """The environment of every tool: the caller's, with the C locale and UTC."""
    return os.environ | {"LC_ALL": "C", "TZ": "UTC"}


@functools.cache
def tool(name: str) -> str:
    """Path of a stock tool; the test fails, naming the Debian package, when it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed: apt-get install {PACKAGES.get(name, name)}", pytrace=False)
    return path


def run(
    name: str,
    *args: str | os.PathLike[str],
    check: bool = True,
    deadline: float = DEADLINE,
    cwd: str | os.PathLike[str] | None = None,
    stdin: str | None = None,
    open_files: int | None = None,
) -> Completed:
    """Run a stock tool to its end.

    Args:
        name: the tool, one of `PACKAGES`.
        args: its arguments.
        check: fail the test when the exit code is not zero.
        deadline: seconds until it is killed (`subprocess.TimeoutExpired`).
        cwd: directory to run in.
        stdin: text for its standard input; None closes it.
        open_files: how many files it may open; a small number ends its walk along a backing loop.

    Returns: exit code, standard output and standard error as text (undecodable bytes as surrogates).
    """
    command = [tool(name), *(os.fspath(arg) for arg in args)]
    done = subprocess.run(
        command,
        check=False,
        timeout=deadline,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        preexec_fn=None if open_files is None else functools.partial(_limit_open_files, open_files),
        **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def _limit_open_files(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def qemu_img(
    *args: str | os.PathLike[str], check: bool = True, deadline: float = DEADLINE, cwd: str | Path | None = None
) -> Completed:
    """`qemu-img ARGS`; with `check` (the default) a non-zero exit code fails the test."""
    return run("qemu-img", *args, check=check, deadline=deadline, cwd=cwd)


def qemu_io(
    path: str | os.PathLike[str],
    *commands: str,
    format: str | None = "qcow2",
    options: Sequence[str] = (),
    check: bool = True,
    deadline: float = DEADLINE,
) -> Completed:
    """`qemu-io -f FORMAT -c COMMAND ... PATH`; format None probes. A read with `-P` that finds other bytes fails."""
    args = ["-f", format] if format is not None else []
    for command in commands:
        args += ["-c", command]
    done = run("qemu-io", *args, *options, path, check=check, deadline=deadline)
    if check and ("Pattern verification failed" in done.stdout or "failed: " in done.stdout + done.stderr):
        raise AssertionError(f"qemu-io {commands} on {path}\n{done.stdout}{done.stderr}")
    return done


def image_check(path: str | os.PathLike[str], *args: str) -> dict[str, Any]:
    """Numbers of `qemu-img check --output=json`, with the exit code as `rc`; none is asserted."""
    done = qemu_img("check", "--output=json", *args, path, check=False)
    return {"rc": done.returncode, "stderr": done.stderr} | (json.loads(done.stdout) if done.stdout.strip() else {})


def assert_clean(path: str | os.PathLike[str]) -> None:
    """`qemu-img check` ends with 0: no errors, no leaks, no flag that it would mend."""
    qemu_img("check", "-f", "qcow2", path)


def image_info(path: str | os.PathLike[str], *args: str) -> dict[str, Any]:
    """`qemu-img info -U --output=json`, parsed."""
    result: dict[str, Any] = json.loads(qemu_img("info", "-U", "--output=json", *args, path).stdout)
    return result


def image_map(path: str | os.PathLike[str], *args: str) -> list[dict[str, Any]]:
    """`qemu-img map -U --output=json`, parsed."""
    result: list[dict[str, Any]] = json.loads(qemu_img("map", "-U", "--output=json", *args, path).stdout)
    return result


def content(path: str | os.PathLike[str], work: Path, *, snapshot: str | None = None, format: str = "qcow2") -> bytes:
    """Guest content as `qemu-img convert` reads it (of one snapshot when named); for images that fit in memory."""
    raw = work / "oracle-content.raw"
    select = ["-l", snapshot] if snapshot is not None else []
    qemu_img("convert", "-U", "-f", format, "-O", "raw", *select, path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


@functools.cache
def version(name: str) -> tuple[int, ...]:
    """Version of a stock tool, such as (7, 2, 22)."""
    found = re.search(r"\d+(?:\.\d+)+", run(name, "--version").stdout)
    if found is None:
        pytest.fail(f"{name} --version names no version", pytrace=False)
    return tuple(int(part) for part in found.group().split("."))


def versions(names: Mapping[str, str] | Sequence[str] = ("qemu-img", "qemu-io")) -> dict[str, str]:
    """Versions of the named tools as text, "missing" for one that is not installed; for reports."""
    return {name: ".".join(map(str, version(name))) if shutil.which(name) else "missing" for name in names}


def have_corpus() -> bool:
    """Whether the shared corpus of images is at hand (see tests/corpus/archives.py)."""
    from tests.corpus.archives import corpus_source

    return corpus_source() is not None
