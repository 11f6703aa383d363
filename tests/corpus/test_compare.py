"""compare, asked about pairs of images of the corpus: the stock tool's words and exit codes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.side_by_side import ours, stock
from tests.corpus import archives
from tests.corpus.questions import DAMAGED_MAPPINGS

pytestmark = [pytest.mark.corpus, pytest.mark.timeout(120)]

Image = dict[str, Any]
NOT_OPENED = 2
NOT_READ = 3  # and above: what a mapping or the data of an image cannot tell
LARGEST = 256 << 20
ENDLESS = {"chain-self", "chain-loop", "bad-l1-self"}  # the stock tool never ends with the first two


def usable(image: Image) -> bool:
    """Whether both tools read the image as it is, in a moment."""
    size = image["answers"].get("content", {}).get("virtual_size") or 0
    info = (image["answers"].get("info") or {}).get("json") or {}
    unfit = image.get("info_only") or image.get("secret") or image.get("place") or image["id"] in ENDLESS
    return not unfit and size <= LARGEST and info.get("format", "qcow2") in ("qcow2", "raw")


def pairs() -> list[tuple[Image, Image]]:
    """Each image with the next of its group, and some with themselves or with any other."""
    images = [image for image in archives.manifest()["images"] if usable(image)]
    choose = random.Random(7)
    found = [(one, other) for one, other in itertools.pairwise(images) if one["group"] == other["group"]]
    found += [(image, image) for image in choose.sample(images, 30)]
    return found + [(choose.choice(images), choose.choice(images)) for _ in range(30)]


def test_pairs(corpus: Path, record_property: Callable[[str, object], None]) -> None:
    wrong, same, stricter = [], 0, 0
    for number, (one, other) in enumerate(pairs()):
        words = ["compare", *(["-s"] if number % 2 else [])]
        for option, image in (("-f", one), ("-F", other)):
            words += [option, image["open_format"]] if image.get("open_format") else []
        words += [one["file"], other["file"]]
        expected, got = stock(corpus, *words), ours(corpus, *words)
        # What is said of an image that cannot be opened is asked with info.
        if got[:2] == expected[:2] and (got.code == NOT_OPENED or got.err == _without_warnings(expected.err)):
            same += 1
        elif got.code >= NOT_READ and {one["id"], other["id"]} & DAMAGED_MAPPINGS.keys():
            stricter += 1
        else:
            wrong.append((words, expected, got))
    record_property("counted", ("comparisons", {"same": same, "stricter": stricter, "wrong": len(wrong)}))
    assert not wrong, f"{len(wrong)} of {same + stricter + len(wrong)}: {wrong[:5]}"
    assert same > 150
    assert stricter < same / 5


def _without_warnings(text: str) -> str:
    """Less what the stock tool says about refcounts, of which a reader needs none."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("qcow2: "))
