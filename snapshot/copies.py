"""The state of an internal snapshot as a file of its own, for a file in which it must not be applied.

A qcow2 file can only be based on the active layer of another one, never on a snapshot inside it. So where overlays need
what a file holds now, the state of a snapshot in it can be reached by a copy alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import qcowlib
from snapshot import offline
from snapshot.active import make_file_like, sync
from snapshot.domain import backing_file
from snapshot.plan_revert_request import StateFacts
from snapshot.session import Session

Arguments = dict[str, Any]


def state_facts(path: str, name: str, free: int) -> StateFacts:
    """What a copy of a state would have to hold.

    Args:
        path: the qcow2 file; it may be in use.
        name: of the internal snapshot.
        free: bytes free where the copy goes.
    """
    try:
        with _layer(path, shared=True) as image, image.open_snapshot(name=name) as view:
            kinds = (int(qcowlib.ExtentKind.DATA), int(qcowlib.ExtentKind.COMPRESSED))
            data = sum(
                int(table.length[table.kind == kind].sum())
                for table in view.layer_extents(0, view.size)
                for kind in kinds
            )
            below = backing_file(path)
            problem = None
            if image.header.crypt_method:
                problem = "it is encrypted"
            elif image.header.backing_file is not None and below is None:
                problem = f"it is based on '{image.header.backing_file}', which is no local file"
            if below is None:
                return StateFacts(data, view.size, None, None, free, problem)
            return StateFacts(data, view.size, below.path, below.format or offline.probed(below.path), free, problem)
    except qcowlib.QcowError as error:
        return StateFacts(problem=str(error))


def copy_state(session: Session, arguments: Arguments) -> None:
    """Copy it; what the state leaves to the backing file of its own file, the copy leaves to it as well.

    Raises:
        DomainSnapshotError, QcowError: it could not be copied whole.
    """
    path, source = arguments["path"], arguments["source"]
    make_file_like(session, path, source)

    def progress(done: int, total: int) -> None:
        session.interrupt.check()
        session.report("copy", done, total)

    with contextlib.ExitStack() as opened:
        image = opened.enter_context(_layer(source, shared=arguments["shared"], chain=True))
        view = opened.enter_context(image.open_snapshot(name=arguments["name"]))
        header = image.header
        qcowlib.convert(
            view,
            path,
            target_format="qcow2",
            backing_file=arguments["backing"],
            backing_fmt=arguments["format"],
            policy=qcowlib.LocalFiles(),
            progress=progress,
            cluster_size=image.cluster_size,
            extended_l2=header.extended_l2,
        )
    sync(path)


@contextlib.contextmanager
def _layer(path: str, *, shared: bool, chain: bool = False) -> Iterator[qcowlib.Qcow2Image]:
    policy = qcowlib.LocalFiles() if chain else None
    with qcowlib.open_image(path, format="qcow2", open_backing=chain, policy=policy, force_share=shared) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        yield image
