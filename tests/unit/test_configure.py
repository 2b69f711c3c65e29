"""From what people ask to what a VM is: defaults, free places, limits, and what needs a stop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hostler.host import configure
from hostler.host.context import Host
from hostler.host.operations.disks import ATTACH, require_free_place
from hostler.model.disk import Bus, Disk, DiskSource, ImageFormat, Media
from hostler.model.errors import (
    AlreadyExists,
    Busy,
    HostLacks,
    HostlerError,
    InUse,
    InvalidInput,
    LimitExceeded,
    NotFound,
    WrongState,
)
from hostler.model.limits import Profile
from hostler.model.nic import Nic
from hostler.model.requests import DiskAdd, NicAdd, VmChange, VmCreate
from hostler.model.units import GiB, MiB
from hostler.model.vm import Firmware, VmRecord, VmState
from hostler.qemu.pci import nic_slots
from hostler.testing.inprocess import Node, Site
from hostler.testing.vm_variants import FACTS, config

pytestmark = pytest.mark.unit


@pytest.fixture
async def node(site: Site) -> Node:
    return await site.add("a")


@pytest.fixture
def host(node: Node) -> Host:
    return node.application.host


def raw(node: Node, name: str = "a.img") -> DiskAdd:
    return DiskAdd(volume=node.site.image(name), format=ImageFormat.RAW)


def source(name: str = "x") -> DiskSource:
    return DiskSource(path=f"/none/{name}", size=4096)


async def create(node: Node, **fields: Any) -> VmRecord:
    return await node.application.vms.create(VmCreate.model_validate({"name": "web", **fields}), "test")


# adapters


async def test_removing_an_adapter_moves_no_other(node: Node) -> None:
    vms = node.application.vms
    await create(node, nics=[{"network": "user"}, {"network": "none"}, {"network": "user"}])
    record = await vms.remove_nic("web", "nic1", "test")
    assert nic_slots(record.config.nics) == {"nic0": 0, "nic2": 2}
    record = await vms.add_nic("web", NicAdd(), "test")
    assert nic_slots(record.config.nics) == {"nic0": 0, "nic2": 2, "nic1": 1}
    with pytest.raises(NotFound, match="no such adapter"):
        await vms.remove_nic("web", "nic7", "test")


def test_adapters_without_a_slot_of_their_own_stay_where_they_were() -> None:
    nics = tuple(Nic(id=f"nic{n}", mac=f"52:54:00:00:00:0{n}") for n in range(3))
    left = configure.without_nic(config(nics=nics), "nic0")
    assert nic_slots(left.nics) == {"nic1": 1, "nic2": 2}


async def test_a_change_that_waits_knows_the_new_adapter_too(node: Node) -> None:
    vms = node.application.vms
    await create(node)
    await node.finish(await vms.act("web", "start", "test"))
    await vms.change("web", VmChange(vcpus=2), "test", when_off=True)
    with pytest.raises(WrongState):
        await vms.add_nic("web", NicAdd(), "test")
    await node.finish(await vms.act("web", "turn-off", "test"))
    await vms.add_nic("web", NicAdd(), "test")
    await node.finish(await vms.act("web", "start", "test"))
    record = vms.get("web")
    assert (record.config.vcpus, [n.id for n in record.config.nics]) == (2, ["nic0"])


async def test_two_adapters_added_at_once(node: Node) -> None:
    vms = node.application.vms
    await create(node)
    await asyncio.gather(*(vms.add_nic("web", NicAdd(), "test") for _ in range(5)))
    nics = vms.get("web").config.nics
    assert sorted(n.id for n in nics) == [f"nic{n}" for n in range(5)]
    assert len({n.mac for n in nics}) == 5


async def test_a_mac_address_is_given_once(node: Node) -> None:
    await create(node, nics=[{"mac": "52:54:00:12:34:56"}])
    with pytest.raises(InUse, match="52:54:00:12:34:56"):
        await create(node, name="db", nics=[{"mac": "52:54:00:12:34:56"}])


async def test_adapters_have_a_limit(node: Node) -> None:
    await create(node, nics=[{}] * 24)
    with pytest.raises(LimitExceeded) as caught:
        await node.application.vms.add_nic("web", NicAdd(), "test")
    assert (caught.value.details["limit"], caught.value.details["maximum"]) == ("vm_nics", 24)


async def test_a_bridge_that_is_not_there(node: Node) -> None:
    with pytest.raises(HostlerError, match="no-such-br"):
        await create(node, nics=[{"network": "bridge", "bridge": "no-such-br"}])
    assert node.application.vms.list() == []


# disks


def record(**changes: Any) -> VmRecord:
    return VmRecord(config=config(**changes))


def test_a_disk_gets_the_first_free_place_and_id(host: Host) -> None:
    disks = (Disk(id="disk0", source=source("a")), Disk(id="disk2", source=source("b"), unit=2))
    waiting = record(disks=(*disks, Disk(id="disk1", source=source("c"), unit=1))).config
    made = configure.next_disk(host, record(disks=disks).but(next_config=waiting), DiskAdd(volume="x"), source())
    assert (made.id, made.address) == ("disk3", (Bus.SCSI, 0, 3))
    other = configure.next_disk(host, record(disks=disks), DiskAdd(volume="x"), source())
    assert (other.id, other.address) == ("disk1", (Bus.SCSI, 0, 1))
    assert other.serial and other.serial != made.serial and other.wwn != made.wwn
    assert other.wwn is not None and other.wwn >> 60 == 5


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (DiskAdd(volume="x", controller=0, unit=0), InUse, "controller 0 unit 0"),
        (DiskAdd(volume="x", controller=3), InvalidInput, "no controller 3"),
        (DiskAdd(volume="x", bus=Bus.IDE, unit=4), InvalidInput, "unit 0 to 3"),
        (DiskAdd(volume="x", bus=Bus.IDE, controller=1), InvalidInput, "no controller 1"),
    ],
)
def test_a_place_that_cannot_be(host: Host, request_: DiskAdd, error: type[HostlerError], text: str) -> None:
    with pytest.raises(error, match=text):
        configure.next_disk(host, record(disks=(Disk(id="disk0", source=source("a")),)), request_, source())


def test_all_places_taken(host: Host) -> None:
    full = tuple(Disk(id=f"disk{n}", source=source(str(n)), unit=n) for n in range(64))
    with pytest.raises(LimitExceeded) as caught:
        configure.next_disk(host, record(disks=full), DiskAdd(volume="x"), source())
    assert (caught.value.details["limit"], caught.value.details["maximum"]) == ("scsi_disks_per_controller", 64)
    second = configure.next_disk(host, record(disks=full, scsi_controllers=2), DiskAdd(volume="x"), source())
    assert (second.controller, second.unit) == (1, 0)


@pytest.mark.parametrize("state", [VmState.RUNNING, VmState.PAUSED, VmState.SAVED])
def test_ide_takes_no_disk_while_a_vm_runs(host: Host, state: VmState) -> None:
    with pytest.raises(InvalidInput, match="IDE"):
        configure.next_disk(host, record().but(state=state), DiskAdd(volume="x", bus=Bus.IDE), source())


def test_one_volume_twice_in_one_vm(host: Host) -> None:
    writes = record(disks=(Disk(id="disk0", source=source("a")),))
    with pytest.raises(InUse, match="disk0"):
        configure.next_disk(host, writes, DiskAdd(volume="x"), source("a"))
    reads = record(disks=(Disk(id="disk0", source=source("a"), read_only=True),))
    again = configure.next_disk(host, reads, DiskAdd(volume="x", media=Media.CDROM), source("a"))
    assert not again.writes


async def test_disks_boot_in_order_and_cd_drives_first(node: Node) -> None:
    made = await create(
        node,
        disks=[raw(node, "a.img"), raw(node, "b.img"), raw(node, "cd.iso").model_copy(update={"media": Media.CDROM})],
    )
    assert [(d.id, d.boot_index) for d in made.config.disks] == [("disk0", 2), ("disk1", 3), ("disk2", 1)]


async def test_a_disk_that_came_first_is_not_overwritten(node: Node) -> None:
    """Two attaches planned at the same moment, for the same place."""
    host, vms = node.application.host, node.application.vms
    await create(node)
    plan = await vms.attach_disk("web", raw(node, "a.img"), "test", dry_run=True)
    assert isinstance(plan, VmRecord)
    job = await vms.attach_disk("web", raw(node, "a.img"), "test")
    await node.finish(job)  # type: ignore[arg-type]
    late = plan.config.disks[0]
    with pytest.raises(Busy, match="same moment"):
        await ATTACH.begin(
            host, host.actor("web"), "test", {"disk": late.to_json()}, require=lambda now: require_free_place(now, late)
        )
    assert vms.get("web").job is None


# limits and what the host has


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"vcpus": 5}, "vm_vcpus"),
        ({"memory": 65 * GiB}, "vm_memory"),
        ({"nics": [{}] * 13}, "vm_nics"),
    ],
)
async def test_the_profile_of_hyper_v(site: Site, fields: dict[str, Any], limit: str) -> None:
    node = await site.add("hv", Profile.HYPER_V_2008_R2)
    with pytest.raises(LimitExceeded) as caught:
        await create(node, **fields)
    details = caught.value.details
    assert (details["limit"], details["profile"]) == (limit, "hyper-v-2008-r2")
    assert str(details["profile"]) in caught.value.cause and "hostler" in caught.value.advice
    other = await site.add("other")
    assert (await create(other, **fields)).state is VmState.OFF


@pytest.mark.parametrize(
    ("changes", "missing", "text"),
    [
        ({"firmware": Firmware.UEFI}, {"firmware_code": None}, "UEFI"),
        ({"tpm": True}, {"tpm": False}, "TPM"),
        ({"memory": 64 * MiB + 1}, {}, "whole MiB"),
        ({"secure_boot": True}, {}, "secure boot"),
    ],
)
def test_what_this_host_could_never_run(host: Host, changes: Any, missing: Any, text: str) -> None:
    host.facts = host.facts.but(qemu=FACTS.but(**missing))
    with pytest.raises((HostLacks, InvalidInput), match=text):
        configure.check_config(host, config(**changes))


@pytest.mark.parametrize(("field", "value"), [("machine", "pc-q35-99"), ("cpu_model", "EPYC-v99")])
async def test_an_unknown_machine_or_processor(node: Node, field: str, value: str) -> None:
    with pytest.raises(HostLacks) as caught:
        await create(node, **{field: value})
    known = FACTS.machines if field == "machine" else FACTS.cpu_models
    assert known[0] in caught.value.advice


async def test_a_dry_run_changes_nothing(node: Node) -> None:
    made = await node.application.vms.create(VmCreate(name="web"), "test", dry_run=True)
    assert made.name == "web"
    assert node.application.vms.list() == []
    assert list(await node.store.list("vm/")) == []


async def test_one_name_for_one_vm_also_at_once(node: Node) -> None:
    made = await asyncio.gather(*(create(node) for _ in range(4)), return_exceptions=True)
    assert [type(m) for m in made if isinstance(m, BaseException)] == [AlreadyExists] * 3
    await create(node, name="db")
    with pytest.raises(AlreadyExists):
        await node.application.vms.change("db", VmChange(name="web"), "test")


# changing


@pytest.mark.parametrize("state", VmState)
def test_what_needs_a_stop(state: VmState) -> None:
    request = VmChange(name="x", notes="y", vcpus=2, memory=64 * MiB)
    assert configure.needs_stop(record().but(state=state), request) == (
        [] if state is VmState.OFF else ["memory", "vcpus"]
    )


def test_what_can_change_at_once_changes_now_the_rest_later(host: Host) -> None:
    now, later = configure.change_config(host, record(), VmChange(name="x", vcpus=3), later=True)
    assert later is not None
    assert (now.name, now.vcpus, later.name, later.vcpus) == ("x", 1, "x", 3)
    both = VmRecord(config=now, next_config=later)
    now, later = configure.change_config(host, both, VmChange(notes="n"), later=False)
    assert later is not None
    assert (now.notes, later.notes, later.vcpus) == ("n", "n", 3)


def test_a_controller_with_disks_cannot_be_taken_away(host: Host) -> None:
    with pytest.raises(InvalidInput, match="controller"):
        configure.change_config(
            host, record(disks=(Disk(id="disk0", source=source("a")),)), VmChange(scsi_controllers=0), later=False
        )


async def test_a_change_and_an_attach_at_once_lose_nothing(node: Node) -> None:
    vms = node.application.vms
    await create(node)
    await node.finish(await vms.act("web", "start", "test"))
    job = await vms.attach_disk("web", raw(node, "b.img"), "test")
    await asyncio.gather(*(vms.change("web", VmChange(notes=str(n)), "test") for n in range(20)))
    await node.finish(job)  # type: ignore[arg-type]
    changed = vms.get("web").config
    assert ([d.id for d in changed.disks], changed.notes) == (["disk0"], "19")
