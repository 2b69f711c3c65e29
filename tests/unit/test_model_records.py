"""VMs, disks, adapters: what is a valid one, and that records survive storing, newer versions and changing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hostler.model.disk import Bus, Disk, DiskSource, Media
from hostler.model.nic import Network, Nic
from hostler.model.principal import GRANTS, Permission, Principal, Role
from hostler.model.requests import DiskAdd, NicAdd, VmChange, VmCreate, VolumeCreate
from hostler.model.vm import KernelBoot, VmConfig, VmRecord

pytestmark = pytest.mark.unit

MAC = "52:54:00:00:00:01"


def disk(id: str = "disk0", **fields: Any) -> Disk:
    return Disk(id=id, source=DiskSource(path="/srv/a.img", size=2**30), **fields)


def config(**fields: Any) -> VmConfig:
    return VmConfig(id="1", name="web1", machine="pc-q35-7.2", cpu_model="qemu64-v1", **fields)


addresses = st.tuples(st.just(Bus.SCSI), st.integers(0, 3), st.integers(0, 63)) | st.tuples(
    st.just(Bus.IDE), st.just(0), st.integers(0, 3)
)


@given(st.lists(addresses, unique=True, max_size=12), st.integers(0, 2))
def test_a_vm_with_any_set_of_addresses_survives_storing(places: list[tuple[Bus, int, int]], nics: int) -> None:
    disks = tuple(disk(f"disk{n}", bus=bus, controller=c, unit=u) for n, (bus, c, u) in enumerate(places))
    adapters = tuple(Nic(id=f"nic{n}", mac=f"52:54:00:00:00:{n:02x}") for n in range(nics))
    vm = config(disks=disks, nics=adapters, scsi_controllers=4)
    assert VmConfig.model_validate(vm.to_json()) == vm
    assert VmConfig.model_validate_json(vm.model_dump_json()) == vm
    assert all(vm.disk(one.id) == one for one in disks)
    assert vm.disk("none") is None


def test_the_full_house_of_disks_fits() -> None:
    disks = [disk(f"s{c}-{u}", controller=c, unit=u) for c in range(4) for u in range(64)]
    disks += [disk(f"i{u}", bus=Bus.IDE, unit=u) for u in range(4)]
    assert len(config(disks=tuple(disks), scsi_controllers=4).disks) == 260


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"disks": (disk("a"), disk("a", unit=1))}, "same id"),
        ({"disks": (disk("a"),), "nics": (Nic(id="a", mac=MAC),)}, "same id"),
        ({"disks": (disk("a"), disk("b"))}, "same address"),
        ({"disks": (disk("a", controller=1),)}, "SCSI controller 1"),
        ({"disks": (disk("a"),), "scsi_controllers": 0}, "SCSI controller 0"),
        ({"nics": (Nic(id="a", mac=MAC), Nic(id="b", mac=MAC))}, "same MAC"),
        ({"vcpus": 0}, "vcpus"),
        ({"memory": 2**20 - 1}, "memory"),
        ({"scsi_controllers": 5}, "scsi_controllers"),
        ({"notes": "x" * 16_385}, "notes"),
        ({"kernel": {"kernel": "vmlinuz"}}, "absolute path"),
        ({"kernel": {"kernel": "/vmlinuz\0"}}, "zero byte"),
        ({"autostart": {"delay": -1}}, "delay"),
        ({"shutdown": {"timeout": 0}}, "timeout"),
    ],
)
def test_an_impossible_vm_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"bus": Bus.IDE, "unit": 4},
        {"bus": Bus.IDE, "controller": 1},
        {"controller": 4},
        {"unit": 64},
        {"unit": -1},
        {"serial": "x" * 37},
        {"serial": "a b"},
        {"serial": "a,b"},
        {"serial": "a\n"},
        {"wwn": 2**64},
        {"boot_index": -1},
    ],
)
def test_an_impossible_disk_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        disk(**fields)


@pytest.mark.parametrize("id", ["", "A", "0a", "a_b", "a b", "a" * 32, "a\n", "a,b", "ä"])
def test_a_device_id_that_qemu_would_refuse_is_refused(id: str) -> None:
    with pytest.raises(ValidationError):
        disk(id)


def test_which_disks_write() -> None:
    assert disk().writes
    assert not disk(read_only=True).writes
    assert not disk(media=Media.CDROM).writes
    assert disk(bus=Bus.IDE, unit=2).address == (Bus.IDE, 0, 2)


@pytest.mark.parametrize(
    "mac", ["", "52:54:00:00:00", "52-54-00-00-00-01", "52:54:00:00:00:0G", "01:00:5e:00:00:01", MAC + "\n"]
)
def test_a_mac_address_that_is_none_is_refused(mac: str) -> None:
    with pytest.raises(ValidationError):
        Nic(id="nic0", mac=mac)


@pytest.mark.parametrize("bridge", ["", "x" * 16, "br 0", "br/0", "br0\n"])
def test_a_bridge_name_linux_would_refuse_is_refused(bridge: str) -> None:
    with pytest.raises(ValidationError):
        Nic(id="nic0", mac=MAC, network=Network.BRIDGE, bridge=bridge)


@pytest.mark.parametrize("model", [Nic, NicAdd])
def test_a_bridge_is_named_exactly_when_there_is_one(model: type[Nic] | type[NicAdd]) -> None:
    base = {"mac": MAC} | ({"id": "nic0"} if model is Nic else {})
    for wrong in ({"network": "bridge"}, {"network": "user", "bridge": "br0"}, {"network": "none", "bridge": "br0"}):
        with pytest.raises(ValidationError, match="bridge"):
            model.model_validate(base | wrong)
    assert model.model_validate(base | {"network": "bridge", "bridge": "br0"}).bridge == "br0"


def test_a_stored_record_of_a_newer_version_is_read() -> None:
    stored = VmRecord(config=config()).to_json() | {"invented_later": 1}
    assert VmRecord.model_validate(stored) == VmRecord(config=config())


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a", "vcpu": 2},
        {"name": ""},
        {"name": "a", "secure_boot": True},
        {"name": "a", "disks": [{"volum": "x"}]},
    ],
)
def test_a_mistyped_or_impossible_request_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VmCreate.model_validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"volume": "a", "device": "/dev/loop0"},
        {"device": "loop0"},
        {"device": "/dev/loop0", "format": "vhd"},
        {"volume": "a\0"},
    ],
)
def test_a_disk_has_exactly_one_source(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DiskAdd.model_validate(body)


def test_a_volume_has_a_size_or_a_source() -> None:
    with pytest.raises(ValidationError, match="size"):
        VolumeCreate(name="a")
    assert VolumeCreate(name="a", source="/srv/a.vhd").size is None


def test_a_change_keeps_what_it_does_not_name() -> None:
    assert VmChange.model_validate({"notes": ""}).model_dump(exclude_unset=True) == {"notes": ""}


def test_but_changes_validates_and_knows_its_fields() -> None:
    vm = config()
    assert vm.but(vcpus=2).vcpus == 2
    assert vm.vcpus == 1
    with pytest.raises(ValidationError):
        vm.but(vcpus=0)
    with pytest.raises(TypeError, match=r"no field vcpu$"):
        vm.but(vcpu=2)
    with pytest.raises(ValidationError, match="frozen"):
        vm.vcpus = 3  # type: ignore[misc]


def test_a_kernel_command_line_has_no_zero_byte_and_ends() -> None:
    assert KernelBoot(kernel="/k", cmdline='a=b "c d",e').cmdline
    for wrong in ("a\0b", "x" * 4097):
        with pytest.raises(ValidationError):
            KernelBoot(kernel="/k", cmdline=wrong)


def test_what_the_roles_may_do() -> None:
    assert set(GRANTS) == set(Role)
    assert set().union(*GRANTS.values()) == set(Permission)
    assert GRANTS[Role.VIEWER] < GRANTS[Role.OPERATOR] < GRANTS[Role.ADMIN]
    assert Permission.PEER not in GRANTS[Role.ADMIN]
    assert GRANTS[Role.HOST] == {Permission.PEER}
    assert Principal(name="token backup", role=Role.VIEWER).may(Permission.VIEW)
    assert not Principal(name="token backup", role=Role.VIEWER).may(Permission.OPERATE)
