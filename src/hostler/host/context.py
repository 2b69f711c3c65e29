"""The host as its operations see it: everything they work with, in one value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hostler.host.actor import VmActor
from hostler.host.checkpoints.book import CheckpointBook
from hostler.host.events import EventHub
from hostler.host.hypervisor import Hypervisor
from hostler.host.jobs import JobRunner
from hostler.host.paths import Paths
from hostler.host.pools.places import Places
from hostler.host.pools.service import Pools
from hostler.host.resources import Resources
from hostler.host.volumes.service import Volumes
from hostler.model.errors import HostLacks, NotFound
from hostler.model.host import HostFacts
from hostler.model.limits import Limits
from hostler.model.names import nearest
from hostler.model.units import format_size
from hostler.model.vm import HAS_PROCESS, VmConfig, VmRecord
from hostler.storage.claims import ClaimBook
from hostler.storage.layer_images import LayerImages
from hostler.store.contract import Store


@dataclass(slots=True)
class Host:
    """`actors` holds every VM of this host by id."""

    paths: Paths
    facts: HostFacts
    limits: Limits
    store: Store
    events: EventHub
    jobs: JobRunner
    hypervisor: Hypervisor
    resources: Resources
    claims: ClaimBook
    volumes: Volumes
    pools: Pools
    places: Places
    checkpoints: CheckpointBook
    layers: LayerImages
    actors: dict[str, VmActor] = field(default_factory=dict)
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Id of each VM that moved away: its name, and the name of the host it moved to."""
    coming: Callable[[], Sequence[VmConfig]] = tuple
    """The VMs that are on their way to this host."""
    admitted: dict[str, VmConfig] = field(default_factory=dict)
    """Those that have been let in, but whose record does not say so yet."""

    def actor(self, ref: str) -> VmActor:
        """The actor of the VM with that id or name. NotFound with the nearest name otherwise."""
        found = self.actors.get(ref) or next((a for a in self.actors.values() if a.record.name == ref), None)
        if found is None:
            raise self._not_found(ref)
        return found

    def _not_found(self, ref: str) -> NotFound:
        for vm_id, (name, host) in self.moved.items():
            if ref in (vm_id, name):
                return NotFound(f"vm {ref}", f"moved to host {host}", "ask that one; it is in 'hostler host list'")
        near = nearest(ref, (a.record.name for a in self.actors.values()))
        advice = f"did you mean {near!r}?" if near else "list the known ones with 'hostler vm list'"
        return NotFound(f"vm {ref}", "there is no such VM on this host", advice)

    def running(self) -> list[VmRecord]:
        """Every VM that has, or may have, a QEMU here."""
        return [a.record for a in self.actors.values() if a.record.state in HAS_PROCESS or a.machine is not None]

    @contextlib.contextmanager
    def admitting(self, config: VmConfig) -> Iterator[None]:
        """As `admit`; until the block ends, in which the VM's record is changed, it is counted already."""
        self.admit(config)
        self.admitted[config.id] = config
        try:
            yield
        finally:
            del self.admitted[config.id]

    def admit(self, config: VmConfig) -> None:
        """Raises LimitExceeded or HostLacks if this VM cannot run beside those that do, or are about to."""
        every = {c.id: c for c in (*self.coming(), *self.admitted.values(), *(r.config for r in self.running()))}
        others = [c for c in every.values() if c.id != config.id]
        subject = f"vm {config.name}"
        self.limits.refuse_above(subject, "host_running_vms", len(others) + 1, "the number of running VMs")
        vcpus = sum(c.vcpus for c in others) + config.vcpus
        self.limits.refuse_above(subject, "host_vcpus", vcpus, "the virtual processors of running VMs")
        promised = sum(c.memory for c in others)
        if promised + config.memory > self.facts.memory:
            raise HostLacks(
                subject,
                f"needs {format_size(config.memory)} of memory; this host has {format_size(self.facts.memory)}, of"
                f" which {format_size(promised)} are promised to running VMs",
                "stop or move another VM, or give this one less memory",
                needed=config.memory,
                memory=self.facts.memory,
                promised=promised,
            )
