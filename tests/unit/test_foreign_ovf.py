"""OVF, OVA and our own folder are read for what they say; what becomes of a machine here."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from hostler.foreign import ova, ovf, own
from hostler.foreign.locate import find
from hostler.foreign.mapping import Place, network_of, places, remarks, request_of
from hostler.model.disk import Bus, Disk, DiskSource, ImageFormat, Media
from hostler.model.errors import InvalidInput
from hostler.model.foreign import ForeignBus, ForeignDisk, ForeignKind, ForeignMachine, ForeignNic, RemarkKind
from hostler.model.limits import PROFILES, Profile
from hostler.model.nic import Network, Nic
from hostler.model.units import GiB, MiB
from hostler.model.vm import Firmware, VmConfig

pytestmark = pytest.mark.unit

# As VMware writes it, shortened to what a reader meets.
VMWARE = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope vmw:buildId="build-1" xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:vmw="http://www.vmware.com/schema/ovf"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References>
    <File ovf:href="web-disk1.vmdk" ovf:id="file1" ovf:size="69120"/>
    <File ovf:href="tools%201.iso" ovf:id="file2" ovf:size="512"/>
  </References>
  <DiskSection><Info>Disks</Info>
    <Disk ovf:capacity="20" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="vmdisk1" ovf:fileRef="file1"
      ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection><Info/><Network ovf:name="VM Network"><Description/></Network></NetworkSection>
  <VirtualSystem ovf:id="web">
    <Info>A virtual machine</Info><Name>web server</Name>
    <OperatingSystemSection ovf:id="94"><Info/><Description>Ubuntu Linux (64-bit)</Description></OperatingSystemSection>
    <AnnotationSection><Info/><Annotation>made in 2019</Annotation></AnnotationSection>
    <VirtualHardwareSection><Info/>
      <Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>4</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>2048</rasd:VirtualQuantity></Item>
      <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>lsilogic</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
      <Item><rasd:Address>1</rasd:Address><rasd:InstanceID>4</rasd:InstanceID>
        <rasd:ResourceType>5</rasd:ResourceType></Item>
      <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>Hard disk 1</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:InstanceID>5</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
      <Item><rasd:AddressOnParent>1</rasd:AddressOnParent><rasd:HostResource>ovf:/file/file2</rasd:HostResource>
        <rasd:InstanceID>6</rasd:InstanceID><rasd:Parent>4</rasd:Parent><rasd:ResourceType>15</rasd:ResourceType></Item>
      <Item><rasd:AddressOnParent>7</rasd:AddressOnParent><rasd:Connection>VM Network</rasd:Connection>
        <rasd:ElementName>Ethernet 1</rasd:ElementName><rasd:InstanceID>7</rasd:InstanceID>
        <rasd:ResourceSubType>E1000</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>
      <Item><rasd:ElementName>Virtual fibre</rasd:ElementName><rasd:ResourceType>7</rasd:ResourceType></Item>
      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
      <vmw:Config ovf:required="false" vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""


def test_what_vmware_writes() -> None:
    found = ovf.read_ovf(VMWARE.encode(), "a.ovf")
    machine = found.machine
    assert (machine.name, machine.vcpus, machine.memory) == ("web server", 4, 2 * GiB)
    assert (machine.firmware, machine.secure_boot, machine.notes) == (Firmware.UEFI, True, "made in 2019")
    assert machine.guest_system == "Ubuntu Linux (64-bit)"
    disk, drive = machine.disks
    assert (disk.place, disk.name, disk.size) == ("scsi 0:0", "web-disk1.vmdk", 20 * GiB)
    assert (drive.place, drive.name, drive.media) == ("ide 0:1", "tools 1.iso", Media.CDROM)
    assert [(n.network, n.mac, n.legacy) for n in machine.nics] == [("VM Network", None, True)]
    assert machine.not_understood == ("item of resource type 7: Virtual fibre",)
    assert [(f.name, f.size) for f in found.files] == [("web-disk1.vmdk", 69120), ("tools 1.iso", 512)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("byte * 2^20", MiB), ("byte*2^30", GiB), ("MegaBytes", MiB), ("byte", 1), ("byte * 1024", 1024), ("what", 7)],
)
def test_units(text: str, size: int) -> None:
    assert ovf.unit_of(text, 7) == size


def test_an_envelope_with_two_machines_is_refused() -> None:
    twice = VMWARE.replace("</Envelope>", "<VirtualSystem/></Envelope>")
    with pytest.raises(InvalidInput, match="2 machines"):
        ovf.read_ovf(twice.encode(), "a.ovf")


# archives


def archive(path: Path, files: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_an_archive_are_ranges_of_it(tmp_path: Path, kind: int) -> None:
    long = "d" * 120 + ".vmdk"
    files = {"web.ovf": VMWARE.encode(), long if kind != tarfile.USTAR_FORMAT else "d.vmdk": b"disk" * 300}
    path = archive(tmp_path / "web.ova", files, kind)
    data = path.read_bytes()
    found = ova.list_members(lambda at, n: data[at : at + n], len(data), "web.ova")
    assert {m.name: data[m.offset : m.offset + m.size] for m in found} == files
    assert find(str(path)).machine.kind is ForeignKind.OVA
    assert find(str(path)).members.keys() == files.keys()


def listed(tar: bytes) -> list[ova.Member]:
    return ova.list_members(lambda at, n: tar[at : at + n], len(tar), "x.ova")


@pytest.mark.parametrize("name", ["../../etc/cron.d/x", "/etc/passwd", "a/b.vmdk", ".."])
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    data = archive(tmp_path / "x.ova", {name: b"1"}).read_bytes()
    with pytest.raises(InvalidInput, match="whose name is a path"):
        listed(data)


def test_an_archive_packed_with_a_dot(tmp_path: Path) -> None:
    """As `tar cf web.ova ./*` and `tar cf web.ova .` make it."""
    path = tmp_path / "web.ova"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo("./web.ovf")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    assert [(m.name, m.size) for m in listed(path.read_bytes())] == [("web.ovf", 3)]


def test_links_and_damage_in_an_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ova"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("disk.vmdk")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/shadow"
        tar.addfile(member)
    with pytest.raises(InvalidInput, match="no plain file"):
        listed(path.read_bytes())
    good = archive(path, {"a": b"1" * 2000}).read_bytes()
    with pytest.raises(InvalidInput, match="cut off"):
        listed(good[:1024])
    with pytest.raises(InvalidInput, match="checksum"):
        listed(b"b" + good[1:])
    with pytest.raises(InvalidInput, match="two files"):
        listed(good[:2560] + good)


def test_manifests() -> None:
    good = b"SHA256(a.ovf)= " + b"0" * 64 + b"\r\nSHA1(a b.vmdk) = " + b"F" * 40 + b"\n"
    assert ova.read_manifest(good, "a.mf") == [
        ova.Digest("a.ovf", "sha256", "0" * 64),
        ova.Digest("a b.vmdk", "sha1", "f" * 40),
    ]
    with pytest.raises(InvalidInput, match="no digest"):
        ova.read_manifest(b"MD5(a)= 1", "a.mf")
    digests = [ova.Digest("disk 1.qcow2", "sha256", "a" * 64)]
    assert own.read_manifest(own.write_manifest(digests), "m") == digests
    with pytest.raises(InvalidInput, match="no digest"):
        own.read_manifest(b"a" * 64 + b"  ../x\n", "m")


# our own


CONFIG = VmConfig(
    id="8c5ab1c6-21f8-4c4c-9d5e-35a1a9f0a001",
    name="web",
    vcpus=3,
    memory=768 * MiB,
    machine="pc-q35-7.2",
    cpu_model="Nehalem-v1",
    run_as=100_001,
    disks=(
        Disk(
            id="disk0",
            source=DiskSource(path="/srv/secret/web.qcow2", format=ImageFormat.QCOW2, size=GiB),
            serial="HL1",
            wwn=5 << 60,
            boot_index=1,
        ),
    ),
    nics=(Nic(id="nic0", mac="52:54:00:00:00:01", network=Network.BRIDGE, bridge="br0", slot=3),),
)


def test_our_own_description_keeps_everything_but_paths() -> None:
    data = own.write_own(CONFIG, {"disk0": "disk0.qcow2"}, "1.0", "2026-11-24T10:00:00Z")
    assert b"/srv/secret" not in data
    found = own.read_own(data, "vm.json")
    kept = CONFIG.disks[0].but(source=CONFIG.disks[0].source.but(path="disk0.qcow2"))
    assert found.config == CONFIG.but(run_as=None, disks=(kept,))
    assert found.machine.nics[0].network == "bridge:br0"
    assert found.machine.disks[0].format is ImageFormat.QCOW2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mark": "x"}, "no description"),
        ({"version": 2}, "version 2"),
        ({"config": {}}, "does not describe"),
        ({"config": None}, "does not describe"),
    ],
)
def test_other_peoples_json_is_refused(change: dict[str, object], why: str) -> None:
    content = json.loads(own.write_own(CONFIG, {"disk0": "disk0.qcow2"}, "1.0", ""))
    with pytest.raises(InvalidInput, match=why):
        own.read_own(json.dumps(content | change).encode(), "vm.json")


@pytest.mark.parametrize("name", ["/etc/shadow", "../disk", "", "a/b"])
def test_a_disk_of_our_own_is_beside_it(name: str) -> None:
    data = own.write_own(CONFIG, {"disk0": name}, "1.0", "")
    with pytest.raises(InvalidInput, match="no file beside it"):
        own.read_own(data, "vm.json")


# what becomes of it


def disk(bus: ForeignBus, controller: int, unit: int, **more: object) -> ForeignDisk:
    return ForeignDisk(bus=bus, controller=controller, unit=unit, name="a.vhd", **more)  # type: ignore[arg-type]


def test_places() -> None:
    ide, scsi, sata = ForeignBus.IDE, ForeignBus.SCSI, ForeignBus.SATA
    found = places(
        (disk(sata, 0, 0), disk(ide, 1, 1), disk(ide, 0, 0), disk(scsi, 2, 63), disk(ForeignBus.FLOPPY, 0, 0))
    )
    assert found == [
        Place(Bus.IDE, 0, 1),
        Place(Bus.IDE, 0, 3),
        Place(Bus.IDE, 0, 0),
        Place(Bus.SCSI, 2, 63),
        None,
    ]
    many = places(tuple(disk(sata, 0, unit) for unit in range(6)))
    assert many[4:] == [Place(Bus.SCSI, 0, 0), Place(Bus.SCSI, 0, 1)]
    assert len(set(places(tuple(disk(scsi, 9, 9) for _ in range(256))))) == 256
    assert places(tuple(disk(scsi, 9, 9) for _ in range(257)))[-1] is None


def test_networks() -> None:
    lan = ForeignNic(mac="00:15:5d:00:00:01", network="LAN")
    assert network_of(lan, {}, None, own=False).network is Network.NONE
    assert network_of(lan, {}, "user", own=False).network is Network.USER
    assert network_of(lan, {"LAN": "bridge:br1"}, "user", own=False).bridge == "br1"
    assert network_of(ForeignNic(network=""), {}, "user", own=False).network is Network.NONE
    assert network_of(ForeignNic(network="bridge:br0"), {}, None, own=True).bridge == "br0"
    assert network_of(ForeignNic(network="bridge:br0"), {}, None, own=False).network is Network.NONE
    with pytest.raises(InvalidInput, match="none that an adapter"):
        network_of(lan, {"LAN": "br1"}, None, own=False)


def test_what_is_said_about_a_machine() -> None:
    machine = ForeignMachine(
        kind=ForeignKind.HYPER_V_XML,
        name="a",
        memory=GiB,
        memory_maximum=4 * GiB,
        generation=2,
        firmware=Firmware.UEFI,
        tpm=True,
        disks=(disk(ForeignBus.SCSI, 0, 0), disk(ForeignBus.IDE, 0, 0)),
        nics=(ForeignNic(mac="00:15:5d:00:00:01"), ForeignNic(legacy=True)),
        com_ports=("\\\\.\\pipe\\a",),
        integration=("heartbeat",),
        saved_state=True,
    )
    found = remarks(machine, places(machine.disks), PROFILES[Profile.HOSTLER])
    kinds = [r.kind for r in found]
    assert kinds == sorted(kinds, key=list(RemarkKind).index)
    said = {(r.kind, r.subject) for r in found}
    assert {
        (RemarkKind.GUEST, "SCSI disks"),
        (RemarkKind.GUEST, "IDE disks"),
        (RemarkKind.GUEST, "firmware"),
        (RemarkKind.GUEST, "network adapters"),
        (RemarkKind.GUEST, "integration services"),
        (RemarkKind.LOST, "TPM"),
        (RemarkKind.LOST, "dynamic memory"),
        (RemarkKind.LOST, "saved state"),
        (RemarkKind.LOST, "COM1"),
        (RemarkKind.KEPT, "network adapter 1"),
        (RemarkKind.CHANGED, "network adapter 2"),
    } <= said
    request = request_of(machine, "b", (), controllers=2)
    assert (request.name, request.memory, request.scsi_controllers) == ("b", GiB, 2)
    assert request_of(machine.but(memory=0), "b", (), 0).memory == GiB
    assert request_of(machine.but(memory=GiB + 5), "b", (), 0).memory == GiB
