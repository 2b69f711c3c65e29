"""What the API answers beside the nouns themselves."""

from __future__ import annotations

from datetime import datetime

from pydantic import JsonValue

from hostler.model.base import Record
from hostler.model.host import HostFacts, HostState
from hostler.model.migration import Blocker, MigrationSettings
from hostler.model.principal import Role


class Event(Record):
    """One change, as the event stream tells it. `kind` is "vm", "volume", "job" or "host"; `data` the whole new value,
    None when it is gone; `key` its id. `id` grows with each event of this daemon's life."""

    id: int
    kind: str
    key: str
    data: dict[str, JsonValue] | None = None


class HostView(Record):
    """A host as another or itself sees it. `facts` is None while it is unreachable."""

    id: str
    name: str
    address: str = ""
    state: HostState
    this: bool
    """Whether it is the host that answers."""
    facts: HostFacts | None = None
    running_vms: int = 0
    memory_in_use: int = 0
    """Bytes promised to running VMs."""
    memory_free: int = 0
    fingerprint: str = ""
    """SHA-256 of its certificate (hex), as a client or another host pins it."""
    text: str = ""


class Invitation(Record):
    """A one-time invitation to trust each other; `token` is secret and good until `expires`."""

    token: str
    expires: datetime


class TokenView(Record):
    """An API token without its secret."""

    id: str
    name: str
    role: Role
    created: datetime


class TokenSecret(TokenView):
    """Shown exactly once, at creation."""

    secret: str


class Deleted(Record):
    """What a deletion removed and what it left in place (absolute paths)."""

    id: str
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


class MigrationPlan(Record):
    """The outcome of the check phase: may it go, and if not, everything that stands in the way. `memory` is what may
    have to be sent, in bytes."""

    vm: str
    source: str
    target: str
    settings: MigrationSettings
    blockers: tuple[Blocker, ...] = ()
    memory: int = 0

    @property
    def possible(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.blockers


class PeerIntroduction(Record):
    """How a host presents itself to another. `certificate` is PEM; `secret` the one of the invitation."""

    id: str
    name: str
    address: str
    certificate: str
    secret: str = ""


class OutgoingStatus(Record):
    """What a source says of a move it started: `known` False means it knows nothing of it (never will run there);
    `owner` is the id of the host that may run the VM now."""

    known: bool
    owner: str | None = None
    over: bool = False


class Version(Record):
    """The daemon's version, and the names of what its API has beyond its first release (append-only)."""

    version: str
    api_extensions: tuple[str, ...] = ()
