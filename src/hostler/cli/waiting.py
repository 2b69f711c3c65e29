"""Starting a job and waiting for it, with progress for people, and a Ctrl-C that leaves the job alone.

The job belongs to the host, not to this command: interrupting the command must not leave a VM half moved. So Ctrl-C
ends the waiting and says how to watch or cancel the job. For a move, where people mean "do not move it", a second
Ctrl-C within three seconds cancels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hostler.cli.exit_codes import Exit
from hostler.cli.output import hint, print_json, say
from hostler.cli.settings import Settings
from hostler.cli.views import Json
from hostler.client import calls
from hostler.model.errors import PeerUnreachable

if TYPE_CHECKING:
    from hostler.client.calls import Call
    from hostler.model.job import Job

ENDED = frozenset({"done", "failed", "cancelled"})
LONG_POLL = 20.0
"""Seconds one request waits when nobody watches the progress."""
SHORT_POLL = 0.5
"""Seconds between two looks at the progress."""
RESTART = 15.0
"""Seconds in which a daemon that went away while a job was watched may come back."""
RETRY = 0.3
SECOND_CHANCE = 3.0
"""Seconds in which a second Ctrl-C means: cancel."""

Line = Callable[[Json], str]


def run_job(
    settings: Settings,
    call: Call[Job],
    *,
    wait: bool,
    done: str | Callable[[Json], str],
    line: Line | None = None,
    cancel_on_second: bool = False,
) -> int:
    """Sends a call that starts a job and sees it through. `done` is said at the end; `line` describes the running job.
    Raises what made the job fail. The exit code."""
    try:
        job = json.loads(content := settings.client.raw(call))
    except KeyboardInterrupt:
        hint("interrupted while the request was under way; see what became of it: hostler job list")
        return Exit.INTERRUPTED
    if not wait:
        return _started(settings, content, job)
    return watch(settings, job, done=done, line=line, cancel_on_second=cancel_on_second, content=content)


def watch(
    settings: Settings,
    job: Json,
    *,
    done: str | Callable[[Json], str],
    line: Line | None = None,
    cancel_on_second: bool = False,
    content: bytes = b"",
) -> int:
    """Follows a job to its end. See run_job."""
    follower = Follower(settings, job, content, line)
    try:
        follower.follow()
    except KeyboardInterrupt:
        if not (cancel_on_second and _cancelled_by_second(settings, follower)):
            return _left(follower.job)
    job = follower.job
    if settings.json:
        print_json(follower.content)
    raise_failure(job)
    say(settings, done if isinstance(done, str) else done(job))
    return Exit.OK


class Follower:
    """Keeps the newest state of a job and shows it."""

    def __init__(self, settings: Settings, job: Json, content: bytes, line: Line | None) -> None:
        self.job, self.content = job, content or json.dumps(job).encode()
        self._settings, self._line = settings, line

    def follow(self, until: float | None = None) -> bool:
        """Waits for the end (True), or for the monotonic time `until` (False)."""
        if self.over:
            return True
        shows = self._settings.shows_progress
        with _bar(shows) as update:
            while not self.over:
                update(self.job, self._line)
                left = LONG_POLL if until is None else until - time.monotonic()
                if left <= 0:
                    return False
                self._look(min(left, SHORT_POLL if shows else LONG_POLL))
        return True

    @property
    def over(self) -> bool:
        return self.job["state"] in ENDED

    def _look(self, wait: float) -> None:
        call = calls.job(self.job["id"], wait=wait)
        try:
            self.content = self._settings.client.raw(call)
        except PeerUnreachable:
            self.content = self._when_back(call)
        self.job = json.loads(self.content)

    def _when_back(self, call: Call[Job]) -> bytes:
        """The answer after a restart of the daemon, which takes up its jobs again."""
        end = time.monotonic() + RESTART
        while True:
            time.sleep(RETRY)
            try:
                return self._settings.client.raw(call)
            except PeerUnreachable:
                if time.monotonic() > end:
                    raise


def _cancelled_by_second(settings: Settings, follower: Follower) -> bool:
    """Gives three seconds for a second Ctrl-C. True when the job is over afterwards, in whatever way."""
    try:
        hint(f"\npress Ctrl-C again within {SECOND_CHANCE:g} s to cancel it; otherwise it runs on")
        return follower.follow(time.monotonic() + SECOND_CHANCE)
    except KeyboardInterrupt:
        hint("\ncancelling")
        settings.client.raw(calls.job_cancel(follower.job["id"]))
    try:
        return follower.follow()
    except KeyboardInterrupt:
        return False


def _started(settings: Settings, content: bytes, job: Json) -> int:
    if settings.json:
        print_json(content)
    elif settings.quiet:
        click.echo(job["id"])
    else:
        say(settings, f"job {job['id']} is {job['state']}; wait for it: hostler job watch {job['id']}")
    return Exit.OK


def _left(job: Json) -> int:
    hint(f"\nthe job runs on; watch it: hostler job watch {job['id']}")
    if job.get("cancellable", True):
        hint(f"to stop and undo it: hostler job cancel {job['id']}")
    return Exit.INTERRUPTED


def raise_failure(job: Json) -> None:
    """Raises the error of a job that failed or was cancelled."""
    if job["state"] == "done":
        return
    from hostler.client.client import outcome  # noqa: PLC0415 - the models are needed only for a failure
    from hostler.model.job import Job  # noqa: PLC0415

    outcome(Job.model_validate(job))


def _bar(shown: bool) -> Any:
    if not shown:
        from contextlib import nullcontext  # noqa: PLC0415

        return nullcontext(lambda _job, _line: None)
    from hostler.cli.progress import bar  # noqa: PLC0415 - rich is slow to import

    return bar()
