"""A folder as `hostler export` writes it, made by hand: raw disks of given content, description, manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from hostler.foreign.ova import Digest
from hostler.foreign.own import DESCRIPTION, MANIFEST, write_manifest, write_own
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.nic import Nic
from hostler.model.vm import VmConfig
from hostler.testing import vm_variants


def exported_folder(folder: Path, disks: Mapping[str, bytes], **changes: object) -> Path:
    """The folder of a VM named "exported" with these raw disks (by id). `changes` are of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tuple(
        Disk(
            id=name,
            source=DiskSource(path="/gone", format=ImageFormat.RAW, size=len(content)),
            unit=unit,
            serial=f"HL{unit:012}",
            wwn=(5 << 60) | unit,
            boot_index=unit + 1,
        )
        for unit, (name, content) in enumerate(disks.items())
    )
    base: dict[str, object] = {
        "id": "8c5ab1c6-21f8-4c4c-9d5e-35a1a9f0a001",
        "name": "exported",
        "machine": vm_variants.FACTS.machines[0],
        "cpu_model": vm_variants.FACTS.default_cpu,
        "disks": made,
        "nics": (Nic(id="nic0", mac="52:54:00:aa:bb:01", slot=2),),
    }
    config = VmConfig.model_validate(base | changes)
    files = {DESCRIPTION: write_own(config, {name: f"{name}.raw" for name in disks}, "1.0", "2026-11-24T10:00:00Z")}
    files |= {f"{name}.raw": content for name, content in disks.items()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    digests = [Digest(name, "sha256", hashlib.sha256(content).hexdigest()) for name, content in files.items()]
    (folder / MANIFEST).write_bytes(write_manifest(digests))
    return folder
