"""What unit tests of a whole host share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from hostler.cluster import incoming, outgoing
from hostler.host import adoption
from hostler.testing.inprocess import Site, short_directory


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """In-process hosts, whose reconcilers do not make the tests wait."""
    monkeypatch.setattr(incoming, "ROUND", 0.05)
    monkeypatch.setattr(outgoing, "HEARTBEAT", 0.05)
    monkeypatch.setattr(adoption, "RETRY", 0.02)
    with short_directory() as directory:
        async with Site(directory) as made:
            yield made
