"""Two hosts that trust each other, as real daemons, for whoever uses them through the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.testing.bench_vm import Bench
from hostler.testing.lab import Lab


@pytest.fixture(scope="module")
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets, which the user of a VM may enter."""
    with tempfile.TemporaryDirectory(prefix="he", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="module")
def two_hosts(short_dir: Path) -> Iterator[Lab]:
    """Joined hosts "a" and "b"."""
    with Lab(short_dir, isolated=False) as made:
        made.join(made.add_host("a"), made.add_host("b"))
        yield made


@pytest.fixture(scope="module")
def guest(two_hosts: Lab, short_dir: Path) -> Bench:
    """The VM "guest", running on host a and writing a journal."""
    made = Bench(two_hosts, short_dir)
    made.create(made.hosts[0])
    made.start(made.hosts[0])
    return made
