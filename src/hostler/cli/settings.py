"""What the global options say, and the connection that follows from them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hostler.client.client import Client


@dataclass
class Settings:
    """The global options of one run; click hands it to every command."""

    host: str | None = None
    json: bool = False
    quiet: bool = False
    _client: Client | None = None

    @property
    def client(self) -> Client:
        """The connection to the host; made at first use, since most of the time of `--help` would go into it."""
        if self._client is None:
            from hostler.client.client import Client  # noqa: PLC0415

            self._client = Client(self.host)
        return self._client

    @property
    def talkative(self) -> bool:
        """Whether people want to read how it goes."""
        return not self.json and not self.quiet

    @property
    def shows_progress(self) -> bool:
        """Whether moving progress can be shown: only to people, only on a terminal."""
        return self.talkative and sys.stderr.isatty()

    def close(self) -> None:
        """Ends the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None
