"""From words to requests: sizes, disks, adapters, new disks, and `vm create` as a whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.cli import parsing
from hostler.cli.commands.vm_create import create, vm_request
from hostler.cli.making import NewDisk
from hostler.model.disk import Bus, CacheMode, ImageFormat, Media
from hostler.model.errors import InvalidInput
from hostler.model.nic import Network
from hostler.model.units import GiB, MiB
from hostler.model.vm import Firmware

pytestmark = pytest.mark.unit


def options(*words: str) -> dict[str, Any]:
    """What click hands to `vm create` for these words."""
    return create.make_context("create", list(words)).params


def request(*words: str) -> Any:
    """The request for these words."""
    given = options(*words)
    for other in ("start", "dry_run", "wait", "new_disks"):
        given.pop(other)
    return vm_request(given.pop("name"), **given)


def test_only_what_was_said_is_sent() -> None:
    assert request("web1").model_fields_set == {"name"}


def test_a_whole_vm() -> None:
    vm = request(
        "web1", "--memory", "2G", "--vcpus", "3", "--disk", "data,bus=ide,read-only=yes", "--disk", "/srv/a.vhdx",
        "--disk", "/dev/loop7", "--cdrom", "/iso/debian.iso", "--nic", "bridge:br0,mac=52:54:00:AA:BB:CC,queues=2",
        "--nic", "none", "--uefi", "--tpm", "--scsi-controllers", "2", "--autostart", "--autostart-order", "7",
        "--autostart-delay", "3", "--shutdown-timeout", "9", "--shutdown-then", "turn-off", "--notes", "n",
        "--kernel", "/boot/k", "--initrd", "/boot/i", "--append", "console=ttyS0", "--machine", "pc-q35-7.2",
        "--cpu-model", "Nehalem-v1",
    )  # fmt: skip
    assert (vm.memory, vm.vcpus, vm.firmware, vm.tpm, vm.scsi_controllers) == (2 * GiB, 3, Firmware.UEFI, True, 2)
    data, image, device, iso = vm.disks
    assert (data.volume, data.bus, data.read_only) == ("data", Bus.IDE, True)
    assert (image.volume, image.device, image.format) == ("/srv/a.vhdx", None, None)
    assert (device.volume, device.device) == (None, "/dev/loop7")
    assert (iso.media, iso.bus, iso.format, iso.read_only) == (Media.CDROM, Bus.IDE, ImageFormat.RAW, True)
    assert (vm.nics[0].network, vm.nics[0].bridge, vm.nics[0].mac, vm.nics[0].queues) == (
        Network.BRIDGE, "br0", "52:54:00:aa:bb:cc", 2,
    )  # fmt: skip
    assert vm.nics[1].network is Network.NONE
    assert (vm.autostart.enabled, vm.autostart.order, vm.autostart.delay) == (True, 7, 3)
    assert (vm.shutdown.timeout, vm.shutdown.then) == (9, "turn-off")
    assert (vm.kernel.kernel, vm.kernel.initrd, vm.kernel.cmdline) == ("/boot/k", "/boot/i", "console=ttyS0")
    assert (vm.machine, vm.cpu_model, vm.notes) == ("pc-q35-7.2", "Nehalem-v1", "n")


def test_secure_boot_means_uefi() -> None:
    vm = request("web1", "--secure-boot")
    assert (vm.firmware, vm.secure_boot) == (Firmware.UEFI, True)


def test_a_relative_path_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert request("web1", "--disk", "./a.qcow2").disks[0].volume == f"{tmp_path}/a.qcow2"
    assert request("web1", "--cdrom", "a.iso").disks[0].volume == f"{tmp_path}/a.iso"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--disk", "a,buss=ide"], "there is no option 'buss'"),
        (["--disk", "a,bus=ide,bus=scsi"], "stands there twice"),
        (["--disk", "a,bus=usb"], "bus"),
        (["--disk", "a,read-only=perhaps"], "neither yes nor no"),
        (["--disk", "a,controller=9"], "controller"),
        (["--disk", "/dev/sda,format=qcow2"], "no format"),
        (["--nic", "wifi"], "no network 'wifi'"),
        (["--nic", "bridge"], "a bridge, and only a bridge"),
        (["--nic", "user:br0"], "a bridge, and only a bridge"),
        (["--nic", "user,mac=nonsense"], "mac"),
        (["--append", "quiet"], "only with --kernel"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], cause: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        request("web1", *words)
    assert cause in refused.value.cause


def test_the_near_option_is_suggested() -> None:
    with pytest.raises(InvalidInput) as refused:
        parsing.disk("a,cach=none")
    assert refused.value.advice == "did you mean 'cache'?"


def test_a_path_may_hold_commas_and_equal_signs() -> None:
    disk = parsing.disk("/srv/a,b=1,c,cache=writeback")
    assert (disk.volume, disk.cache) == ("/srv/a,b=1,c", CacheMode.WRITEBACK)


@given(st.dictionaries(st.sampled_from(parsing.DISK_KEYS), st.text(st.characters(exclude_characters=","), max_size=9)))
def test_options_survive_the_round_trip(chosen: dict[str, str]) -> None:
    text = ",".join(["/srv/x", *(f"{key}={value}" for key, value in chosen.items())])
    assert parsing.split_options(text, parsing.DISK_KEYS, "disk") == ("/srv/x", chosen)


def test_new_disk() -> None:
    new = NewDisk("20G,format=vhdx,path=/srv/x.vhdx,bus=ide,discard=no")
    volume, disk = new.volume("web1"), new.disk("web1")
    assert (volume.name, volume.size, volume.format, volume.path) == ("web1", 20 * GiB, ImageFormat.VHDX, "/srv/x.vhdx")
    assert (disk.volume, disk.bus, disk.discard) == ("web1", Bus.IDE, False)


@pytest.mark.parametrize("text", ["", "x", "20G,size=3", "20G,format=vmdk", "-1G"])
def test_new_disk_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        NewDisk(text).volume("web1")


def test_sizes() -> None:
    assert parsing.SIZE.convert("1.5G", None, None) == 1536 * MiB
    assert parsing.SIZE.convert(7, None, None) == 7
