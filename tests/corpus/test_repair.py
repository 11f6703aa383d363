"""The manifest's answers about repair: what the stock tool repairs ours repairs, with its exit codes; nothing is lost.

Where the stock tool's repair leaves an image damaged, ours either heals it or leaves every byte as it was.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib.errors import QcowError
from tests.cli.side_by_side import ours
from tests.corpus import archives
from tests.corpus.digests import digest
from tests.corpus.questions import DAMAGED_MAPPINGS

pytestmark = [pytest.mark.corpus, pytest.mark.timeout(120)]

#: Exit code of -r leaks or -r all where ours is not the stock tool's, though that heals the image.
OTHER_EXIT_CODES = {
    ("bad-zero-v2", "leaks"): "our check sees the zero flag in version 2, which is no leak",
}
#: Content after a repair that is not the stock tool's.
OTHER_CONTENT = {
    "bad-l1-beyond": "the lost L2 table is found again",
    "bad-l1-self": "the lost L2 table is found again",
    "bad-l1-unaligned": "the lost L2 table is found again",
    "bad-overlap-l2": "the stock repair changes flags in the L2 table that shows as guest data",
    "bad-zero-v2": "without the flag the cluster can be read",
}

CASES = [
    pytest.param(image, mode, id=f"{image['id']}-{mode}")
    for image in archives.manifest()["images"]
    for mode in image["answers"].get("repair") or ()
    if image["group"] != "third-party" and len(image["files"]) == 1
] or [pytest.param(None, "", id="no-corpus")]


def content(path: Path) -> str | None:
    """The manifest's cheap digest of the active layer; None where it cannot be read."""
    try:
        with qcowlib.open_image(path, format="qcow2", policy=qcowlib.LocalFiles()) as image:
            kinds = (qcowlib.ExtentKind.ZERO, qcowlib.ExtentKind.UNALLOCATED)
            data = [(row.start, row.length) for table in image.extents() for row in table if row.kind not in kinds]
            return digest(image, data, whole=False).nz64k_sha256
    except QcowError:
        return None


@pytest.mark.parametrize(("image", "mode"), CASES)
def test_repair(image: dict[str, Any], mode: str, corpus: Path, tmp_path: Path) -> None:
    answer = image["answers"]["repair"][mode]
    path = tmp_path / "image"
    shutil.copyfile(corpus / image["file"], path)
    initial, before = path.read_bytes(), content(path)
    said = ours(tmp_path, "check", "-f", "qcow2", "-q", "-r", mode, "image")
    assert "Traceback" not in said.err, said.err
    after = ours(tmp_path, "check", "-f", "qcow2", "-q", "image")
    if before is not None:
        assert content(path) == before, "content that could be read is lost"
    if said.code and answer["rc"]:
        # Leaked clusters may be given back beside damage that is no mapping's: a refcount that is too low.
        if path.read_bytes() != initial:
            assert mode == "leaks"
            assert after.code == 2
        return
    if answer["rc"] == 0:
        if (image["id"], mode) not in OTHER_EXIT_CODES:
            assert said.code == 0, said
            assert after.code == 0, after
        wanted = answer["content_after"]
        if wanted["rc"] == 0 and image["id"] not in {*OTHER_CONTENT, *DAMAGED_MAPPINGS}:
            assert content(path) == wanted["nz64k_sha256"]
    else:
        assert after.code == 0, "better than the stock tool, or as before"


def test_the_tables_name_images_of_the_corpus(manifest: dict[str, Any]) -> None:
    names = {image["id"] for image in manifest["images"]}
    assert not names or {*OTHER_CONTENT, *(name for name, _ in OTHER_EXIT_CODES)} <= names
