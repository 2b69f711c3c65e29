"""Whole hosts in one process, for tests of everything between the API and the hypervisor: the real application on a
real store, with a simulated hypervisor, a wire between the hosts that can be cut, and a failure or a stop at any step.

    async with Site(directory) as site:
        a, b = await site.add("a"), await site.add("b")
        site.join(a, b)
        a.faults.fail("vm.start/launch:before", NoSpace(...))     # or a.faults.hang(...), see hostler.testing.faults
        await a.die();  await a.start()                            # the daemon is killed and started again

What runs (`site.world`) outlives an application, as QEMU outlives a daemon.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import struct
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from hostler.cluster.application import Application, Parts, build_application
from hostler.host.paths import Paths
from hostler.identity.certificates import HostIdentity, load_or_create
from hostler.identity.invitations import InvitationService
from hostler.identity.tls import Trust
from hostler.model.disk import DiskSource, ImageFormat
from hostler.model.errors import NotFound, PeerUnreachable
from hostler.model.host import HostFacts, Peer
from hostler.model.job import Job
from hostler.model.limits import Profile
from hostler.model.migration import Blocker, IncomingRequest, IncomingStatus
from hostler.model.units import GiB
from hostler.model.views import HostView, OutgoingStatus, PeerIntroduction
from hostler.storage.layer_images import LayerImages
from hostler.storage.qemu_img import AS_USUAL, Layout, OnProgress, QemuImg, new_file
from hostler.store.sqlite import SqliteStore
from hostler.testing.faults import Faults
from hostler.testing.faulty_store import FaultyStore
from hostler.testing.simulated import SimulatedHypervisor
from hostler.testing.simulated_world import World
from hostler.testing.vm_variants import FACTS

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds a job may take on a loaded machine; one that hangs is a failure of the test."""


async def until(condition: Callable[[], bool]) -> None:
    """Let everybody else go on until the condition holds. TimeoutError if it never does."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the condition may be about anything
            await asyncio.sleep(0.001)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path is short enough for a host, in memory where there is such a place: a test that
    only starts and ends hosts waits for little but the disk otherwise."""
    memory = "/dev/shm"  # noqa: S108 - the directory made below it is our own
    base = memory if os.access(memory, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="h", dir=base) as name:
        yield Path(name)


class PlainImages(QemuImg):
    """Makes raw images without a process."""

    async def create(self, path: str, format: ImageFormat, size: int, layout: Layout = AS_USUAL) -> None:
        """A sparse file."""
        async with new_file(path) as part:
            os.truncate(part, size)

    async def convert(
        self,
        source: str,
        source_format: ImageFormat,
        path: str,
        format: ImageFormat,
        size: int,
        on_progress: OnProgress | None = None,
        layout: Layout = AS_USUAL,
    ) -> None:
        """A copy of a raw image."""
        async with new_file(path) as part:
            shutil.copyfile(source, part)
            os.truncate(part, size)

    async def convert_node(
        self,
        node: Mapping[str, Any],
        path: str,
        format: ImageFormat,
        size: int,
        on_progress: OnProgress | None = None,
    ) -> None:
        """A copy of a raw image."""
        await self.convert(node["file"]["filename"], format, path, format, size, on_progress)


class PlainLayers(LayerImages):
    """Layers that are headers only: they hold nothing, so that nothing is to be merged."""

    async def create(self, layer: DiskSource) -> None:
        """A qcow2 as `recognise` wants it: magic, version 2, a size, tables inside the file."""
        async with new_file(layer.path) as part:
            header = struct.pack(">4sIQIIQIIQQ", b"QFI\xfb", 2, 8, 1, 16, layer.size, 0, 1, 65536, 131072)
            await asyncio.to_thread(Path(part).write_bytes, header.ljust(196608, b"\0"))

    async def commit(self, top: DiskSource, on_progress: OnProgress | None = None) -> None:
        """Nothing to write; both must be there."""
        assert top.backing is not None
        for path in (top.path, top.backing.path):
            if not os.path.exists(path):
                raise NotFound(f"layer {path}", "does not exist")

    async def name_below(self, layer: DiskSource, below: DiskSource) -> None:
        """Nobody reads it."""

    async def flatten(
        self, top: DiskSource, path: str, format: ImageFormat, on_progress: OnProgress | None = None
    ) -> None:
        """An empty image."""
        await PlainImages().create(path, format, top.size)


class NoTls(Trust):
    """Knows nobody and encrypts nothing: hosts of one process talk without a network."""

    def __init__(self, identity: HostIdentity) -> None:
        self.identity = identity
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def replace(self, peers: Iterable[Peer]) -> None:
        """Nothing to prepare."""

    def client_context(self, fingerprint: str, certificate: str | None = None) -> ssl.SSLContext:
        """Not used by a `Wire`."""
        return self._context


class Node:
    """One host: its directories, and its application while it lives."""

    def __init__(self, site: Site, name: str, profile: Profile, boot_id: str, images: QemuImg | None = None) -> None:
        self.site = site
        self.images = images or PlainImages()
        self.name = name
        self.boot_id = boot_id
        self.profile = profile
        self.faults = Faults()
        """Failures and stops at "KIND/STEP:before|after", and in the hypervisor's and its machines' methods."""
        self.paths = Paths(site.directory / name / "s", site.directory / name / "r")
        self.paths.state_dir.mkdir(parents=True)
        self.identity = load_or_create(self.paths.state_dir / "identity", name)
        self.address = f"{name}:1"
        self.cut = False
        """Whether its cable is pulled."""
        self.died = asyncio.Event()
        self.died.set()
        self.hypervisor = SimulatedHypervisor(FACTS, world=site.world)
        self.hypervisor.faults = self.faults
        self._application: Application | None = None
        self._store: FaultyStore | None = None
        self.disk = Faults()
        """Failures of its store, see hostler.testing.faulty_store."""

    @property
    def application(self) -> Application:
        """Its application. AssertionError while it is dead."""
        assert self._application is not None, f"host {self.name} is dead"
        return self._application

    @property
    def store(self) -> FaultyStore:
        """Its store. AssertionError while it is dead."""
        assert self._store is not None, f"host {self.name} is dead"
        return self._store

    @property
    def peer(self) -> Peer:
        """This host as others know it."""
        return Peer(
            id=self.identity.host_id,
            name=self.name,
            address=self.address,
            fingerprint=self.identity.fingerprint,
            certificate=self.identity.certificate,
        )

    async def start(self) -> None:
        """What hostlerd does at its start."""
        self._store = FaultyStore(await SqliteStore.open(self.paths.state_dir / "store" / "hostler.db"), self.disk)
        trust = NoTls(self.identity)
        self._application = build_application(
            Parts(
                paths=self.paths,
                facts=self._facts(),
                store=self._store,
                hypervisor=self.hypervisor,
                identity=self.identity,
                trust=trust,
                invitations=InvitationService(self._store),
                connect=self._connect,
                address=lambda: self.address,
                migration_address="127.0.0.1",
                hook=self._hook,
                image=self.images,
                layers=PlainLayers(),
            )
        )
        await self._application.start()
        self.died.clear()  # as hostlerd does not answer before that

    def _facts(self) -> HostFacts:
        return HostFacts(
            id=self.identity.host_id,
            name=self.name,
            logical_processors=8,
            cpu_name="simulated",
            memory=1024 * GiB,
            accelerator=self.hypervisor.accelerator,
            qemu=self.hypervisor.facts,
            privileged=os.geteuid() == 0,
            profile=self.profile,
            boot_id=self.boot_id,
        )

    async def _hook(self, where: str, edge: str) -> None:
        await self.faults.enter(f"{where}:{edge}")

    def _connect(self, url: str, _context: ssl.SSLContext) -> Wire:
        return Wire(self, url.removeprefix("https://"))

    async def die(self) -> None:
        """As after `kill -9`: nothing is finished, nothing undone. What stands at a `hang` never goes on."""
        if self._application is None or self._store is None:
            return
        self.died.set()
        await self._application.close()
        await self._store.close()
        self._application = self._store = None
        self.faults.clear()
        self.disk.clear()

    async def finish(self, job: Job) -> Job:
        """The job when it has ended. AssertionError if it does not."""
        ended = await self.application.jobs.wait(job.id, PATIENCE)
        assert ended.is_over, f"job {ended.kind} does not end: {ended}"
        return ended

    async def quiet(self) -> None:
        """Returns when no job is under way, and every VM has settled."""
        jobs = self.application.jobs
        while waiting := [job for job in jobs.list() if not job.is_over]:
            await self.finish(waiting[0])
        for actor in list(self.application.host.actors.values()):
            await actor.settle()


class Wire:
    """The link from one host to another. Satisfies `hostler.cluster.peers.PeerLink`."""

    def __init__(self, source: Node, address: str) -> None:
        self._source = source
        self._address = address

    async def _call(self, ask: Callable[[Node, str], Awaitable[T]]) -> T:
        """Ask the other host; if it dies or is cut off before it has answered, nobody knows what it did."""
        node = self._source.site.find(self._address)
        if node is None or node.died.is_set() or node.cut or self._source.cut:
            raise PeerUnreachable(f"host {self._address}", "does not answer", sent=False)
        asking = asyncio.ensure_future(ask(node, self._source.identity.host_id))
        death = asyncio.ensure_future(node.died.wait())
        try:
            await asyncio.wait({asking, death}, return_when=asyncio.FIRST_COMPLETED)
            if death.done() or node.cut or self._source.cut:
                raise PeerUnreachable(f"host {self._address}", "went silent", sent=True)
            return await asking
        finally:
            for task in (asking, death):
                task.cancel()
            await asyncio.gather(asking, death, return_exceptions=True)

    async def warm(self) -> None:
        """Nothing to open."""

    async def facts(self) -> HostView:
        return await self._call(lambda node, _: node.application.hosts.this())

    async def check(self, request: IncomingRequest) -> Sequence[Blocker]:
        return await self._call(lambda node, me: node.application.incoming.check(request, me))

    async def prepare(self, request: IncomingRequest) -> IncomingStatus:
        return await self._call(lambda node, me: node.application.incoming.prepare(request, me))

    async def status(self, move_id: str) -> IncomingStatus:
        return await self._call(lambda node, me: node.application.incoming.status(move_id, me))

    async def accept(self, move_id: str) -> IncomingStatus:
        return await self._call(lambda node, me: node.application.incoming.accept(move_id, me))

    async def refuse(self, move_id: str) -> IncomingStatus:
        return await self._call(lambda node, me: node.application.incoming.refuse(move_id, me))

    async def outgoing(self, move_id: str) -> OutgoingStatus:
        return await self._call(lambda node, me: node.application.migrations.outgoing(move_id, me))

    async def introduce(self, introduction: PeerIntroduction) -> PeerIntroduction:
        return await self._call(lambda node, _: node.application.hosts.introduce(introduction))

    async def close(self) -> None:
        """Nothing to close."""


class Site:
    """Hosts that share a world and storage. `directory` must be short, for the sockets below it."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o711)
        self.directory = directory
        self.world = World()
        self.nodes: list[Node] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            await node.die()
        for qemu in list(self.world.running.values()):
            qemu.die()

    async def add(
        self, name: str, profile: Profile = Profile.HOSTLER, boot_id: str = "boot", images: QemuImg | None = None
    ) -> Node:
        """A host that runs. `images`: the real qemu-img where images are more than raw files."""
        node = Node(self, name, profile, boot_id, images)
        self.nodes.append(node)
        await node.start()
        return node

    async def join(self, first: Node, second: Node) -> None:
        """They trust each other from now on."""
        await first.application.peers.add(second.peer)
        await second.application.peers.add(first.peer)

    def find(self, address: str) -> Node | None:
        """The host with that address."""
        return next((node for node in self.nodes if node.address == address), None)

    def image(self, name: str, size: int = 4096) -> str:
        """A raw image on the storage that every host sees; its path."""
        path = self.directory / name
        path.touch()
        os.truncate(path, size)
        return str(path)
