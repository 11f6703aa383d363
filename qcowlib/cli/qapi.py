"""JSON as QEMU prints it: members in the order of its hash table, strings in ASCII, four blanks of indent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "bool | int | str | Mapping[str, Value] | Sequence[Value]"

_BUCKETS = 512
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def ordered(members: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Members in the order in which QEMU walks its dictionaries: by hash bucket, the later inserted first.

    Source: QEMU's QDict (512 buckets, the hash function of tdb).
    """
    found = list(members.items())
    found.reverse()
    found.sort(key=lambda member: _hash(member[0]) % _BUCKETS)
    return found


def dumps(value: Value, *, pretty: bool = True) -> str:
    """A value as JSON text without a final newline."""
    return "".join(_write(value, "\n" if pretty else ""))


def _hash(name: str) -> int:
    data = name.encode()
    value = 0x238F13AF * len(data)
    for place, byte in enumerate(data):
        value += byte << (place * 5 % 24)
    return (1103515243 * value + 12345) & 0xFFFFFFFF


def _write(value: Value, newline: str) -> Iterator[str]:
    if isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, str):
        yield quote(value)
    else:
        yield from _write_container(value, newline)


def _write_container(value: Mapping[str, Value] | Sequence[Value], newline: str) -> Iterator[str]:
    inner = newline + "    " if newline else ""
    mapping = isinstance(value, Mapping)
    members = ordered(value) if isinstance(value, Mapping) else [("", element) for element in value]
    yield "{" if mapping else "["
    for place, (name, member) in enumerate(members):
        yield ("," if newline else ", ") * (place > 0) + inner
        if mapping:
            yield quote(name) + ": "
        yield from _write(member, inner)
    yield newline + ("}" if mapping else "]")


def quote(text: str) -> str:
    """A JSON string; bytes that are no UTF-8 (surrogate escapes here) become replacement characters."""
    return '"' + "".join(_escape(character) for character in text) + '"'


def _escape(character: str) -> str:
    code = ord(character)
    if character in _ESCAPES:
        return _ESCAPES[character]
    if 0xD800 <= code <= 0xDFFF:
        return "\\uFFFD"
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return character if 0x20 <= code < 0x7F else f"\\u{code:04X}"
