"""Where the corpus of real images is, and how it is unpacked: once per test run, shared by all workers.

The corpus is a folder of `*.tar.xz` archives with a `manifest.json` of known answers. It is no part of the package:
`QCOWLIB_CORPUS` names it, or it lies beside the checkout as `../shared/corpus`.
"""

import fcntl
import functools
import json
import os
import tarfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]


def corpus_source() -> Path | None:
    """Folder of the archives and the manifest; None when there is none.

    Raises FileNotFoundError when `QCOWLIB_CORPUS` names a folder without a manifest: a wrong name must not skip tests.
    """
    named = os.environ.get("QCOWLIB_CORPUS")
    source = Path(named) if named else CHECKOUT.parent / "shared" / "corpus"
    if (source / "manifest.json").is_file():
        return source
    if named:
        raise FileNotFoundError(f"QCOWLIB_CORPUS={named} has no manifest.json")
    return None


@functools.cache
def manifest() -> dict[str, Any]:
    """The manifest; without a corpus, one that has no images (so that collecting tests works without it)."""
    source = corpus_source()
    if source is None:
        return {"archives": [], "images": []}
    parsed: dict[str, Any] = json.loads((source / "manifest.json").read_text())
    return parsed


def unpack(source: Path, target: Path) -> Path:
    """Unpack all archives into `target`, unless that is done; safe to call from several processes at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = target / ".unpacked"
        if not done.exists():
            target.mkdir(exist_ok=True)
            for archive in sorted(source.glob("*.tar.xz")):
                # tarfile seeks over the holes of a sparse member, so that the copy has them too.
                with tarfile.open(archive, "r:xz") as members:
                    members.extractall(target, filter="data")
            done.touch()
    return target
