"""XML from others, parsed with limits: no document type, no entities, no external references, not too large or deep.

Also what both readers of XML ask of an element, and the bytes of a document that we write.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, indent, tostring

#: Limits of a document. libvirt's own are some 30 KiB, with 20 levels and 1000 elements.
MAX_BYTES = 4 << 20
MAX_DEPTH = 100
MAX_ELEMENTS = 100_000

# XML 1.0 has no way to write these; a carriage return does not survive parsing.
_UNWRITABLE = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class UnsafeXml(Exception):
    """The text is no XML, or breaks a limit; the message says what."""


class _LimitedBuilder(TreeBuilder):
    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._elements = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH or self._elements > MAX_ELEMENTS:
            raise UnsafeXml("too many elements, or too deeply nested")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self._depth -= 1
        return super().end(tag)


def parse_xml(data: bytes) -> Element:
    """Parse a whole document.

    Args:
        data: its bytes, from anywhere.

    Returns: the root element.
    Raises: UnsafeXml.
    """
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import DefusedXMLParser

    if len(data) > MAX_BYTES:
        raise UnsafeXml(f"larger than {MAX_BYTES >> 20} MiB")
    parser: Any = DefusedXMLParser(target=_LimitedBuilder(), forbid_dtd=True)
    try:
        parser.feed(data)
        root: Element = parser.close()
    except ParseError as error:
        raise UnsafeXml(f"not well-formed XML: {error}") from None
    except DefusedXmlException as error:
        raise UnsafeXml(f"document types and entities are not allowed: {error}") from None
    except (ValueError, LookupError) as error:  # an encoding that is not known, or not what the text is in
        raise UnsafeXml(f"not readable: {error}") from None
    return root


def write_xml(root: Element) -> bytes:
    """The bytes of a document, indented."""
    indent(root)
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def require_writable(text: str, what: str) -> str:
    """The text itself; ValueError when XML cannot hold a character of it, such as a byte that is no UTF-8."""
    found = _UNWRITABLE.search(text)
    if found is not None:
        raise ValueError(f"{what} {text!r} has a character that XML cannot hold")
    return text


def text_of(parent: Element, path: str) -> str | None:
    """Text of a child element; None when there is none."""
    child = parent.find(path)
    return None if child is None else (child.text or "")


def attribute_of(parent: Element, path: str, name: str) -> str | None:
    """An attribute of a child element; None when either is missing."""
    child = parent.find(path)
    return None if child is None else child.get(name)


def set_child(parent: Element, tag: str, text: str | None) -> None:
    """Set the text of a child element, made when missing; None removes it."""
    child = parent.find(tag)
    if text is None:
        if child is not None:
            parent.remove(child)
        return
    if child is None:
        child = Element(tag)
        parent.append(child)
    child.text = text
