"""Runs the project's checks and prints one summary: `./run lint` and `./run test [TIER] [pytest options]`.

Every stage runs, also after one has failed, so that one run tells everything. The last line counts the tests executed
("312 passed, 0 failed, 4 skipped"); the exit code is 0 only if every stage passed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("unit", "component", "cluster", "e2e")
CODE = tuple(name for name in ("src", "tests", "tools", "bench") if any((ROOT / name).rglob("*.py")))
SCRIPTS = ("run", ".ci/run")
NO_TESTS = 5
"""pytest's exit code when nothing was collected: a tier may be empty, or `-k` may name a test of another tier."""
DEADLINE = 45 * 60.0
"""Seconds a stage may take. Single tests have their own, much shorter limit; this ends a runner that hangs."""
PARALLEL = {"unit": 2}
"""Workers per tier. Tiers that boot guests run one test at a time: two guests on two cores only wait for each other."""

_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Result:
    """How a stage ended. `note` is what the summary says about it; `counts` are pytest's."""

    name: str
    ok: bool
    seconds: float
    note: str = ""
    counts: dict[str, int] = field(default_factory=dict)


def environment(cache: Path) -> dict[str, str]:
    """The stages' environment: all caches in `cache`, and no setting that would point a test at the user's own host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOSTLER_")}
    kept["RUFF_CACHE_DIR"] = str(cache / "ruff")
    kept["MYPY_CACHE_DIR"] = str(cache / "mypy")
    kept["HYPOTHESIS_STORAGE_DIRECTORY"] = str(cache / "hypothesis")
    return kept


def execute(command: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a command with its output shown as it comes; returns exit code and the last 64 KiB of that output."""
    tail = b""
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(DEADLINE, process.kill)
        watchdog.start()
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                tail = (tail + chunk)[-65536:]
            return process.wait(), tail.decode(errors="replace")
        finally:
            watchdog.cancel()
            process.kill()


def run_stage(name: str, command: list[str], env: dict[str, str]) -> Result:
    """One stage of lint."""
    print(f"--- {name}", flush=True)
    begun = time.monotonic()
    code, _ = execute(command, env)
    note = "" if code == 0 else f"exit code {code}"
    return Result(name, code == 0, time.monotonic() - begun, note)


def counts_of(output: str) -> dict[str, int]:
    """The figures of pytest's closing line."""
    lines = [line for line in _COLOUR.sub("", output).splitlines() if _COUNT.search(line) and line.startswith("=")]
    found = {
        word.rstrip("s") if word == "errors" else word: int(n) for n, word in _COUNT.findall(lines[-1] if lines else "")
    }
    return {word: n for word, n in found.items() if n}


def run_tests(name: str, arguments: list[str], cache: Path, env: dict[str, str]) -> Result:
    """One run of pytest."""
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache / 'pytest'}", "--durations=5"]
    command += [
        "--durations-min=5",
        "--continue-on-collection-errors",
        f"--color={'yes' if sys.stdout.isatty() else 'no'}",
        *arguments,
    ]
    print(f"--- tests: {name}", flush=True)
    begun = time.monotonic()
    code, output = execute(command, env)
    counts = counts_of(output)
    note = ", ".join(f"{n} {word}" for word, n in counts.items())
    if code not in (0, NO_TESTS):
        note = f"exit code {code}" + (f": {note}" if note else "")
    return Result(f"tests: {name}", code in (0, NO_TESTS), time.monotonic() - begun, note or "no tests", counts)


def lint(env: dict[str, str]) -> list[Result]:
    """Style, types, layers, scripts."""
    bin_dir = Path(sys.executable).parent
    stages = {
        "ruff check": [str(bin_dir / "ruff"), "check", *CODE],
        "ruff format": [str(bin_dir / "ruff"), "format", "--check", *CODE],
        "mypy": [str(bin_dir / "mypy")],
        "mypy tools, bench": [
            str(bin_dir / "mypy"),
            *(str(p) for d in ("tools", "bench") for p in (ROOT / d).rglob("*.py")),
        ],
        "import contracts": [str(bin_dir / "lint-imports"), "--no-cache"],
    }
    if shutil.which("shellcheck"):
        stages["shellcheck"] = ["shellcheck", *SCRIPTS]
    results = [run_stage(name, command, env) for name, command in stages.items()]
    if "shellcheck" not in stages:
        results.append(Result("shellcheck", True, 0.0, "skipped: shellcheck is not installed"))
    return results


def tests(tiers: tuple[str, ...], options: list[str], cache: Path, env: dict[str, str]) -> list[Result]:
    """The tiers in order; where the options name files, only those."""
    if any(Path(option.partition("::")[0]).exists() for option in options if not option.startswith("-")):
        return [run_tests("as named", options, cache, env)]
    results = []
    for tier in tiers:
        if not any((ROOT / "tests" / tier).glob("test_*.py")):
            results.append(Result(f"tests: {tier}", True, 0.0, "no tests"))
            continue
        workers = ["-n", str(PARALLEL[tier])] if tier in PARALLEL and not options else []
        results.append(run_tests(tier, [f"tests/{tier}", *workers, *options], cache, env))
    return results


def summary(results: list[Result]) -> int:
    """Print how each stage ended and the totals; returns the exit code."""
    print("\n--- summary")
    for result in results:
        verdict = "ok    " if result.ok else "FAILED"
        print(f"{verdict} {result.name:<20} {result.seconds:6.1f} s  {result.note}")
    total = {word: sum(r.counts.get(word, 0) for r in results) for word in ("passed", "failed", "error", "skipped")}
    failed = total["failed"] + total["error"]
    bad = [result.name for result in results if not result.ok]
    if bad:
        print("failed: " + ", ".join(bad))
    if any(result.counts for result in results):
        print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return 1 if bad else 0


def main() -> int:
    """`check.py --cache DIR lint | test [TIER] [pytest options]`."""
    cache = Path(sys.argv[2]).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    what, *options = sys.argv[3:]
    env = environment(cache)
    if what == "lint":
        results = lint(env)
        results.append(run_tests("structure", ["tests/unit/test_structure.py"], cache, env))
    elif options and options[0] in TIERS:
        results = tests((options[0],), options[1:], cache, env)
    elif options:
        results = tests(TIERS, options, cache, env)
    else:
        results = lint(env) + tests(TIERS, [], cache, env)
    return summary(results)


if __name__ == "__main__":
    sys.exit(main())
