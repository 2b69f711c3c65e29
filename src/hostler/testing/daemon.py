"""The real daemon with failpoints: `python -m hostler.testing.daemon` takes the options of `hostlerd`.

HOSTLER_TEST_FAILPOINTS names the directory of `failpoints`. Production code has no such thing in it. The deadlines of a
move are shortened, so that tests with a cut network take seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hostler.client import peer
from hostler.cluster import incoming, outgoing
from hostler.daemon.main import run
from hostler.host import adoption
from hostler.testing.failpoints import Failpoints


def hurry() -> None:
    """The deadlines of a move in seconds instead of half minutes, in the same proportion."""
    outgoing.HEARTBEAT, outgoing.PATIENCE = 0.4, 3.0
    incoming.PATIENCE, incoming.ROUND = 6.0, 1.0
    adoption.RETRY = 0.5
    peer.PeerClient.__init__.__defaults__ = (2.0,)  # seconds for one call


def main() -> None:
    """Entry point."""
    hurry()
    directory = os.environ.get("HOSTLER_TEST_FAILPOINTS")
    hook = Failpoints(Path(directory)).hook if directory else None
    sys.exit(run(sys.argv[1:], hook))


if __name__ == "__main__":
    main()
