"""Which files that an image names may be opened (design D7).

A backing file or data file name is untrusted data. It is resolved to a local path (`references.py`), and that path is
put before the caller's policy before anything is opened. The library's default denies; the command line follows local
chains with `LocalFiles`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from qcowlib.errors import ReferenceDenied


@dataclass(frozen=True)
class FileRequest:
    """A file that an image asks for.

    Attributes:
        role: "backing file" or "data file".
        path: the local path as it would be opened.
        named_by: name of the image whose header holds the reference.
    """

    role: str
    path: str
    named_by: str


class OpenPolicy(Protocol):
    """Decides about files named inside images."""

    def admit(self, request: FileRequest) -> None:
        """Return to allow the file to be opened for reading; raise `ReferenceDenied` to refuse."""
        ...


class DenyReferences:
    """Open nothing but the given file: the default of the library."""

    def admit(self, request: FileRequest) -> None:
        """Refuse, and say how to allow."""
        raise ReferenceDenied(
            f"'{request.named_by}' names the {request.role} '{request.path}', and the policy opens nothing that an "
            "image names; pass policy=LocalFiles() or policy=ConfinedTo(directory) to allow it, "
            "or open_backing=False to open the top file alone"
        )


class ConfinedTo:
    """Allow files inside some directories; symbolic links are followed before the path is judged.

    Args:
        directories: the directories whose trees are allowed.
    """

    def __init__(self, *directories: str | os.PathLike[str]) -> None:
        self.directories = tuple(os.path.realpath(os.fspath(directory)) for directory in directories)

    def admit(self, request: FileRequest) -> None:
        """Refuse a path that lies outside of all directories."""
        target = os.path.realpath(request.path)
        if not any(os.path.commonpath((target, directory)) == directory for directory in self.directories):
            allowed = ", ".join(f"'{directory}'" for directory in self.directories) or "no directory"
            raise ReferenceDenied(
                f"'{request.named_by}' names the {request.role} '{request.path}', which is not inside {allowed}; "
                "add its directory to ConfinedTo(...) to allow it"
            )


class LocalFiles:
    """Allow every local file, as the command line does for verbs that read through a chain."""

    def admit(self, request: FileRequest) -> None:
        """Allow; that the file is local was made sure when its name was parsed."""
