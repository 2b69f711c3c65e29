"""XML from strangers: bounded, without entities, without a look at any other file.

A document is decoded here, not by libxml2, so that what is looked for in its text (a document type) is looked for in
the characters that are parsed. Hyper-V writes UTF-16 with a byte order mark, everybody else UTF-8.
"""

from __future__ import annotations

import re
from typing import Any

from hostler.foreign.errors import bad_description
from hostler.model.errors import InvalidInput

MAX_SIZE = 16 * 1024**2
"""Bytes of a description. A Hyper-V configuration has some 100 KiB, an OVF less; an export of a VM with 50 snapshots
has 5 MiB."""
MAX_DEPTH = 64
MAX_ELEMENTS = 400_000
MAX_ATTRIBUTES = 800_000

Element = Any
"""An lxml element; lxml has no types of its own."""

_DECLARATION = re.compile(r"^\s*<\?xml[^>]{0,200}\?>")
_ENCODING = re.compile(rb"^\s*<\?xml[^>]{0,150}encoding=[\"']([A-Za-z0-9._-]{1,30})[\"']")
_BARE_DOCTYPE = re.compile(r"<!DOCTYPE\s+[\w.:-]{1,100}(\s+(SYSTEM|PUBLIC)(\s+(\"[^\"<>]*\"|'[^'<>]*')){1,2})?\s*>")
_BYTE_ORDER = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))
_WITHOUT_MARK = ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"))
_KNOWN = frozenset({"utf-8", "us-ascii", "ascii", "iso-8859-1", "windows-1252"})


def read_xml(data: bytes, path: str, bare_doctype: bool = False) -> Element:
    """The root element. InvalidInput about `path` for anything that is not plain, well-formed XML.

    A document type is refused, since all it could do here is harm. With `bare_doctype` one that only names a DTD (as
    WMI's documents do) is left out before parsing: nothing is loaded, and an entity it might declare is an error.
    """
    if len(data) > MAX_SIZE:
        raise bad_description(path, f"has {len(data)} bytes; more than {MAX_SIZE} are not read")
    text = _DECLARATION.sub("", decode(data, path), count=1)
    if bare_doctype:
        text = _BARE_DOCTYPE.sub("", text, count=1)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise bad_description(path, "declares a document type, which is not read from strangers", "remove it")
    # Before parsing: an element of four characters takes 120 bytes once it is parsed, and an attribute more.
    if text.count("<") > 2 * MAX_ELEMENTS or text.count("=") > MAX_ATTRIBUTES:
        raise _too_much(path)
    from lxml import etree  # noqa: PLC0415 - 6 MB that only a daemon which reads such a description has to carry

    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
        encoding="utf-8",
    )
    try:
        root = etree.fromstring(text.encode("utf-8"), parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise bad_description(path, f"is not well-formed XML: {str(error)[:200]}") from error
    _bound(root, path)
    return root


def decode(data: bytes, path: str) -> str:
    """The characters of a document, by its byte order mark, else by its declaration, else UTF-8."""
    encoding = next((name for mark, name in _BYTE_ORDER if data.startswith(mark)), None)
    encoding = encoding or next((name for mark, name in _WITHOUT_MARK if data.startswith(mark)), None)
    if encoding is None:
        said = _ENCODING.match(data)
        encoding = said[1].decode("ascii").lower() if said else "utf-8"
        if encoding not in _KNOWN:
            raise bad_description(path, f"is written in the encoding {encoding!r}", "save it as UTF-8 or UTF-16")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise bad_description(path, f"is not text in {encoding}: {error.reason}") from error


def _bound(root: Element, path: str) -> None:
    count = 0
    stack = [(root, 1)]
    while stack:
        element, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_ELEMENTS:
            raise _too_much(path)
        stack.extend((child, depth + 1) for child in element)


def _too_much(path: str) -> InvalidInput:
    return bad_description(path, "has more elements, or deeper ones, than any real description")


def local(element: Element) -> str:
    """The name of an element without its namespace."""
    return str(element.tag).rpartition("}")[2]


def attribute(element: Element, name: str) -> str | None:
    """An attribute by its name without namespace; OVF writers disagree about prefixes."""
    for key, value in element.attrib.items():
        if str(key).rpartition("}")[2] == name:
            return str(value)
    return None


def text_of(element: Element | None) -> str:
    """The text directly inside, without surrounding blanks."""
    return "" if element is None or element.text is None else str(element.text).strip()


def children(element: Element, name: str) -> list[Element]:
    """The direct children with that name, whatever their namespace."""
    return [child for child in element if local(child) == name]


def child(element: Element | None, name: str) -> Element | None:
    """The first of them."""
    return None if element is None else next((c for c in element if local(c) == name), None)
