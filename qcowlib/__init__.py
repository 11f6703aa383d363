"""qcowlib: read, write and snapshot qcow2 disk images.

    import qcowlib

    with qcowlib.open_image("disk.qcow2", policy=qcowlib.LocalFiles()) as image:
        print(image.size, [snapshot.name for snapshot in image.snapshots])
        boot_sector = image.read(0, 512)

The names below are what other programs may rely on. They are loaded at first use, so that `import qcowlib` costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcowlib.errors import (
        BitmapError,
        ChainError,
        CorruptMetadata,
        EncryptionError,
        FormatError,
        ImageLocked,
        ImageStateError,
        MissingDependency,
        NoSuchBitmap,
        NoSuchSnapshot,
        OptionError,
        OutOfRange,
        QcowError,
        ReferenceDenied,
        SnapshotError,
        StorageError,
        UnsupportedFeature,
    )
    from qcowlib.extents import Extent, ExtentKind, ExtentTable
    from qcowlib.findings import CheckReport, Finding, Severity
    from qcowlib.image.creation import create_image, create_overlay
    from qcowlib.image.interface import BlockImage, WritableBlockImage
    from qcowlib.image.opening import open_for_repair, open_image
    from qcowlib.image.policy import ConfinedTo, DenyReferences, LocalFiles, OpenPolicy
    from qcowlib.image.probe import probe_format
    from qcowlib.image.qcow2 import Qcow2Image
    from qcowlib.image.raw import RawImage, WritableRawImage
    from qcowlib.image.writable import WritableQcow2Image
    from qcowlib.operations.amend import KeySlotChange, amend
    from qcowlib.operations.bitmaps import (
        DirtyRanges,
        add_bitmap,
        bitmaps_size,
        clear_bitmap,
        copy_bitmaps,
        dirty_extents,
        disable_bitmap,
        enable_bitmap,
        merge_bitmap,
        remove_all_bitmaps,
        remove_bitmap,
    )
    from qcowlib.operations.chain_export import ExportedState, export_chain, import_chain, plan_export, plan_import
    from qcowlib.operations.chain_merge import MergePlan, merge_layer, plan_merge
    from qcowlib.operations.chain_walk import (
        BackingFile,
        ChainLink,
        ChainProblem,
        ChainReport,
        backing_file,
        based_on,
        examine_chain,
    )
    from qcowlib.operations.check import check
    from qcowlib.operations.commit import allocated_bytes, commit, make_empty
    from qcowlib.operations.compact import compact_image
    from qcowlib.operations.compare import Comparison, NotComparable, Outcome, compare
    from qcowlib.operations.convert import convert
    from qcowlib.operations.difference import (
        ChangeKind,
        ChangeTable,
        changed_extents,
        changed_since_bitmap,
        difference,
    )
    from qcowlib.operations.digest import StateDigest, digest_states
    from qcowlib.operations.map import MapRow, map_image
    from qcowlib.operations.measure import Measurement, measure
    from qcowlib.operations.rebase import rebase
    from qcowlib.operations.repair import RepairPlan, carry_out_repair, plan_repair
    from qcowlib.operations.repair_undo import undo_repair
    from qcowlib.operations.resize import resize
    from qcowlib.operations.snapshots import apply_snapshot, attach_vmstate, create_snapshot, delete_snapshot
    from qcowlib.operations.space import ImageSpace, StateSpace, image_space
    from qcowlib.storage.buffer import BytesStorage
    from qcowlib.storage.protocol import ReadStorage, Storage

__version__ = "0.1.0"

__all__ = [
    "BackingFile",
    "BitmapError",
    "BlockImage",
    "BytesStorage",
    "ChainError",
    "ChainLink",
    "ChainProblem",
    "ChainReport",
    "ChangeKind",
    "ChangeTable",
    "CheckReport",
    "Comparison",
    "ConfinedTo",
    "CorruptMetadata",
    "DenyReferences",
    "DirtyRanges",
    "EncryptionError",
    "ExportedState",
    "Extent",
    "ExtentKind",
    "ExtentTable",
    "Finding",
    "FormatError",
    "ImageLocked",
    "ImageSpace",
    "ImageStateError",
    "KeySlotChange",
    "LocalFiles",
    "MapRow",
    "Measurement",
    "MergePlan",
    "MissingDependency",
    "NoSuchBitmap",
    "NoSuchSnapshot",
    "NotComparable",
    "OpenPolicy",
    "OptionError",
    "OutOfRange",
    "Outcome",
    "Qcow2Image",
    "QcowError",
    "RawImage",
    "ReadStorage",
    "ReferenceDenied",
    "RepairPlan",
    "Severity",
    "SnapshotError",
    "StateDigest",
    "StateSpace",
    "Storage",
    "StorageError",
    "UnsupportedFeature",
    "WritableBlockImage",
    "WritableQcow2Image",
    "WritableRawImage",
    "add_bitmap",
    "allocated_bytes",
    "amend",
    "apply_snapshot",
    "attach_vmstate",
    "backing_file",
    "based_on",
    "bitmaps_size",
    "carry_out_repair",
    "changed_extents",
    "changed_since_bitmap",
    "check",
    "clear_bitmap",
    "commit",
    "compact_image",
    "compare",
    "convert",
    "copy_bitmaps",
    "create_image",
    "create_overlay",
    "create_snapshot",
    "delete_snapshot",
    "difference",
    "digest_states",
    "dirty_extents",
    "disable_bitmap",
    "enable_bitmap",
    "examine_chain",
    "export_chain",
    "image_space",
    "import_chain",
    "make_empty",
    "map_image",
    "measure",
    "merge_bitmap",
    "merge_layer",
    "open_for_repair",
    "open_image",
    "plan_export",
    "plan_import",
    "plan_merge",
    "plan_repair",
    "probe_format",
    "rebase",
    "remove_all_bitmaps",
    "remove_bitmap",
    "resize",
    "undo_repair",
]

_MODULES = {
    "qcowlib.errors": (
        "BitmapError", "ChainError", "CorruptMetadata", "EncryptionError", "FormatError", "ImageLocked",
        "ImageStateError", "MissingDependency", "NoSuchBitmap", "NoSuchSnapshot", "OptionError", "OutOfRange",
        "QcowError", "ReferenceDenied", "SnapshotError", "StorageError", "UnsupportedFeature",
    ),
    "qcowlib.extents": ("Extent", "ExtentKind", "ExtentTable"),
    "qcowlib.findings": ("CheckReport", "Finding", "Severity"),
    "qcowlib.image.creation": ("create_image", "create_overlay"),
    "qcowlib.image.interface": ("BlockImage", "WritableBlockImage"),
    "qcowlib.image.opening": ("open_for_repair", "open_image"),
    "qcowlib.image.policy": ("ConfinedTo", "DenyReferences", "LocalFiles", "OpenPolicy"),
    "qcowlib.image.probe": ("probe_format",),
    "qcowlib.image.qcow2": ("Qcow2Image",),
    "qcowlib.image.raw": ("RawImage", "WritableRawImage"),
    "qcowlib.image.writable": ("WritableQcow2Image",),
    "qcowlib.operations.amend": ("KeySlotChange", "amend"),
    "qcowlib.operations.bitmaps": (
        "DirtyRanges", "add_bitmap", "bitmaps_size", "clear_bitmap", "copy_bitmaps", "dirty_extents", "disable_bitmap",
        "enable_bitmap", "merge_bitmap", "remove_all_bitmaps", "remove_bitmap",
    ),
    "qcowlib.operations.chain_export": ("ExportedState", "export_chain", "import_chain", "plan_export", "plan_import"),
    "qcowlib.operations.chain_merge": ("MergePlan", "merge_layer", "plan_merge"),
    "qcowlib.operations.chain_walk": (
        "BackingFile", "ChainLink", "ChainProblem", "ChainReport", "backing_file", "based_on", "examine_chain",
    ),
    "qcowlib.operations.check": ("check",),
    "qcowlib.operations.compact": ("compact_image",),
    "qcowlib.operations.commit": ("allocated_bytes", "commit", "make_empty"),
    "qcowlib.operations.compare": ("Comparison", "NotComparable", "Outcome", "compare"),
    "qcowlib.operations.convert": ("convert",),
    "qcowlib.operations.difference": (
        "ChangeKind", "ChangeTable", "changed_extents", "changed_since_bitmap", "difference",
    ),
    "qcowlib.operations.digest": ("StateDigest", "digest_states"),
    "qcowlib.operations.map": ("MapRow", "map_image"),
    "qcowlib.operations.measure": ("Measurement", "measure"),
    "qcowlib.operations.rebase": ("rebase",),
    "qcowlib.operations.repair": ("RepairPlan", "carry_out_repair", "plan_repair"),
    "qcowlib.operations.repair_undo": ("undo_repair",),
    "qcowlib.operations.resize": ("resize",),
    "qcowlib.operations.snapshots": ("apply_snapshot", "attach_vmstate", "create_snapshot", "delete_snapshot"),
    "qcowlib.operations.space": ("ImageSpace", "StateSpace", "image_space"),
    "qcowlib.storage.buffer": ("BytesStorage",),
    "qcowlib.storage.protocol": ("ReadStorage", "Storage"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'qcowlib' has no attribute '{name}'")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
