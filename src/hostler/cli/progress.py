"""A moving progress line on a terminal. Written to stderr: stdout is for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from hostler.cli.views import Json

Line = Callable[[Json], str]
Update = Callable[[Json, "Line | None"], None]


def describe(job: Json) -> str:
    """What a job does now: its running step and its own words."""
    running = [step["name"] for step in job["steps"] if step["state"] == "running"]
    words = [job["kind"], job["target_name"] or job["target"]]
    words += [running[-1]] if running else [job["state"]]
    words += [job["progress"]["text"]] if job["progress"].get("text") else []
    return "  ".join(words)


@contextmanager
def bar() -> Iterator[Update]:
    """A bar to be updated with each new state of the job; it disappears at the end."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, refresh_per_second=8) as progress:
        task = progress.add_task("", total=None)

        def update(job: Json, line: Line | None) -> None:
            fraction = job["progress"].get("fraction")
            progress.update(
                task,
                description=(line or describe)(job),
                total=None if fraction is None else 1.0,
                completed=fraction or 0.0,
            )

        yield update
