"""QEMU's block graph: nodes by name, who is on top of whom, and which file each one is.

Source: QMP `query-named-block-nodes` and `x-debug-query-block-graph` (since QEMU 4.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snapshot.qmp import Qmp

_MAX_CHAIN = 200


class BlockGraph:
    """The block nodes of a QEMU at one moment.

    Args:
        nodes: answer of `query-named-block-nodes`.
        graph: answer of `x-debug-query-block-graph`.
    """

    def __init__(self, nodes: list[dict[str, Any]], graph: dict[str, Any]) -> None:
        self._nodes = {node["node-name"]: node for node in nodes}
        self._names = {entry["id"]: entry for entry in graph["nodes"]}
        self._edges = [
            (self._names[edge["parent"]], edge["name"], self._names[edge["child"]]["name"])
            for edge in graph["edges"]
            if edge["parent"] in self._names and edge["child"] in self._names
        ]

    @classmethod
    def query(cls, qmp: Qmp) -> BlockGraph:
        """Ask a QEMU."""
        return cls(qmp.execute("query-named-block-nodes", {"flat": True}), qmp.execute("x-debug-query-block-graph"))

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def node(self, name: str) -> dict[str, Any]:
        """QEMU's description of a node; empty when there is none."""
        return self._nodes.get(name, {})

    def child(self, name: str, role: str) -> str | None:
        """The node that another one uses as "file" or "backing"."""
        for parent, edge, child in self._edges:
            if parent["type"] == "block-driver" and parent["name"] == name and edge == role:
                return str(child)
        return None

    def parents(self, name: str) -> list[tuple[str, str, str]]:
        """Who uses a node: (type, name, role) of each; type is "block-driver", "block-backend" or "block-job"."""
        return [(p["type"], p["name"], edge) for p, edge, child in self._edges if child == name]

    def chain(self, name: str) -> list[str]:
        """A node and all below it, through backing links (and the one child of a filter)."""
        found = [name]
        while len(found) <= _MAX_CHAIN:
            below = self.child(found[-1], "backing")
            if below is None or below in found:
                return found
            found.append(below)
        return found

    def path(self, name: str) -> str:
        """Path of the local file of a format node; the node's own name of it when it is no local file."""
        inner: str | None = name
        for _ in range(_MAX_CHAIN):
            below = self.child(inner, "file") if inner else None
            if below is None:
                break
            inner = below
        return str(self.node(inner or name).get("file", ""))

    def root_above(self, name: str) -> str | None:
        """The node at the top of the chain that a node is in: the one that a device uses."""
        current = name
        for _ in range(_MAX_CHAIN):
            users = self.parents(current)
            if any(kind == "block-backend" for kind, _name, _role in users):
                return current
            above = [user for kind, user, role in users if kind == "block-driver" and role == "backing"]
            if not above:
                return None
            current = above[0]
        return None

    def find(self, path: str) -> str | None:
        """The format node of a file, if there is one."""
        from os.path import exists, samefile

        for name, node in self._nodes.items():
            if node.get("drv") in ("qcow2", "raw"):
                mine = self.path(name)
                if mine == path or (exists(mine) and exists(path) and samefile(mine, path)):
                    return str(name)
        return None

    def nodes_of_job(self, job: str) -> Iterator[str]:
        """The nodes that a block job works on, and the chains under them."""
        for parent, _edge, child in self._edges:
            if parent["type"] == "block-job" and parent["name"] == job:
                yield child
                below = self.child(child, "file")
                if self.node(child).get("drv") in ("commit_top", "mirror_top") and below is None:
                    below = self.child(child, "backing")
                if below is not None:
                    yield below
