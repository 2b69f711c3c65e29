"""What unit tests of a whole host share."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostler.cluster import incoming, outgoing
from hostler.host import adoption
from hostler.testing.inprocess import Site


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """In-process hosts, whose reconcilers do not make the tests wait."""
    monkeypatch.setattr(incoming, "ROUND", 0.05)
    monkeypatch.setattr(outgoing, "HEARTBEAT", 0.05)
    monkeypatch.setattr(adoption, "RETRY", 0.02)
    with tempfile.TemporaryDirectory(prefix="ho", dir="/tmp") as name:
        async with Site(Path(name)) as made:
            yield made
