"""The application: every function that REST, CLI and later WMI end in, composed from the parts of one host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import structlog

from hostler.cluster.hosts import Connect, HostService
from hostler.cluster.incoming import IncomingService
from hostler.cluster.migrations import MigrationService
from hostler.cluster.peers import PeerBook, PeerLink
from hostler.host.actor import VmActor
from hostler.host.adoption import Adoption, autostart
from hostler.host.backups.exports import EXPORT
from hostler.host.backups.service import KINDS as BACKUP_JOBS
from hostler.host.backups.service import Backups
from hostler.host.checkpoints.book import CheckpointBook
from hostler.host.checkpoints.service import Checkpoints
from hostler.host.context import Host
from hostler.host.disks import DiskService
from hostler.host.events import EventHub
from hostler.host.exchange.exporting import VmExports
from hostler.host.exchange.importing import KIND as IMPORT
from hostler.host.exchange.importing import Imports
from hostler.host.hypervisor import Hypervisor
from hostler.host.jobs import JobRunner
from hostler.host.operations import OPERATIONS
from hostler.host.paths import Paths
from hostler.host.pools.places import Places
from hostler.host.pools.room import RoomKeeper
from hostler.host.pools.service import Pools
from hostler.host.pools.watch import PoolWatch
from hostler.host.resources import Resources
from hostler.host.roster import Roster
from hostler.host.steps import StepHook
from hostler.host.vms import VmService
from hostler.host.volumes.operations.base import Tools
from hostler.host.volumes.service import Volumes
from hostler.host.volumes.users import VolumeUsers, of_checkpoints
from hostler.host.volumes.work import VolumeWork
from hostler.identity.certificates import HostIdentity
from hostler.identity.invitations import InvitationService
from hostler.identity.tls import Trust
from hostler.model.host import HostFacts, Peer
from hostler.model.job import Job
from hostler.model.limits import PROFILES, Limits
from hostler.network.taps import Taps
from hostler.storage.changes import VolumeChanges
from hostler.storage.claims import ClaimBook
from hostler.storage.exports import Exports
from hostler.storage.layer_images import LayerImages
from hostler.storage.pools.book import PoolBook
from hostler.storage.qemu_img import QemuImg
from hostler.storage.volumes import VolumeService
from hostler.store.contract import Store

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a host is made of. `address`: where other hosts reach this one's API (host:port, "" if nowhere), asked each
    time since the port may be chosen by the system; `migration_address`: the address QEMU listens on for memory
    streams; `hook`: called around each step of each job (tests); `image`, `layers`: instead of this host's qemu-img
    (tests)."""

    paths: Paths
    facts: HostFacts
    store: Store
    hypervisor: Hypervisor
    identity: HostIdentity
    trust: Trust
    invitations: InvitationService
    connect: Connect
    address: Callable[[], str]
    migration_address: str
    hook: StepHook | None = None
    image: QemuImg | None = None
    layers: LayerImages | None = None


@dataclass(slots=True)
class Application:
    """The functions, by noun."""

    host: Host
    vms: VmService
    disks: DiskService
    volumes: Volumes
    pools: Pools
    imports: Imports
    checkpoints: Checkpoints
    backups: Backups
    vm_exports: VmExports
    jobs: JobRunner
    events: EventHub
    hosts: HostService
    migrations: MigrationService
    incoming: IncomingService
    limits: Limits
    peers: PeerBook
    adoption: Adoption
    roster: Roster
    volume_service: VolumeService
    pool_watch: PoolWatch
    room: RoomKeeper
    _autostart: asyncio.Task[None] | None = None

    @property
    def volume_work(self) -> VolumeWork:
        """The work on volumes that no VM has open."""
        return self.volumes.work

    async def start(self) -> None:
        """Take over what is there: VMs, jobs, moves. The API may answer from its return on."""
        await self.peers.load()
        await self.volume_service.recover()
        await self.pools.recover()
        for note in await self.host.store.list("moved/"):
            self.host.moved[note.key.removeprefix("moved/")] = (str(note.value["name"]), str(note.value["host_name"]))
        await self.adoption.run()
        await self.incoming.recover()
        await self.adoption.settle_arrivals()
        await self.adoption.tidy([c.id for c in self.incoming.coming()])
        self.pool_watch.begin()
        self.room.begin()
        self._autostart = asyncio.create_task(autostart(self.host, self._start_vm), name="autostart")

    async def _start_vm(self, vm_id: str) -> Job:
        action = "restore" if self.vms.get(vm_id).saved else "start"
        return await self.vms.act(vm_id, action, by="autostart")

    async def close(self) -> None:
        """Stop looking after the VMs; they run on."""
        if self._autostart is not None:
            self._autostart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._autostart
        await self.room.close()
        await self.pool_watch.close()
        await self.adoption.close()
        await self.incoming.close()
        await self.jobs.close()
        await self.roster.close()
        await self.hosts.close()
        self.events.close()


def build_application(parts: Parts) -> Application:
    """Put the parts together. Nothing runs before `start`."""
    host = _build_host(parts)
    roster = Roster(host)

    def make_link(peer: Peer) -> PeerLink:
        context = parts.trust.client_context(peer.fingerprint, peer.certificate)
        return parts.connect(f"https://{peer.address}", context)

    peers = PeerBook(parts.store, make_link, parts.trust.replace)
    migrations = MigrationService(host, peers)
    incoming = IncomingService(host, roster, peers, parts.migration_address, parts.hook)
    host.coming = incoming.coming
    host.volumes.users.sources.append(of_checkpoints(host.checkpoints.all))
    checkpoints = Checkpoints(host)
    vms = VmService(host, roster)
    imports = Imports(host, vms)
    backups = Backups(host, vms)
    return Application(
        host=host,
        vms=vms,
        disks=DiskService(host),
        volumes=host.volumes,
        pools=host.pools,
        imports=imports,
        checkpoints=checkpoints,
        backups=backups,
        vm_exports=VmExports(host),
        jobs=host.jobs,
        events=host.events,
        hosts=HostService(host, peers, parts.identity, parts.trust, parts.invitations, parts.connect, parts.address),
        migrations=migrations,
        incoming=incoming,
        limits=host.limits,
        peers=peers,
        adoption=Adoption(
            host,
            roster,
            {**OPERATIONS, migrations.operation.kind: migrations.operation},
            {IMPORT: imports.recover, **dict.fromkeys((*BACKUP_JOBS, EXPORT), backups.recover)},
        ),
        roster=roster,
        volume_service=host.volumes.service,
        room=RoomKeeper(host),
        pool_watch=PoolWatch(host.pools, host.volumes.service, host.events),
    )


def _build_host(parts: Parts) -> Host:
    events = EventHub()
    jobs = JobRunner(parts.store, events, parts.hook)
    limits = PROFILES[parts.facts.profile]
    actors: dict[str, VmActor] = {}
    claims = ClaimBook(parts.store, lambda vm_id: actors[vm_id].record.name if vm_id in actors else vm_id)
    service = VolumeService(parts.store, parts.paths.volumes, limits, claims, parts.image)
    pools = Pools(
        PoolBook(parts.store), service, events, parts.paths.volumes, parts.facts.id, lambda: _paths_in_use(actors)
    )
    places = Places(pools, service, lambda: _paths_in_use(actors))
    changes = VolumeChanges(parts.store, service, service.image)
    work = VolumeWork(Tools(changes, VolumeUsers(actors, claims, service), events), claims, jobs, pools, places)
    return Host(
        paths=parts.paths,
        facts=parts.facts,
        limits=limits,
        store=parts.store,
        events=events,
        jobs=jobs,
        hypervisor=parts.hypervisor,
        resources=Resources(
            parts.paths,
            parts.facts,
            Taps(parts.facts.id),
            Exports(),
            pools.reach,
            lambda vm_id: actors[vm_id].machine if vm_id in actors else None,
        ),
        claims=claims,
        volumes=Volumes(work, claims, jobs, events, pools, places),
        pools=pools,
        places=places,
        checkpoints=CheckpointBook(parts.store),
        layers=parts.layers or LayerImages(),
        actors=actors,
    )


def _paths_in_use(actors: dict[str, VmActor]) -> Iterator[str]:
    """What the disks of this host's VMs name, now and from their next start on."""
    for actor in actors.values():
        record = actor.record
        for config in (record.config, record.next_config or record.config):
            for disk in config.disks:
                yield from (layer.path for layer in disk.source.layers())
