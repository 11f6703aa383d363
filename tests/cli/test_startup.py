"""Start-up: what --help and the plain commands import (design D15)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qcowlib.cli.main import COMMANDS
from tests.cli.side_by_side import process_environment

PROBE = """
import sys
from qcowlib.cli.main import main
code = main({arguments!r})
print(code, *sorted(set(sys.modules) & {{"numpy", "construct", "rich", "cryptography", "argparse", "json"}}))
"""


def imported(arguments: list[str], directory: Path) -> tuple[int, set[str]]:
    """Exit code, and which of the costly modules a command has imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(arguments=arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=directory,
        env=process_environment(),
    )
    code, *modules = done.stdout.splitlines()[-1].split()
    return int(code), set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code, modules = imported(arguments, tmp_path)
    assert code == 0
    assert not modules - {"json"}


def test_usage_error_imports_nothing_heavy(tmp_path: Path) -> None:
    assert imported(["info"], tmp_path) == (1, set())


def test_info_does_not_import_what_it_does_not_need(tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "i", "1M"], check=True, cwd=tmp_path, timeout=60)
    code, modules = imported(["info", "i"], tmp_path)
    assert code == 0
    assert not modules & {"cryptography", "rich", "argparse"}
