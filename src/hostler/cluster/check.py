"""May this VM move to that host? Every blocker is named, each with the way out. Pure.

`blockers_at_target` is judged by the target itself, since only it can see its files, bridges and memory: it gathers
what it finds into a `TargetView` and asks here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hostler.cluster.luggage import missing
from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import HostlerError
from hostler.model.host import Accelerator, HostFacts
from hostler.model.migration import Blocker, BlockerKind, IncomingRequest, MigrationMode, MigrationSettings
from hostler.model.nic import Network
from hostler.model.vm import Firmware, VmConfig, VmRecord, VmState
from hostler.qemu.access import is_vm_user

NEEDED = frozenset({"events", "return-path", "late-block-activate"})
"""Migration capabilities a QEMU must have for the hand-over to be safe."""


@dataclass(frozen=True, slots=True)
class TargetView:
    """What a target finds at itself. `inodes`: path to inode number of the files that exist here (of boot files only
    those everybody may read); `admission`: the refusal of its own admission check; `present`: a VM of this id is here;
    `claimed`: paths that another VM holds here, with its name; `unreached`: paths of network disks that cannot be
    used from here, with the refusal."""

    facts: HostFacts
    inodes: dict[str, int] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()
    bridges: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    users: dict[int, str] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, HostlerError] = field(default_factory=dict)
    incoming: frozenset[str] = frozenset()
    present: bool = False
    admission: HostlerError | None = None


def blockers_at_source(
    record: VmRecord, settings: MigrationSettings, facts: HostFacts, target_id: str
) -> list[Blocker]:
    """What stands in the way here."""
    found: list[Blocker] = []
    if record.state not in (VmState.RUNNING, VmState.PAUSED):
        found.append(
            Blocker(
                kind=BlockerKind.NOT_RUNNING,
                text=f"the VM is {record.state}; only a running or paused VM can move live",
                advice="start it first",
            )
        )
    if target_id == facts.id:
        found.append(Blocker(kind=BlockerKind.SAME_HOST, text="it runs on that host already"))
    found += _capabilities(settings, facts, "this host")
    return found


def _capabilities(settings: MigrationSettings, facts: HostFacts, where: str) -> list[Blocker]:
    needed = NEEDED | ({"multifd"} if settings.streams > 1 and settings.mode is MigrationMode.LIVE else frozenset())
    missing = sorted(needed - set(facts.qemu.migration_capabilities))
    if not missing:
        return []
    return [
        Blocker(
            kind=BlockerKind.CAPABILITY_MISSING,
            text=f"QEMU {facts.qemu.version} of {where} lacks: {', '.join(missing)}",
            advice="update QEMU there" if missing != ["multifd"] else "use one stream",
        )
    ]


def blockers_at_target(request: IncomingRequest, view: TargetView) -> list[Blocker]:
    """What stands in the way at the target, judged from what it found."""
    config = request.config
    return [
        *_machine(config, view.facts, request.accelerator),
        *_capabilities(request.settings, view.facts, view.facts.name),
        *_identity(config, view, request.id),
        *_disks(request, view),
        *_files(request, view),
        *missing(request.luggage, view.inodes, request.inodes, view.facts.name),
        *_network(config, view),
        *_admission(view),
    ]


def _machine(config: VmConfig, facts: HostFacts, accelerator: Accelerator) -> Iterable[Blocker]:
    if config.machine not in facts.qemu.machines:
        yield Blocker(
            kind=BlockerKind.NO_MACHINE_TYPE,
            text=f"QEMU {facts.qemu.version} of {facts.name} does not know the machine type {config.machine}",
            advice="update QEMU there, or give the VM an older machine type while it is off",
        )
    if config.cpu_model not in facts.qemu.cpu_models:
        yield Blocker(
            kind=BlockerKind.NO_CPU_MODEL,
            text=f"{facts.name} cannot provide the processor model {config.cpu_model}",
            advice="choose a model that both hosts have while the VM is off",
        )
    if facts.accelerator.kind is not accelerator:
        yield Blocker(
            kind=BlockerKind.ACCELERATOR_DIFFERS,
            text=f"the VM runs under {accelerator}, {facts.name} uses {facts.accelerator.kind}",
            advice="shut the VM down and start it there",
        )
    if config.firmware is Firmware.UEFI and facts.qemu.firmware_code is None:
        yield Blocker(
            kind=BlockerKind.NO_FIRMWARE, text=f"{facts.name} has no UEFI firmware", advice="install ovmf there"
        )
    if config.tpm and not facts.qemu.tpm:
        yield Blocker(kind=BlockerKind.NO_TPM, text=f"{facts.name} has no swtpm", advice="install swtpm there")


def _identity(config: VmConfig, view: TargetView, move_id: str) -> Iterable[Blocker]:
    if config.name in view.names:
        yield Blocker(
            kind=BlockerKind.NAME_TAKEN,
            text=f"{view.facts.name} has a VM named {config.name!r} already",
            advice="rename one of them",
        )
    if view.present or view.incoming - {move_id}:
        yield Blocker(
            kind=BlockerKind.ALREADY_INCOMING,
            text="an earlier move of this VM to that host has not been tidied up",
            advice="wait a minute and try again",
        )
    if view.facts.privileged and (config.run_as is None or not is_vm_user(config.run_as)):
        yield Blocker(
            kind=BlockerKind.NO_USER,
            text=f"{view.facts.name} gives each QEMU a user of its own, and this VM comes without one",
            advice="shut it down and create it there",
        )
    holder = view.users.get(config.run_as) if config.run_as is not None else None
    if holder is not None:
        yield Blocker(
            kind=BlockerKind.NO_USER,
            text=f"user id {config.run_as} of this VM's QEMU belongs to VM {holder!r} there",
            advice="shut this VM down and start it again: it gets another user id",
        )


def _disks(request: IncomingRequest, view: TargetView) -> Iterable[Blocker]:
    same_machine = bool(request.boot_id) and request.boot_id == view.facts.boot_id
    for disk, layer in [(d, s) for d in request.config.disks for s in d.source.layers()]:
        path = layer.path
        if layer.kind is SourceKind.DEVICE:
            if not same_machine or path not in view.devices:
                yield Blocker(
                    kind=BlockerKind.PASS_THROUGH,
                    text=f"disk {disk.id} is the device {path} of this machine, passed through",
                    advice=f"detach it first: hostler disk remove {request.config.name} {disk.id}",
                )
        elif layer.local and (view.inodes.get(path) is None or view.inodes[path] != request.inodes.get(path)):
            found = "is another file" if path in view.inodes else "does not exist"
            yield Blocker(
                kind=BlockerKind.VOLUME_NOT_SHARED,
                text=f"disk {disk.id}: {path} {found} on {view.facts.name}",
                advice="put the volume on storage that both hosts mount at the same path",
            )
        elif layer.networked:
            yield from _network_disk(disk, layer, view)
        if path in view.claimed:
            yield Blocker(
                kind=BlockerKind.VOLUME_BUSY,
                text=f"disk {disk.id}: {path} is in use there by VM {view.claimed[path]!r}",
                advice="stop that VM or detach its disk",
            )


def _network_disk(disk: Disk, layer: DiskSource, view: TargetView) -> Iterable[Blocker]:
    """No file to compare: the target has a pool of the same name, and finds in it what was recorded."""
    error = view.unreached.get(layer.path)
    if error is not None:
        yield Blocker(
            kind=BlockerKind.VOLUME_NOT_SHARED,
            text=f"disk {disk.id}: {layer.path} cannot be used on {view.facts.name}: {error.object}: {error.cause}",
            advice=f"make a pool named {layer.pool!r} of the same storage there, or see why it does not answer",
        )
    if disk.reservations:
        # A registration belongs to the session it was made in (SPC-4, 5.12), and the target has another one.
        yield Blocker(
            kind=BlockerKind.PASS_THROUGH,
            text=f"disk {disk.id} has persistent reservations, which stay with this host's session",
            advice="shut the VM down and start it there",
        )


def _files(request: IncomingRequest, view: TargetView) -> Iterable[Blocker]:
    boot = request.config.kernel
    for path in [] if boot is None else [boot.kernel, *([boot.initrd] if boot.initrd else [])]:
        if path not in view.inodes:
            yield Blocker(
                kind=BlockerKind.KERNEL_FILE_MISSING,
                text=f"the VM boots from {path}, which {view.facts.name} has not, or not for everybody to read",
                advice="copy that file to the same path there, and make it readable",
            )


def _network(config: VmConfig, view: TargetView) -> Iterable[Blocker]:
    for nic in config.nics:
        if nic.network is Network.BRIDGE and nic.bridge not in view.bridges:
            yield Blocker(
                kind=BlockerKind.NO_BRIDGE,
                text=f"adapter {nic.id} is on bridge {nic.bridge}, which {view.facts.name} has not",
                advice=f"make a bridge {nic.bridge} there, or change the adapter",
            )


def _admission(view: TargetView) -> Iterable[Blocker]:
    if view.admission is not None:
        kind = BlockerKind.LIMIT if view.admission.details.get("limit") else BlockerKind.NO_MEMORY
        yield Blocker(kind=kind, text=view.admission.cause, advice=view.admission.advice)
