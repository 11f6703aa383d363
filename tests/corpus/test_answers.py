"""Every image of the corpus answers as its manifest says.

One test for each image and kind of question; the numbers of all of them are printed at the end of the run as
`N of M answers (S stricter)` (see tests/conftest.py).
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import archives, programs
from tests.corpus.questions import ANSWER_KINDS, Verdict, kinds

#: Answers of the manifest that belong to other work (repair), and remarks.
NOT_ASKED = {"repair", "bitmaps_reader", "snapshots_note"}

#: Seconds that a question may take before its answer counts as wrong.
pytestmark = [pytest.mark.corpus, pytest.mark.timeout(120)]

IMAGES = archives.manifest()["images"]
CASES = [
    pytest.param(image, kind, id=f"{image['id']}-{kind}")
    for image in IMAGES
    for kind, questions in kinds().items()
    if any(True for _ in questions(image, Path()))
] or [pytest.param(None, "", id="no-corpus")]


@pytest.mark.parametrize(("image", "kind"), CASES)
def test_the_answer_is_the_manifests(
    image: dict[str, Any], kind: str, corpus: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    program = programs.chosen(tmp_path)
    questions = list(kinds()[kind](image, tmp_path))
    record_property("answers", {"asked": len(questions)})
    _place(image, corpus)
    before = _state(image, corpus)
    verdicts: Counter[Verdict] = Counter()
    wrong = []
    # json: backing names are relative to the process's directory.
    with contextlib.chdir(corpus):
        for question in questions:
            try:
                verdicts[question.ask(program)] += 1
            except (AssertionError, programs.Refused) as error:
                wrong.append(f"{question.name}: {error}")
    record_property("answers", {verdict.name: count for verdict, count in verdicts.items()})
    assert _state(image, corpus) == before, "asking changed a file"
    assert not wrong, "\n".join(wrong)


def test_every_answer_of_the_manifest_is_asked(manifest: dict[str, Any]) -> None:
    for image in manifest["images"]:
        for answer in image["answers"].keys() - NOT_ASKED:
            kind = ANSWER_KINDS[answer]
            if image["answers"][answer]:
                assert any(True for _ in kinds()[kind](image, Path())), f"{image['id']}: {answer} is not asked"


def _place(image: dict[str, Any], corpus: Path) -> None:
    """Copy the files that an image names by an absolute path to that path, unless they are there."""
    for name, absolute in image.get("place", {}).items():
        place = Path(absolute)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes((corpus / name).read_bytes())


def _state(image: dict[str, Any], corpus: Path) -> list[tuple[str, int, int]]:
    """Size and time of change of the image's files."""
    files = [corpus / each["name"] for each in image["files"]]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
