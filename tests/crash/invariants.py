"""What must hold for every disk that an accident may leave, and after it has been opened for writing once.

I1  no refcount is below the number of references
I2  nothing in the active layer has COPIED set and is referred to twice
I3  durable data is there, everything else is old or new, snapshots are as before or as after
healed: refcounts and flags exact, nothing leaked, content as before
"""

from __future__ import annotations

from typing import NamedTuple

from qcowlib.image.opening import open_image
from qcowlib.image.policy import LocalFiles
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.metadata.state import load_state
from qcowlib.operations.check import check_state
from qcowlib.storage.buffer import BytesStorage
from qcowlib.storage.protocol import ReadStorage
from tests.crash.guest import VM_STATE
from tests.crash.images import open_writable
from tests.crash.second_opinion import SecondOpinion

# What an accident may leave behind.
_HARMLESS = {"leak", "refcount-too-high", "copied-flag-l1", "copied-flag-l2"}


class Content(NamedTuple):
    """Guest content: the active layer; each snapshot by name, its vm state by name and VM_STATE."""

    active: bytes
    saved: dict[str, bytes]


def content_by_second_opinion(opinion: SecondOpinion) -> Content:
    """As the independent reader sees it."""
    contents = {}
    for saved in opinion.snapshots:
        contents[saved.name] = opinion.snapshot_content(saved)
        if saved.vm_state_size:
            contents[saved.name + VM_STATE] = opinion.vm_state(saved)
    return Content(opinion.content(), contents)


def content_by_library(storage: ReadStorage) -> Content:
    """As the library reads it."""
    image = open_image(storage, format="qcow2", policy=LocalFiles())
    assert isinstance(image, Qcow2Image)
    return _library_content(image)


def _library_content(image: Qcow2Image) -> Content:
    saved = {}
    for entry in image.snapshots:
        view = image.open_snapshot(entry.id)
        saved[entry.name] = view.read(0, view.size)
        if entry.vm_state_size:
            saved[entry.name + VM_STATE] = view.vmstate.read(0, entry.vm_state_size)
    return Content(image.read(0, image.size), saved)


def examine_broken(data: bytes, backing: bytes | None, name: str) -> Content:
    """I1 and I2 on an image that was cut off, by both censuses; its content, on which both readers agree."""
    opinion = SecondOpinion(data, backing)
    assert not opinion.too_low, f"I1: refcounts of clusters {opinion.too_low} are too low"
    assert not opinion.shared_copied, f"I2: clusters {opinion.shared_copied} are COPIED and shared"
    if opinion.version == 3 and not opinion.dirty:
        assert opinion.clean, f"not marked dirty, but leaks {opinion.leaks}, {opinion.wrong_copied} wrong flags"
    report = check_state(load_state(BytesStorage(data)))
    codes = {finding.code for finding in report.findings}
    assert codes <= _HARMLESS, f"check finds {codes}"
    assert report.stopped is None
    content = content_by_second_opinion(opinion)
    assert content == content_by_library(BytesStorage(data, writable=False, name=name)), "the two readers disagree"
    return content


def examine_healed(data: bytes, backing: bytes | None, expected: Content) -> None:
    """An image that was opened for writing and closed: exact, with the content that it had."""
    opinion = SecondOpinion(data, backing)
    assert not opinion.dirty
    assert not opinion.too_low, f"refcounts of clusters {opinion.too_low} are too low"
    assert not opinion.leaks, f"leaked clusters {opinion.leaks}"
    assert opinion.wrong_copied == 0, f"{opinion.wrong_copied} wrong COPIED flags"
    report = check_state(load_state(BytesStorage(data)))
    assert report.findings == []
    assert report.stopped is None
    assert content_by_second_opinion(opinion) == expected, "healing has changed the content"


def heal(disk: BytesStorage, expected: Content) -> bytes:
    """Open an image for writing once, read all of it, close it; what it is then."""
    image = open_writable(disk)
    assert _library_content(image) == expected, "the open that heals has changed the content"
    image.close()
    return disk.getvalue()
