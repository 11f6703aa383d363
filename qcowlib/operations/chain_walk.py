"""A backing chain as its headers tell it: what each link says, whether that is there, and what would mend it.

header of the top -> name of the backing file -> its header -> ...    no content is read, no lock is taken
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from qcowlib.errors import ChainError, QcowError
from qcowlib.image.create_target import same_file
from qcowlib.image.opening import open_image
from qcowlib.image.policy import FileRequest, LocalFiles, OpenPolicy
from qcowlib.image.probe import probe_format
from qcowlib.image.qcow2 import Qcow2Image
from qcowlib.image.references import Reference, backing_reference
from qcowlib.storage.local import open_local

_MOST_LINKS = 1024  # of a chain: more than any guest can open


@dataclass(frozen=True)
class ChainProblem:
    """Something wrong with a link of a chain.

    Attributes:
        code: missing, loop, no-format, wrong-format, unusable-name, unreadable, or smaller-base.
        path: the image that has the link.
        text: what is wrong, in one line.
        fixes: commands that would mend it; several where a person has to choose.
    """

    code: str
    path: str
    text: str
    fixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChainLink:
    """One image of a chain.

    Attributes:
        path: local path of the image.
        format: by its content: "qcow2", "raw", or another format's name.
        size: bytes of the virtual disk.
        stated: name of the backing file in its header; None without one.
        stated_format: format of it in the header; None where the header does not say.
    """

    path: str
    format: str
    size: int
    stated: str | None = None
    stated_format: str | None = None


@dataclass
class ChainReport:
    """A chain from the top down, as far as it can be followed, and its problems."""

    links: list[ChainLink] = field(default_factory=list)
    problems: list[ChainProblem] = field(default_factory=list)


def examine_chain(path: str, *, policy: OpenPolicy | None = None) -> ChainReport:
    """Follow a chain from its top and say what is wrong with it; nothing is changed.

        for problem in qcowlib.examine_chain("overlay.qcow2").problems:
            print(problem.text, *problem.fixes, sep="\\n    ")

    Args:
        path: the top.
        policy: which files may be looked at; local ones by default.

    Raises:
        QcowError: the top itself cannot be opened.
    """
    report = ChainReport()
    policy = LocalFiles() if policy is None else policy
    reference = Reference(path)
    seen: list[str] = []
    while True:
        try:
            link = _read_link(reference.path, reference.format)
        except QcowError as error:
            if not report.links:
                raise
            report.problems.append(ChainProblem("unreadable", reference.path, f"'{reference.path}': {error}"))
            return report
        if report.links:
            report.problems += _wrong_format(report.links[-1], link)
        report.links.append(link)
        seen.append(os.path.realpath(link.path))
        if link.stated is None:
            return report
        below = _follow(link, seen, policy, report)
        if below is None:
            return report
        reference = below


def _read_link(path: str, stated_format: str | None = None) -> ChainLink:
    with open_local(path, force_share=True) as storage:
        # What is said to be raw is read as raw, whatever a guest has written to it.
        found = "raw" if stated_format == "raw" else probe_format(storage)
        if found != "qcow2":
            return ChainLink(path, found, storage.size())
    with open_image(path, format="qcow2", open_backing=False, force_share=True) as image:
        assert isinstance(image, Qcow2Image)
        header = image.header
        return ChainLink(path, "qcow2", image.size, header.backing_file, header.backing_format)


def _follow(link: ChainLink, seen: list[str], policy: OpenPolicy, report: ChainReport) -> Reference | None:
    """What a link names, if that can be looked at; else the problem is noted."""
    assert link.stated is not None
    try:
        below = backing_reference(link.stated, link.stated_format, link.path)
        if not _is_plain(below):
            raise ChainError(f"'{link.stated}' describes more than a file: it is not followed here")
        policy.admit(FileRequest("backing file", below.path, link.path))
    except QcowError as error:
        report.problems.append(ChainProblem("unusable-name", link.path, f"'{link.path}': {error}"))
        return None
    if not os.path.exists(below.path):
        text = f"'{link.path}': its backing file '{below.path}' is not there"
        fixes = tuple(_rebase(link.path, found, _format_of(found)) for found in _elsewhere(below.path, link.path))
        report.problems.append(ChainProblem("missing", link.path, text, fixes))
        return None
    if os.path.realpath(below.path) in seen or len(seen) >= _MOST_LINKS:
        text = f"'{link.path}': its backing file '{below.path}' is in the chain above it: the chain is a loop"
        report.problems.append(ChainProblem("loop", link.path, text))
        return None
    return below


def _wrong_format(above: ChainLink, link: ChainLink) -> Iterator[ChainProblem]:
    if above.stated_format is None:
        text = (
            f"'{above.path}' does not say what format its backing file '{link.path}' has; it looks like {link.format}"
        )
        yield ChainProblem("no-format", above.path, text, (_rebase(above.path, above.stated or "", link.format),))
    elif above.stated_format != link.format:
        text = f"'{above.path}' says that '{link.path}' is {above.stated_format}, but it is {link.format}"
        yield ChainProblem("wrong-format", above.path, text, (_rebase(above.path, above.stated or "", link.format),))
    if link.size < above.size:
        text = f"'{link.path}' is smaller than '{above.path}' on it: zeroes show behind its end"
        yield ChainProblem("smaller-base", above.path, text)


def _elsewhere(missing: str, overlay: str) -> list[str]:
    """Files of the same name beside the overlay, or in a directory below or beside it, that could have been moved."""
    name, home = os.path.basename(missing), os.path.dirname(os.path.abspath(overlay))
    places = [home]
    for parent in (home, os.path.dirname(home)):
        with suppress(OSError), os.scandir(parent) as entries:
            places += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    found = [os.path.join(place, name) for place in dict.fromkeys(places)]
    return [path for path in found if os.path.isfile(path) and not same_file(path, overlay)]


def _format_of(path: str) -> str:
    try:
        with open_local(path, force_share=True) as storage:
            return probe_format(storage)
    except QcowError:
        return "qcow2"


def _rebase(overlay: str, base: str, image_format: str) -> str:
    from shlex import join

    return join(["qcow", "rebase", "-u", "-b", base, "-F", image_format, overlay])


class BackingFile(NamedTuple):
    """The file that an image is based on: absolute path, and its format as the header states it (None: it does not)."""

    path: str
    format: str | None


def backing_file(path: str) -> BackingFile | None:
    """The file that a qcow2 image is based on, by its header; the image may be in use.

    None where it has none, where the name does not describe local files, or describes anything but one whole file.

    Raises:
        QcowError: the image cannot be opened.
    """
    below = _below(path)
    if below is None or not _is_plain(below):
        return None
    return BackingFile(os.path.abspath(below.path), below.format)


def based_on(paths: Iterable[str], known: Iterable[str] = ()) -> dict[str, list[str]]:
    """For each of some files the images that are based directly on it, or on a part of it.

    Args:
        paths: files that others may be based on.
        known: images that may be anywhere; all files in the directories of these and of `paths` are looked at as well.
    """
    found: dict[str, list[str]] = {path: [] for path in paths}
    candidates = {os.path.abspath(path) for path in (*known, *found)}
    for directory in {os.path.dirname(path) for path in candidates}:
        with suppress(OSError), os.scandir(directory) as entries:
            candidates.update(entry.path for entry in entries if entry.is_file())
    for candidate in sorted(candidates):
        with suppress(QcowError, OSError):
            below = _below(candidate)
            for path, users in found.items():
                if below is not None and same_file(below.path, path) and not same_file(candidate, path):
                    users.append(candidate)
    return found


def _below(path: str) -> Reference | None:
    """What an image names as its backing file, if that describes local files."""
    link = _read_link(path)
    with suppress(ChainError):
        return None if link.stated is None else backing_reference(link.stated, link.stated_format, path)
    return None


def _is_plain(below: Reference) -> bool:
    """Whether a reference is to the whole of one file."""
    return not below.windows and below.zeroes is None and below.backing is None
