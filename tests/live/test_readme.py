"""What README.md shows of a running machine can be pasted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracle import tool

pytestmark = pytest.mark.live

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_lines_about_virtual_machines_run(tmp_path: Path) -> None:
    if not README.exists():
        pytest.skip("these tests run against a wheel, without the checkout")
    section = README.read_text().split("## Snapshots of virtual machines\n\n")[1]
    block = section.split("\n\n")[0]
    lines = [line.removeprefix("    ") for line in block.split("\n")]
    assert 8 <= len(lines) <= 12
    script = "\n".join(["set -e", "trap 'kill $(cat vm.pid)' EXIT", *lines])
    tool("qemu-system-x86_64")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "XDG_STATE_HOME": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problems:     none (checked)" in done.stdout
    assert "reverted to snapshot 'before'" in done.stdout
    tree = done.stdout.split("reverted to snapshot 'before'\n")[1].split("\n")
    assert tree[0] == "before (current)"
    assert tree[1] == "+- disks"
    assert tree[2].startswith("   +- before-revert-")
    assert tree[3] == "deleted snapshot 'disks'"
    assert (tmp_path / "state" / "domsnap" / "vm" / "before.xml").exists()
