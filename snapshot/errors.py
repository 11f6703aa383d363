"""The errors of domain snapshots; only these and `qcowlib.errors.QcowError` leave the package."""


class DomainSnapshotError(Exception):
    """Base of all errors about domains and their snapshots."""
