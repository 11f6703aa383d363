"""Facts of domains that do not exist."""

from collections.abc import Sequence
from typing import Any

from snapshot.domain import DiskFacts, DomainFacts, StoredSnapshot
from snapshot.model import Disk
from snapshot.plan import PathFacts, Resolved

GIB = 1 << 30


def disk(target: str = "vda", image_format: str = "qcow2", **facts: Any) -> DiskFacts:
    """A qcow2 disk of 1 GiB, nothing special about it."""
    fields = {"path": f"/d/{target}.{image_format}", "read_only": False, "virtual_size": GIB, "backing_chain": ()}
    fields |= {key: facts.pop(key) for key in list(facts) if key in fields}
    number = ord(target[-1]) - ord("a")
    one = Disk(target=target, format=image_format, node_name=f"d{number}", **fields)  # type: ignore[arg-type]
    bits = 16 if image_format == "qcow2" else None
    return DiskFacts(**({"disk": one, "driver": image_format, "refcount_bits": bits} | facts))


def stored(*names: str) -> tuple[StoredSnapshot, ...]:
    return tuple(StoredSnapshot(str(number + 1), name, 0) for number, name in enumerate(names))


def domain(*disks: DiskFacts, active: bool = True, **facts: Any) -> DomainFacts:
    """A running machine with 1 GiB of RAM."""
    fields: dict[str, Any] = {"name": "g", "active": active, "disks": disks or (disk("vda"), disk("vdb"))}
    if active:
        fields |= {
            "run_state": "running", "machine": "pc-i440fx-7.2", "ram_size": GIB, "version": (7, 2, 0),
            "max_bandwidth": 1 << 27,
        }  # fmt: skip
    return DomainFacts(**(fields | facts))


def host(resolved: Resolved, *, exists: Sequence[str] = (), free: int = 1 << 40) -> dict[str, PathFacts]:
    """A host with room for everything."""
    made = set(resolved.new_files())
    return {path: PathFacts(path in exists or path not in made, True, free, 1) for path in resolved.paths()}
