"""A host with many running VMs in a process of its own, to look at from outside: `python -m hostler.testing.full_host
DIRECTORY COUNT`. It says "idle" when nothing is under way any more, and ends with its standard input."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from hostler.daemon.compose import build
from hostler.daemon.config import parse_config
from hostler.model.requests import VmCreate
from hostler.model.units import MiB
from hostler.testing.inprocess import until
from hostler.testing.simulated import SimulatedHypervisor, World


async def main(directory: Path, count: int) -> None:
    """The whole daemon, with its API, and `count` simulated VMs that run."""
    options = [f"--state-dir={directory / 's'}", f"--run-dir={directory / 'r'}", "--listen=127.0.0.1:0"]
    daemon = await build(parse_config(options, {}), SimulatedHypervisor(world=World()))
    try:
        application = daemon.application
        for number in range(count):
            await application.vms.create(VmCreate(name=f"vm{number}", memory=64 * MiB), "test")
            await application.vms.act(f"vm{number}", "start", "test")
        await until(lambda: all(job.is_over for job in application.jobs.list()))
        print("idle", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await daemon.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
