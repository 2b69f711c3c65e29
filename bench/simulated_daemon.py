"""The real daemon on a simulated hypervisor: `python -m bench.simulated_daemon` takes the options of `hostlerd`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from hostler.daemon import logging
from hostler.daemon.compose import build
from hostler.daemon.config import parse_config
from hostler.testing.simulated import SimulatedHypervisor


async def serve(argv: list[str]) -> None:
    """Until SIGTERM."""
    config = parse_config(argv, os.environ)
    logging.configure(config.log_level)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    daemon = await build(config, SimulatedHypervisor())
    await stop.wait()
    await daemon.stop()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
