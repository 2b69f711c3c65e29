"""The composition root: which parts a daemon is made of, in which order they come up, and how they go down.

Order matters. First what keeps others out (the lock on the run directory, the one in the store) and what may be taken
already (the sockets); only then is anything looked at or taken over. Down goes everything in reverse, and VMs run on.
"""

from __future__ import annotations

import errno
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from hostler.api.rest.app import create_app
from hostler.api.rest.listeners import Listeners
from hostler.api.rest.server import RestServer
from hostler.client.peer import PeerClient
from hostler.cluster.application import Application, Parts, build_application
from hostler.daemon.config import Config
from hostler.daemon.lock import RunLock
from hostler.hardware.facts import MachineFacts, read_facts
from hostler.host.hypervisor import Hypervisor
from hostler.host.paths import Paths
from hostler.host.steps import StepHook
from hostler.host.volumes.readers import Readers
from hostler.identity.audit import AuditTrail
from hostler.identity.certificates import HostIdentity, load_or_create
from hostler.identity.gate import Identity
from hostler.identity.invitations import InvitationService
from hostler.identity.tls import Trust
from hostler.identity.tokens import TokenService
from hostler.model.errors import HostlerError, InternalError, NoSpace, NotPermitted
from hostler.model.host import HostFacts
from hostler.qemu.accelerator import choose
from hostler.qemu.facts import discover
from hostler.qemu.machine import QemuHypervisor
from hostler.storage.qemu_img import QemuImg
from hostler.store.sqlite import SqliteStore

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon. `https_address` is where HTTPS is really served, None where it is not."""

    config: Config
    host_id: str
    application: Application
    identity: Identity
    https_address: str | None
    _parts: AsyncExitStack

    @property
    def socket_path(self) -> Path:
        """Where the API's unix socket is."""
        return self.config.socket_path

    async def stop(self) -> None:
        """Stop answering and looking after the VMs; they run on. Harmless when stopped."""
        await self._parts.aclose()


async def build(config: Config, hypervisor: Hypervisor | None = None, hooks: StepHook | None = None) -> Daemon:
    """A daemon that answers. `hypervisor`: instead of this host's QEMU; `hooks`: called around each step of each job
    (both for tests). A HostlerError says what is missing or taken; nothing is left behind then."""
    async with AsyncExitStack() as parts:
        _make_state_dir(config.state_dir)
        lock = RunLock(config.run_dir)
        parts.callback(lock.release)
        host = load_or_create(config.state_dir / "identity", config.name)
        # The store is in a directory of its own, closed to others: QEMU's users must reach what is beside it.
        store = await SqliteStore.open(config.state_dir / "store" / "hostler.db")
        parts.push_async_callback(store.close)
        listeners = Listeners(config.socket_path, config.listen)
        parts.callback(listeners.close)
        hardware = read_facts()
        hypervisor = hypervisor or await _qemu(config, hardware)
        trust = Trust(host)
        identity = Identity(trust, TokenService(store), AuditTrail(config.state_dir / "audit.jsonl"))
        parts.callback(identity.audit.close)
        application = build_application(
            Parts(
                paths=Paths(config.state_dir, config.run_dir),
                facts=_facts(config, host, hardware, hypervisor),
                store=store,
                hypervisor=hypervisor,
                identity=host,
                trust=trust,
                invitations=InvitationService(store),
                connect=PeerClient,
                address=lambda: config.advertised(listeners.https_address),
                migration_address=config.migration_address,
                hook=hooks,
                image=QemuImg(guard=Readers()) if os.geteuid() == 0 else None,
            )
        )
        parts.push_async_callback(application.close)
        await application.start()
        server = RestServer(create_app(application, identity), listeners, trust.server_context())
        parts.push_async_callback(server.stop)
        await server.start()
        return Daemon(config, host.host_id, application, identity, listeners.https_address, parts.pop_all())


async def _qemu(config: Config, hardware: MachineFacts) -> Hypervisor:
    """This host's QEMU, asked what it can do (the answers are kept, so that a restart is quick)."""
    accelerator = await choose(hardware.cpu_flags, config.accelerator, config.qemu)
    log.info("daemon.accelerator", kind=str(accelerator.kind), reason=accelerator.reason)
    facts = await discover(config.qemu, accelerator.kind, str(config.state_dir / "cache"))
    return QemuHypervisor(facts, accelerator)


def _facts(config: Config, host: HostIdentity, hardware: MachineFacts, hypervisor: Hypervisor) -> HostFacts:
    return HostFacts(
        id=host.host_id,
        name=config.name,
        accelerator=hypervisor.accelerator,
        qemu=hypervisor.facts,
        privileged=os.geteuid() == 0,
        profile=config.profile,
        **dict(hardware),
    )


def _make_state_dir(path: Path) -> None:
    """Others may pass through it (QEMU runs as users of its own), not look into it."""
    try:
        path.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(path, error) from error


def _explain(path: Path, error: OSError) -> HostlerError:
    subject = f"state directory {path}"
    if isinstance(error, PermissionError):
        return NotPermitted(subject, "cannot be made by this user", "choose another --state-dir, or run as root")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(subject, "cannot be made: the disk is full", "free some space on it")
    return InternalError(subject, f"cannot be made: {error.strerror}", "choose another --state-dir")
