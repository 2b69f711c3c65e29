"""Moving VMs to other hosts: check, move, and what the target may ask about a move."""

from __future__ import annotations

from hostler.cluster import outgoing
from hostler.cluster.check import blockers_at_source
from hostler.cluster.incoming import key_of_moved
from hostler.cluster.luggage import shared_layers
from hostler.cluster.peers import PeerBook
from hostler.host.actor import VmActor
from hostler.host.context import Host
from hostler.host.operation import Params
from hostler.model.errors import Blocked, HostlerError, NotFound, NotPermitted
from hostler.model.host import Peer
from hostler.model.job import Job
from hostler.model.migration import MigrationSettings
from hostler.model.names import new_id
from hostler.model.requests import MigrateRequest
from hostler.model.views import MigrationPlan, OutgoingStatus
from hostler.model.vm import VmState

KIND = "vm.migrate"


def settings_of(request: MigrateRequest) -> MigrationSettings:
    """What of the request is about the transfer."""
    return MigrationSettings(
        mode=request.mode,
        bandwidth=request.bandwidth,
        downtime_limit=request.downtime_limit,
        streams=request.streams,
    )


class MigrationService:
    """The application functions about moves from this host."""

    def __init__(self, host: Host, peers: PeerBook) -> None:
        self._host = host
        self._peers = peers
        self.operation = outgoing.operation(peers)

    def _target(self, ref: str) -> str:
        """The id of the host with that name or id; this one's own id where it is meant."""
        if ref in (self._host.facts.id, self._host.facts.name):
            return self._host.facts.id
        peer: Peer = self._peers.get(ref)
        return peer.id

    async def check(self, ref: str, request: MigrateRequest) -> MigrationPlan:
        """Everything that stands in the way, here and there. Changes nothing."""
        actor, target = self._host.actor(ref), self._target(request.host)
        settings = settings_of(request)
        blockers = blockers_at_source(actor.record, settings, self._host.facts, target)
        if target != self._host.facts.id:
            move = outgoing.Move(self._host, self._peers, actor, target, settings, secret="")
            run = actor.record.state is VmState.RUNNING
            blockers += await shared_layers(self._host, actor.record)
            blockers += await move.link.check(await move.request(new_id(), run))
        return MigrationPlan(
            vm=actor.record.id,
            source=self._host.facts.id,
            target=target,
            settings=settings,
            blockers=tuple(blockers),
            memory=actor.record.config.memory,
        )

    async def migrate(self, ref: str, request: MigrateRequest, by: str) -> Job:
        """Begin to move it. This host refuses at once what it can; the target's check is the job's first step."""
        actor, target = self._host.actor(ref), self._target(request.host)
        settings = settings_of(request)
        self.operation.allow(actor.record)
        self._refuse_blocked(actor, settings, target)
        params: Params = {"target": target, "settings": settings.to_json()}
        return await self.operation.begin(self._host, actor, by, params)

    def _refuse_blocked(self, actor: VmActor, settings: MigrationSettings, target: str) -> None:
        blockers = blockers_at_source(actor.record, settings, self._host.facts, target)
        if blockers:
            raise Blocked(
                actor.subject,
                "; ".join(b.text for b in blockers),
                next((b.advice for b in blockers if b.advice), ""),
                blockers=[b.to_json() for b in blockers],
            )

    async def outgoing(self, move_id: str, peer_id: str) -> OutgoingStatus:
        """What a target may know of a move to it."""
        try:
            job = self._host.jobs.get(move_id)
        except NotFound:
            return OutgoingStatus(known=False)
        if job.kind != KIND or job.id != move_id:
            return OutgoingStatus(known=False)
        if job.params.get("target") != peer_id:
            raise NotPermitted(f"move {move_id}", "is not to that host")
        return OutgoingStatus(known=True, over=job.is_over, owner=await self._owner(job, peer_id))

    async def _owner(self, job: Job, peer_id: str) -> str:
        actor = self._host.actors.get(job.target)
        if actor is not None:
            return actor.record.handed_to or self._host.facts.id
        try:
            moved = await self._host.store.get(key_of_moved(job.target))
        except HostlerError:
            moved = None
        return str(moved.value["host"]) if moved is not None else self._host.facts.id
