"""The state of an internal snapshot as a file of its own: the same bytes and backing file, nothing left behind."""

import os
from pathlib import Path
from typing import Any

import pytest

from snapshot.actions import ACTIONS
from snapshot.catalog import Catalog
from snapshot.copies import state_facts
from snapshot.errors import DomainSnapshotError, Interrupted
from snapshot.journal import Journal
from snapshot.session import Session
from tests import oracle

MIB = 1 << 20
COPY = ACTIONS["copy-state"]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(None, Catalog(str(tmp_path / "catalog")), Journal(str(tmp_path / "catalog")))


def chain(tmp_path: Path, *, based: bool = True) -> dict[str, Any]:
    """A file with an internal snapshot, between a base and an overlay; what the copy of the snapshot is made with."""
    base, middle, top = (str(tmp_path / name) for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    (tmp_path / "base.raw").write_bytes(b"b" * 4 * MIB)
    backing = ("-b", base, "-F", "raw") if based else ()
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", *backing, middle, "4M")
    oracle.qemu_io(middle, "write -P 1 1M 64k", "write -z 2M 4k")
    oracle.qemu_img("snapshot", "-c", "s", middle)
    oracle.qemu_io(middle, "write -P 2 1M 1M")
    oracle.qemu_img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    facts = state_facts(middle, "s", 0)
    assert (facts.data, facts.size, facts.problem) == (64 << 10, 4 * MIB, None)
    assert (facts.backing, facts.backing_format) == ((base, "raw") if based else (None, None))
    return {"path": str(tmp_path / "copy.qcow2"), "source": middle, "name": "s", "size": facts.size,
            "backing": facts.backing, "format": facts.backing_format, "shared": False}  # fmt: skip


@pytest.mark.parametrize("based", [True, False])
def test_a_copy(tmp_path: Path, session: Session, based: bool) -> None:
    arguments = chain(tmp_path, based=based)
    os.chmod(arguments["source"], 0o640)
    before = Path(arguments["source"]).read_bytes()
    COPY.do(session, arguments)
    copy = arguments["path"]
    oracle.assert_clean(copy)
    oracle.qemu_img("convert", "-l", "s", "-O", "raw", arguments["source"], tmp_path / "wanted")
    oracle.qemu_img("convert", "-O", "raw", copy, tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()
    info = oracle.image_info(copy)
    assert info.get("full-backing-filename") == arguments["backing"]
    assert info["cluster-size"] == 4096
    assert os.path.getsize(copy) < MIB // 2  # what the base holds is left to it
    assert os.stat(copy).st_mode & 0o777 == 0o640
    assert Path(arguments["source"]).read_bytes() == before
    COPY.undo(session, arguments)
    assert not os.path.exists(copy)


def test_nothing_is_left_of_a_copy_that_is_stopped(tmp_path: Path, session: Session) -> None:
    arguments = chain(tmp_path)
    session.interrupt.signal = 2
    with pytest.raises(Interrupted):
        COPY.do(session, arguments)
    assert os.path.exists(arguments["path"])
    COPY.undo(session, arguments)
    assert not os.path.exists(arguments["path"])


def test_a_file_that_is_none_of_ours_stays(tmp_path: Path, session: Session) -> None:
    arguments = chain(tmp_path)
    Path(arguments["path"]).write_bytes(b"somebody's")
    with pytest.raises(DomainSnapshotError, match="cannot make"):
        COPY.do(session, arguments)
    COPY.undo(session, arguments)
    later = Session(None, session.store, session.journal)  # as `recover` has it
    with pytest.raises(DomainSnapshotError, match="it stays"):
        COPY.undo(later, arguments)
    assert Path(arguments["path"]).read_bytes() == b"somebody's"


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    arguments = chain(tmp_path)
    source = arguments["source"]
    assert "t" in (state_facts(source, "t", 0).problem or "")
    oracle.qemu_img("rebase", "-u", "-b", "nbd://host/disk", "-F", "raw", source)
    assert "is based on 'nbd://host/disk', which is no local file" in (state_facts(source, "s", 0).problem or "")
    secret = "secret,id=k,data=x"
    options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    oracle.qemu_img("create", "-q", "--object", secret, "-f", "qcow2", "-o", options, tmp_path / "e", "1M")
    oracle.qemu_img(
        "snapshot", "--object", secret, "-c", "s", "--image-opts",
        f"driver=qcow2,encrypt.key-secret=k,file.filename={tmp_path / 'e'}",
    )  # fmt: skip
    assert state_facts(str(tmp_path / "e"), "s", 0).problem == "it is encrypted"
