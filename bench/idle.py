"""What the daemon costs while nothing happens: memory and processor time with a hundred running VMs (simulated)."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil

from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import guest_in, workplace
from bench.subject import Host
from hostler.testing.microguest import MicroGuest

VMS = 100
MEMORY_MIB = 64
WINDOW = 3.0
"""Seconds of one reading."""
PROGRAM = ("-m", "bench.simulated_daemon")


async def fill(host: Host, guest: MicroGuest, start: bool) -> None:
    """A hundred VMs, running if `start`."""
    for number in range(VMS):
        vm = await host.create(f"vm{number:03}", guest, MEMORY_MIB, "")
        if start:
            await host.act(vm.config.id, "start")


def _processor_time(pid: int) -> float:
    """Seconds all threads of a process have run; from the scheduler, since the usual clock ticks only every 10 ms."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


async def _reading(process: psutil.Process) -> Sample:
    before = _processor_time(process.pid)
    await asyncio.sleep(WINDOW)
    used = _processor_time(process.pid) - before
    return {"memory (MiB)": process.memory_info().rss / 2**20, "processor (% of a core)": used / WINDOW * 100}


async def run(rounds: int) -> Result:
    """Readings of a daemon whose VMs all run."""
    result = Result("idle")
    result.notes["virtual machines"] = f"{VMS}, simulated"
    with workplace() as place:
        async with Host("a", place / "a", PROGRAM).running() as host:
            await fill(host, guest_in(place), start=True)
            process = psutil.Process(host.process.pid)
            return await in_turns(result, [Contender("hostler", lambda: _reading(process))], rounds)
