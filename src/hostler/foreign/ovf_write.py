"""An OVF descriptor (1.1, DSP0243) of one of our VMs, in the words that other products read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

from hostler.foreign.ova import Digest
from hostler.model.disk import Bus, Disk
from hostler.model.nic import Network, Nic
from hostler.model.units import MiB
from hostler.model.vm import Firmware, VmConfig

_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
  xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
  xmlns:vmw="http://www.vmware.com/schema/ovf">
"""
_VMDK = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"


@dataclass(frozen=True, slots=True)
class OvfDisk:
    """A disk and its file: name and size of that in bytes."""

    disk: Disk
    file: str
    file_size: int


def write_ovf(config: VmConfig, disks: Sequence[OvfDisk]) -> bytes:
    """The descriptor. SCSI becomes an LSI controller, IDE (AHCI) a SATA one, adapters E1000: what every product offers;
    a guest that ran on virtio here finds its drivers for those in its own system."""
    networks = dict.fromkeys(_network(nic) for nic in config.nics)
    parts = [
        _HEAD,
        "  <References>\n",
        *(
            f'    <File ovf:href={quoteattr(quote(d.file))} ovf:id="file{n}" ovf:size="{d.file_size}"/>\n'
            for n, d in enumerate(disks, 1)
        ),
        "  </References>\n  <DiskSection>\n    <Info>Virtual disks</Info>\n",
        *(
            f'    <Disk ovf:capacity="{d.disk.source.size}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk{n}"'
            f' ovf:fileRef="file{n}" ovf:format="{_VMDK}"/>\n'
            for n, d in enumerate(disks, 1)
        ),
        "  </DiskSection>\n  <NetworkSection>\n    <Info>Networks</Info>\n",
        *(
            f"    <Network ovf:name={quoteattr(name)}><Description>{escape(name)}</Description></Network>\n"
            for name in networks
        ),
        f"  </NetworkSection>\n  <VirtualSystem ovf:id={quoteattr(config.id)}>\n    <Info>A virtual machine</Info>\n",
        f"    <Name>{escape(config.name)}</Name>\n",
        '    <OperatingSystemSection ovf:id="1"><Info>The guest system is not known</Info></OperatingSystemSection>\n',
        f"    <AnnotationSection><Info>Notes</Info><Annotation>{escape(_plain(config.notes))}</Annotation>"
        "</AnnotationSection>\n"
        if config.notes
        else "",
        "    <VirtualHardwareSection>\n      <Info>Virtual hardware</Info>\n",
        *_hardware(config, disks),
        "    </VirtualHardwareSection>\n  </VirtualSystem>\n</Envelope>\n",
    ]
    return "".join(parts).encode()


def _plain(text: str) -> str:
    """Without control characters, which XML 1.0 has no way to write."""
    return "".join(c for c in text if c in "\n\t" or c >= " ")


def _network(nic: Nic) -> str:
    return nic.bridge or ("user" if nic.network is Network.USER else "none")


def _hardware(config: VmConfig, disks: Sequence[OvfDisk]) -> list[str]:
    items = [
        _item(1, 3, f"{config.vcpus} virtual processors", AllocationUnits="hertz * 10^6", VirtualQuantity=config.vcpus),
        _item(
            2,
            4,
            f"{config.memory // MiB} MiB of memory",
            AllocationUnits="byte * 2^20",
            VirtualQuantity=config.memory // MiB,
        ),
    ]
    controllers = {Bus.IDE: 10} if any(d.disk.bus is Bus.IDE for d in disks) else {}
    if controllers:
        items.append(_item(10, 20, "SATA controller", Address=0, ResourceSubType="AHCI"))
    scsi = sorted({d.disk.controller for d in disks if d.disk.bus is Bus.SCSI})
    items += [_item(20 + n, 6, f"SCSI controller {n}", Address=n, ResourceSubType="lsilogic") for n in scsi]
    for number, made in enumerate(disks, 1):
        parent = 10 if made.disk.bus is Bus.IDE else 20 + made.disk.controller
        items.append(
            _item(
                100 + number,
                17,
                f"Hard disk {number}",
                AddressOnParent=made.disk.unit,
                HostResource=f"ovf:/disk/vmdisk{number}",
                Parent=parent,
            )
        )
    for number, nic in enumerate(config.nics, 1):
        items.append(
            _item(
                1000 + number,
                10,
                f"Network adapter {number}",
                Address=nic.mac,
                AutomaticAllocation="true",
                Connection=_network(nic),
                ResourceSubType="E1000",
            )
        )
    return [_system(config), *items, *_firmware(config)]


def _system(config: VmConfig) -> str:
    return (
        "      <System><vssd:ElementName>Virtual hardware</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>"
        f"<vssd:VirtualSystemIdentifier>{escape(config.name)}</vssd:VirtualSystemIdentifier>"
        "<vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType></System>\n"
    )


def _item(number: int, kind: int, name: str, **fields: object) -> str:
    """Fields in the order of the alphabet, as the schema wants them."""
    values = {**fields, "ElementName": name, "InstanceID": number, "ResourceType": kind}
    inner = "".join(f"<rasd:{key}>{escape(str(values[key]))}</rasd:{key}>" for key in sorted(values))
    return f"      <Item>{inner}</Item>\n"


def _firmware(config: VmConfig) -> list[str]:
    if config.firmware is not Firmware.UEFI:
        return []
    lines = ['      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>\n']
    if config.secure_boot:
        lines.append(
            '      <vmw:Config ovf:required="false" vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="true"/>\n'
        )
    return lines


def write_mf(digests: Sequence[Digest]) -> bytes:
    """An OVF's manifest."""
    return "".join(f"{d.algorithm.upper()}({d.name})= {d.value}\n" for d in digests).encode()
