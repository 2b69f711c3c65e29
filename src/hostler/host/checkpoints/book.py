"""The records of checkpoints, by VM. Only a job that holds the VM changes them, or the VM's own actor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hostler.model.checkpoint import Checkpoint
from hostler.model.errors import NotFound
from hostler.model.names import nearest
from hostler.store.contract import Delete, Put, Store


class CheckpointBook:
    """Checkpoints in a store, as "checkpoint/<vm>/<id>"."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def of(self, vm: str) -> list[Checkpoint]:
        """Those of one VM (an id), oldest first."""
        return await self._below(f"checkpoint/{vm}/")

    async def all(self) -> list[Checkpoint]:
        """Those of every VM of this host, oldest first."""
        return await self._below("checkpoint/")

    async def _below(self, prefix: str) -> list[Checkpoint]:
        found = [Checkpoint.model_validate(entry.value) for entry in await self._store.list(prefix)]
        return sorted(found, key=lambda c: (c.created, c.id))


def put(checkpoint: Checkpoint) -> Put:
    """The write that stores it."""
    return Put(_key(checkpoint), checkpoint.to_json())


def remove(checkpoint: Checkpoint) -> Delete:
    """The write that forgets it."""
    return Delete(_key(checkpoint))


def _key(checkpoint: Checkpoint) -> str:
    return f"checkpoint/{checkpoint.vm}/{checkpoint.id}"


def pick(checkpoints: Sequence[Checkpoint], ref: str, vm: str) -> Checkpoint:
    """The one with that name or id, or an unambiguous beginning of an id of at least 4 characters. NotFound with the
    nearest name; where several have the name, the newest. `vm`: how errors call the VM."""
    found = [c for c in checkpoints if ref in (c.id, c.name)]
    if not found and len(ref) >= 4:
        begun = [c for c in checkpoints if c.id.startswith(ref)]
        found = begun if len(begun) == 1 else []
    if not found:
        near = nearest(ref, _names(checkpoints))
        advice = f"did you mean {near!r}?" if near else "list them with 'hostler checkpoint list'"
        raise NotFound(f"checkpoint {ref} of {vm}", "there is no such checkpoint", advice)
    return found[-1]


def _names(checkpoints: Iterable[Checkpoint]) -> list[str]:
    return [c.name for c in checkpoints]
