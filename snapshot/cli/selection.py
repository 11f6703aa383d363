"""Which domain the user means, and where its snapshots are recorded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from snapshot.catalog import Catalog, default_directory
from snapshot.errors import DomainSnapshotError
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
    directory = arguments.catalog
    if directory is None:
        assert domain is not None
        directory = default_directory(domain.name, None if description is None else description.path)
    return Catalog(directory, domain_xml=None if description is None else description.xml)
