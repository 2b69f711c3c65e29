"""The check of a move: every kind of blocker has a case that shows it, alone, with its way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hostler.cluster.check import NEEDED, TargetView, blockers_at_source, blockers_at_target
from hostler.host.paths import Paths
from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import Blocked, ErrorCode, HostLacks, InvalidInput, LimitExceeded
from hostler.model.host import Accelerator, AcceleratorChoice, HostFacts, QemuFacts
from hostler.model.limits import Profile
from hostler.model.migration import Blocker, BlockerKind, IncomingRequest, MigrationMode, MigrationSettings
from hostler.model.nic import Network, Nic
from hostler.model.requests import MigrateRequest, VmCreate
from hostler.model.units import GiB
from hostler.model.vm import Firmware, KernelBoot, VmConfig, VmRecord, VmState
from hostler.qemu.access import UID_BASE
from hostler.testing.inprocess import Site
from hostler.testing.vm_variants import FACTS, config

pytestmark = pytest.mark.unit

K = BlockerKind
TCG = AcceleratorChoice(kind=Accelerator.TCG, reason="test")


def facts(name: str = "b", qemu: QemuFacts = FACTS, **changes: Any) -> HostFacts:
    base: dict[str, Any] = {
        "id": name,
        "name": name,
        "logical_processors": 4,
        "cpu_name": "x",
        "memory": 8 * GiB,
        "accelerator": TCG,
        "qemu": qemu,
        "privileged": False,
        "boot_id": f"boot of {name}",
    }
    return HostFacts.model_validate(base | changes)


VOLUME = Disk(id="disk0", source=DiskSource(path="/srv/a.qcow2", size=4096))
DEVICE = Disk(id="disk1", unit=1, source=DiskSource(kind=SourceKind.DEVICE, path="/dev/loop7", size=4096))
BRIDGED = Nic(id="nic0", mac="52:54:00:00:00:01", network=Network.BRIDGE, bridge="br0")
BOOT = KernelBoot(kernel="/boot/k", initrd="/boot/i")


def request(vm: VmConfig | None = None, **changes: Any) -> IncomingRequest:
    base: dict[str, Any] = {
        "id": "move",
        "config": vm or config(disks=(VOLUME,), nics=(BRIDGED,), kernel=BOOT, run_as=7),
        "generation": 2,
        "settings": MigrationSettings(),
        "accelerator": Accelerator.TCG,
        "secret": "00",
        "inodes": {VOLUME.source.path: 42},
        "boot_id": "boot of a",
    }
    return IncomingRequest.model_validate(base | changes)


VIEW = TargetView(
    facts=facts(),
    inodes={VOLUME.source.path: 42, "/boot/k": 1, "/boot/i": 2},
    bridges=frozenset({"br0"}),
    names=frozenset({"other"}),
    users={8: "other"},
)
"""A target at which nothing stands in the way."""


def seen(**changes: Any) -> TargetView:
    return replace(VIEW, **changes)


def at_target(request: IncomingRequest, view: TargetView) -> Callable[[], list[Blocker]]:
    return lambda: blockers_at_target(request, view)


def at_source(state: VmState = VmState.RUNNING, target: str = "b", **qemu: Any) -> Callable[[], list[Blocker]]:
    record = VmRecord(config=config()).but(state=state)
    return lambda: blockers_at_source(record, MigrationSettings(), facts("a", FACTS.but(**qemu)), target)


def lacking(**qemu: Any) -> TargetView:
    return seen(facts=facts(qemu=FACTS.but(**qemu)))


WITHOUT_DISKS = config()
CASES: list[tuple[BlockerKind, str, Callable[[], list[Blocker]]]] = [
    *((K.NOT_RUNNING, str(s), at_source(s)) for s in VmState if s not in (VmState.RUNNING, VmState.PAUSED)),
    (K.SAME_HOST, "runs on that host already", at_source(target="a")),
    (K.CAPABILITY_MISSING, "return-path", at_source(migration_capabilities=("events", "late-block-activate"))),
    (K.CAPABILITY_MISSING, "of b lacks", at_target(request(), lacking(migration_capabilities=("return-path",)))),
    (
        K.CAPABILITY_MISSING,
        "multifd",
        at_target(
            request(settings=MigrationSettings(streams=2)), lacking(migration_capabilities=tuple(sorted(NEEDED)))
        ),
    ),
    (K.NAME_TAKEN, "web1", at_target(request(), seen(names=frozenset({"web1"})))),
    (K.NO_MACHINE_TYPE, "pc-q35-7.2", at_target(request(), lacking(machines=("pc-q35-9.0",)))),
    (K.NO_CPU_MODEL, "Westmere-v1", at_target(request(), lacking(cpu_models=("Nehalem-v1",)))),
    (K.ACCELERATOR_DIFFERS, "kvm", at_target(request(accelerator=Accelerator.KVM), VIEW)),
    (K.NO_MEMORY, "too little", at_target(request(), seen(admission=HostLacks("vm web1", "too little", "stop one")))),
    (
        K.LIMIT,
        "too many",
        at_target(request(), seen(admission=LimitExceeded("vm web1", "too many", "use fewer", limit="host_vcpus"))),
    ),
    (K.VOLUME_NOT_SHARED, "does not exist", at_target(request(), seen(inodes={"/boot/k": 1, "/boot/i": 2}))),
    (K.VOLUME_NOT_SHARED, "another file", at_target(request(inodes={VOLUME.source.path: 43}), VIEW)),
    (K.VOLUME_NOT_SHARED, "another file", at_target(request(inodes={}), VIEW)),
    (K.VOLUME_BUSY, "'other'", at_target(request(), seen(claimed={VOLUME.source.path: "other"}))),
    (K.PASS_THROUGH, "/dev/loop7", at_target(request(config(disks=(DEVICE,))), VIEW)),
    (
        K.PASS_THROUGH,
        "/dev/loop7",  # the same name on another machine
        at_target(request(config(disks=(DEVICE,))), seen(devices=frozenset({"/dev/loop7"}))),
    ),
    (
        K.PASS_THROUGH,
        "/dev/loop7",  # one machine, but nobody knows which
        at_target(
            request(config(disks=(DEVICE,)), boot_id=""),
            seen(devices=frozenset({"/dev/loop7"}), facts=facts(boot_id="")),
        ),
    ),
    (K.NO_BRIDGE, "br0", at_target(request(), seen(bridges=frozenset({"br1"})))),
    (K.NO_FIRMWARE, "UEFI", at_target(request(config(firmware=Firmware.UEFI)), lacking(firmware_code=None))),
    (K.NO_TPM, "swtpm", at_target(request(config(tpm=True)), lacking(tpm=False))),
    (K.NO_USER, "user id 7", at_target(request(), seen(users={7: "other"}))),
    (K.NO_USER, "user of its own", at_target(request(), seen(facts=facts(privileged=True)))),
    (K.NO_USER, "user of its own", at_target(request(config(run_as=0)), seen(facts=facts(privileged=True)))),
    (K.ALREADY_INCOMING, "earlier move", at_target(request(), seen(present=True))),
    (K.KERNEL_FILE_MISSING, "/boot/i", at_target(request(), seen(inodes={VOLUME.source.path: 42, "/boot/k": 1}))),
    (K.ALREADY_INCOMING, "earlier move", at_target(request(), seen(incoming=frozenset({"another"})))),
]


def test_every_blocker_has_a_case() -> None:
    assert {kind for kind, _, _ in CASES} == set(BlockerKind)


@pytest.mark.parametrize(("kind", "text", "look"), CASES, ids=lambda v: str(v) if isinstance(v, BlockerKind) else "")
def test_a_blocker(kind: BlockerKind, text: str, look: Callable[[], list[Blocker]]) -> None:
    (found,) = look()
    assert found.kind is kind
    assert text in found.text
    assert found.advice or kind is K.SAME_HOST, "every blocker but one names a way out"


def test_nothing_in_the_way() -> None:
    assert blockers_at_target(request(), VIEW) == []
    for state in (VmState.RUNNING, VmState.PAUSED):
        assert at_source(state)() == []


def test_a_device_can_be_shared_within_one_machine() -> None:
    one_machine = seen(devices=frozenset({"/dev/loop7"}), facts=facts(boot_id="boot of a"))
    assert blockers_at_target(request(config(disks=(DEVICE,))), one_machine) == []


def test_a_repeated_preparation_does_not_stand_in_its_own_way() -> None:
    assert blockers_at_target(request(), seen(incoming=frozenset({"move"}))) == []


def test_a_user_of_the_range_for_vms_is_taken() -> None:
    vm = config(run_as=UID_BASE + 7)
    assert blockers_at_target(request(vm), seen(facts=facts(privileged=True))) == []


@pytest.mark.parametrize("vm_id", ["", "/home", "../../home", ".", "a/b", "a" * 65, "a\0"])
def test_an_id_that_leads_elsewhere_is_no_request(vm_id: str) -> None:
    """Directories of VMs are made and removed by root; another host must not choose which."""
    with pytest.raises(ValidationError):
        request(config(id=vm_id))
    with pytest.raises(ValidationError):
        request(id=vm_id)
    with pytest.raises(InvalidInput):
        Paths(Path("/s"), Path("/r")).vm_state(vm_id)


def test_a_quick_move_needs_no_streams() -> None:
    few = lacking(migration_capabilities=tuple(sorted(NEEDED)))
    settings = MigrationSettings(streams=8, mode=MigrationMode.QUICK)
    assert blockers_at_target(request(settings=settings), few) == []


def test_every_blocker_is_named_at_once() -> None:
    worst = TargetView(
        facts=facts(qemu=FACTS.but(machines=(), cpu_models=(), migration_capabilities=(), tpm=False)),
        names=frozenset({"web1"}),
        users={7: "other"},
        claimed={VOLUME.source.path: "other"},
        admission=HostLacks("vm web1", "too little", "stop one"),
    )
    found = blockers_at_target(request(), worst)
    assert len(found) == 11
    assert len({b.text for b in found}) == len(found)


async def test_a_target_whose_profile_allows_less(site: Site) -> None:
    a, b = await site.add("a"), await site.add("b", Profile.HYPER_V_2008_R2)
    await site.join(a, b)
    await a.application.vms.create(VmCreate(name="web", vcpus=5), "test")
    await a.finish(await a.application.vms.act("web", "start", "test"))
    plan = await a.application.migrations.check("web", MigrateRequest(host="b"))
    (blocker,) = plan.blockers
    assert blocker.kind is K.LIMIT and "vm_vcpus" in blocker.text
    job = await a.finish(await a.application.migrations.migrate("web", MigrateRequest(host="b"), "test"))
    assert job.error is not None and job.error.code is ErrorCode.BLOCKED
    assert a.application.vms.get("web").state is VmState.RUNNING
    with pytest.raises(Blocked, match="runs on that host already"):
        await a.application.migrations.migrate("web", MigrateRequest(host="a"), "test")


def test_a_network_disk_needs_the_same_storage_there_and_takes_no_reservations_along() -> None:
    lun = DiskSource(kind=SourceKind.ISCSI, path="iscsi://h:3260/iqn.x:y/1", size=4096, pool="san", identity="naa.6")
    plain = request(config(disks=(Disk(id="lun", source=lun),)))
    assert blockers_at_target(plain, seen()) == [], "there is no file to compare"
    unreached = {lun.path: HostLacks("pool san", "there is no such pool on this host")}
    [blocker] = blockers_at_target(plain, seen(unreached=unreached))
    assert blocker.kind is K.VOLUME_NOT_SHARED
    assert "pool san" in blocker.text and "'san'" in blocker.advice
    reserving = request(config(disks=(Disk(id="lun", source=lun, reservations=True),)))
    [blocker] = blockers_at_target(reserving, seen())
    assert blocker.kind is K.PASS_THROUGH and "reservations" in blocker.text
