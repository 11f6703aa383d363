"""Names of backing files and data files: text from a header to a local path, or a refusal.

QEMU's grammar, as far as it describes local files:

    NAME                  a path; a relative one starts at the directory of the image that names it
    file:NAME             the same, but a relative one starts at the process's directory
    json:{...}            driver options; paths start at the process's directory
    PROTOCOL:ANYTHING     a colon before the first slash: never opened here, refused by name

The options of `json:` may nest drivers. Those that describe local files are understood: `qcow2` and `raw` over `file`,
`host_device` or another `raw` with `offset` and `size` (a slice), keys nested or dotted, `backing` as null or options,
`data-file` as options. `blkdebug` is QEMU's driver for faults on demand: without any it shows a file as it is.
`null-co://` (or the driver null-co or null-aio) is a disk of zeroes that no file is behind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qcowlib.errors import ChainError, OptionError
from qcowlib.image.drivers import KNOWN_FORMATS
from qcowlib.image.qemu_json import parse_json_name
from qcowlib.units import size_value

MAX_DESCRIPTION_DEPTH = 32

_FILE_DRIVERS = ("file", "host_device")
_FORMAT_DRIVERS = ("raw", "qcow2")
_NULL_DRIVERS = ("null-co", "null-aio")
_NULL_SIZE = 1 << 30  # QEMU's default
# What options a driver has beside those that tune how a file is opened; None: a driver that is to be found out.
_OPTIONS: dict[str | None, frozenset[str]] = {
    None: frozenset(("driver", "filename", "file", "offset", "size", "backing", "data-file")),
    "raw": frozenset(("driver", "file", "offset", "size")),
    "qcow2": frozenset(("driver", "file", "backing", "data-file")),
    **dict.fromkeys(_FILE_DRIVERS, frozenset(("driver", "filename"))),
    **dict.fromkeys(_NULL_DRIVERS, frozenset(("driver", "size", "latency-ns", "read-zeroes"))),
}
# QEMU's names of what is not a local file.
_OTHER_PROTOCOLS = ("blkdebug", "blkverify", "ftp", "ftps", "fat", "http", "https", "iscsi", "nbd", "nbd+tcp",
                    "nbd+unix", "nfs", "nvme", "rbd", "ssh", "gluster")  # fmt: skip
# Options that tune how a file is opened and do not change what is read from it.
_TUNING_OPTIONS = frozenset(
    {
        "aio", "auto-read-only", "cache", "cache-clean-interval", "cache-size", "check-cache-dropped", "detect-zeroes",
        "discard", "encrypt", "force-share", "l2-cache-entry-size", "l2-cache-size", "lazy-refcounts", "locking",
        "node-name", "overlap-check", "pass-discard-other", "pass-discard-request", "pass-discard-snapshot",
        "pr-manager", "read-only", "refcount-cache-size", "x-check-cache-dropped",
    }
)  # fmt: skip
# Options of blkdebug that only shape requests.
_FAULTLESS_OPTIONS = frozenset(
    ("driver", "image", "config", "set-state", "node-name", "align", "max-transfer", "opt-write-zero", "max-write-zero",
     "opt-discard", "max-discard")
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A slice of a file: `size` bytes from `offset`, or up to the end when size is None."""

    offset: int
    size: int | None


@dataclass(frozen=True)
class Reference:
    """A local file with the way to look at it.

    Attributes:
        path: local path as it is to be opened (relative ones start at the process's directory).
        format: "raw", "qcow2", or None when nothing says it.
        windows: slices to apply to the file, innermost first, below the format.
        backing: None when the image's own header decides; else the description's word on the backing file.
        data_file: None when the image's own header decides; else the external data file.
        zeroes: bytes of a disk of zeroes that no file is behind; None for a file.
        locked: the file is opened under QEMU's image locks; False is "locking=off", somebody's express wish.
        faulty: requests shall fail on demand (blkdebug): its guest data is not to be had here.
        key_secret: id of the secret with the passphrase (`encrypt.key-secret`).
        passphrase: of this image alone; None leaves it to the one that is given for all layers.
    """

    path: str
    format: str | None = None
    windows: tuple[Window, ...] = ()
    backing: BackingOverride | None = None
    data_file: Reference | None = None
    zeroes: int | None = None
    locked: bool = True
    faulty: bool = False
    key_secret: str | None = None
    passphrase: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class BackingOverride:
    """What a description says in the place of the header's backing name; None says: no backing file."""

    reference: Reference | None


def has_protocol(name: str) -> bool:
    """Whether a name starts with a protocol: a colon comes before the first slash."""
    colon = name.find(":")
    return colon >= 0 and "/" not in name[:colon]


def backing_reference(name: str, backing_format: str | None, image_path: str) -> Reference:
    """What a backing name in a header stands for.

    Args:
        name: the backing file name in the header.
        backing_format: the backing format in the header, None when it has none.
        image_path: local path of the image that holds the name ("" when it has none).

    Raises:
        ChainError: the name does not describe local files.
    """
    _refuse_nul(name)
    if name.startswith("json:"):
        reference = _parse_description(name)
        if backing_format is not None and reference.format not in (None, backing_format):
            raise ChainError(f"the backing name '{name}' does not describe a {backing_format} image")
        return replace(reference, format=reference.format or backing_format)
    if has_protocol(name):
        return replace(_protocol_reference(name), format=backing_format)
    if not name.startswith("/") and not image_path:
        raise ChainError(f"the relative backing name '{name}' cannot be used: the image that names it has no path")
    return Reference(os.path.join(os.path.dirname(image_path), name), backing_format)


def data_file_path(name: str, image_path: str) -> str:
    """Local path of the external data file that a header names.

    The name is a plain file name by the specification; nothing in it is interpreted. As for QEMU, a relative one
    starts at the process's directory. Only where there is no such file, one beside the image is taken.

    Raises:
        ChainError: the name could only be meant as a URL or as a description.
    """
    _refuse_nul(name)
    if name.startswith("json:") or has_protocol(name):
        raise ChainError(f"the data file name '{name}' is not a plain file name and is not opened")
    beside = os.path.join(os.path.dirname(image_path), name)
    return beside if not os.path.lexists(name) and os.path.lexists(beside) else name


def parse_image_name(name: str) -> Reference:
    """What a name from a user stands for (a file to open, no header involved); relative paths start at the process's
    directory.

    Raises:
        ChainError: the name does not describe local files.
    """
    if name.startswith("json:"):
        return _parse_description(name)
    return _protocol_reference(name) if has_protocol(name) else Reference(name)


def _refuse_nul(name: str) -> None:
    if "\0" in name:
        raise ChainError(f"the file name {name!r} holds a zero byte")


def _protocol_reference(name: str) -> Reference:
    """What a name with a protocol stands for."""
    protocol, _, path = name.partition(":")
    if protocol in _NULL_DRIVERS:
        return Reference(name, zeroes=_NULL_SIZE)
    if protocol == "blkdebug" and ":" in path:
        rules, _, file = path.partition(":")
        return _below_blkdebug(parse_image_name(file), bool(rules))
    if protocol not in _FILE_DRIVERS or not path or path.startswith("//"):
        rule = f"'{name}' uses the protocol '{protocol}', which is not opened: only local files are"
        raise ChainError(rule, stock=None if protocol in _OTHER_PROTOCOLS else f"Unknown protocol '{protocol}'")
    return Reference(f"./{path}" if has_protocol(path) else path)


def _parse_description(name: str) -> Reference:
    options = _nested(parse_json_name(name), name)
    if "driver" not in options and "file" not in options and "filename" not in options:
        raise ChainError(f"the JSON options of '{name}' name no file", stock="Must specify either driver or file")
    return _reference_from_options(options, name, 0)


def _nested(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Dotted keys ("file.filename") as nested objects."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        target = result
        *parents, last = key.split(".")
        if len(parents) > MAX_DESCRIPTION_DEPTH:
            raise ChainError(f"the JSON options of '{name}' nest too deeply")
        for parent in parents:
            inner = target.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ChainError(f"the JSON options of '{name}' give '{parent}' twice")
            target = inner
        if isinstance(value, dict) and isinstance(target.get(last), dict):
            target[last].update(value)
        else:
            target[last] = value
    return result


def _reference_from_options(options: dict[str, Any], name: str, depth: int) -> Reference:
    if depth > MAX_DESCRIPTION_DEPTH:
        raise ChainError(f"the JSON options of '{name}' nest too deeply")
    options = _nested(options, name)
    driver = options.get("driver")
    if driver == "blkdebug":
        return _blkdebug_reference(options, name, depth)
    if driver not in _OPTIONS:
        rule = f"the JSON options of '{name}' name the driver '{driver}': only local files are opened"
        raise ChainError(rule, stock=None if driver in KNOWN_FORMATS else f"Unknown driver '{driver}'")
    unknown = sorted(set(options) - _OPTIONS[driver] - _TUNING_OPTIONS)
    if unknown:
        rule = f"the JSON options of '{name}' hold '{unknown[0]}', which cannot be followed"
        stock = f"Block format '{driver}' does not support the option '{unknown[0]}'"
        raise ChainError(rule, stock=None if driver is None else stock)
    if driver in _NULL_DRIVERS:
        return Reference(f"{driver}://", driver, zeroes=_number(options.get("size", _NULL_SIZE), "size", name))
    if driver in _FILE_DRIVERS or (driver is None and "filename" in options):
        return _file_reference(options, name)
    inner = _child(options, "file", name, depth)
    if inner.format == "qcow2":
        raise ChainError(f"the JSON options of '{name}' put a format above qcow2, which is not supported")
    if driver == "raw":
        window = _window(options, name)
        windows = inner.windows if window is None else (*inner.windows, window)
        return replace(inner, format="raw", windows=windows)
    if "offset" in options or "size" in options:
        raise ChainError(f"the JSON options of '{name}' give an offset or size to a driver other than raw")
    return replace(
        inner,
        format=driver,
        backing=_backing_override(options, name, depth),
        data_file=None if "data-file" not in options else _child(options, "data-file", name, depth),
        key_secret=_key_secret(options),
    )


def _key_secret(options: dict[str, Any]) -> str | None:
    encrypt = options.get("encrypt")
    secret = encrypt.get("key-secret") if isinstance(encrypt, dict) else None
    return secret if isinstance(secret, str) else None


def with_passphrases(reference: Reference, secrets: Mapping[str, bytes]) -> Reference:
    """The reference with the passphrases that it and the layers below it name, as far as they are there.

    Args:
        reference: from a description.
        secrets: passphrases by id.
    """
    below = reference.backing.reference if reference.backing is not None else None
    return replace(
        reference,
        passphrase=None if reference.key_secret is None else secrets.get(reference.key_secret),
        backing=reference.backing if below is None else BackingOverride(with_passphrases(below, secrets)),
    )


def _child(options: dict[str, Any], role: str, name: str, depth: int) -> Reference:
    """The file that options describe under a name such as "file"."""
    child = options.get(role)
    if isinstance(child, str):
        rule = f"the JSON options of '{name}' refer to a node by name as {role}"
        raise ChainError(rule, stock=f"Cannot find device='{child}' nor node-name='{child}'")
    if not isinstance(child, dict) or not child:
        rule = f"the JSON options of '{name}' do not describe a file"
        raise ChainError(rule, stock=f'A block device must be specified for "{role}"')
    return _reference_from_options(child, name, depth + 1)


def _blkdebug_reference(options: dict[str, Any], name: str, depth: int) -> Reference:
    faulty = bool(set(options) - _FAULTLESS_OPTIONS or options.get("config"))
    return _below_blkdebug(_child(options, "image", name, depth), faulty)


def _below_blkdebug(inner: Reference, faulty: bool) -> Reference:
    """The file as a slice that is all of it: no more than what it reads and writes shows through."""
    return replace(inner, windows=(*inner.windows, Window(0, None)), faulty=faulty or inner.faulty)


def _file_reference(options: dict[str, Any], name: str) -> Reference:
    filename = options.get("filename")
    if not isinstance(filename, str) or not filename:
        stock = "The 'file' block driver requires a file name"
        raise ChainError(f"the JSON options of '{name}' name no file", stock=stock)
    _refuse_nul(filename)
    if "driver" not in options:
        # Without a driver QEMU takes the name as a user's file name, protocols included.
        if filename.startswith("json:"):
            raise ChainError(f"the JSON options of '{name}' hold another description as a file name")
        reference = _protocol_reference(filename) if has_protocol(filename) else Reference(filename)
        return replace(reference, locked=_locked(options, name))
    return Reference(filename, locked=_locked(options, name))


def _locked(options: dict[str, Any], name: str) -> bool:
    locking = options.get("locking", "auto")
    if locking not in ("auto", "on", "off"):
        raise ChainError(
            f"the JSON options of '{name}' give no usable locking",
            stock=f"invalid parameter value: {locking}",
        )
    return bool(locking != "off")


def _backing_override(options: dict[str, Any], name: str, depth: int) -> BackingOverride | None:
    if "backing" not in options:
        return None
    backing = options["backing"]
    if backing is None:
        return BackingOverride(None)
    if not isinstance(backing, dict):
        raise ChainError(f"the JSON options of '{name}' refer to a node by name as backing file")
    return BackingOverride(_reference_from_options(backing, name, depth + 1))


def _window(options: dict[str, Any], name: str) -> Window | None:
    if "offset" not in options and "size" not in options:
        return None
    offset = _number(options.get("offset", 0), "offset", name)
    size = None if options.get("size") is None else _number(options["size"], "size", name)
    return Window(offset, size)


def _number(value: Any, key: str, name: str) -> int:  # noqa: ANN401 - what a JSON parser returns
    if isinstance(value, str):
        try:
            value = size_value(value)
        except OptionError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ChainError(f"the JSON options of '{name}' give no usable {key}")
    return value
