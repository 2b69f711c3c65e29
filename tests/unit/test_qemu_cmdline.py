"""The command line against its golden files.

After a change that is meant, write them anew and look at the difference before committing it:

    REGENERATE_GOLDEN=1 python -m pytest tests/unit/test_qemu_cmdline.py
    git diff tests/unit/golden

A change to what the guest sees (machine, CPU, device, address) must be bound to a new machine version instead: saved
and running VMs depend on the old line.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from hostler.model.disk import Disk
from hostler.model.errors import HostLacks
from hostler.model.host import Accelerator, QemuFacts
from hostler.model.machine import LaunchSpec
from hostler.model.nic import Network, Nic
from hostler.model.vm import Firmware
from hostler.qemu.cmdline import aio_for, command_line, firmware_template, nic_device_id
from hostler.testing.vm_variants import FACTS, VARIANTS, config, volume

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_command_line_is_the_golden_one(name: str) -> None:
    path = GOLDEN / f"{name}.args"
    line = command_line(VARIANTS[name], FACTS)
    assert not any("\n" in argument for argument in line)
    if os.environ.get("REGENERATE_GOLDEN"):
        path.write_text("\n".join(line) + "\n")
    assert line == path.read_text().splitlines()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.args")} == set(VARIANTS)


def test_what_the_guest_sees_does_not_depend_on_the_host() -> None:
    """The lines of two hosts differ in paths, taps and the way files are read, and in nothing else."""
    here = VARIANTS["nics"]
    there = here.but(run_dir="/run/x", state_dir="/srv/x", taps={"nic2": "t0", "nic3": "t1"}, incoming=True)
    one = command_line(here, FACTS)
    other = command_line(there, FACTS.but(binary="/opt/qemu", aio_io_uring=False))
    assert devices(one) == devices(other)
    assert [a for a in one if a.startswith("pc-q35")] == [a for a in other if a.startswith("pc-q35")]


def devices(line: list[str]) -> list[object]:
    return [json.loads(value) for option, value in itertools.pairwise(line) if option == "-device"]


def test_order_of_disks_in_the_configuration_does_not_matter() -> None:
    spec = VARIANTS["formats"]
    turned = spec.but(config=spec.config.but(disks=tuple(reversed(spec.config.disks))))
    assert command_line(turned, FACTS) == command_line(spec, FACTS)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_no_two_devices_share_an_id_or_an_address(name: str) -> None:
    found = devices(command_line(VARIANTS[name], FACTS))
    ids = [device["id"] for device in found if isinstance(device, dict)]
    places = [(d["bus"], d["addr"]) for d in found if isinstance(d, dict) and "addr" in d]
    assert len(set(ids)) == len(ids)
    assert len(set(places)) == len(places)


def test_a_disk_named_like_a_controller_does_not_collide() -> None:
    vm = config(disks=(Disk(id="scsi0", source=volume()),), nics=(Nic(id="vga", mac="52:54:00:00:00:01"),))
    found = devices(command_line(VARIANTS["bios"].but(config=vm), FACTS))
    ids = [device["id"] for device in found if isinstance(device, dict)]
    assert len(set(ids)) == len(ids)


def test_commas_in_names_and_paths_stay_in_their_value() -> None:
    spec = VARIANTS["bios"].but(config=config(name="a,debug-threads=off"), run_dir="/run/a,b")
    line = command_line(spec, FACTS)
    assert line[line.index("-name") + 1] == "guest=a,,debug-threads=off,debug-threads=on"
    assert "unix:/run/a,,b/vnc.sock" in line
    assert "/run/a,b/qemu.pid" in line


def test_qmp_listens_on_an_inherited_socket_when_given_one() -> None:
    line = command_line(VARIANTS["bios"], FACTS, qmp_fd=17)
    assert "socket,id=qmp,fd=17,server=on,wait=off" in line
    assert not any("qmp.sock" in argument for argument in line)


def test_kvm_is_said_only_when_chosen() -> None:
    line = command_line(VARIANTS["bios"].but(accelerator=Accelerator.KVM), FACTS)
    assert line[line.index("-accel") + 1] == "kvm"


def test_without_seccomp_there_is_no_sandbox_option() -> None:
    assert "-sandbox" not in command_line(VARIANTS["bios"], FACTS.but(sandbox=False))


@pytest.mark.parametrize(
    ("spec", "facts", "word"),
    [
        (VARIANTS["bios"], FACTS.but(machines=("pc-q35-9.0",)), "machine type pc-q35-7.2"),
        (VARIANTS["uefi"], FACTS.but(firmware_code=None), "UEFI firmware"),
        (VARIANTS["secure-boot"], FACTS.but(firmware_secure_vars=None), "secure boot"),
        (VARIANTS["tpm"], FACTS.but(tpm=False), "TPM emulator"),
    ],
)
def test_what_the_host_lacks_is_named_before_qemu_starts(spec: LaunchSpec, facts: QemuFacts, word: str) -> None:
    with pytest.raises(HostLacks, match=word) as caught:
        command_line(spec, facts)
    assert caught.value.advice


def test_bridge_adapter_without_a_tap_is_refused() -> None:
    vm = config(nics=(Nic(id="lan", mac="52:54:00:00:00:01", network=Network.BRIDGE, bridge="br0"),))
    with pytest.raises(HostLacks, match="lan was given no tap"):
        command_line(VARIANTS["bios"].but(config=vm), FACTS)


def test_variable_store_template_follows_secure_boot() -> None:
    assert firmware_template(config(), FACTS) is None
    assert firmware_template(config(firmware=Firmware.UEFI), FACTS) == FACTS.firmware_vars
    assert firmware_template(config(firmware=Firmware.UEFI, secure_boot=True), FACTS) == FACTS.firmware_secure_vars


def test_adapter_device_id_and_aio() -> None:
    assert nic_device_id(Nic(id="lan", mac="52:54:00:00:00:01")) == "nic-lan"
    assert (aio_for(FACTS), aio_for(FACTS.but(aio_io_uring=False))) == ("io_uring", "native")
