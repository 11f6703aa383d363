"""Single changes of image files that nobody uses: done wholly or not at all, and harmless when done again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

import qcowlib
from snapshot.domain import backing_file, below_path, same_file
from snapshot.session import unlocked

_LOCAL = qcowlib.LocalFiles()


class StoredLike(Protocol):
    """An entry of a snapshot table."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...


def merge_back(overlay: str, base: str) -> None:
    """Write what an overlay holds to its base, if it is still based on it; the overlay stays.

    The base's format is what the overlay's header states: the content of a raw base is its guest's.

    Raises:
        QcowError: the images cannot be read or written; both read as before.
    """
    below = backing_file(overlay) if os.path.exists(overlay) else None
    if below is None or not same_file(below.path, base):
        return
    with unlocked(lambda: open_layer(overlay)) as top:
        if qcowlib.allocated_bytes(top) or holds_zeroes(top):
            with unlocked(lambda: open_writable(base, below.format or probed(base))) as bottom:
                qcowlib.commit(top, bottom, known_raw=below.format == "raw")


def holds_zeroes(image: qcowlib.BlockImage) -> bool:
    """Whether an image's own layer says of anything that it is zero."""
    zero = int(qcowlib.ExtentKind.ZERO)
    return any((table.kind == zero).any() for table in image.layer_extents(0, image.size))


def delete_internal(path: str, name: str, snapshot_id: str | None = None) -> None:
    """Delete the internal snapshots of a name (only the one of that id, if it is given); none may be there."""

    def wanted(stored: StoredLike) -> bool:
        return stored.name == name and snapshot_id in (None, stored.id)

    with unlocked(lambda: open_layer(path)) as image:
        found = any(wanted(stored) for stored in image.snapshots)
    if found:
        with unlocked(lambda: open_writable_layer(path)) as image:
            for stored in [stored for stored in image.snapshots if wanted(stored)]:
                qcowlib.delete_snapshot(image, stored)


def apply_internal(path: str, name: str) -> None:
    """Make the active layer what an internal snapshot holds, if the snapshot is there."""
    with unlocked(lambda: open_layer(path)) as image:
        found = any(stored.name == name for stored in image.snapshots)
    if found:
        with unlocked(lambda: open_writable_layer(path)) as image:
            qcowlib.apply_snapshot(image, next(stored for stored in image.snapshots if stored.name == name))


def is_fresh_overlay(path: str, base: str | None) -> bool:
    """Whether a file is an image on a base (or on none), or the beginning of one (its header is written last)."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic.strip(b"\0") == b"":
        return True
    if magic != b"QFI\xfb":
        return False
    below = below_path(path)
    return below is base if below is None or base is None else same_file(below, base)


def dependents(files: Iterable[str], known: Iterable[str], raw: Collection[str]) -> dict[str, list[str]]:
    """For each of some files the images that are based on it; a raw disk is none, whatever its guest has written.

    Args:
        files: files that others may be based on.
        known: other files that the domain has, or had.
        raw: those that are raw disks.
    """
    return {
        path: [one for one in based if not any(same_file(one, other) for other in raw)]
        for path, based in qcowlib.based_on(files, known).items()
    }


def data_bytes(path: str, image_format: str) -> int:
    """Bytes of data in one file, as far as it can be told while somebody writes."""
    kinds = (qcowlib.ExtentKind.DATA, qcowlib.ExtentKind.COMPRESSED)
    try:
        with qcowlib.open_image(path, format=image_format, open_backing=False, force_share=True) as image:
            tables = image.layer_extents(0, image.size)
            return sum(int(table.length[table.kind == int(kind)].sum()) for table in tables for kind in kinds)
    except qcowlib.QcowError:
        return os.stat(path).st_blocks * 512


def open_layer(path: str) -> qcowlib.Qcow2Image:
    """A qcow2 file alone, without what it is based on; for reading."""
    image = qcowlib.open_image(path, format="qcow2", open_backing=False)
    assert isinstance(image, qcowlib.Qcow2Image)
    return image


def open_writable_layer(path: str) -> qcowlib.WritableQcow2Image:
    """The same, for changes of its snapshots or of its header."""
    image = qcowlib.open_image(path, format="qcow2", writable=True, open_backing=False)
    assert isinstance(image, qcowlib.WritableQcow2Image)
    return image


def open_writable(path: str, image_format: str) -> qcowlib.WritableQcow2Image | qcowlib.WritableRawImage:
    """An image with its chain, for writing."""
    return qcowlib.open_image(path, format=image_format, writable=True, policy=_LOCAL)


def probed(path: str) -> str:
    """ "qcow2" or "raw" by a file's first bytes, as QEMU takes a backing file whose format no header states."""
    with open(path, "rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


@contextlib.contextmanager
def writable_or_broken(path: str) -> Iterator[None]:
    """Hold a file's lock; a file that is no image (a creation that was cut off) has none.

    Raises:
        ImageLocked: somebody uses it.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(qcowlib.FormatError, qcowlib.OptionError):
            held.enter_context(unlocked(lambda: open_writable_layer(path)))
        yield
