"""Actions on the files of a domain that is not started."""

from __future__ import annotations

import time
from typing import Any

import qcowlib
from snapshot import offline
from snapshot.errors import DomainSnapshotError
from snapshot.session import Session

Arguments = dict[str, Any]


def hold(session: Session, arguments: Arguments) -> None:
    """Open all images, so that nobody can start the domain until the operation ends."""
    session.instant = time.time_ns()
    for disk in arguments["disks"]:
        path = disk["path"]
        image: qcowlib.Qcow2Image | qcowlib.RawImage
        if disk["writable"]:
            image = offline.open_writable_layer(path)
        else:
            image = qcowlib.open_image(path, format=disk["format"], open_backing=False)
        session.images[path] = session.held.enter_context(image)


def let_go(session: Session, arguments: Arguments) -> None:  # noqa: ARG001 - one signature for all actions
    """Close them."""
    session.release()


def held_layer(session: Session, path: str) -> qcowlib.WritableQcow2Image:
    """An image that is held for writing."""
    image = session.images.get(path)
    if not isinstance(image, qcowlib.WritableQcow2Image):
        raise DomainSnapshotError(f"'{path}' is not held for writing")
    return image


def create_internal(session: Session, arguments: Arguments) -> None:
    """Take an internal snapshot of one image that is held."""
    image = held_layer(session, arguments["path"])
    qcowlib.create_snapshot(image, arguments["name"], date_ns=session.instant)
    image.flush()


def delete_internal(session: Session, arguments: Arguments) -> None:
    """Delete it, if it is there."""
    image = session.images.pop(arguments["path"], None)
    if image is not None:
        image.close()
    offline.delete_internal(arguments["path"], arguments["name"])


def apply_internal(session: Session, arguments: Arguments) -> None:
    """Make the active layer what an internal snapshot holds."""
    image = held_layer(session, arguments["path"])
    stored = [one for one in image.snapshots if one.name == arguments["name"]]
    if len(stored) != 1:
        raise DomainSnapshotError(f"'{arguments['path']}' has {len(stored)} snapshots '{arguments['name']}'")
    qcowlib.apply_snapshot(image, stored[0])
    image.flush()


def unapply_internal(session: Session, arguments: Arguments) -> None:
    """Undo: back to what the image held before, which is in the snapshot that was taken as the way back."""
    image = session.images.pop(arguments["path"], None)
    if image is not None:
        image.close()
    offline.apply_internal(arguments["path"], arguments["way_back"])
