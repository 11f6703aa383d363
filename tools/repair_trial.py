#!/usr/bin/env python3
"""Repair damaged images with qcow and with stock qemu-img, and count what became of them.

    python3 tools/repair_trial.py [--cases N] [--seed S] [--show ours|stock|trouble] [--case TEXT]
    python3 tools/repair_trial.py --corpus DIRECTORY        # every image there whose name begins with bad- or leak-

A case is an image of stock QEMU with some of its fields changed at random (as in tools/fuzz.py); the same seed gives
the same cases. Each repair (`check -r all`) works on a copy of its own. Counted are cases that a check finds damaged:

    healed     stock `qemu-img check` finds nothing afterwards
    kept       every guest cluster, of the active layer and of each snapshot, that could be read before reads the same
    lost       one of them reads otherwise, or not at all
    only untrue     (counted as kept) only bytes that the undamaged image does not have there: read through the damage

Before and after are read by the library, which refuses a damaged mapping where qemu-img gives bytes. Failures, for
ours: an exception that is no QcowError, an undo that does not bring every byte back, a second repair that changes
something, a repair that changes an image which it then does not heal. Exit code 1 if one was, or content was lost.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qcowlib
from qcowlib.errors import QcowError
from qcowlib.image.opening import open_for_repair
from qcowlib.image.qcow2 import MappedLayer, Qcow2Image
from qcowlib.operations.check import check
from qcowlib.operations.repair import carry_out_repair, plan_repair
from qcowlib.operations.repair_undo import next_undo_path, undo_repair
from tools.fuzz import Case, random_case
from tools.fuzz_images import Seed, seed_images

STOCK_DEADLINE = 60.0
MAX_CLUSTERS = 1 << 14  # of a layer, from its beginning: sizes can be damaged as well
MAX_SNAPSHOTS = 64  # of an image, from the first: a repair by the stock tool can leave 65,536 empty ones


class Layer(NamedTuple):
    """What can be read of one layer: id of the snapshot (None: active), its L1 table, digests by guest cluster."""

    id: str | None
    l1_offset: int
    clusters: dict[int, bytes]


class Damaged(NamedTuple):
    """An image before its repair: what could be read, and of the undamaged one, if that is known."""

    before: list[Layer]
    truth: list[Layer] | None


class Outcome(NamedTuple):
    """What one repair made of an image: check is clean afterwards, content lost, untrue content, what went wrong."""

    healed: bool
    lost: int
    false: int
    trouble: str = ""


def content(path: Path) -> list[Layer]:
    """What can be read of an image: the active layer, then its snapshots; nothing of one that cannot be opened."""
    try:
        image = qcowlib.open_image(path, format="qcow2", policy=qcowlib.LocalFiles())
    except QcowError:
        try:
            image = qcowlib.open_image(path, format="qcow2", open_backing=False)
        except QcowError:
            return []
    with image:
        assert isinstance(image, Qcow2Image)
        layers = [Layer(None, 0, _read_layer(image))]
        try:
            snapshots = image.snapshots
        except QcowError:
            return layers
        for entry in snapshots[:MAX_SNAPSHOTS]:
            try:
                with image.open_snapshot(snapshot_id=entry.id, name=entry.name) as layer:
                    layers.append(Layer(entry.id, entry.l1_table_offset, _read_layer(layer)))
            except QcowError:
                continue
    return layers


def _read_layer(layer: MappedLayer) -> dict[int, bytes]:
    """Digest of each guest cluster that can be read, by index."""
    size, found = layer.cluster_size, {}
    for index in range(min(-(-layer.size // size), MAX_CLUSTERS)):
        try:
            data = layer.read(index * size, min(size, layer.size - index * size))
        except QcowError:
            continue
        found[index] = hashlib.blake2b(data, digest_size=8).digest()
    return found


def same_layer(layers: list[Layer], wanted: Layer) -> dict[int, bytes]:
    """The clusters of a layer in another list: the one with the same L1 table, else with the same id."""
    for layer in layers:
        if layer.l1_offset == wanted.l1_offset and (layer.id is None) == (wanted.id is None):
            return layer.clusters
    return next((layer.clusters for layer in layers if layer.id == wanted.id), {})


def lost_content(before: list[Layer], after: list[Layer], truth: list[Layer] | None) -> tuple[int, int]:
    """Guest clusters that could be read before and are not the same now; how many of them were false before."""
    lost = false = 0
    for layer in before:
        now = same_layer(after, layer)
        for index, digest in layer.clusters.items():
            if now.get(index) != digest:
                lost += 1
                false += truth is not None and same_layer(truth, layer).get(index) != digest
    return lost, false


def stock_check(path: Path, *options: str) -> int:
    """Exit code of `qemu-img check`; 124 when it does not end."""
    command = ["qemu-img", "check", "-q", "-f", "qcow2", *options, str(path)]
    try:
        return subprocess.run(command, capture_output=True, timeout=STOCK_DEADLINE, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def is_damaged(path: Path) -> bool:
    """Whether our check finds something."""
    try:
        with open_for_repair(path, "all", format="qcow2", dry_run=True) as image:
            return bool(check(image).findings)
    except QcowError:
        return True


def repair_by_stock(path: Path, image: Damaged) -> Outcome:
    """`qemu-img check -r all`."""
    stock_check(path, "-r", "all")
    return Outcome(stock_check(path) == 0, *lost_content(image.before, content(path), image.truth))


def repair_by_ours(path: Path, image: Damaged) -> Outcome:
    """Ours, its undo and a second repair."""
    damaged = path.read_bytes()
    try:
        undo = _repair(path)
        repaired = path.read_bytes()
        healed = stock_check(path) == 0
        lost = lost_content(image.before, content(path), image.truth)
        trouble = "changed, and not healed" if repaired != damaged and is_damaged(path) else ""
        if undo is not None:
            undo_repair(str(path), undo)
            if path.read_bytes() != damaged:
                trouble = "the undo does not bring every byte back"
            path.write_bytes(repaired)
        _repair(path)
        if path.read_bytes() != repaired:
            trouble = "a second repair changes something"
    except QcowError as error:
        lost = lost_content(image.before, content(path), image.truth)
        return Outcome(False, *lost, "" if path.read_bytes() == damaged else str(error))
    except Exception:
        return Outcome(False, 0, 0, traceback.format_exc())
    return Outcome(healed, *lost, trouble)


def _repair(path: Path) -> str | None:
    """Plan and carry out; the undo file, if there is one."""
    with open_for_repair(path, "all", format="qcow2") as image:
        plan = plan_repair(image, "all")
        undo = next_undo_path(str(path)) if plan.keeps_bytes else None
        carry_out_repair(plan, image, undo)
    return undo


def random_images(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, bytes, list[Layer] | None]]:
    """(name, bytes, what the undamaged image holds) of each case."""
    seeds: dict[str, Seed] = seed_images(folder)
    truth = {name: content(folder / name) for name in seeds}
    for number in range(arguments.cases):
        case = random_case(random.Random(f"repair-{arguments.seed}-{number}"), seeds)
        if arguments.case:
            name, _, changes = arguments.case.partition(":")
            pieces = [change.split("=") for change in changes.split(",")]
            case = Case(name, tuple((int(offset), bytes.fromhex(data)) for offset, data in pieces))
        data = bytearray(seeds[case.seed].data)
        for offset, change in case.changes:
            data[offset : offset + len(change)] = change
        yield str(case), bytes(data), truth[case.seed]
        if arguments.case:
            return


def corpus_images(directory: Path) -> Iterator[tuple[str, bytes, list[Layer] | None]]:
    """(name, bytes, nothing) of each damaged image of a corpus."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(("bad-", "leak-")) and path.suffix == ".qcow2":
            yield path.name, path.read_bytes(), None


def main() -> int:
    """Run; 1 when there was a failure."""
    parser = argparse.ArgumentParser(description="Repair damaged images with qcow and with stock qemu-img.")
    parser.add_argument("--cases", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other cases (1)")
    parser.add_argument("--corpus", type=Path, help="the damaged images of this directory instead")
    parser.add_argument("--show", choices=("ours", "stock", "trouble"), help="show the cases not healed, or not kept")
    parser.add_argument("--case", help="run this one case, as it was shown")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="qcow-repair-") as name:
        folder = Path(name)
        images = corpus_images(arguments.corpus) if arguments.corpus else random_images(arguments, folder)
        for label, data, truth in images:
            _try(label, data, truth, folder, counts, arguments.show)
    _print_table(counts)
    return 1 if counts["ours", "trouble"] or counts["ours", "lost"] else 0


def _try(
    label: str,
    data: bytes,
    truth: list[Layer] | None,
    folder: Path,
    counts: Counter[tuple[str, str]],
    show: str | None,
) -> None:
    path, work = folder / "case.qcow2", folder / "repaired.qcow2"
    path.write_bytes(data)
    if not stock_check(path) and not is_damaged(path):
        counts["", "sound"] += 1
        return
    counts["", "damaged"] += 1
    image = Damaged(content(path), truth)
    for side, repair in (("ours", repair_by_ours), ("stock", repair_by_stock)):
        for old in folder.glob("repaired.qcow2*"):
            old.unlink()
        work.write_bytes(data)
        outcome = repair(work, image)
        true = outcome.lost - outcome.false
        counts[side, "healed"] += outcome.healed
        counts[side, "lost" if true else "kept"] += 1
        counts[side, "only untrue"] += outcome.lost > 0 and not true
        counts[side, "healed and kept"] += outcome.healed and not true
        counts[side, "trouble"] += bool(outcome.trouble)
        wanted = show == side and (outcome.lost or not outcome.healed)
        if outcome.trouble or wanted or (side == "ours" and true):
            fate = "healed" if outcome.healed else "not healed"
            lost = f"{true} true and {outcome.false} untrue clusters lost"
            print(f"{side}: {fate}, {lost} {outcome.trouble}\n  --case '{label}'", flush=True)


def _print_table(counts: Counter[tuple[str, str]]) -> None:
    columns = ("healed", "kept", "only untrue", "lost", "healed and kept", "trouble")
    print(f"{counts['', 'damaged']} damaged images, {counts['', 'sound']} without a finding left out")
    print("".join(f"{text:>17}" for text in ("", *columns)))
    for side, text in (("ours", "qcow"), ("stock", "qemu-img")):
        print("".join(f"{value!s:>17}" for value in (text, *(counts[side, column] for column in columns))))


if __name__ == "__main__":
    sys.exit(main())
