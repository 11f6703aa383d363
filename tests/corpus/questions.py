"""The corpus's questions and how an answer is judged.

One question has one answer in the manifest. An answer is the same as the stock tools', or *stricter*, or wrong. Three
rules decide where the stock answer is not the measure:

1. A snapshot has its own disk size: its content is that after a revert.
2. Where the stock tool silently gives bytes for a damaged mapping, a refusal is right, and stricter.
3. Other container formats are refused by name.

The check opens only the file it is asked about, where the stock check opens the backing chain and the data file as
well: where one of these is missing, the answer is that of the stock check without it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from tests import oracle
from tests.corpus.digests import Digests
from tests.corpus.programs import Program, Refused, Reply, Target

Image = dict[str, Any]

#: Formats that are read; every other one is refused by name (rule 3).
OWN_FORMATS = ("qcow2", "raw")

#: Images whose mapping is damaged (rule 2): only here is a refusal to read right where the stock tool reads.
DAMAGED_MAPPINGS = {
    "bad-comp-beyond": "a compressed cluster lies beyond the end of the file",
    "bad-head-l1-beyond": "the L1 table lies beyond the end of the file",
    "bad-head-l1-zero-offset": "the L1 table lies in the header",
    "bad-l1-beyond": "an L2 table lies beyond the end of the file",
    "bad-l1-self": "an L1 entry points at the L1 table",
    "bad-l2-beyond": "a cluster lies beyond the end of the file",
    "bad-overlap-l1": "an L2 entry points at the L1 table",
    "bad-overlap-l2": "an L2 entry points at an L2 table",
    "bad-overlap-refblock": "an L2 entry points at a refcount block",
    "bad-overlap-reftable": "an L2 entry points at the refcount table",
    "bad-snap-count-more": "the snapshot table ends before its last entries, which are read from nothing",
    "bad-snap-disksize-huge": "a snapshot's disk is larger than its L1 table can map",
    "bad-snap-id-overflow": "the length of a snapshot's id leads into the next entry",
    "bad-snap-l1-beyond": "a snapshot's L1 table lies beyond the end of the file",
    "bad-snap-l2-beyond": "an L2 table of a snapshot lies beyond the end of the file",
    "bad-snap-name-overflow": "the length of a snapshot's name leads beyond the end of the file",
    "bad-trunc-data": "the file ends before some of its data",
    "bad-trunc-header": "the file ends before its L1 table",
    "bad-trunc-l1": "the file ends before its L1 table",
    "bad-trunc-l2": "the file ends before an L2 table",
    "bad-trunc-refblock": "the file ends before its L1 table",
    "bad-trunc-reftable": "the file ends before its L1 table",
    "head-corrupt-by-qemu": "an L2 entry points at a refcount block",
    "tp-binwalk-512": "the file ends before its L1 table",
}

#: Checks that find more than the stock check, each with the damage that it sees.
STRICTER_CHECKS = {
    "bad-zero-v2": "the zero flag is reserved in version 2; the stock tool refuses to read the cluster",
}

#: Bitmaps whose damage the stock tools do not see (rule 2).
DAMAGED_BITMAPS = {"bad-bitmap-table-beyond": "the table names bits beyond the end of the file"}

#: What stands in for the files that an image names, when the stock tool is asked about the image alone.
NAMED_FILES_CUT_OFF = ({"backing": None}, {"data-file": {"driver": "null-co", "size": 1 << 40}})


#: Bytes of a snapshot's extra data from which on it has a disk size of its own.
DISK_SIZE_END = 16


class Verdict(Enum):
    SAME = "same"
    STRICTER = "stricter"
    NOT_ASKED = "not asked"


class Question(NamedTuple):
    """One question: a name for messages, and what asks and judges (it raises AssertionError for a wrong answer)."""

    name: str
    ask: Callable[[Program], Verdict]


def kinds() -> dict[str, Callable[[Image, Path], Iterator[Question]]]:
    """The kinds of questions; each makes the questions of one image, given a directory for its own files."""
    return {
        "info": _info,
        "check": _check,
        "map": _map,
        "content": _content,
        "snapshots": _snapshots,
        "vmstate": _vmstate,
        "snapshot_list": _snapshot_list,
        "lookups": _lookups,
        "bitmaps": _bitmaps,
    }


#: Keys of the manifest's answers and the kind of question that asks them; repair is not asked.
ANSWER_KINDS = {
    "info": "info",
    "info_probed": "info",
    "check": "check",
    "map": "map",
    "content": "content",
    "snapshots": "snapshots",
    "snapshot_list": "snapshot_list",
    "lookups": "lookups",
    "bitmaps": "bitmaps",
}


def foreign_format(image: Image) -> str | None:
    """Name of the container format when it is not one of ours."""
    name = image["answers"]["info"].get("json", {}).get("format")
    return name if name and name not in OWN_FORMATS else None


def target(image: Image, *, key: str = "secret") -> Target:
    """The image as the manifest says that it is to be opened; `key` is the manifest's name of the passphrase."""
    secret = None if foreign_format(image) else image.get(key)
    return Target(image["file"], image.get("open_format"), secret)


def _refused_by_name(image: Image, reply: Reply) -> Verdict | None:
    """Rule 3 for a command; None for our own formats."""
    name = foreign_format(image)
    if name is None:
        return None
    assert reply.rc == 1, f"a {name} image must be refused with exit code 1, not {reply.rc}"
    assert name in reply.stderr.lower(), f"the refusal of a {name} image must name the format: {reply.stderr!r}"
    return Verdict.SAME


def _info(image: Image, work: Path) -> Iterator[Question]:
    answer = image["answers"]["info"]
    probed = image["answers"].get("info_probed", answer)
    yield Question("info, probed", lambda program: _ask_info(program, image, None, probed))
    named = answer.get("json", {}).get("format", "qcow2")
    # A file of another format is asked once: it has no format name that we open.
    if named in OWN_FORMATS and not (answer["rc"] != 0 and image["file"].endswith(".vmdk")):
        yield Question(f"info -f {named}", lambda program: _ask_info(program, image, named, answer))


def _ask_info(program: Program, image: Image, format_name: str | None, answer: dict[str, Any]) -> Verdict:
    options = ["-f", format_name] if format_name else []
    reply = program.command("info", "-U", "--output=json", *options, image["file"])
    if verdict := _refused_by_name(image, reply):
        return verdict
    assert reply.rc == answer["rc"], f"exit code {reply.rc} is not {answer['rc']}: {reply.stderr}"
    if "json" in answer:
        ours = json.loads(reply.stdout)
        ours.pop("actual-size", None)
        cut = answer.get("snapshots_cut")
        if cut:
            assert len(ours["snapshots"]) == cut["total"]
            ours["snapshots"] = ours["snapshots"][: len(answer["json"]["snapshots"])]
        _assert_same(ours, answer["json"])
    return Verdict.SAME


def _check(image: Image, work: Path) -> Iterator[Question]:
    yield Question("check", lambda program: _ask_check(program, image))


def _ask_check(program: Program, image: Image) -> Verdict:
    answer = image["answers"]["check"]
    reply = program.command("check", "--output=json", *target(image).arguments())
    if verdict := _refused_by_name(image, reply):
        return verdict
    ours = json.loads(reply.stdout) if reply.stdout.strip() else None
    if image["id"] in STRICTER_CHECKS and reply.rc != answer["rc"]:
        assert reply.rc in (1, 2), f"a stricter check ends with 1 or 2, not {reply.rc}"
        assert answer["rc"] in (0, 3), "a stricter check finds damage where the stock one finds none"
        return Verdict.STRICTER
    if answer["rc"] == 1 and reply.rc == 0:
        answer = _check_of_the_file_alone(image)
    assert reply.rc == answer["rc"], f"exit code {reply.rc} is not {answer['rc']}: {ours} {reply.stderr}"
    if answer.get("json") is not None:
        assert ours is not None, f"no JSON: {reply.stderr}"
        # The name that the stock tool shows is a text about the options with which it was asked.
        ignored = {"filename"} if answer["json"]["filename"] != image["file"] else set()
        _assert_same(*({k: v for k, v in side.items() if k not in ignored} for side in (ours, answer["json"])))
    return Verdict.SAME


def _check_of_the_file_alone(image: Image) -> dict[str, Any]:
    """The stock check of an image without the files that it names; its own answer when that is not what it lacks."""
    file = {"driver": "qcow2", "file": {"driver": "file", "filename": image["file"]}}
    for replacement in NAMED_FILES_CUT_OFF:
        alone = oracle.image_check("json:" + json.dumps(file | replacement))
        if "format" in alone:
            return {"rc": alone.pop("rc"), "json": {k: v for k, v in alone.items() if k != "stderr"}}
    return dict(image["answers"]["check"])


def _map(image: Image, work: Path) -> Iterator[Question]:
    if "map" in image["answers"]:
        yield Question("map", lambda program: _ask_map(program, image))


def _ask_map(program: Program, image: Image) -> Verdict:
    answer = image["answers"]["map"]
    reply = program.command("map", "--output=json", *target(image).arguments())
    if verdict := _refused_by_name(image, reply):
        return verdict
    if answer["rc"] == 0 and reply.rc == 1 and image["id"] in DAMAGED_MAPPINGS:
        return Verdict.STRICTER
    assert reply.rc == answer["rc"], f"exit code {reply.rc} is not {answer['rc']}: {reply.stderr}"
    if answer["rc"] == 0:
        rows = [_map_row(row) for row in json.loads(reply.stdout)]
        if "map" in image.get("host_dependent", ()):
            # Which bytes of a raw file are holes is the host's affair; what is covered is not.
            assert [sum(row[1] for row in rows), rows[0][0]] == [sum(row[1] for row in answer["extents"]), 0]
        else:
            assert rows == answer["extents"], _first_difference(rows, answer["extents"])
    return Verdict.SAME


def _map_row(row: dict[str, Any]) -> list[Any]:
    flags = [int(row[name]) for name in ("present", "zero", "data")]
    return [row["start"], row["length"], row["depth"], *flags, row.get("offset")]


def _content(image: Image, work: Path) -> Iterator[Question]:
    answer = image["answers"].get("content")
    if answer is not None:
        yield Question("content", lambda program: _ask_content(program, image, target(image), None, answer))
        if "secret2" in image:
            other = target(image, key="secret2")
            yield Question("content, second key", lambda program: _ask_content(program, image, other, None, answer))


def _snapshots(image: Image, work: Path) -> Iterator[Question]:
    listed = image["answers"].get("snapshots", [])
    for snapshot in listed:
        name = f"snapshot {snapshot['id']!r}"
        yield Question(name, lambda program, asked=snapshot: _ask_snapshot(program, image, asked))  # type: ignore[misc]
    if listed:
        yield Question("snapshot fields", lambda program: _ask_fields(program, image))


def _ask_snapshot(program: Program, image: Image, snapshot: dict[str, Any]) -> Verdict:
    answer = snapshot.get("content_after_revert", snapshot["content"])  # rule 1
    own_size = snapshot.get("disk_size")
    if answer["rc"] == 0 and own_size is not None and own_size != answer["virtual_size"]:
        # A disk size that the stock tool cannot even revert to: the independent reader's answer is the measure.
        answer = {"rc": 0} | snapshot["content"]["independent_reader"]
    return _ask_content(program, image, target(image), snapshot["id"], answer)


def _ask_content(
    program: Program, image: Image, opened: Target, snapshot: str | None, answer: dict[str, Any]
) -> Verdict:
    whole = answer.get("sha256") is not None
    try:
        ours = program.content(opened, snapshot=snapshot, whole=whole)
    except Refused as refusal:
        return _judge_refusal(image, answer, str(refusal))
    if ours is None:
        return Verdict.NOT_ASKED
    assert answer["rc"] == 0, "read, although it must be refused"
    assert foreign_format(image) is None, "read, although its format must be refused"
    assert ours == Digests(answer["virtual_size"], answer["sha256"], answer["nz64k_sha256"])
    return Verdict.SAME


def _judge_refusal(image: Image, answer: dict[str, Any], refusal: str) -> Verdict:
    foreign = foreign_format(image)
    if foreign is not None:
        assert foreign in refusal.lower(), f"the refusal must name {foreign}: {refusal}"
        return Verdict.SAME
    if answer["rc"] == 0:
        assert image["id"] in DAMAGED_MAPPINGS, f"refused, but the mapping is sound: {refusal}"
        return Verdict.STRICTER
    return Verdict.SAME


def _ask_fields(program: Program, image: Image) -> Verdict:
    ours = program.snapshots(target(image))
    if ours is None:
        return Verdict.NOT_ASKED
    for mine, stock in zip(ours, image["answers"]["snapshots"], strict=True):
        common = mine.keys() & stock.keys()
        if stock.get("extra_data_size", 0) < DISK_SIZE_END:
            common -= {"disk_size"}  # not stored: the manifest has the active layer's
        _assert_same({k: mine[k] for k in common}, {k: stock[k] for k in common})
    return Verdict.SAME


def _vmstate(image: Image, work: Path) -> Iterator[Question]:
    for snapshot in image["answers"].get("snapshots", []):
        if "vmstate" in snapshot:
            name = f"vmstate {snapshot['id']!r}"
            yield Question(name, lambda program, asked=snapshot: _ask_vmstate(program, image, asked))  # type: ignore[misc]


def _ask_vmstate(program: Program, image: Image, snapshot: dict[str, Any]) -> Verdict:
    ours = program.vmstate(target(image), snapshot["id"])
    if ours is None:
        return Verdict.NOT_ASKED
    assert (ours.virtual_size, ours.sha256) == (snapshot["vmstate"]["size"], snapshot["vmstate"]["sha256"])
    return Verdict.SAME


def _snapshot_list(image: Image, work: Path) -> Iterator[Question]:
    if "snapshot_list" in image["answers"]:
        yield Question("snapshot -l", lambda program: _ask_snapshot_list(program, image))


def _ask_snapshot_list(program: Program, image: Image) -> Verdict:
    answer = image["answers"]["snapshot_list"]
    reply = program.command("snapshot", "-l", image["file"])
    assert reply.rc == answer["rc"], f"exit code {reply.rc} is not {answer['rc']}: {reply.stderr}"
    assert reply.stdout.splitlines() == answer["text"]
    return Verdict.SAME


def _lookups(image: Image, work: Path) -> Iterator[Question]:
    for name, ways in image["answers"].get("lookups", {}).items():
        for way, answer in ways.items():
            yield Question(
                f"{way} {name!r}",
                lambda program, name=name, way=way, answer=answer: _ask_lookup(  # type: ignore[misc]
                    program, image, work, name, way, answer
                ),
            )


def _ask_lookup(program: Program, image: Image, work: Path, name: str, way: str, answer: dict[str, Any]) -> Verdict:
    """Which snapshot a name takes: by the content it leads to, or by the id that is gone after a delete."""
    raw, copy = str(work / "lookup.raw"), str(work / "lookup.qcow2")
    if way.startswith("convert"):
        selector = way.removeprefix("convert -l").strip() + name
        reply = program.command("convert", "-l", selector, "-O", "raw", image["file"], raw)
    else:
        shutil.copyfile(image["file"], copy)
        before = _snapshot_ids(program, copy)
        reply = program.command("snapshot", way.split()[1], name, copy)
    assert reply.rc == answer["rc"], f"exit code {reply.rc} is not {answer['rc']}: {reply.stderr}"
    if "removed_id" in answer:
        after = _snapshot_ids(program, copy)
        assert [one for one in before if one not in after] == answer["removed_id"]
    elif way == "snapshot -a" and reply.rc == 0:
        reply = program.command("convert", "-O", "raw", copy, raw)
        assert reply.rc == 0, reply.stderr
    if "sha256" in answer:
        with open(raw, "rb") as content:
            assert hashlib.file_digest(content, "sha256").hexdigest() == answer["sha256"]
        os.unlink(raw)
    return Verdict.SAME


def _snapshot_ids(program: Program, path: str) -> list[str]:
    reply = program.command("info", "--output=json", path)
    return [entry["id"] for entry in json.loads(reply.stdout).get("snapshots", [])]


def _bitmaps(image: Image, work: Path) -> Iterator[Question]:
    for bitmap in image["answers"].get("bitmaps", []):
        name = f"bitmap {bitmap['name']!r}"
        yield Question(name, lambda program, asked=bitmap: _ask_bitmap(program, image, asked))  # type: ignore[misc]


def _ask_bitmap(program: Program, image: Image, bitmap: dict[str, Any]) -> Verdict:
    """What is marked, as the stock NBD server says; an inconsistent bitmap is refused with its words."""
    try:
        ours = program.dirty(target(image), bitmap["name"])
    except Refused as refusal:
        return _judge_refused_bitmap(image, bitmap, str(refusal))
    if ours is None:
        return Verdict.NOT_ASKED
    assert "nbd" not in bitmap, "read, although it must be refused"
    assert ours == bitmap["dirty"], _first_difference(ours, bitmap["dirty"])
    return Verdict.SAME


def _judge_refused_bitmap(image: Image, bitmap: dict[str, Any], refusal: str) -> Verdict:
    if "nbd" in bitmap:
        assert bitmap["nbd"]["stderr"][0].partition(": ")[2] in refusal
        return Verdict.SAME
    assert image["id"] in DAMAGED_BITMAPS, f"refused, but the bitmap is sound: {refusal}"
    return Verdict.STRICTER


def _assert_same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    differences = [
        f"{key}: {ours.get(key, 'absent')!r} is not {stock.get(key, 'absent')!r}"
        for key in sorted(ours.keys() | stock.keys())
        if ours.get(key, "absent") != stock.get(key, "absent")
    ]
    assert not differences, "; ".join(differences)


def _first_difference(ours: list[Any], stock: list[Any]) -> str:
    for index, (mine, theirs) in enumerate(zip(ours, stock, strict=False)):
        if mine != theirs:
            return f"row {index}: {mine} is not {theirs}"
    return f"{len(ours)} rows, not {len(stock)}"
