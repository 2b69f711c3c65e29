"""What Hyper-V writes about its machines, in each of its three forms, is read for what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostler.foreign import hyperv_exp, hyperv_xml, vmcx
from hostler.foreign.hyperv_config import clean_mac, machine_of, snapshot_of
from hostler.foreign.locate import find, locate_image
from hostler.model.disk import Media
from hostler.model.errors import InvalidInput, NotFound
from hostler.model.foreign import ForeignBus, ForeignKind, ForeignMachine
from hostler.model.units import GiB, MiB
from hostler.model.vm import Firmware
from hostler.testing import hyperv_export as made
from hostler.testing.hyperv_export import Adapter, Drive, Machine

pytestmark = pytest.mark.unit

FULL = Machine(
    name="Büro-Server <1>",
    ide={
        (0, 0): Drive("D:\\VM\\boot.vhd"),
        (0, 1): Drive("D:\\VM\\swap.vhd"),
        (1, 0): Drive("C:\\iso\\tools.iso", "ISO"),
    },
    scsi=({0: Drive("D:\\VM\\data.vhd"), 63: Drive("E:\\last.vhd")}, {5: Drive("\\\\.\\PHYSICALDRIVE3", "Physical")}),
    floppy="C:\\a.vfd",
    nics=(Adapter("00-15-5D-01-07-DC", "LAN", static=True), Adapter("00-15-5D-01-07-DD", "", legacy=True)),
    notes="two\nlines",
    com1="\\\\.\\pipe\\debug",
    autostart=True,
    saved=True,
)


def of_xml(machine: Machine) -> ForeignMachine:
    root = hyperv_xml.read_configuration(made.xml(machine), "a.xml")
    return machine_of(root, ForeignKind.HYPER_V_XML, "fallback")


def test_a_configuration_says_everything() -> None:
    found = of_xml(FULL)
    assert (found.name, found.vcpus, found.memory) == ("Büro-Server <1>", 2, 512 * MiB)
    assert (found.generation, found.firmware, found.version, found.id) == (1, Firmware.BIOS, "5.0", made.VM_ID)
    assert found.notes == "two\nlines"
    assert found.starts_with_host
    assert found.saved_state
    assert found.boot_order == ("Optical", "HardDrive", "Network", "Floppy")
    assert found.com_ports == ("\\\\.\\pipe\\debug", "")
    assert "shutdown" in found.integration
    assert found.scsi_controllers == 2
    places = {d.place: (d.name, d.media, d.physical) for d in found.disks}
    assert places == {
        "ide 0:0": ("D:\\VM\\boot.vhd", Media.DISK, False),
        "ide 0:1": ("D:\\VM\\swap.vhd", Media.DISK, False),
        "ide 1:0": ("C:\\iso\\tools.iso", Media.CDROM, False),
        "scsi 0:0": ("D:\\VM\\data.vhd", Media.DISK, False),
        "scsi 0:63": ("E:\\last.vhd", Media.DISK, False),
        "scsi 1:5": ("\\\\.\\PHYSICALDRIVE3", Media.DISK, True),
        "floppy 0:0": ("C:\\a.vfd", Media.FLOPPY, False),
    }
    first, second = found.nics
    assert (first.mac, first.static, first.network, first.legacy) == ("00:15:5d:01:07:dc", True, "LAN", False)
    assert (second.mac, second.network, second.legacy) == ("00:15:5d:01:07:dd", "", True)
    assert found.not_understood == ()


def test_generation_2_is_uefi_and_dynamic_memory_has_a_maximum() -> None:
    found = of_xml(Machine(generation=2, dynamic=True, memory=2048))
    assert (found.firmware, found.secure_boot) == (Firmware.UEFI, True)
    assert (found.memory, found.memory_maximum) == (2 * GiB, 1_048_576 * MiB)


def test_what_is_not_understood_is_told_verbatim() -> None:
    fibre = "_11111111-2222-3333-4444-555555555555_"
    extra: made.Tree = [(fibre, [("WorldWideName", "C003FF0000FFFF00")]), ("settings2", [("novel", 7)])]
    found = of_xml(Machine(extra=extra))
    assert f"device {fibre.strip('_')} ({fibre.strip('_')})" in found.not_understood
    assert f"{fibre}/WorldWideName = C003FF0000FFFF00" in found.not_understood
    assert "settings2/novel = 7" in found.not_understood


def test_an_old_configuration_without_a_manifest_entry_is_read_too() -> None:
    """2008 kept the names of switch and port beside the address, and emulated devices have no entry."""
    nic: made.Tree = [("MacAddress", "00-15-5D-00-00-01"), ("SwitchName", "abc"), ("FriendlyName", "LAN card")]
    scsi: made.Tree = [("controller0", [("drive2", [("pathname", "D:\\x.vhd"), ("type", "VHD")])])]
    extra: made.Tree = [
        ("_aaaaaaaa-0000-0000-0000-000000000001_", nic),
        ("_aaaaaaaa-0000-0000-0000-000000000002_", scsi),
    ]
    found = of_xml(Machine(nics=(), scsi=(), extra=extra))
    assert [(n.mac, n.network) for n in found.nics] == [("00:15:5d:00:00:01", "abc")]
    assert [(d.place, d.name) for d in found.disks] == [("scsi 0:2", "D:\\x.vhd")]


def test_the_binary_form_says_the_same_as_the_xml() -> None:
    binary = vmcx.read_vmcx(made.vmcx(FULL), "a.vmcx")
    assert machine_of(binary.root, ForeignKind.HYPER_V_XML, "fallback") == of_xml(FULL)
    assert not binary.log_pending
    long = Machine(notes="n" * 5000)
    root = vmcx.read_vmcx(made.vmcx(long, dirty=True), "a.vmcx")
    assert machine_of(root.root, ForeignKind.HYPER_V_VMCX, "x").notes == "n" * 5000
    assert root.log_pending


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (0, b"\0" * 4, "is no binary configuration"),
        (10, b"\0\3", "version"),
        (0x2000, b"\1\2\3\4", "object table"),
        (0x2004, b"\xff\xff\xff\x7f", "more objects"),
        (0x2008 + 5, b"\xff\xff\xff\xff\xff", "cut off"),
    ],
)
def test_a_damaged_binary_form_is_refused(at: int, value: bytes, why: str) -> None:
    data = bytearray(made.vmcx(FULL))
    data[at : at + len(value)] = value
    if at == 0:
        data[0x1000:0x1004] = value
    with pytest.raises(InvalidInput, match=why):
        vmcx.read_vmcx(bytes(data), "a.vmcx")


def test_tables_that_overlap_do_not_multiply() -> None:
    """A hostile file names the same large piece a thousand times; what is taken out of it stays bounded."""
    data = bytearray(made.vmcx(FULL)) + bytes(1024 * 1024)
    row = bytes(data[0x2008 : 0x2008 + 18])
    objects = b"\2" + row[1:5] + (0x4000).to_bytes(8, "little") + (1024 * 1024).to_bytes(4, "little") + b"\1"
    count = 200
    data[0x2004:0x2008] = count.to_bytes(4, "little")
    data[0x2008 : 0x2008 + 18 * count] = objects * count
    with pytest.raises(InvalidInput, match="overlap"):
        vmcx.read_vmcx(bytes(data), "a.vmcx")


def test_an_export_of_2008_is_read_from_its_instances() -> None:
    data = made.exp("old", {(0, 0): "C:\\VM\\boot.vhd", (1, 0): "C:\\tools.iso", (1, 1): "C:\\VM\\data.vhd"})
    assert hyperv_exp.is_exp(data)
    found = hyperv_exp.read_exp(data, "a.exp", "fallback")
    assert (found.name, found.vcpus, found.memory, found.notes) == ("old", 2, 512 * MiB, "from 2008")
    assert found.boot_order == ("CD", "IDE", "PXE", "Floppy")
    assert found.starts_with_host
    assert [(d.place, d.name, d.media) for d in found.disks] == [
        ("ide 0:0", "C:\\VM\\boot.vhd", Media.DISK),
        ("ide 1:0", "C:\\tools.iso", Media.CDROM),
        ("ide 1:1", "C:\\VM\\data.vhd", Media.DISK),
    ]
    assert [(n.mac, n.network, n.static) for n in found.nics] == [("00:15:5d:01:02:03", "LAN", False)]
    assert found.not_understood == ("Msvm_ResourceAllocationSettingData (resource type 33): Microsoft Fibre Thing",)


def test_a_document_type_is_left_out_only_where_it_is_harmless() -> None:
    plain = made.exp("a", {}).decode("utf-16")
    evil = plain.replace('SYSTEM "http://www.dmtf.org/cim/mof.dtd/2.0">', '[<!ENTITY a SYSTEM "file:///etc/passwd">]>')
    with pytest.raises(InvalidInput, match="document type"):
        hyperv_exp.read_exp(evil.encode("utf-16"), "a.exp", "x")
    with pytest.raises(InvalidInput, match="well-formed"):
        hyperv_exp.read_exp(plain.replace("from 2008", "&a;").encode("utf-16"), "a.exp", "x")
    config = made.xml(Machine()).decode("utf-16").replace("<configuration>", "<!DOCTYPE x><configuration>", 1)
    with pytest.raises(InvalidInput, match="document type"):
        hyperv_xml.read_configuration(config.encode("utf-16"), "a.xml")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<a/>",
        b"<configuration>",
        b"\xff\xfe<\0",
        b'<?xml version="1.0" encoding="EBCDIC-CP"?><configuration/>',
        b"<configuration>" + b"<a>" * 100 + b"</a>" * 100 + b"</configuration>",
    ],
)
def test_what_is_no_configuration_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        hyperv_xml.read_configuration(data, "a.xml")


def test_a_snapshot_knows_its_parent() -> None:
    parent = "11111111-2222-3333-4444-555555555555"
    config = Machine(name="before the update", ide={(0, 0): Drive("D:\\a_1.avhd")}, parent=parent.upper())
    found = snapshot_of(hyperv_xml.read_configuration(made.xml(config), "s.xml"), "ABCD")
    assert (found.id, found.name, found.parent) == ("abcd", "before the update", parent)
    assert [d.name for d in found.disks] == ["D:\\a_1.avhd"]


@pytest.mark.parametrize(
    ("text", "mac"),
    [
        ("00-15-5D-01-07-DC", "00:15:5d:01:07:dc"),
        ("00155D0107DC", "00:15:5d:01:07:dc"),
        ("000000000000", None),
        ("01:00:5e:00:00:01", None),
        ("", None),
        ("00-15-5D-01-07", None),
    ],
)
def test_addresses_of_adapters(text: str, mac: str | None) -> None:
    assert clean_mac(text) == mac


# folders


def export(root: Path, form: str = "xml") -> Path:
    folder = root / "web01"
    for name in ("Virtual Machines", "Virtual Hard Disks", "Snapshots"):
        (folder / name).mkdir(parents=True)
    (folder / "config.xml").write_bytes(made.xml(Machine(name="about the export")))
    config = Machine(ide={(0, 0): Drive("D:\\VMs\\web01\\Boot.vhd")})
    data = {"xml": made.xml, "vmcx": made.vmcx}.get(form, lambda m: made.exp(m.name, {(0, 0): m.ide[0, 0].path}))(
        config
    )
    (folder / "Virtual Machines" / f"{made.VM_ID.upper()}.{form}").write_bytes(data)
    (folder / "Virtual Hard Disks" / "boot.VHD").write_bytes(b"x")
    snapshot = Machine(name="first", ide={(0, 0): Drive("D:\\boot_1.avhd")})
    (folder / "Snapshots" / "AAAA.xml").write_bytes(made.xml(snapshot))
    return folder


@pytest.mark.parametrize("form", ["xml", "exp", "vmcx"])
def test_an_exported_folder(tmp_path: Path, form: str) -> None:
    folder = export(tmp_path, form)
    found = find(str(folder))
    assert found.machine.name == "web01"
    assert str(found.machine.kind) == f"hyper-v-{form}"
    assert [s.name for s in found.machine.snapshots] == ["first"]
    disk = found.machine.disks[0]
    assert disk.bus is ForeignBus.IDE
    image = locate_image(disk.name, found.directories)
    assert image == str(folder / "Virtual Hard Disks" / "boot.VHD")
    assert find(found.description).machine == found.machine


def test_an_exp_with_the_content_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.exp").write_bytes(made.xml(Machine(name="either")))
    found = find(str(tmp_path))
    assert (found.machine.name, found.machine.kind) == ("either", ForeignKind.HYPER_V_XML)


def test_a_bare_configuration_beside_its_disks(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_bytes(made.xml(Machine(ide={(0, 0): Drive("\\\\server\\share\\b.vhd")})))
    (tmp_path / "b.vhd").write_bytes(b"x")
    found = find(str(tmp_path / "a.xml"))
    assert locate_image(found.machine.disks[0].name, found.directories) == str(tmp_path / "b.vhd")
    assert locate_image("../b.vhd", found.directories) == str(tmp_path / "b.vhd")
    assert locate_image("/etc/passwd", found.directories) is None
    assert locate_image("", found.directories) is None


def test_a_folder_that_says_too_much_or_too_little(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no description"):
        find(str(tmp_path))
    (tmp_path / "a.xml").write_bytes(made.xml(Machine()))
    (tmp_path / "b.xml").write_bytes(made.xml(Machine()))
    with pytest.raises(InvalidInput, match=r"several descriptions: a\.xml, b\.xml"):
        find(str(tmp_path))
    with pytest.raises(NotFound):
        find(str(tmp_path / "none"))


def test_an_image_alone_becomes_a_machine(tmp_path: Path) -> None:
    (tmp_path / "disk.vhd").write_bytes(b"conectix")
    found = find(str(tmp_path / "disk.vhd"))
    assert (found.machine.kind, found.machine.name, len(found.machine.disks)) == (ForeignKind.IMAGE, "disk", 1)
    assert find(str(tmp_path)).machine == found.machine
