"""Writes `requirements.lock`: every Python package the project uses, one exact version each, with PyPI's hashes.

Run it after changing dependencies in `pyproject.toml`, or with `--upgrade` to take newer releases:

    python tools/lock.py [--upgrade]

It needs `uv` on the PATH (`pip install uv`). The result depends on PyPI and `pyproject.toml` only: whatever index or
constraint this machine is configured with is left out, and no address is written. The lock holds for every CPython from
3.11 on under Linux; the hashes of all artefacts of a release are listed, so other processors install from it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
BUILD = ("hatchling", "editables")
"""What builds the project itself: installed from the lock too, so that a build fetches nothing."""

HEADER = """\
# Every Python package Hostler uses, with PyPI's hashes. Made by tools/lock.py from pyproject.toml; do not edit.
"""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def clean_environment() -> dict[str, str]:
    """This process's environment without what would point uv or pip somewhere else than PyPI."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}


def compiled(upgrade: bool) -> str:
    """The resolution of all dependencies for every platform and Python, as uv prints it."""
    command = ["uv", "--no-config", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0]]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    command += ["--extra", "dev", "pyproject.toml", "-"]
    if not upgrade and LOCK.exists():
        command += ["--constraint", str(LOCK)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(),
        input="".join(f"{name}\n" for name in BUILD),
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    if result.returncode != 0:
        sys.exit(f"lock: uv could not resolve the dependencies:\n{result.stderr}")
    return result.stdout


def blocks(text: str) -> Iterator[str]:
    """Each requirement with its continuation lines."""
    block: list[str] = []
    for line in text.splitlines():
        block.append(line)
        if not line.endswith("\\"):
            yield "\n".join(block)
            block = []


def for_linux(block: str) -> bool:
    """Whether the requirement is ever installed by CPython under Linux."""
    marker = block.split("\\", maxsplit=1)[0].partition(";")[2].strip()
    if not marker:
        return True
    places: list[dict[str, str]] = [
        {
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "python_version": python,
            "python_full_version": f"{python}.0",
        }
        for python in PYTHONS
    ]
    return any(Marker(marker).evaluate(dict(place)) for place in places)


def main() -> None:
    """Write the lock file; it is replaced in one step."""
    kept = [block for block in blocks(compiled("--upgrade" in sys.argv[1:])) if for_linux(block)]
    fresh = LOCK.with_suffix(".new")
    fresh.write_text(HEADER + "\n".join(kept) + "\n")
    fresh.replace(LOCK)
    print(f"lock: {len(kept)} packages in {LOCK.name}")


if __name__ == "__main__":
    main()
