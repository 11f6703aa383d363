"""The programs whose crash states are explored: what is done, to which images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from tests.crash.guest import Step
from tests.crash.images import Scenario

FLUSH = Step("flush")


def write(offset: float, length: float, seed: int = 0) -> Step:
    """Write; positions in clusters here and below, made bytes by `scale`."""
    return Step("write", offset, length, seed)  # type: ignore[arg-type]


def packed(cluster: int, seed: int = 0) -> Step:
    """Write one compressed cluster."""
    return Step("packed", cluster, 1, seed)


def zero(offset: float, length: float) -> Step:
    """Write zeroes."""
    return Step("zero", offset, length)  # type: ignore[arg-type]


def discard(offset: float, length: float) -> Step:
    """Discard."""
    return Step("discard", offset, length)  # type: ignore[arg-type]


def create(name: str, vm_state: float = 0) -> Step:
    """Create a snapshot."""
    return Step("create", 0, vm_state, name=name)  # type: ignore[arg-type]


def attach(name: str, vm_state: float) -> Step:
    """Give a snapshot a vm state."""
    return Step("attach", 0, vm_state, name=name)  # type: ignore[arg-type]


def apply(name: str) -> Step:
    """Apply a snapshot."""
    return Step("apply", name=name)


def delete(name: str) -> Step:
    """Delete a snapshot."""
    return Step("delete", name=name)


def resize(clusters: float) -> Step:
    """Change the size of the disk; by qemu-img, while the image is made."""
    return Step("resize", length=clusters)  # type: ignore[arg-type]


def amend(options: str) -> Step:
    """Change options of the image."""
    return Step("amend", name=options)


def reserve(clusters: float) -> Step:
    """Make the disk larger, with preallocated space."""
    return Step("reserve", length=clusters)  # type: ignore[arg-type]


def scale(steps: Sequence[Step], cluster_size: int) -> list[Step]:
    """Steps in bytes; a fraction of a cluster may lie inside a sector, but for sizes of the disk."""
    return [
        step._replace(
            offset=int(step.offset * cluster_size),
            length=sectors(step.length * cluster_size)
            if step.kind in ("resize", "reserve")
            else int(step.length * cluster_size),
        )
        for step in steps
    ]


def sectors(length: float) -> int:
    """A length in bytes, rounded up to sectors."""
    return -int(-length // 512) * 512


# Steps that make the image, steps under test.
Program: TypeAlias = tuple[Sequence[Step], Sequence[Step]]
Options: TypeAlias = dict[str, str | int]

SEQUENTIAL: Program = (
    [],
    [*(write(2.5 * index, 2.5, index) for index in range(10)), FLUSH, *(write(25 + index, 1) for index in range(5))],
)

# In place, across borders, inside sectors; then again where it has just been written.
OVERWRITE = (
    [write(0, 12)],
    [write(1, 3, 1), write(4.3, 2, 1), FLUSH, write(4.3, 0.05, 2), write(0.01, 0.9, 3), write(9.5, 6, 4)],
)

# Data, zero clusters and compressed clusters that two snapshots share with the active layer.
_SHARED = [
    write(0, 14),
    zero(14, 2),
    packed(16, 1),
    packed(17, 2),
    packed(18, 3),
    create("a"),
    write(2, 3, 5),
    packed(6, 4),
    zero(7, 2),
    write(17, 1, 6),
    create("b"),
    write(3.5, 1, 7),
    discard(9, 2),
]

SHARED = (
    _SHARED,
    [
        write(0.4, 1, 10),
        write(4, 3, 11),
        write(18.2, 0.1, 12),
        FLUSH,
        zero(10, 3),
        write(4.4, 0.05, 13),
        packed(5, 14),
        FLUSH,
        discard(0, 3),
        write(0.5, 3, 15),
        write(14.2, 0.3, 16),
    ],
)

PACKED = (
    [write(0, 2), *(packed(index, index) for index in range(2, 7))],
    [
        *(packed(index, index) for index in range(8, 14)),
        FLUSH,
        packed(3, 20),
        write(4.2, 0.5, 21),
        discard(5, 2),
        packed(8, 22),
        FLUSH,
        packed(9, 23),
        write(10, 3, 24),
        packed(1, 25),
    ],
)

ZEROES = (
    [write(0, 10), packed(10, 1), zero(11, 2)],
    [
        zero(1, 2),
        zero(3.3, 1.5),
        FLUSH,
        write(1.4, 0.2, 1),
        zero(10, 2),
        discard(5, 1),
        discard(6.5, 2),
        FLUSH,
        write(5, 2, 2),
        zero(14, 3),
        write(12.5, 1, 3),
    ],
)

# Above a backing file that ends inside the disk.
BACKING = (
    [write(2, 2), zero(5, 1)],
    [
        write(0.2, 0.1, 1),
        write(3.5, 2, 2),
        zero(7.4, 1.6),
        FLUSH,
        discard(9, 2),
        write(9.2, 0.3, 3),
        packed(11, 4),
        write(14.5, 4, 5),
    ],
)

CREATE = (
    _SHARED,
    [write(1.1, 1.5, 20), create("c"), write(1.2, 0.2, 21), write(6, 2, 22), FLUSH, create("d"), zero(0, 3)],
)

APPLY = (
    _SHARED,
    [write(1.1, 1.5, 20), apply("a"), write(1.2, 0.2, 21), write(6.5, 2, 22), FLUSH, apply("b"), apply("b")],
)

DELETE = (
    _SHARED,
    [write(1.1, 1.5, 20), delete("a"), write(1.2, 0.2, 21), write(6.5, 2, 22), delete("b"), write(16.5, 2, 23)],
)

MIXED = (
    _SHARED,
    [delete("a"), create("e"), write(3, 5, 30), apply("b"), create("f"), delete("b"), write(0, 1, 31), apply("e")],
)

# With memory of the guest.
VM_STATES: Program = (
    _SHARED,
    [
        write(1.1, 1.5, 20),
        create("c", 3.3),
        write(1.2, 0.2, 21),
        attach("a", 5.1),
        apply("c"),
        write(6, 2, 22),
        create("d"),
        apply("a"),
        delete("a"),
    ],
)

# Snapshots of a smaller and of a larger disk.
SIZES = (
    [write(0, 8), create("small"), resize(30), write(6, 20, 1), create("large"), resize(12), write(2, 4, 2)],
    [apply("large"), write(24, 2, 3), apply("small"), create("again"), delete("large"), write(1.5, 3, 4)],
)

# Grown with a larger L1 table, shrunk over L2 tables, data and compressed clusters; the last cluster cut in parts.
RESIZE: Program = (
    [write(0, 14), packed(14, 1), packed(15, 2), zero(16, 1), write(18, 2)],
    [
        write(1.1, 1.5, 20),
        resize(200),
        write(150.25, 3, 21),
        packed(180, 3),
        FLUSH,
        resize(15.5),
        write(2, 1, 22),
        resize(40),
        write(15.25, 0.5, 23),
        reserve(45),
        write(41, 1, 24),
        resize(11.5),
    ],
)

# Widths and versions: zero clusters that snapshots share, with and without clusters of their own.
AMEND: Program = (
    [*_SHARED, create("c"), zero(2, 1), zero(13.5, 0.5)],
    [
        write(1.1, 1.5, 20),
        amend("refcount_bits=64"),
        zero(3, 2),
        FLUSH,
        amend("refcount_bits=16,compat=0.10"),
        delete("a"),
        amend("compat=1.1,lazy_refcounts=1"),
        write(4.5, 1, 22),
    ],
)

AMEND_BACKING: Program = (
    [write(2, 2), zero(4, 3), create("a"), zero(8, 1), write(5, 0.5, 1), zero(2, 1), zero(12, 3)],
    [write(0.5, 1, 2), amend("compat=0.10"), write(13, 1, 3), amend("compat=1.1,refcount_bits=32"), zero(9, 1)],
)

# The tables are shared with snapshots of other sizes.
RESIZE_SHARED: Program = (
    [*_SHARED],
    [resize(11.5), write(2, 1, 20), create("c"), resize(90), write(9, 4, 21), delete("c"), resize(10.5), apply("a")],
)

# Above a backing file that is longer than the disk.
RESIZE_BACKING: Program = (
    [write(2, 2), zero(5, 1)],
    [resize(12.5), write(11, 0.5, 1), resize(10), resize(18), reserve(24), write(20, 1, 2)],
)

# A refcount block ends inside the first write, and others after it where they have 64 entries.
BLOCKS: Program = (
    [write(0, 200)],
    [write(200, 60), write(3.1, 1), FLUSH, write(260, 120, 1), create("a"), write(0, 9)],
)

# 2 KiB of refcount blocks of 64 entries: the refcount table of one cluster ends at 2 MiB.
GROWTH = (
    [write(0, 3810)],
    [write(3810, 40), FLUSH, write(3850, 60, 1), write(3910, 60, 2)],
)


def _scenarios() -> list[Scenario]:
    v2: Options = {"compat": "0.10"}
    v3: Options = {"compat": "1.1"}
    small: Options = {"cluster_size": 512}
    page: Options = {"cluster_size": 4096}
    usual: Options = {"cluster_size": 65536}
    parted: Options = {"cluster_size": 16384, "extended_l2": "on"}
    writes = {"sequential": SEQUENTIAL, "overwrite": OVERWRITE, "shared": SHARED, "packed": PACKED, "zeroes": ZEROES}
    trees = {"create": CREATE, "apply": APPLY, "delete": DELETE, "mixed": MIXED, "vmstates": VM_STATES}
    geometries: dict[str, Options] = {
        "v3-512": v3 | small,
        "v2-512": v2 | small,
        "v3-4k-r8": v3 | page | {"refcount_bits": 8},
        "v3-16k-parts": v3 | parted,
    }
    found = []

    def add(
        name: str,
        options: Options,
        program: Program,
        clusters: float,
        backing: float = 0,
        samples: int = 5,
    ) -> None:
        size = int(options["cluster_size"])
        before, steps = (scale(part, size) for part in program)
        found.append(Scenario(name, sectors(clusters * size), options, before, steps, int(backing * size), samples))

    for label, options in geometries.items():
        for name, program in (writes | trees).items():
            # 70 clusters of 512 bytes have two L2 tables.
            clusters = 70 if options["cluster_size"] == 512 else 40
            add(f"{name}-{label}", options, program, clusters, samples=3 if name in ("mixed", "vmstates") else 5)
        if options["compat"] == "1.1":  # qemu-img resizes no version 2 image that has snapshots
            add(f"sizes-{label}", options, SIZES, 20)
        add(f"backing-{label}", options, BACKING, 40, backing=15.5)
        if label != "v3-4k-r8":
            add(f"resize-{label}", options, RESIZE, 20, samples=3)
        if label in ("v3-512", "v3-16k-parts"):
            if label == "v3-512":
                add(f"amend-{label}", options, AMEND, 70, samples=3)
                add(f"amend-backing-{label}", options, AMEND_BACKING, 40, backing=15.5, samples=3)
            add(f"resize-shared-{label}", options, RESIZE_SHARED, 20, samples=3)
            add(f"resize-backing-{label}", options, RESIZE_BACKING, 10.25, backing=15.5, samples=3)
    add("growth-v3-512-r64", v3 | small | {"refcount_bits": 64}, GROWTH, 4000, samples=2)
    add("blocks-v2-512", v2 | small, BLOCKS, 400)
    add("blocks-v3-512-r64", v3 | small | {"refcount_bits": 64}, BLOCKS, 400)
    add("overwrite-v3-512-r1", v3 | small | {"refcount_bits": 1}, OVERWRITE, 70)
    add("mixed-v3-512-r4", v3 | small | {"refcount_bits": 4}, MIXED, 70)
    add("sizes-v3-512-r4", v3 | small | {"refcount_bits": 4}, SIZES, 20)
    add("delete-v2-4k", v2 | page, DELETE, 40)
    add("mixed-v3-64k", v3 | usual, MIXED, 24, samples=2)
    add("shared-v3-64k", v3 | usual, SHARED, 24, samples=2)
    return found


SCENARIOS = _scenarios()
