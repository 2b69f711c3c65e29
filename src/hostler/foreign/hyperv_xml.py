"""Hyper-V's configuration file as XML (2008 to 2012 R2): `<configuration>` with leaves like
`<count type="integer">2</count>`."""

from __future__ import annotations

import base64
import binascii

from hostler.foreign.errors import bad_description
from hostler.foreign.sections import Section, Value
from hostler.foreign.xml import Element, local, read_xml, text_of


def read_configuration(data: bytes, path: str) -> Section:
    """The sections of a configuration. InvalidInput when it is none."""
    root = read_xml(data, path)
    if local(root) != "configuration":
        raise bad_description(
            path,
            f"is XML, but <{local(root)}> instead of Hyper-V's <configuration>",
            "give the file in 'Virtual Machines', or the folder of the export",
        )
    section = Section()
    _fill(section, root)
    return section


def is_configuration(data: bytes) -> bool:
    """Whether this is the beginning of such a file."""
    head = data[:4096].replace(b"\0", b"")
    return b"<configuration" in head


def _fill(section: Section, element: Element) -> None:
    for child in element:
        kind = child.attrib.get("type")
        if kind is None and len(child):
            _fill(section.add_section(local(child)), child)
        elif kind is None:
            section.add_section(local(child))
        else:
            section.add_value(local(child), _value(kind, text_of(child)))


def _value(kind: str, text: str) -> Value:
    """A typed leaf; one that does not keep to its type is kept as text."""
    if kind == "bool":
        return text.lower() == "true"
    if kind == "integer":
        try:
            return int(text)
        except ValueError:
            return text
    if kind == "bytes":
        try:
            return base64.b64decode(text, validate=False)
        except (binascii.Error, ValueError):
            return text
    return text
