"""Our own exported folder: `vm.json`, the disks beside it, and `manifest.sha256`, which `sha256sum -c` understands.

`vm.json` has the VM's whole configuration, with the names of files in the place of paths. Everything in it is checked
again when it is read: whoever wrote it may not have been this program.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue, ValidationError

from hostler.foreign.errors import bad_description
from hostler.foreign.ova import Digest
from hostler.model.disk import Bus, Disk, DiskSource, SourceKind
from hostler.model.foreign import ForeignBus, ForeignDisk, ForeignKind, ForeignMachine, ForeignNic
from hostler.model.names import is_id
from hostler.model.nic import Network, Nic
from hostler.model.vm import VmConfig

DESCRIPTION = "vm.json"
MANIFEST = "manifest.sha256"
STATE_FILES = {"uefi-vars.fd": "uefi-vars.fd", "tpm2-00.permall": "tpm/tpm2-00.permall"}
"""What else a VM is: its UEFI variables and its TPM's state. Name in the folder, and below the VM's state directory."""
MARK = "hostler-vm"
VERSION = 1
MAX_SIZE = 4 * 1024**2
"""Bytes. A VM with 260 disks has 200 KiB."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0\n]{1,255})")


@dataclass(frozen=True, slots=True)
class OwnFolder:
    """`config`'s disks have the name of a file in this folder as their path."""

    machine: ForeignMachine
    config: VmConfig


def write_own(config: VmConfig, files: dict[str, str], version: str, when: str) -> bytes:
    """`vm.json` of a VM whose disks are in these files (by id of the disk). `version`: of this program."""
    disks = tuple(_described(disk, files.get(disk.id)) for disk in config.disks)
    described = config.but(disks=disks, run_as=None, kernel=None)
    content = {"mark": MARK, "version": VERSION, "program": version, "exported": when, "config": described.to_json()}
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _described(disk: Disk, file: str | None) -> Disk:
    """The disk on its file here; without one, a drive without a medium."""
    if file is None:
        return disk.but(source=DiskSource(kind=SourceKind.EMPTY, path=""), read_only=True)
    return disk.but(source=DiskSource(path=file, format=disk.source.format, size=disk.source.size))


def read_own(data: bytes, path: str) -> OwnFolder:
    """What is in a `vm.json`. InvalidInput when it is none, or one of a later version."""
    if len(data) > MAX_SIZE:
        raise bad_description(path, f"has {len(data)} bytes; more than {MAX_SIZE} are not read")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise bad_description(path, "is not JSON") from error
    if not isinstance(content, dict) or content.get("mark") != MARK:
        raise bad_description(path, f"is no description that 'hostler vm export' wrote (no mark {MARK!r})")
    if content.get("version") != VERSION:
        raise bad_description(path, f"has version {content.get('version')!r}; {VERSION} is known", "update this host")
    try:
        config = VmConfig.model_validate(content.get("config"))
    except (ValidationError, RecursionError) as error:
        why = str(error).splitlines()[:3]
        raise bad_description(path, f"does not describe a VM: {' '.join(why)[:300]}") from error
    if not is_id(config.id):
        raise bad_description(path, f"has the id {config.id[:60]!r}, which is none of a VM")
    for disk in config.disks:
        if disk.source.kind is not SourceKind.EMPTY:
            _check_file(disk.source, path)
    return OwnFolder(_machine(config, content), config.but(kernel=None))


def _check_file(source: DiskSource, path: str) -> None:
    name = source.path
    plain = os.path.basename(name) == name and name not in ("", ".", "..") and "\0" not in name
    if not plain or source.kind is not SourceKind.VOLUME or source.backing is not None:
        raise bad_description(path, f"names the disk {name[:100]!r}, which is no file beside it")


def _machine(config: VmConfig, content: dict[str, JsonValue]) -> ForeignMachine:
    return ForeignMachine(
        kind=ForeignKind.HOSTLER,
        version=str(content.get("program") or ""),
        name=config.name,
        id=config.id,
        vcpus=config.vcpus,
        memory=config.memory,
        firmware=config.firmware,
        secure_boot=config.secure_boot,
        tpm=config.tpm,
        notes=config.notes,
        scsi_controllers=config.scsi_controllers,
        disks=tuple(_disk(disk) for disk in config.disks),
        nics=tuple(_nic(nic) for nic in config.nics),
        starts_with_host=config.autostart.enabled,
    )


def _disk(disk: Disk) -> ForeignDisk:
    return ForeignDisk(
        bus=ForeignBus.SCSI if disk.bus is Bus.SCSI else ForeignBus.SATA,
        controller=disk.controller,
        unit=disk.unit,
        media=disk.media,
        name=disk.source.path,
        size=disk.source.size,
        format=disk.source.format,
    )


def _nic(nic: Nic) -> ForeignNic:
    network = {Network.NONE: "", Network.USER: "user"}.get(nic.network, f"bridge:{nic.bridge}")
    return ForeignNic(name=nic.id, mac=nic.mac, network=network)


def write_manifest(digests: Sequence[Digest]) -> bytes:
    """`manifest.sha256` as sha256sum writes it."""
    return "".join(f"{digest.value}  {digest.name}\n" for digest in digests).encode()


def read_manifest(data: bytes, path: str) -> list[Digest]:
    """The lines of a `manifest.sha256`. InvalidInput for anything else in it."""
    found = []
    for line in data[: 1024 * 1024].decode("utf-8", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise bad_description(path, f"has a line that is no digest: {line[:80]!r}")
        found.append(Digest(match[2], "sha256", match[1]))
    return found
