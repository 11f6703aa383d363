"""A short run of tools/fuzz.py, always the same cases; run it for longer, with other seeds, by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import tool

_ROOT = Path(__file__).resolve().parent.parent.parent


def _fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool("qemu-img")
    return subprocess.run(
        [sys.executable, _ROOT / "tools" / "fuzz.py", *arguments],
        check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_changed_metadata_gives_honest_errors() -> None:
    done = _fuzz("--seconds", "20", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " equal" in done.stdout
    assert " both refuse" in done.stdout


#: Cases that failed once.
FOUND = [
    "bitmap:136=80000000",
    "bitmap:8194=0000,24864=0000000000000000,4112=eb985b44254e7eba",
    "plain:12288=0000000000000005",
    "tiny-clusters:1736=0000040000000000",
    "tiny-clusters:33808=04000000,34488=0000000000005800,148=00008e00,1632=0000000000009400",
]


@pytest.mark.parametrize("case", FOUND)
def test_cases_that_failed_once(case: str) -> None:
    done = _fuzz("--case", case)
    assert done.returncode == 0, done.stdout + done.stderr
