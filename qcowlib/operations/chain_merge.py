"""Taking one image out of a backing chain, so that everything above it reads as before.

    into the base     what the image has is written to its base; the images on it are then based on the base
    into the overlay  what the overlay still reads from the image is copied into it; it is then based on the base

    plan_merge   bytes that each way moves, and what stands against it
    merge_layer  a journal beside the image, the work, the names, the image removed, the journal removed

Each step can be done again. A merge that was killed is finished by the same call; until then the chain is whole at
every moment, and reads the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcowlib.errors import ChainError, OptionError, StorageError
from qcowlib.extents import ExtentKind
from qcowlib.image.create_target import same_file
from qcowlib.image.opening import open_image
from qcowlib.image.policy import LocalFiles
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.raw import WritableRawImage
from qcowlib.image.references import backing_reference
from qcowlib.image.writable import WritableQcow2Image
from qcowlib.operations.chain_walk import ChainLink, based_on, examine_chain
from qcowlib.operations.commit import allocated_bytes, commit
from qcowlib.operations.rebase import rebase

JOURNAL = ".qcow-merge"
"""What is put behind the name of the image that is being taken out, for the journal's name."""

BASE, OVERLAY = "base", "overlay"
_POLICY = LocalFiles()

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergePlan:
    """What taking an image out of its chain would mean.

    Attributes:
        layer: the image to be taken out.
        base: what it is based on, and its format.
        overlays: the images that are based on it.
        costs: bytes that are moved, by direction ("base", "overlay"); those that are possible.
        refused: why a direction is not possible.
        unfinished: the direction of a merge that was cut off, to be finished; None otherwise.
    """

    layer: str
    base: str
    base_format: str
    overlays: tuple[str, ...]
    costs: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unfinished: str | None = None

    @property
    def direction(self) -> str | None:
        """The direction of an unfinished merge, else the cheaper one; None when there is none."""
        return self.unfinished or min(self.costs, key=self.costs.__getitem__, default=None)


def plan_merge(top: str, layer: str) -> MergePlan:
    """What taking `layer` out of the chain of `top` would move, in either direction; metadata only.

        plan = qcowlib.plan_merge("now.qcow2", "monday.qcow2")
        print(plan.costs, plan.refused, plan.direction)

    Args:
        top: the top of a chain.
        layer: an image of it that has a backing file.

    Raises:
        ChainError: the chain cannot be followed, or the image is not in it.
        QcowError: an image cannot be read.
    """
    journal = _read_journal(layer)
    if journal is not None:
        return MergePlan(
            layer, journal["base"], journal["format"], tuple(journal["overlays"]), unfinished=journal["direction"]
        )
    report = examine_chain(top)
    for problem in report.problems:
        if problem.code != "smaller-base":
            raise ChainError(f"the chain of '{top}' is not whole, see chain doctor: {problem.text}")
    place = next((number for number, link in enumerate(report.links) if same_file(link.path, layer)), None)
    if place is None:
        raise ChainError(f"'{layer}' is not in the chain of '{top}'")
    if place + 1 == len(report.links):
        raise ChainError(f"'{layer}' has no backing file: there is nothing to merge it with")
    link, base = report.links[place : place + 2]
    users = based_on([link.path, base.path], [one.path for one in report.links])
    plan = MergePlan(link.path, base.path, base.format, tuple(users[link.path]))
    reason = _obstacle(plan)
    if reason is not None:
        plan.refused.update({BASE: reason, OVERLAY: reason})
        return plan
    _judge_base(plan, link, base, [user for user in users[base.path] if not same_file(user, link.path)])
    _judge_overlay(plan)
    return plan


def _obstacle(plan: MergePlan) -> str | None:
    """What stands against both directions."""
    with _layer(plan.layer) as image:
        if image.header.nb_snapshots:
            return f"'{plan.layer}' has internal snapshots, which would be lost"
        if image.bitmaps:
            return f"'{plan.layer}' has bitmaps, which would be lost"
    for path in (plan.layer, *plan.overlays, *([plan.base] if plan.base_format == "qcow2" else [])):
        with _layer(path) as image:
            if image.header.crypt_method:
                return f"'{path}' is encrypted: use commit or rebase, which take its passphrase"
    if plan.base_format not in ("qcow2", "raw"):
        return f"'{plan.base}' is a {plan.base_format} image"
    return None


def _judge_base(plan: MergePlan, link: ChainLink, base: ChainLink, others: list[str]) -> None:
    with _layer(link.path) as image:
        cost = allocated_bytes(image)
    sizes = [_size(path) for path in plan.overlays]
    if others:
        plan.refused[BASE] = f"'{others[0]}' is based on '{plan.base}' as well, and would change"
    elif link.size < base.size and max(sizes, default=0) > link.size:
        plan.refused[BASE] = f"behind the end of '{link.path}' its overlay would show what '{plan.base}' has there"
    else:
        plan.costs[BASE] = cost


def _size(path: str) -> int:
    with _layer(path) as image:
        return image.size


def _judge_overlay(plan: MergePlan) -> None:
    if not plan.overlays:
        plan.refused[OVERLAY] = f"nothing is based on '{plan.layer}'"
        return
    cost = 0
    for path in plan.overlays:
        with _layer(path) as overlay, _layer(plan.layer) as image:
            if overlay.header.nb_snapshots:
                plan.refused[OVERLAY] = f"internal snapshots of '{path}' read from '{plan.layer}', and would change"
                return
            cost += _shown_bytes(overlay, image)
    plan.costs[OVERLAY] = cost


def _shown_bytes(overlay: Qcow2Image, below: Qcow2Image) -> int:
    """Bytes of data that an image shows through an overlay."""
    total, end = 0, min(overlay.size, below.size)
    for table in overlay.layer_extents(0, overlay.size):
        for row in np.flatnonzero(table.kind == ExtentKind.UNALLOCATED).tolist():
            start = int(table.start[row])
            stop = min(start + int(table.length[row]), end)
            if start < stop:
                for part in below.layer_extents(start, stop - start):
                    stored = (part.kind == ExtentKind.DATA) | (part.kind == ExtentKind.COMPRESSED)
                    total += int(part.length[stored].sum())
    return total


def merge_layer(
    top: str, layer: str, *, into: str | None = None, keep: bool = False, progress: Progress | None = None
) -> MergePlan:
    """Take `layer` out of the chain of `top`; everything that was based on it reads as before.

        qcowlib.merge_layer("now.qcow2", "monday.qcow2")

    Args:
        top: the top of a chain; it may be `layer` itself, which is then committed.
        layer: an image of it that has a backing file.
        into: "base" or "overlay"; None takes the cheaper way, or finishes a merge that was cut off.
        keep: do not remove the file at the end.
        progress: called with (bytes done, bytes to do).

    Returns: the plan that was carried out.

    Raises:
        ChainError: as `plan_merge`.
        OptionError: the way is not possible: the message says why. Nothing was changed.
        ImageLocked: an image is in use.
        StorageError: a host file failed. The chain is whole; the same call goes on.
    """
    plan = plan_merge(top, layer)
    direction = plan.direction if into is None else into
    if plan.unfinished is not None and direction != plan.unfinished:
        raise OptionError(f"a merge of '{layer}' into the {plan.unfinished} was cut off: finish that one")
    if plan.unfinished is None and (direction is None or direction not in plan.costs):
        reasons = plan.refused if direction is None else {direction: plan.refused.get(direction, "no such direction")}
        raise OptionError("; ".join(f"into the {way}: {reason}" for way, reason in reasons.items()))
    journal = _read_journal(plan.layer) or _journal_of(plan, direction or "")
    _write_journal(plan.layer, journal)
    if direction == OVERLAY:
        _merge_into_overlays(plan, progress)
    elif not journal["moved"]:
        _write_into_base(plan, progress)
        # From here on the base may be used without this image, and must not be overwritten again.
        _write_journal(plan.layer, journal | {"moved": True})
    _rename_bases(plan)
    if not keep and os.path.lexists(plan.layer):
        with open_image(plan.layer, format="qcow2", writable=True, open_backing=False):
            os.unlink(plan.layer)  # while it is locked: nobody has begun to use it
        _sync_directory(plan.layer)
    _remove_journal(plan.layer)
    return plan


def _write_into_base(plan: MergePlan, progress: Progress | None) -> None:
    with _layer(plan.layer) as image, _open_writable(plan.base, plan.base_format) as base:
        commit(image, base, progress=progress)


def _rename_bases(plan: MergePlan) -> None:
    for path in plan.overlays:
        with _open_overlay(path, open_backing=False) as overlay:
            if _is_on(overlay, path, plan.layer):
                rebase(overlay, _name_for(plan.base, path), plan.base_format, unsafe=True)


def _merge_into_overlays(plan: MergePlan, progress: Progress | None) -> None:
    for path in plan.overlays:
        with _open_overlay(path, open_backing=False) as alone:
            if not _is_on(alone, path, plan.layer):
                continue  # done before it was cut off
        with (
            _open_overlay(path, open_backing=True) as overlay,
            open_image(plan.base, format=plan.base_format, policy=_POLICY) as base,
        ):
            rebase(overlay, _name_for(plan.base, path), plan.base_format, new=base, progress=progress)


def _is_on(overlay: WritableQcow2Image, path: str, base: str) -> bool:
    name = overlay.header.backing_file
    return name is not None and same_file(backing_reference(name, None, path).path, base)


def _name_for(base: str, overlay: str) -> str:
    """The base as the overlay's header shall name it: relative to the overlay where both are in one directory."""
    home = os.path.realpath(os.path.dirname(overlay) or ".")
    if os.path.realpath(os.path.dirname(base) or ".") == home and ":" not in os.path.basename(base):
        return os.path.basename(base)
    return os.path.abspath(base)


def _layer(path: str) -> Qcow2Image:
    image = open_image(path, format="qcow2", open_backing=False)
    assert isinstance(image, Qcow2Image)
    return image


def _open_overlay(path: str, *, open_backing: bool) -> WritableQcow2Image:
    image = open_image(path, format="qcow2", writable=True, open_backing=open_backing, policy=_POLICY)
    assert isinstance(image, WritableQcow2Image)
    return image


def _open_writable(path: str, image_format: str) -> WritableQcow2Image | WritableRawImage:
    return open_image(path, format=image_format, writable=True, policy=_POLICY)


# -- the journal


def _journal_of(plan: MergePlan, direction: str) -> dict[str, Any]:
    return {
        "version": 1,
        "direction": direction,
        "base": os.path.abspath(plan.base),
        "format": plan.base_format,
        "overlays": [os.path.abspath(path) for path in plan.overlays],
        "moved": False,
    }


def _write_journal(layer: str, content: dict[str, Any]) -> None:
    path = layer + JOURNAL
    try:
        with open(path + ".new", "w", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
        _sync_directory(path)
    except OSError as error:
        raise StorageError(path, "write", error) from error


def _read_journal(layer: str) -> dict[str, Any] | None:
    try:
        with open(layer + JOURNAL, encoding="utf-8", errors="surrogateescape") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(layer + JOURNAL, "read", error) from error
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("version") != 1 or content.get("direction") not in (BASE, OVERLAY):
        raise ChainError(f"'{layer + JOURNAL}' is no journal of a merge that can be read: remove it if it is none")
    return content


def _remove_journal(layer: str) -> None:
    try:
        os.unlink(layer + JOURNAL)
        _sync_directory(layer)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(layer + JOURNAL, "remove", error) from error


def _sync_directory(path: str) -> None:
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
