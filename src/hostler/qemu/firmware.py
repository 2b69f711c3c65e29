"""Which UEFI firmware this host has. Distributions describe theirs in JSON files (QEMU's docs/interop/firmware.json);
the first description, in name order, that fits wins, as that document prescribes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Final

from pydantic import Field, ValidationError

from hostler.model.base import Record

DESCRIPTIONS: Final = ("/etc/qemu/firmware", "/usr/share/qemu/firmware")
"""An administrator's file replaces the distribution's of the same name."""

_DEBIAN: Final = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")
_DEBIAN_SECURE: Final = ("/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd")

Files = tuple[str, str]
"""Code image and template of the variable store."""


class _Image(Record):
    filename: str
    format: str


class _Mapping(Record):
    device: str
    executable: _Image | None = None
    nvram_template: _Image | None = Field(default=None, alias="nvram-template")


class _Target(Record):
    architecture: str
    machines: tuple[str, ...]


class _Description(Record):
    interface_types: tuple[str, ...] = Field(alias="interface-types")
    mapping: _Mapping
    targets: tuple[_Target, ...]
    features: tuple[str, ...]

    def files(self, secure_boot: bool) -> Files | None:
        """Its files, where it is UEFI for q35 in two raw flash images, and secure boot is as wanted."""
        fits = (
            "uefi" in self.interface_types
            and any(t.architecture == "x86_64" and any("q35" in m for m in t.machines) for t in self.targets)
            and ("enrolled-keys" in self.features) is secure_boot
            and ("requires-smm" in self.features) is secure_boot
            # Builds for confidential guests keep no variables.
            and "amd-sev-es" not in self.features
        )
        code, template = self.mapping.executable, self.mapping.nvram_template
        if not fits or self.mapping.device != "flash" or code is None or template is None:
            return None
        return (code.filename, template.filename) if (code.format, template.format) == ("raw", "raw") else None


def find_firmware(secure_boot: bool, directories: Sequence[str] = DESCRIPTIONS) -> Files | None:
    """Code image and variable template; with `secure_boot`, those that enforce it with Microsoft's keys enrolled. None
    where this host has none. Damaged descriptions are passed over."""
    described = (_files(path, secure_boot) for path in _descriptions(directories))
    candidates = [files for files in described if files] + [_DEBIAN_SECURE if secure_boot else _DEBIAN]
    return next((files for files in candidates if all(os.path.isfile(path) for path in files)), None)


def _descriptions(directories: Sequence[str]) -> list[str]:
    """Paths in the order of file names; of two with one name the first directory's."""
    found: dict[str, str] = {}
    for directory in directories:
        names = os.listdir(directory) if os.path.isdir(directory) else []
        for name in names:
            if name.endswith(".json"):
                found.setdefault(name, os.path.join(directory, name))
    return [found[name] for name in sorted(found)]


def _files(path: str, secure_boot: bool) -> Files | None:
    try:
        with open(path, encoding="utf-8") as file:
            return _Description.model_validate(json.load(file)).files(secure_boot)
    except (OSError, ValueError, ValidationError):
        return None
