"""`hostlerd`: from the command line to a running daemon and back.

Stopping it (SIGTERM, SIGINT) takes seconds and stops no VM; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from hostler import __version__
from hostler.daemon import logging
from hostler.daemon.compose import Daemon, build
from hostler.daemon.config import Config, parse_config
from hostler.daemon.notify import notify
from hostler.host.steps import StepHook
from hostler.model.errors import HostlerError, InvalidInput

log = structlog.get_logger()

STOP_TIME = 20.0
"""Seconds; systemd gives 90 before it kills."""
EXIT_FAILED = 1
EXIT_USAGE = 2


def main() -> None:
    """Entry point of the program."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str], hooks: StepHook | None = None) -> int:
    """Run the daemon until it is told to stop; the exit status. `hooks`: see `compose.build`."""
    faulthandler.enable()
    try:
        config = parse_config(argv, os.environ)
    except InvalidInput as error:
        return _report(error, EXIT_USAGE)
    logging.configure(config.log_level)
    _allow_many_files()
    return asyncio.run(serve(config, hooks))


async def serve(config: Config, hooks: StepHook | None = None) -> int:
    """Build, serve, and stop when a signal comes; the exit status."""
    stop = asyncio.Event()
    _on_signals(stop)
    try:
        daemon = await _unless(stop, build(config, hooks=hooks))
    except HostlerError as error:
        log.error("daemon.failed", object=error.object, cause=error.cause)
        return _report(error, EXIT_FAILED)
    if daemon is None:
        return 0
    try:
        _tell_ready(daemon)
        await stop.wait()
    finally:
        log.info("daemon.stop")
        notify("STOPPING=1")
        await _stop(daemon)
    return 0


async def _stop(daemon: Daemon) -> None:
    """In time, whatever hangs: what is not put down in order is recovered by the next daemon, as after a kill."""
    try:
        await asyncio.wait_for(daemon.stop(), STOP_TIME)
    except TimeoutError:
        log.error("daemon.stop-late", seconds=STOP_TIME)


async def _unless(stop: asyncio.Event, building: Coroutine[Any, Any, Daemon]) -> Daemon | None:
    """The daemon, or None when the signal came first; what was begun is undone then."""
    task = asyncio.create_task(building)
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return None
        return task.result()
    finally:
        waiting.cancel()


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def first() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # the second one has its ordinary effect

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first)


def _tell_ready(daemon: Daemon) -> None:
    where = [f"unix:{daemon.socket_path}"]
    if daemon.https_address:
        where.append(f"https://{daemon.https_address}")
    log.info("daemon.ready", version=__version__, host=daemon.host_id, where=where)
    with contextlib.suppress(OSError):  # nobody reads it
        print("hostlerd ready:", "; ".join(where), flush=True)
    notify("READY=1")


def _report(error: HostlerError, status: int) -> int:
    advice = f"\n  {error.advice}" if error.advice else ""
    print(f"hostlerd: {error.object}: {error.cause}{advice}", file=sys.stderr)
    return status


def _allow_many_files() -> None:
    """A host with hundreds of VMs holds some files for each; the soft limit of 1024 is for programs that use select."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
