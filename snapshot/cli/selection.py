"""Which domain the user means, and where its snapshots are recorded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from snapshot.catalog import Catalog, default_directory
from snapshot.cli.output import plain
from snapshot.errors import CatalogError, DomainSnapshotError
from snapshot.sources import DomainDescription, load_description

if TYPE_CHECKING:
    from snapshot.domain import ActiveDomain, InactiveDomain


@dataclass(frozen=True)
class Selection:
    """A domain with its catalog. Attributes: domain: None when only a catalog was given."""

    domain: ActiveDomain | InactiveDomain | None
    catalog: Catalog

    @property
    def required(self) -> ActiveDomain | InactiveDomain:
        """The domain; DomainSnapshotError when none was given."""
        if self.domain is None:
            raise DomainSnapshotError("which domain? Give --qmp SOCKET or --domain FILE")
        return self.domain


@contextmanager
def selected(arguments: argparse.Namespace) -> Iterator[Selection]:
    """The domain that the options name, connected while the block runs.

    Raises: DomainSnapshotError: none, or one that cannot be reached.
    """
    description = _description(arguments)
    domain = _open(description, arguments)
    try:
        yield Selection(domain, _catalog(arguments, description, domain))
    finally:
        if domain is not None:
            domain.close()


def _description(arguments: argparse.Namespace) -> DomainDescription | None:
    if arguments.domain is None:
        return None
    description = load_description(arguments.domain)
    if arguments.qmp is not None:
        description = replace(description, qmp_socket=os.path.abspath(arguments.qmp))
    return description


def _open(description: DomainDescription | None, arguments: argparse.Namespace) -> ActiveDomain | InactiveDomain | None:
    if description is None and arguments.qmp is None:
        if arguments.catalog is None:
            raise DomainSnapshotError("which domain? Give --qmp SOCKET or --domain FILE")
        return None
    from snapshot.domain import connect, open_domain

    if description is None:
        return connect(os.path.abspath(arguments.qmp), wait=arguments.wait)
    return open_domain(description, wait=arguments.wait)


def _catalog(
    arguments: argparse.Namespace,
    description: DomainDescription | None,
    domain: ActiveDomain | InactiveDomain | None,
) -> Catalog:
    xml = None if description is None else description.xml
    if arguments.catalog is not None:
        return Catalog(arguments.catalog, domain_xml=xml)
    assert domain is not None
    # It may be a link to the directory beside a domain file.
    by_name = os.path.realpath(default_directory(domain.name))
    if description is None:
        _refuse_others(Catalog(by_name), domain)
        return Catalog(by_name)
    beside = os.path.realpath(default_directory(domain.name, description.path))
    known = beside != by_name and _is_of(Catalog(by_name), [disk.path for disk in description.disks])
    if known and os.path.isdir(beside):
        print(
            f"domsnap: note: '{plain(by_name)}' has snapshots of this domain as well: --catalog shows them",
            file=sys.stderr,
        )
    return Catalog(by_name if known and not os.path.isdir(beside) else beside, domain_xml=xml)


def _is_of(catalog: Catalog, paths: Iterable[str]) -> bool:
    """Whether a catalog has a snapshot of one of these files."""
    mine = {os.path.realpath(path) for path in paths}
    try:
        disks = [disk for snapshot in catalog.load() for disk in snapshot.disks]
    except CatalogError:  # nobody asked for this one
        return False
    return any(os.path.realpath(name) in mine for disk in disks for name in (disk.file, disk.overlay) if name)


def _refuse_others(catalog: Catalog, domain: ActiveDomain | InactiveDomain) -> None:
    """Two domains can have one name, and their snapshots must not get into one catalog."""
    if not catalog.load():
        return
    chains = [(one.disk.path, *one.disk.backing_chain) for one in domain.facts().disks]
    if not _is_of(catalog, (path for chain in chains for path in chain)):
        raise DomainSnapshotError(
            f"the snapshots in '{catalog.directory}' are of a domain '{domain.name}' with other disks: say with "
            "--catalog or --domain where those of this one are"
        )
