"""The command `domsnap`, and a domain that is off."""

from pathlib import Path
from typing import Any

import pytest

import qcowlib
from snapshot.cli.main import main

MIB = 1 << 20


class Result:
    """What a command did: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def domsnap(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))

    def run(*words: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def domain(tmp_path: Path) -> Path:
    """A domain file with a qcow2 and a raw disk, off."""
    qcowlib.create_image(tmp_path / "a.qcow2", MIB)
    qcowlib.create_image(tmp_path / "b.raw", MIB, format="raw")
    path = tmp_path / "vm.toml"
    path.write_text(
        'name = "vm"\nqmp = "qmp"\n[disks.vda]\npath = "a.qcow2"\nformat = "qcow2"\n'
        '[disks.vdb]\npath = "b.raw"\nformat = "raw"\n'
    )
    return path
