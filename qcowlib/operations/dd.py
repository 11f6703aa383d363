"""Copying a part of a disk into a new image, with the block arithmetic of qemu-img dd."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import replace
from typing import NamedTuple

from qcowlib.image.policy import OpenPolicy
from qcowlib.image.reader import ReadableImage
from qcowlib.operations.copy_source import CopySource
from qcowlib.operations.copying import CopyJob, Progress, copy
from qcowlib.operations.new_target import NewTarget, created, refuse_own_source


class DdRange(NamedTuple):
    """The part of the source that dd copies.

    Attributes:
        start, end: guest bytes.
        beyond_end: `skip` goes behind the end, so that nothing is copied; qemu-img says so.
    """

    start: int
    end: int
    beyond_end: bool


def dd_range(size: int, *, block_size: int = 512, count: int | None = None, skip: int = 0) -> DdRange:
    """What qemu-img dd copies of a disk of `size` bytes.

    Args:
        size: bytes of the source.
        block_size: bytes of a block.
        count: blocks to take into account from the beginning of the disk on; None means all.
        skip: blocks to leave out at the beginning. As in qemu-img, they are a part of `count`.
    """
    end = size if count is None else min(size, count * block_size)
    start = skip * block_size
    return DdRange(end, end, True) if start > end else DdRange(start, end, False)


def dd(
    source: ReadableImage,
    target: str | os.PathLike[str],
    *,
    target_format: str = "raw",
    block_size: int = 512,
    count: int | None = None,
    skip: int = 0,
    policy: OpenPolicy | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> DdRange:
    """Copy blocks of a disk into a new image of their size.

    Args:
        source: an opened image, or a snapshot of one.
        target: name of the file to write.
        target_format: "raw" or "qcow2".
        block_size, count, skip: as for `dd_range`.
        policy, executor, progress: as for `convert`.

    Returns: what was copied.

    Raises: as `convert`.
    """
    path = os.fspath(target)
    refuse_own_source([source], path)
    part = dd_range(source.size, block_size=block_size, count=count, skip=skip)
    job = CopyJob(CopySource([source]), part.start, part.end, executor=executor, progress=progress)
    total = job.data_bytes()
    new = NewTarget(path, part.end - part.start, target_format, {}, policy=policy)
    with created(new) as image:
        copy(replace(job, zero_from=new.zero_from(image), fresh=True), image, total=total)
    return part
