"""The catalog of a domain's snapshots: a directory with one libvirt <domainsnapshot> document for each.

    add / replace / remove / set_current -> new file, fsync, rename, fsync of the directory

Each change is whole or has not happened, whenever power fails: the file `current` names the current snapshot and what
it was before, which counts while the first has no document (yet, or any more).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from urllib.parse import quote

from snapshot.document import build, name_problem, parse
from snapshot.errors import CatalogError, NoSuchDomainSnapshot
from snapshot.model import DomainSnapshot
from snapshot.safe_xml import MAX_BYTES

CURRENT = "current"
_SUFFIX = ".xml"
_MAX_DOCUMENTS = 100_000
_LONGEST_STEM = 180


def default_directory(domain: str, domain_file: str | None = None) -> str:
    """Where the catalog of a domain is when the user names no place.

    Args:
        domain: name of the domain.
        domain_file: the domain file, if it is described by one.

    Returns: "<domain file>.snapshots", else "domsnap/<domain>" in $XDG_STATE_HOME, /var/lib (root) or ~/.local/state.
    """
    if domain_file is not None:
        return os.path.abspath(domain_file) + ".snapshots"
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    usual = "/var/lib" if is_root else os.path.expanduser("~/.local/state")
    state = os.environ.get("XDG_STATE_HOME") or usual
    return os.path.join(os.path.abspath(state), "domsnap", _stem(domain))


def remember_directory(domain: str, directory: str) -> None:
    """Let the domain's name alone lead to the catalog beside its domain file, unless it leads somewhere already.

    Only a convenience: where it cannot be done, the domain file or the directory has to be named, as before.
    """
    by_name = default_directory(domain)
    with suppress(OSError):
        os.makedirs(os.path.dirname(by_name), exist_ok=True)
        os.symlink(directory, by_name)


class Catalog:
    """The snapshots of one domain, on disk.

    Args:
        directory: of the documents; made at the first change. It is the caller's part to let one program at a time
            change it (the engine's lock of the domain does).
        domain_xml: libvirt's XML of the domain, stored in new documents, which libvirt then takes as its own.
    """

    def __init__(self, directory: str | os.PathLike[str], *, domain_xml: bytes | None = None) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        self.domain_xml = domain_xml

    def load(self) -> list[DomainSnapshot]:
        """All snapshots, oldest first. Raises CatalogError, naming the document, when one cannot be read."""
        snapshots: dict[str, DomainSnapshot] = {}
        for path in self._documents():
            snapshot = _parse(path, _read(path))
            if snapshot.name in snapshots:
                raise CatalogError(f"{path}: a second document of the snapshot '{snapshot.name}'")
            snapshots[snapshot.name] = snapshot
        return sorted(snapshots.values(), key=lambda snapshot: (snapshot.creation_time, snapshot.name))

    def get(self, name: str) -> DomainSnapshot:
        """One snapshot; raises NoSuchDomainSnapshot."""
        for snapshot in self.load():
            if snapshot.name == name:
                return snapshot
        raise NoSuchDomainSnapshot(f"there is no snapshot '{name}'")

    @property
    def current(self) -> str | None:
        """Name of the snapshot that the present state comes from; None for none."""
        names = {snapshot.name for snapshot in self.load()}
        return next((name for name in self._current_names() if name in names), None)

    def add(self, snapshot: DomainSnapshot, *, make_current: bool = True) -> None:
        """Record a new snapshot, as the current one unless told otherwise. Raises CatalogError."""
        problem = name_problem(snapshot.name)
        if problem is not None:
            raise CatalogError(problem)
        if any(known.name == snapshot.name for known in self.load()):
            raise CatalogError(f"the catalog has a snapshot '{snapshot.name}' already")
        document = self._build(snapshot, None)
        before = self.current
        self._make_directory()
        # The new name comes into force with the document. Without it, one that a cut-off change left must not.
        self._write_current(*((snapshot.name, before) if make_current else (before,)))
        self._write(_stem(snapshot.name) + _SUFFIX, document)

    def replace(self, snapshot: DomainSnapshot) -> None:
        """Record the changed facts of a known snapshot; what else its document says is kept. Raises CatalogError."""
        path = self._path_of(snapshot.name)
        self._write(os.path.basename(path), self._build(snapshot, _read(path)))

    def remove(self, name: str) -> None:
        """Forget a snapshot: its children become its parent's, and so does the place of the current one."""
        path = self._path_of(name)
        snapshots = self.load()
        parent = next(snapshot.parent for snapshot in snapshots if snapshot.name == name)
        current = self.current
        for snapshot in snapshots:
            if snapshot.parent == name:
                self.replace(replace(snapshot, parent=parent))
        if current == name:
            # The parent comes into force when the document has gone.
            self._write_current(name, parent)
        try:
            os.unlink(path)
            _sync_directory(self.directory)
        except OSError as error:
            raise CatalogError(f"{path}: {error.strerror}") from None

    def set_current(self, name: str | None) -> None:
        """Say which snapshot the present state comes from. Raises NoSuchDomainSnapshot."""
        if name is not None:
            self._path_of(name)
        self._make_directory()
        self._write_current(name)

    def _documents(self) -> list[str]:
        try:
            with os.scandir(self.directory) as entries:
                names = [e.name for e in entries if e.name.endswith(_SUFFIX) and not e.name.startswith(".")]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CatalogError(f"{self.directory}: {error.strerror}") from None
        if len(names) > _MAX_DOCUMENTS:
            raise CatalogError(f"{self.directory}: more than {_MAX_DOCUMENTS} documents")
        return [os.path.join(self.directory, name) for name in sorted(names)]

    def _path_of(self, name: str) -> str:
        """The document of a snapshot; libvirt's files may have other names than ours."""
        usual = os.path.join(self.directory, _stem(name) + _SUFFIX)
        others = (path for path in self._documents() if path != usual)
        for path in (usual, *others) if os.path.exists(usual) else others:
            if _parse(path, _read(path)).name == name:
                return path
        raise NoSuchDomainSnapshot(f"there is no snapshot '{name}'")

    def _build(self, snapshot: DomainSnapshot, earlier: bytes | None) -> bytes:
        try:
            return build(snapshot, domain_xml=self.domain_xml, earlier=earlier)
        except ValueError as error:
            raise CatalogError(f"the snapshot '{snapshot.name}' cannot be recorded: {error}") from None

    def _current_names(self) -> Iterable[str]:
        path = os.path.join(self.directory, CURRENT)
        try:
            return _read(path).decode().split("\n")[:2]
        except UnicodeDecodeError:
            raise CatalogError(f"{path} is not text") from None
        except CatalogError:
            if os.path.lexists(path):
                raise
            return ()

    def _write_current(self, *names: str | None) -> None:
        self._write(CURRENT, "".join(f"{name or ''}\n" for name in names).encode())

    def _make_directory(self) -> None:
        missing = []
        directory = self.directory
        while not os.path.isdir(directory):
            missing.append(directory)
            directory = os.path.dirname(directory)
        for directory in reversed(missing):
            try:
                os.mkdir(directory)
            except FileExistsError:
                continue
            except OSError as error:
                raise CatalogError(f"{directory}: {error.strerror}") from None
            _sync_directory(os.path.dirname(directory))

    def _write(self, name: str, data: bytes) -> None:
        """Put a file in its place; after a crash it is the old one or the new one."""
        path = os.path.join(self.directory, name)
        # One name for each file, so that what a crash leaves is used again; links are not followed.
        fresh = os.path.join(self.directory, f".{name}.new")
        try:
            # libvirt's XML may have passwords in it: for the owner's eyes.
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
            _sync_directory(self.directory)
        except OSError as error:
            _remove_quietly(fresh)
            raise CatalogError(f"{path}: {error.strerror}") from None


def _stem(name: str) -> str:
    """A file name for any name: the name itself where it is an ordinary one, and never two names' the same."""
    stem = quote(name, safe=" +,-.:=@_~", errors="surrogateescape")
    if stem.startswith("."):
        stem = "%2E" + stem[1:]
    if len(stem) > _LONGEST_STEM:
        digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        stem = f"{stem[: _LONGEST_STEM - 33]}%{digest}"
    return stem


@lru_cache(maxsize=256)
def _parsed(data: bytes) -> DomainSnapshot:
    """An operation loads the catalog several times, and XML is slow."""
    return parse(data)


def _parse(path: str, data: bytes) -> DomainSnapshot:
    try:
        return _parsed(data)
    except ValueError as error:
        raise CatalogError(f"{path}: {error}") from None


def _read(path: str) -> bytes:
    """A whole file that is a regular one and no larger than a document may be. Raises CatalogError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CatalogError(f"{path}: not a regular file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CatalogError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise CatalogError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    return data


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_quietly(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
