"""Images that would take all memory or all time: every attempt on them ends soon, with an answer or an honest error.

The attempts run in processes of their own, which may have 1 GiB of address space.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib.errors import ChainError, FormatError
from tests.hostile.attempts import NOT_ALL, READING, WRITING
from tests.hostile.draft import END_OF_EXTENSIONS, Draft, extension
from tests.hostile.images import (
    BACKING_FORMAT_MAGIC,
    BUILDERS,
    REFUSED_HEADERS,
    long_description,
    make,
    nested_description,
)

#: CPU seconds that one attempt may take; most take some milliseconds.
SLOWEST = 30.0
DEADLINE = 280.0
GROUPS = 8

#: Refused attempts that change the file all the same, with the reason.
HEALED: dict[tuple[str, str], str] = {}

_HERE = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", REFUSED_HEADERS)
def test_a_header_beyond_the_limits_is_refused_at_once(name: str, tmp_path: Path) -> None:
    path = make(name, tmp_path / "image.qcow2")
    before = path.read_bytes()
    began = time.process_time()
    for writable in (False, True):
        with pytest.raises(FormatError) as caught:
            qcowlib.open_image(path, format="qcow2", writable=writable, open_backing=False)
        assert "\n" not in str(caught.value)
    assert time.process_time() - began < 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("group", range(GROUPS))
def test_nothing_is_exhausted(group: int, tmp_path: Path) -> None:
    names = list(BUILDERS)[group::GROUPS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.attempts", str(tmp_path), *names],
        cwd=_HERE, check=False, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows[-1:], done.stderr[-2000:])
    expected = {(name, attempt) for name in names for attempt in NOT_ALL.get(name, READING | WRITING)}
    assert {(row["image"], row["attempt"]) for row in rows} == expected
    faults = [row for row in rows if row["outcome"] == "FAULT"]
    assert not faults, faults[0]["text"]
    assert [row for row in rows if row["seconds"] > SLOWEST] == []
    assert [row for row in rows if row["changed"] and _must_not_change(row)] == []


def _must_not_change(row: dict[str, Any]) -> bool:
    """Reading never changes the file; neither does what was refused."""
    refused = row["outcome"] != "done"
    return row["attempt"] in READING or (refused and (row["image"], row["attempt"]) not in HEALED)


def _chain(folder: Path, length: int) -> Path:
    """Overlays 0 to length - 1, each on the next."""
    for number in range(length):
        name = f"{number + 1}.qcow2".encode()
        fields = {"backing_file_offset": 2048, "backing_file_size": len(name)}
        fields |= {"l1_size": 0, "size": 0} if number else {}
        draft = Draft(cluster_bits=12, fields={} if number == length - 1 else fields)
        draft.extensions = extension(BACKING_FORMAT_MAGIC, b"qcow2") + END_OF_EXTENSIONS
        draft.fields |= {"l1_size": 8, "size": 1 << 20}
        draft.pieces = {draft.at(4): bytes(8), 2048: name}
        draft.write(folder / f"{number}.qcow2")
    return folder / "0.qcow2"


def test_a_chain_of_a_thousand_overlays_is_refused(tmp_path: Path) -> None:
    top = _chain(tmp_path, 1000)
    began = time.process_time()
    with pytest.raises(ChainError, match="longer than 200"):
        qcowlib.open_image(top, policy=qcowlib.LocalFiles())
    with qcowlib.open_image(top, open_backing=False) as image:
        assert not image.snapshots if isinstance(image, qcowlib.Qcow2Image) else False
    assert time.process_time() - began < 10


def test_a_chain_of_150_overlays_is_read(tmp_path: Path) -> None:
    with qcowlib.open_image(_chain(tmp_path, 150), policy=qcowlib.LocalFiles()) as image:
        assert image.read(0, 1 << 20) == bytes(1 << 20)
        assert sum(int(table.length.sum()) for table in image.extents()) == 1 << 20


@pytest.mark.parametrize(
    "name",
    [nested_description(10_000), nested_description(33), "json:" + "[" * 500_000, long_description(1 << 20)],
    ids=["10000-drivers", "33-drivers", "500000-brackets", "1-mib-name"],
)
def test_descriptions_of_any_depth_and_length_end_in_an_error(name: str) -> None:
    from qcowlib.image.references import backing_reference, parse_image_name

    began = time.process_time()
    if "xxx" in name:
        assert len(backing_reference(name, None, "").path) == 1 << 20
        with pytest.raises(qcowlib.StorageError):
            qcowlib.open_image(parse_image_name(name))
    else:
        for parse in (parse_image_name, lambda text: backing_reference(text, "raw", "")):
            with pytest.raises(ChainError):
                parse(name)
    assert time.process_time() - began < 5
