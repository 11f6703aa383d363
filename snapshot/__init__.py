"""Domain snapshots: memory and disks of a virtual machine at one instant."""

from snapshot.errors import DomainSnapshotError

__all__ = ["DomainSnapshotError"]
