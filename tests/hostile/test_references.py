"""What an image names is not opened: not by verbs that need the image alone, not by the library's default policy.

Shown from outside (strace sees every open of the process) and from inside (Python's audit hook).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.draft import END_OF_EXTENSIONS, Draft, extension
from tests.hostile.images import DATA_FILE, DATA_FILE_MAGIC
from tests.oracle import tool

SECRET = "named-by-the-image"
_ROOT = Path(__file__).resolve().parent.parent.parent

#: Names that an image may give; {} is an existing file beside it.
NAMES = {
    "plain": "{}",
    "absolute": "/etc/passwd",
    "device": "/dev/zero",
    "link": "link",
    "colon": "a:b",
    "file-protocol": "file:{}",
    "nbd": "nbd://127.0.0.1:1/x",
    "json": '{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}',
    "json-host-device": '{{"driver":"host_device","filename":"/dev/zero"}}',
    "parents": "../../../../../../etc/passwd",
    "descriptor": "/dev/fdset/0",
    "proc": "/proc/self/mem",
}


def _image(folder: Path, kind: str, kept: str) -> Path:
    name = NAMES[kind].format(SECRET)
    data = (f"json:{name}" if kind.startswith("json") else name).encode()
    draft = Draft()
    if kept == "backing":
        draft.fields = {"backing_file_offset": 1024, "backing_file_size": len(data)}
        draft.pieces[1024] = data
    else:
        draft.fields = {"incompatible_features": DATA_FILE}
        draft.extensions = extension(DATA_FILE_MAGIC, data) + END_OF_EXTENSIONS
    (folder / SECRET).write_bytes(bytes(1 << 20))
    (folder / "a:b").write_bytes(bytes(1 << 20))
    (folder / "link").symlink_to("/etc/passwd")
    return draft.write(folder / "image.qcow2")


_OPENED = re.compile(r'\b(?:open|openat|openat2|creat)\((?:[A-Z_0-9]+, )?"((?:[^"\\]|\\.)*)"')
_CONNECTED = re.compile(r"\bconnect\(")


def _foreign(trace: str, allowed: set[str]) -> list[str]:
    """The files that were opened beside those of Python itself and the image."""
    assert not _CONNECTED.search(trace), trace
    python = tuple(
        {sys.prefix, sys.base_prefix, str(_ROOT / "qcowlib"), "/usr/lib", "/lib", "/usr/share", "/usr/local"}
    )
    system = {"/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/null"}
    names = {match.group(1) for match in _OPENED.finditer(trace)}
    assert names >= allowed, "the trace shows not even the image"
    rest = names - allowed - system
    return sorted(name for name in rest if not name.startswith((*python, "/sys/devices/system", "/proc/self/maps")))


VERBS = [
    ("info",), ("info", "--output=json"), ("check",), ("snapshot", "-l"), ("snapshot", "-c", "one"),
    ("snapshot", "-d", "none"), ("snapshot", "-a", "none"),
]  # fmt: skip
_ALL_VERBS = """
import contextlib, io, json, sys
from qcowlib.cli.main import main
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([*words, sys.argv[1]])
"""


@pytest.mark.parametrize("kept", ["backing", "data-file"])
@pytest.mark.parametrize("kind", NAMES)
def test_verbs_of_the_top_file_open_nothing_else(kind: str, kept: str, tmp_path: Path) -> None:
    image = _image(tmp_path, kind, kept)
    trace = tmp_path / "trace"
    subprocess.run(
        [tool("strace"), "-f", "-qq", "-e", "trace=openat,open,openat2,creat,connect", "-o", trace,
         sys.executable, "-BPc", _ALL_VERBS, image.name, json.dumps(VERBS)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(_ROOT)}, check=True, timeout=120,
    )  # fmt: skip
    assert _foreign(trace.read_text(), {image.name, str(_ROOT)}) == []


_HOOK = """
import json, os, sys
import qcowlib
from qcowlib.errors import QcowError
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
sys.addaudithook(lambda event, args: opened.append(event) if event.startswith("socket.") else None)
for path in sys.argv[1:]:
    for writable in (False, True):
        before = len(opened)
        try:
            with qcowlib.open_image(path, format="qcow2", writable=writable) as image:
                image.read(0, image.size)
                outcome = "opened"
        except QcowError as error:
            outcome = type(error).__name__
        print(json.dumps([path, outcome, opened[before:]]))
"""


def _library_opens(paths: list[Path], folder: Path) -> list[tuple[str, str, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-BPc", _HOOK, *paths],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(_ROOT)}, check=True, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def _require_alone(rows: list[tuple[str, str, list[str]]]) -> None:
    for path, outcome, opened in rows:
        assert outcome in ("ReferenceDenied", "ChainError"), (path, outcome)
        foreign = [name for name in opened if name != path and not name.endswith((".py", ".pyc", ".so"))]
        assert path in opened
        assert [name for name in foreign if not name.startswith((sys.prefix, sys.base_prefix, str(_ROOT)))] == []


def test_the_default_policy_opens_nothing_that_an_image_names(tmp_path: Path) -> None:
    paths = []
    for kind in NAMES:
        for kept in ("backing", "data-file"):
            (tmp_path / f"{kind}-{kept}").mkdir()
            paths.append(_image(tmp_path / f"{kind}-{kept}", kind, kept))
    rows = _library_opens(paths, tmp_path)
    assert len(rows) == 2 * len(paths)
    _require_alone(rows)


@pytest.mark.corpus
def test_the_default_policy_on_the_corpus_attacks(corpus: Path, tmp_path: Path) -> None:
    names = ("backing-json", "backing-passwd", "datafile-file", "datafile-nbd", "raw-base")
    paths = [tmp_path / f"attack-{name}.qcow2" for name in names]
    for path in paths:
        path.write_bytes((corpus / path.name).read_bytes())
    _require_alone(_library_opens(paths, tmp_path))
