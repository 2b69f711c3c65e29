"""`python -m bench [NAME...] [--rounds N]`: run benchmarks, print them, keep them in bench/results/ (not in git)."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import importlib
import json
import os
import platform
import sys
from pathlib import Path

from bench.libvirt import ASKED
from bench.measure import ROUNDS, Result, table
from hostler.model.errors import HostlerError

NAMES = (
    "start",
    "hotadd",
    "flatten",
    "migrate",
    "storage_migration",
    "guestio",
    "cli",
    "idle",
    "convert",
    "checkpoint",
)
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """Exit code 0 when every benchmark asked for ran, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure Hostler beside bare QEMU and libvirt.",
        epilog=f"{ASKED}=no in the environment leaves libvirt out.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; without one, all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds per contender (default {ROUNDS})")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"where they are kept (default {RESULTS})")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    return max([run_one(name, options.rounds, options.results) for name in options.names or NAMES])


def run_one(name: str, rounds: int, results: Path) -> int:
    """Run one, print and keep its result."""
    try:
        result = asyncio.run(importlib.import_module(f"bench.{name}").run(rounds))
    except HostlerError as error:
        print(f"{name}: {error}", *getattr(error, "__notes__", ()), sep="\n  ", file=sys.stderr)
        return 1
    print(table(result), flush=True)
    print(f"  kept in {keep(result, results)}", flush=True)
    return 0


def keep(result: Result, results: Path) -> Path:
    """Write the result with what is needed to read it later."""
    results.mkdir(exist_ok=True)
    at = datetime.datetime.now(datetime.UTC)
    content = {
        "name": result.name,
        "at": at.isoformat(timespec="seconds"),
        "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
        "rows": [dataclasses.asdict(row) for row in result.rows()],
        "samples": result.samples,
        "skipped": result.skipped,
        "notes": result.notes,
    }
    path = results / f"{result.name}-{at:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(content, indent=1))
    return path


if __name__ == "__main__":
    sys.exit(main())
