"""A tree of named sections with values at its leaves: what Hyper-V's configuration is, in XML and in binary form.

Reading a value notes that it was understood, so that what is left over at the end can be told verbatim.
"""

from __future__ import annotations

from collections.abc import Iterator

Value = str | int | float | bool | bytes


class Section:
    """Names may repeat; order is kept. Lookups ignore case, as Hyper-V's own names vary in it."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.sections: list[tuple[str, Section]] = []
        self.values: list[tuple[str, Value]] = []
        self._read: set[str] = set()

    def add_section(self, name: str) -> Section:
        """A new section below this one."""
        made = Section(f"{self.path}/{name}" if self.path else name)
        self.sections.append((name, made))
        return made

    def add_value(self, name: str, value: Value) -> None:
        """A new leaf."""
        self.values.append((name, value))

    def section(self, path: str) -> Section:
        """The first section at "a/b/c"; an empty one where there is none."""
        here = self
        for part in path.split("/"):
            here = next((s for name, s in here.sections if name.lower() == part.lower()), Section())
        return here

    def value(self, path: str) -> Value | None:
        """The leaf at "a/b/c", None where there is none."""
        place, _, leaf = path.rpartition("/")
        here = self.section(place) if place else self
        for name, value in here.values:
            if name.lower() == leaf.lower():
                here._read.add(name)
                return value
        return None

    def text(self, path: str) -> str:
        """The same as text, "" where there is none."""
        found = self.value(path)
        return "" if found is None or isinstance(found, bytes) else str(found).strip()

    def number(self, path: str) -> int | None:
        """The same as a whole number, None where it is none."""
        found = self.value(path)
        if isinstance(found, bool | bytes) or found is None:
            return None
        try:
            return int(found)
        except (ValueError, OverflowError):
            return None

    def flag(self, path: str) -> bool:
        """The same as yes or no; no where there is none."""
        found = self.value(path)
        return found.strip().lower() == "true" if isinstance(found, str) else bool(found)

    def unread(self) -> Iterator[tuple[str, Value]]:
        """Path and value of every leaf that nobody asked for."""
        stack = [self]
        while stack:
            here = stack.pop()
            yield from ((f"{here.path}/{name}", value) for name, value in here.values if name not in here._read)
            stack.extend(section for _, section in reversed(here.sections))
