"""Two hosts on one machine, and a guest that writes a journal and answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.testing.bench_vm import Bench
from hostler.testing.lab import Lab


@pytest.fixture(scope="module")
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for the sockets of a VM."""
    with tempfile.TemporaryDirectory(prefix="hl", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="module")
def lab(short_dir: Path) -> Iterator[Lab]:
    """Two joined hosts, "a" and "b"."""
    with Lab(short_dir) as made:
        first = made.add_host("a", guest_bridge=made.isolated)
        second = made.add_host("b", guest_bridge=made.isolated)
        made.join(first, second)
        yield made


@pytest.fixture(scope="module")
def bench(lab: Lab, short_dir: Path) -> Iterator[Bench]:
    """The lab with a guest in it."""
    made = Bench(lab, short_dir)
    yield made
    made.close()
