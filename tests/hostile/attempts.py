"""Everything that can be done to hostile images, each attempt on its own: run as a process with hard limits.

    python3 -m tests.hostile.attempts FOLDER NAME...

Makes the named images of tests/hostile/images.py one after the other. Prints one line of JSON per attempt: image,
attempt, outcome ("done", or the class of the error), text, CPU seconds, and whether the file was changed. Anything but
a QcowError is shown as "FAULT".
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path

import qcowlib
from qcowlib.errors import QcowError
from tests.hostile.images import make

ADDRESS_SPACE = 1 << 30
_BATCHES = 50
_POLICY = qcowlib.LocalFiles()


# Images with so many tables that looking at all of them, again and again, would only cost the test its time.
NOT_ALL = {
    "snapshots-65536-with-max-l1": ("open-top", "read", "qcow-check", "snapshots", "create-snapshot"),
    "extensions-262000": ("open-top", "read", "qcow-info", "create-snapshot"),
    "l1-32-mib-one-table": ("open-top", "read", "extents", "check", "write"),
}


def _open_top(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", open_backing=False) as image:
        return f"{image.size} {len(image.snapshots)} {len(image.bitmaps)}"


def _read(path: str) -> str:
    """First, last and random ranges; each may be refused on its own, and a refusal is not silence."""
    refusals = set()
    with qcowlib.open_image(path, format="qcow2", policy=_POLICY) as image:
        dice = random.Random(1)
        ranges = [(0, 65536), (max(0, image.size - 65536), 65536)]
        ranges += [(dice.randrange(max(1, image.size)), dice.choice((1, 512, 70000))) for _ in range(30)]
        for offset, length in ranges:
            wanted = min(length, image.size - offset)
            try:
                data = image.read(offset, wanted)
                assert len(data) == wanted
            except QcowError as error:
                refusals.add(type(error).__name__)
    return ",".join(sorted(refusals))


def _extents(path: str) -> str:
    rows = 0
    with qcowlib.open_image(path, format="qcow2", policy=_POLICY) as image:
        for table in islice(image.extents(), _BATCHES):
            rows += len(table)
            assert len(table) < 1 << 20
    return str(rows)


def _map(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", policy=_POLICY) as image:
        return str(sum(1 for _ in islice(qcowlib.map_image(image, 0, 1 << 36), 10000)))


def _check(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", open_backing=False) as image:
        report = qcowlib.check(image)
        return f"{report.corruptions} {report.leaks} {report.check_errors}"


def _snapshots(path: str) -> str:
    refusals = set()
    with qcowlib.open_image(path, format="qcow2", policy=_POLICY) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        for entry in [*image.snapshots[:3], *image.snapshots[-1:]]:
            try:
                with image.open_snapshot(entry) as view:
                    view.read(0, min(4096, view.size))
                    view.read(max(0, view.size - 4096), min(4096, view.size))
                    for table in islice(view.extents(), _BATCHES):
                        assert len(table) < 1 << 20
                    view.vmstate.read(0, min(4096, view.vmstate.size))
            except QcowError as error:
                refusals.add(type(error).__name__)
    return ",".join(sorted(refusals))


def _command(*words: str) -> Callable[[str], str]:
    def run(path: str) -> str:
        from qcowlib.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([*words, path])
        assert "Traceback" not in err.getvalue()
        if words[0] != "check" and code:
            assert code == 1, code
            assert len(err.getvalue().strip().splitlines()) == 1, err.getvalue()
        return f"{code} {err.getvalue().strip()[:200]}"

    return run


def _passphrase(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", passphrase="secret") as image:
        return image.read(0, 512).hex()[:16]


def _create_snapshot(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        return qcowlib.create_snapshot(image, "taken").id


def _first(image: qcowlib.Qcow2Image) -> str:
    return image.snapshots[0].id if image.snapshots else "1"


def _delete_snapshot(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        qcowlib.delete_snapshot(image, _first(image))
    return ""


def _apply_snapshot(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        qcowlib.apply_snapshot(image, _first(image))
    return ""


def _dirty(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", open_backing=False) as image:
        assert isinstance(image, qcowlib.Qcow2Image)
        return str(
            [sum(len(rows.start) for rows in qcowlib.dirty_extents(image, one.name)) for one in image.bitmaps[:3]]
        )


def _bitmaps(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, open_backing=False) as image:
        assert isinstance(image, qcowlib.WritableQcow2Image)
        for change in (qcowlib.clear_bitmap, qcowlib.remove_bitmap):
            for entry in image.bitmaps[:1]:
                change(image, entry.name)
        qcowlib.add_bitmap(image, "added")
    return ""


def _write(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, policy=_POLICY) as image:
        image.write(0, b"written")
        return image.read(0, 7).decode()


def _write_last(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, policy=_POLICY) as image:
        image.write(image.size - 512, bytes(512))
    return ""


def _discard(path: str) -> str:
    with qcowlib.open_image(path, format="qcow2", writable=True, policy=_POLICY) as image:
        image.discard(0, min(image.size, 1 << 20))
    return ""


READING: dict[str, Callable[[str], str]] = {
    "open-top": _open_top,
    "read": _read,
    "extents": _extents,
    "map": _map,
    "check": _check,
    "snapshots": _snapshots,
    "dirty": _dirty,
    "passphrase": _passphrase,
    "qcow-info": _command("info"),
    "qcow-check": _command("check"),
    "qcow-snapshot-l": _command("snapshot", "-l"),
}
WRITING: dict[str, Callable[[str], str]] = {
    "create-snapshot": _create_snapshot,
    "delete-snapshot": _delete_snapshot,
    "apply-snapshot": _apply_snapshot,
    "bitmaps": _bitmaps,
    "write": _write,
    "write-last": _write_last,
    "discard": _discard,
}


def _digest(path: Path) -> str:
    """Of what the file holds; holes are passed over."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        position = 0
        while True:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                return digest.hexdigest()
            data = os.pread(file.fileno(), 1 << 20, position)
            if data.strip(b"\0"):
                digest.update(b"%d:" % position + data)
            position += len(data)


def _attempt(run: Callable[[str], str], path: Path) -> dict[str, object]:
    began = time.process_time()
    try:
        outcome, text = "done", run(str(path))
    except QcowError as error:
        outcome, text = type(error).__name__, str(error)
    except Exception:
        outcome, text = "FAULT", traceback.format_exc()
    return {"outcome": outcome, "text": text[:4000], "seconds": round(time.process_time() - began, 2)}


def main(folder: Path, names: list[str]) -> None:
    """Run all attempts on the named images; those that write get a fresh one each."""
    for name in names:
        path = make(name, folder / "image.qcow2")
        before = _digest(path)
        for attempt, run in (READING | WRITING).items():
            if name in NOT_ALL and attempt not in NOT_ALL[name]:
                continue
            line = {"image": name, "attempt": attempt} | _attempt(run, path)
            line["changed"] = _digest(path) != before
            if line["changed"]:
                make(name, path)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
        path.unlink()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    main(Path(sys.argv[1]), sys.argv[2:])
