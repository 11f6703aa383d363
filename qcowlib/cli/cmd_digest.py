"""qcow digest: hashes of the content of an image and of all its snapshots, as a manifest that can be verified."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from qcowlib.cli.common import (
    FORCE_SHARE,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    CommandFailed,
    one_filename,
    report,
    wants_json,
    warn_of_sharing,
)
from qcowlib.cli.opening import ImageName, image_name, open_image_name
from qcowlib.cli.options import Arguments, Option, Syntax
from qcowlib.errors import QcowError

if TYPE_CHECKING:
    from qcowlib.operations.digest import StateDigest

SYNTAX = Syntax(
    "digest",
    "[--algorithm sha256|xxh3-128]... [--output=human|json] [--verify MANIFEST] [-U] FILENAME",
    (
        FORMAT,
        Option("algorithm", "", "algorithm", "NAME", "sha256 or xxh3-128; may be repeated (default: both)"),
        Option("verify", "", "verify", "MANIFEST", "compare with digests that --output=json has printed"),
        OUTPUT,
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
    ),
    "A digest tells what a guest reads, through the backing chain: it stays the same when an image is converted or\n"
    "compacted. What states share is read once.\n"
    "Exit codes: 0 all digests told, or all as in the manifest; 1 a state cannot be read or differs; other errors 2.",
)

SHAPE_VERSION = 1


def run(arguments: Arguments) -> int:
    """Digest, and verify if that is asked."""
    try:
        filename = one_filename(arguments)
        as_json = wants_json(arguments)
        wanted = _manifest(arguments.last("verify"))
        algorithms = arguments.all("algorithm") or _algorithms(wanted)
        name = image_name(arguments, filename)
        states = _digest(name, algorithms, share=warn_of_sharing(arguments))
    except CommandFailed as error:
        error.code = 2
        raise
    if wanted is not None:
        return _verify(states, wanted, algorithms)
    if as_json:
        print(json.dumps(_shape(name.shown, states), indent=4))
    else:
        _print_table(states)
    for state in states:
        if state.damage is not None:
            report(f"{_label(state)} cannot be read: {state.damage}")
    return int(any(state.damage is not None for state in states))


def _digest(name: ImageName, algorithms: list[str], *, share: bool) -> list[StateDigest]:
    with open_image_name(name, force_share=share, open_backing=True) as image:
        from concurrent.futures import ThreadPoolExecutor

        from qcowlib.operations.digest import digest_states

        with ThreadPoolExecutor(os.cpu_count()) as executor:
            try:
                return digest_states(image, algorithms, executor=executor)
            except QcowError as error:
                raise CommandFailed(f"Could not digest '{name.text}': {error}") from error


def _algorithms(wanted: dict[str, Any] | None) -> list[str]:
    if wanted is None:
        return ["sha256", "xxh3-128"]
    return list(dict.fromkeys(name for state in wanted["states"] for name in state.get("digests", {})))


def _manifest(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        sound = isinstance(manifest, dict) and all(isinstance(state["digests"], dict) for state in manifest["states"])
    except OSError as error:
        raise CommandFailed(f"Could not read '{path}': {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound or manifest.get("version") != SHAPE_VERSION:
        raise CommandFailed(f"'{path}' is no manifest of version {SHAPE_VERSION}, as digest --output=json prints it")
    found: dict[str, Any] = manifest
    return found


def _shape(filename: str, states: list[StateDigest]) -> dict[str, object]:
    shapes = []
    for state in states:
        entry = state.snapshot
        shape: dict[str, object] = {"snapshot": None if entry is None else {"id": entry.id, "name": entry.name}}
        shape |= {"virtual-size": state.size, "digests": state.digests}
        if state.damage is not None:
            shape["damage"] = state.damage
        shapes.append(shape)
    return {"version": SHAPE_VERSION, "filename": filename, "states": shapes}


def _label(state: StateDigest) -> str:
    return "active layer" if state.snapshot is None else f"snapshot {state.snapshot.id} ({state.snapshot.name})"


def _print_table(states: list[StateDigest]) -> None:
    for state in states:
        for algorithm, digest in state.digests.items():
            print(f"{algorithm:<9} {digest}  {_label(state)}")


def _verify(states: list[StateDigest], wanted: dict[str, Any], algorithms: list[str]) -> int:
    """Compare each state of the manifest; states that it does not know are no matter of it."""
    present: dict[tuple[str, str] | None, StateDigest] = {}
    for state in states:
        present[None if state.snapshot is None else (state.snapshot.id, state.snapshot.name)] = state
    failed = 0
    for shape in wanted["states"]:
        key = None if shape.get("snapshot") is None else (shape["snapshot"]["id"], shape["snapshot"]["name"])
        label = "active layer" if key is None else f"snapshot {key[0]} ({key[1]})"
        found = present.get(key)
        if found is None:
            verdict = "is not there"
        elif found.damage is not None:
            verdict = f"cannot be read: {found.damage}"
        elif not shape["digests"]:
            verdict = "has no digest in the manifest"
        elif any(found.digests.get(name) != shape["digests"].get(name) for name in algorithms):
            verdict = "DIFFERS"
        else:
            verdict = "is the same"
        failed += verdict != "is the same"
        print(f"{label} {verdict}")
    return int(failed > 0)
