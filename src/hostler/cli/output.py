"""Printing: JSON exactly as the host wrote it, tables for people, plain aligned text for pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from hostler.cli.settings import Settings
from hostler.cli.views import Facts, Table
from hostler.model.errors import NotFound
from hostler.model.names import nearest

GAP = "  "
COLOURS = {
    "running": "green",
    "up": "green",
    "ready": "green",
    "done": "green",
    "critical": "red",
    "failed": "red",
    "damaged": "red",
    "missing": "red",
    "unreachable": "red",
    "paused": "yellow",
    "saved": "yellow",
    "cancelled": "yellow",
    "off": "bright_black",
}

View = Callable[[Any], "Table | Facts | str"]


def show(settings: Settings, content: bytes, view: View) -> None:
    """An answer: the JSON itself with --json, else what `view` makes of it."""
    if settings.json:
        print_json(content)
        return
    rendered = view(json.loads(content))
    if settings.quiet and isinstance(rendered, Table):
        for name in rendered.whole or [row[0].removesuffix(" *") for row in rendered.rows]:
            click.echo(printable(name))
    elif isinstance(rendered, Table):
        _print_table(rendered)
    elif isinstance(rendered, Facts):
        _print_facts(rendered)
    else:
        click.echo(printable(rendered))


def show_one_of(settings: Settings, content: bytes, kind: str, ref: str, view: View) -> None:
    """The one of a list that has this name or id. NotFound with the nearest name."""
    found = json.loads(content)
    for item in found:
        if ref in (item["name"], item["id"]):
            show(settings, json.dumps(item).encode(), view)
            return
    near = nearest(ref, [str(item["name"]) for item in found])
    raise NotFound(
        f"{kind} {ref!r}", "does not exist", f"did you mean {near!r}?" if near else f"see: hostler {kind} list"
    )


def print_json(content: bytes) -> None:
    """One document and a line end; an answer without a body is `null`."""
    click.echo(content or b"null")


def printable(text: str) -> str:
    """The text without what would steer a terminal: notes, and the last words of a QEMU, are written by others."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def say(settings: Settings, text: str) -> None:
    """A message for people: not with --json or --quiet."""
    if settings.talkative:
        click.echo(printable(text))


def hint(text: str) -> None:
    """Something beside the result; on stderr, so that it is never taken for the result."""
    click.echo(text, err=True)


def confirm(question: str, yes: bool) -> None:
    """Asks a person before something is lost; a script has said what it wants. click.Abort for "no"."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


def plain(table: Table) -> str:
    """Columns aligned by blanks, as pipes like it: no colours, no lines, no tabs, nothing cut off."""
    lines = [table.columns, *(tuple(printable(cell) for cell in row) for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    right = [name in table.right for name in table.columns]
    shown = []
    for line in lines:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        shown.append(GAP.join(cells).rstrip())
    return "\n".join(shown)


def _print_table(table: Table) -> None:
    if not table.rows:
        if table.empty:
            hint(table.empty)
    elif sys.stdout.isatty():
        _rich_table(table)
    else:
        click.echo(plain(table))


def _print_facts(found: Facts) -> None:
    width = max((len(label) for label, _ in found.facts), default=0)
    for label, value in found.facts:
        first, *more = printable(value).splitlines() or [""]
        click.echo(f"{label:<{width}}{GAP}{first}")
        for line in more:
            click.echo(f"{'':<{width}}{GAP}{line}")
    for table in found.tables:
        if table.rows:
            click.echo("")
            _print_table(table)


def _rich_table(table: Table) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow to import, and pipes need none of it
    from rich.table import Table as RichTable  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in table.columns:
        drawn.add_column(name, justify="right" if name in table.right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell), _style(table, i, cell)) for i, cell in enumerate(row)))
    Console().print(drawn)


def _style(table: Table, column: int, cell: str) -> str:
    if table.columns[column] != table.states:
        return ""
    return COLOURS.get(cell.split(" ", 1)[0], "")


def show_or_say(settings: Settings, content: bytes, text: str) -> None:
    """The JSON with --json, else a message."""
    if settings.json:
        print_json(content)
    else:
        say(settings, text)
