"""Which files named by an image may be opened."""

from pathlib import Path

import pytest

from qcowlib.errors import ReferenceDenied
from qcowlib.image.policy import ConfinedTo, DenyReferences, FileRequest, LocalFiles


def request_for(path: str | Path) -> FileRequest:
    return FileRequest("backing file", str(path), "disk.qcow2")


def test_the_default_denies_and_says_how_to_allow() -> None:
    with pytest.raises(ReferenceDenied, match=r"'disk.qcow2' names the backing file '/x'.*LocalFiles"):
        DenyReferences().admit(request_for("/x"))


def test_local_files_admit_any_path() -> None:
    LocalFiles().admit(request_for("/etc/passwd"))


def test_confined_to_a_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"x")
    (inside / "link").symlink_to(outside / "secret")
    (tmp_path / "inner").mkdir()
    policy = ConfinedTo(inside)
    policy.admit(request_for(inside / "base.qcow2"))
    policy.admit(request_for(inside / "sub" / ".." / "base.qcow2"))
    for path in (outside / "secret", inside / ".." / "out" / "secret", inside / "link", tmp_path / "inner" / "x"):
        with pytest.raises(ReferenceDenied, match="not inside"):
            policy.admit(request_for(path))


def test_confined_to_nothing() -> None:
    with pytest.raises(ReferenceDenied, match="no directory"):
        ConfinedTo().admit(request_for("/x"))


def test_confined_to_the_root() -> None:
    ConfinedTo("/").admit(request_for("/etc/passwd"))
