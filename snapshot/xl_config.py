"""Xen's xl.cfg: the domain's name and its disks, in every form that a disk may be written in.

    text -> tokens -> {key: value} -> disk specifications -> DomainDescription

The syntax is that of xl.cfg(5) and xl-disk-configuration(5): assignments of texts, numbers and lists, and texts such as
"/dev/vg/guest,raw,xvda,rw" or "format=qcow2, vdev=xvda, access=rw, target=/images/a, with a comma.qcow2".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from snapshot.description import DomainDescription, checked
from snapshot.errors import SourceError
from snapshot.model import Disk

Value = str | int | list["Value"]

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*|\\\n)|(?P<end>[\n;]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<number>0[xX][0-9a-fA-F]{1,16}|\d{1,20})
    |(?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|(?P<sign>\+=|[=,\[\]])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}

_MAX_DEPTH = 20
_POSITIONS = ("target", "format", "vdev", "access")
_KEYS = {*_POSITIONS, "devtype", "backend", "backendtype", "script"}
_FORMATS = {"": "raw", "raw": "raw", "aio": "raw", "qcow2": "qcow2", "qcow": "qcow", "vhd": "vhd", "qed": "qed"}
_ACCESS = {"": None, "r": True, "ro": True, "w": False, "rw": False}


def from_xl_config(text: str, path: str) -> DomainDescription:
    """The description in an xl.cfg.

    Args:
        text: of the file.
        path: of the file; relative disks are relative to xl's working directory, and therefore refused.

    Raises: SourceError.
    """
    values = parse_assignments(text)
    name, disks = values.get("name"), values.get("disk", [])
    if not isinstance(name, str):
        raise SourceError("not an xl.cfg: it does not name a domain")
    if not isinstance(disks, list):
        raise SourceError("disk is not a list")
    found = [disk for spec in disks if (disk := parse_disk(_require_text(spec))) is not None]
    return checked(DomainDescription(name=name, disks=tuple(found), path=path))


def _require_text(value: Value) -> str:
    if not isinstance(value, str):
        raise SourceError("a disk is not a text")
    return value


# --- Assignments


def parse_assignments(text: str) -> dict[str, Value]:
    """All assignments of an xl.cfg; the last one of a name counts, "+=" adds. Raises SourceError with the line."""
    tokens = _Tokens(text)
    values: dict[str, Value] = {}
    while (token := tokens.next(skip_ends=True)) is not None:
        kind, name = token
        if kind != "name":
            raise tokens.error(f"a name was expected, not {name}")
        sign = tokens.next()
        if sign is None or sign[1] not in {"=", "+="}:
            raise tokens.error(f"'=' was expected after {name}")
        value = _value(tokens, tokens.next(), 0)
        values[name] = _added(values.get(name), value) if sign[1] == "+=" else value
        end = tokens.next()
        if end is not None and end[0] != "end":
            raise tokens.error(f"the line does not end after the value of {name}")
    return values


def _added(before: Value | None, value: Value) -> Value:
    if before is None:
        return value
    if isinstance(before, str) and isinstance(value, str):
        return before + value
    first, second = (each if isinstance(each, list) else [each] for each in (before, value))
    return [*first, *second]


def _value(tokens: _Tokens, token: tuple[str, str] | None, depth: int) -> Value:
    if token is None or depth > _MAX_DEPTH:
        raise tokens.error("a value was expected" if token is None else "lists are too deeply nested")
    kind, text = token
    if kind == "number":
        return int(text, 0) if text[:2] in {"0x", "0X"} else int(text)
    if kind == "text":
        return _ESCAPE.sub(_unescape, text[1:-1])
    if text != "[":
        raise tokens.error(f"a value was expected, not {text}")
    values: list[Value] = []
    while (token := tokens.next(skip_ends=True)) is not None and token[1] != "]":
        values.append(_value(tokens, token, depth + 1))
        token = tokens.next(skip_ends=True)
        if token is None or token[1] == "]":
            break
        if token[1] != ",":
            raise tokens.error("',' or ']' was expected in a list")
    if token is None:
        raise tokens.error("a list does not end")
    return values


def _unescape(found: re.Match[str]) -> str:
    code = found[1]
    if code[0] == "x" and len(code) > 1:
        return chr(int(code[1:], 16))
    if code.isdigit() and code[0] in "01234567":
        return chr(int(code, 8) & 0xFF)
    return _ESCAPES.get(code, code)


class _Tokens:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._tokens = self._scan()

    def next(self, *, skip_ends: bool = False) -> tuple[str, str] | None:
        """Kind and text of the next token; None at the end of the file."""
        for kind, text in self._tokens:
            if not (skip_ends and kind == "end"):
                return kind, text
        return None

    def error(self, text: str) -> SourceError:
        return SourceError(f"line {self._text.count(chr(10), 0, self._position) + 1}: {text}")

    def _scan(self) -> Iterator[tuple[str, str]]:
        while self._position < len(self._text):
            found = _TOKEN.match(self._text, self._position)
            if found is None:
                raise self.error(f"{self._text[self._position]!r} is not understood")
            if found.lastgroup != "space":
                yield str(found.lastgroup), found[0]
            self._position = found.end()


# --- Disks


def parse_disk(spec: str) -> Disk | None:
    """The disk that a specification means; None for an empty CD drive. Raises SourceError."""
    values = _disk_values(spec)
    cdrom = values.get("devtype") == "cdrom"
    access = values.get("access", "").lower()
    if access not in _ACCESS:
        raise SourceError(f"disk '{spec}': unknown access '{access}'")
    read_only = cdrom if _ACCESS[access] is None else bool(_ACCESS[access])
    disk_format = values.get("format", "").lower()
    target, vdev = values.get("target", ""), values.get("vdev", "")
    if disk_format == "empty" or (cdrom and not target):
        return None
    if disk_format not in _FORMATS:
        raise SourceError(f"disk '{spec}': unknown format '{disk_format}'")
    if values.get("script") or values.get("backend", "0") not in {"", "0", "Domain-0"}:
        raise SourceError(f"disk '{spec}': a disk behind a script or another backend domain is not a file of this host")
    if not vdev or not target:
        raise SourceError(f"disk '{spec}': it names no {'virtual device' if target else 'target'}")
    if not target.startswith("/") and values.get("backendtype") == "phy":
        target = "/dev/" + target
    if not os.path.isabs(target):
        raise SourceError(f"disk '{spec}': '{target}' is not an absolute path")
    return Disk(vdev, target, _FORMATS[disk_format], read_only=read_only)


def _disk_values(spec: str) -> dict[str, str]:
    """Key and value of every part; what has no "=" and is no flag fills the open positions in their order."""
    values: dict[str, str] = {}

    def put(key: str, value: str) -> None:
        if key in values:
            raise SourceError(f"disk '{spec}': {key} is given twice")
        values[key] = value

    rest: str | None = spec
    while rest is not None:
        stripped = rest.lstrip()
        if re.match(r"target\s*=", stripped):
            put("target", stripped.partition("=")[2].strip())  # it is the last, and may have commas
            break
        part, comma, after = stripped.partition(",")
        part, rest = part.strip(), after if comma else None
        key, equals, value = (each.strip() for each in part.partition("="))
        if equals and re.fullmatch(r"[a-z][a-z0-9-]*", key):
            if key not in _KEYS:
                raise SourceError(f"disk '{spec}': unknown key '{key}'")
            put(key, value)
        elif part == "cdrom":
            put("devtype", "cdrom")
        elif part in {"direct-io-safe", "discard", "no-discard"}:
            continue
        else:
            _put_position(spec, part, values)
    return values


def _put_position(spec: str, part: str, values: dict[str, str]) -> None:
    position = next((key for key in _POSITIONS if key not in values), None)
    if position is None:
        if part:
            raise SourceError(f"disk '{spec}': '{part}' is one too many")
        return
    if position == "target":
        part = _strip_prefixes(spec, part, values)
    elif position == "vdev" and re.fullmatch(r"\w+:(cdrom|disk)", part):
        part, _, values["devtype"] = part.partition(":")
    values[position] = part


def _strip_prefixes(spec: str, target: str, values: dict[str, str]) -> str:
    """The old way to say the format: "tap:qcow2:/images/a", "phy:vg/a", "file:/images/a"; it has no second position."""
    has_prefix = False
    while (found := re.match(r"([a-z][a-z0-9]*):", target)) is not None:
        prefix, target, has_prefix = found[1], target[found.end() :], True
        if prefix in {"raw", "qcow", "qcow2", "vhd", "qed", "aio"}:
            values.setdefault("format", prefix)
        elif prefix == "phy":
            values["backendtype"] = "phy"
        elif prefix not in {"file", "tap", "tap2", "tapdisk", "ioemu"}:
            raise SourceError(f"disk '{spec}': a disk behind '{prefix}:' is not a file of this host")
    if has_prefix:
        values.setdefault("format", "raw")
    return target
