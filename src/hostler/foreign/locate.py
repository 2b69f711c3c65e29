"""From a path that somebody gave to the description behind it: what kind it is, what it says, where its images are.

Reads files and nothing else; takes milliseconds on a local disk. Call it in a thread.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostler.foreign import hyperv_exp, hyperv_xml, ova, ovf, own, vmcx
from hostler.foreign.errors import bad_description
from hostler.foreign.hyperv_config import machine_of, snapshot_of
from hostler.foreign.xml import MAX_SIZE
from hostler.model.disk import Media
from hostler.model.errors import InvalidInput, NotFound, NotPermitted
from hostler.model.foreign import ForeignBus, ForeignDisk, ForeignKind, ForeignMachine, ForeignSnapshot
from hostler.model.units import GiB
from hostler.model.vm import VmConfig

MAX_NAMES = 10_000
"""Names of a directory that are looked at."""
MAX_SNAPSHOTS = 512
_DESCRIPTIONS = (".vmcx", ".exp", ".xml")
"""In the order in which they are preferred: an export of 2008 has an .exp, and a config.xml about the export."""
_IMAGES = (".vhd", ".vhdx", ".avhd", ".avhdx", ".qcow2", ".raw", ".img", ".vmdk")
_OF_EXPORT = "config.xml"
_SEPARATORS = re.compile(r"[\\/]")


@dataclass(frozen=True, slots=True)
class Found:
    """A machine and where it was found. `directories`: where its images may be, the likeliest first. `members`: the
    files of an archive, by name. `config`: the whole configuration, where the folder is our own. `digests` and the
    file `manifest` they are from."""

    machine: ForeignMachine
    description: str
    directories: tuple[str, ...]
    config: VmConfig | None = None
    members: dict[str, ova.Member] = field(default_factory=dict)
    digests: tuple[ova.Digest, ...] = ()
    compressed: frozenset[str] = frozenset()
    """Files of an OVF that are compressed as a whole, which is not read."""
    log_pending: bool = False


def find(path: str) -> Found:
    """The machine that a file or folder describes. NotFound, NotPermitted, InvalidInput."""
    if os.path.isdir(path):
        return _of_folder(path)
    head = _read(path, 65_536)
    if ova.is_tar(head):
        return _of_ova(path)
    if os.path.basename(path) == own.DESCRIPTION:
        return _of_own(path)
    if vmcx.is_vmcx(head):
        return _of_hyper_v(path)
    if head.replace(b"\0", b"").lstrip(b"\xff\xfe\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return _of_xml(path, head)
    return _of_image(path)


def _of_xml(path: str, head: bytes) -> Found:
    text = head.replace(b"\0", b"")
    if b"Envelope" in text and b"<configuration" not in text:
        return _of_ovf(path)
    return _of_hyper_v(path)


def _of_folder(path: str) -> Found:
    names = _names(path)
    if own.DESCRIPTION in names:
        return _of_own(os.path.join(path, own.DESCRIPTION))
    machines = next((n for n in names if n.lower() == "virtual machines"), None)
    candidates = _descriptions(os.path.join(path, machines)) if machines else []
    candidates = candidates or _descriptions(path)
    if not candidates:
        candidates = [os.path.join(path, n) for n in names if n.lower().endswith((".ovf", ".ova"))]
    if not candidates:
        return _of_only_image(path, names)
    if len(candidates) > 1:
        listed = ", ".join(os.path.basename(c) for c in candidates[:10])
        raise InvalidInput(f"folder {path}", f"has several descriptions: {listed}", "give the path of one of them")
    return find(candidates[0])


def _descriptions(directory: str) -> list[str]:
    """The descriptions of Hyper-V in a directory, of the best kind there is."""
    names = [n for n in _names(directory) if n.lower() != _OF_EXPORT]
    for ending in _DESCRIPTIONS:
        found = [os.path.join(directory, n) for n in names if n.lower().endswith(ending)]
        found = [f for f in found if ending != ".xml" or hyperv_xml.is_configuration(_read(f, 4096))]
        if found:
            return found
    return []


def _of_only_image(path: str, names: Sequence[str]) -> Found:
    images = [n for n in names if n.lower().endswith(_IMAGES)]
    if len(images) == 1:
        return find(os.path.join(path, images[0]))
    what = f"{len(images)} disk images" if images else "no disk image"
    raise InvalidInput(
        f"folder {path}",
        f"has no description of a VM (.vmcx, .exp, .xml, .ovf, .ova, {own.DESCRIPTION}), and {what}",
        "give the folder that Hyper-V exported to, or the path of a description or image",
    )


def _of_hyper_v(path: str) -> Found:
    machine, pending = _read_hyper_v(path)
    root = Path(path).parent
    root = root.parent if root.name.lower() == "virtual machines" else root
    snapshots = [*machine.snapshots, *_snapshots(root, path)]
    machine = machine.but(snapshots=tuple(snapshots))
    places = [str(Path(path).parent), str(root), *_below(root, ("virtual hard disks", "snapshots"))]
    return Found(machine, path, tuple(dict.fromkeys(places)), log_pending=pending)


def _read_hyper_v(path: str) -> tuple[ForeignMachine, bool]:
    data = _read(path, vmcx.MAX_SIZE + 1)
    name = Path(path).stem
    if vmcx.is_vmcx(data):
        found = vmcx.read_vmcx(data, path)
        return machine_of(found.root, ForeignKind.HYPER_V_VMCX, name), found.log_pending
    if hyperv_exp.is_exp(data) and not hyperv_xml.is_configuration(data):  # an .exp may be either
        return hyperv_exp.read_exp(data, path, name), False
    return machine_of(hyperv_xml.read_configuration(data, path), ForeignKind.HYPER_V_XML, name), False


def _snapshots(root: Path, but: str) -> Iterator[ForeignSnapshot]:
    directory = next(iter(_below(root, ("snapshots",))), None)
    files = _descriptions(directory) if directory else []
    for file in files[:MAX_SNAPSHOTS]:
        if file == but:
            continue
        data = _read(file, vmcx.MAX_SIZE + 1)
        if vmcx.is_vmcx(data):
            yield snapshot_of(vmcx.read_vmcx(data, file).root, Path(file).stem)
        elif hyperv_xml.is_configuration(data):
            yield snapshot_of(hyperv_xml.read_configuration(data, file), Path(file).stem)
        else:
            machine = hyperv_exp.read_exp(data, file, Path(file).stem)
            known = next((s for s in machine.snapshots if s.id == machine.id), None)
            made = ForeignSnapshot(id=machine.id, name=machine.name, notes=machine.notes, disks=machine.disks)
            yield known or made


def _below(root: Path, wanted: Sequence[str]) -> list[str]:
    try:
        names = _names(str(root))
    except (NotFound, NotPermitted):
        return []
    return [str(root / n) for word in wanted for n in names if n.lower() == word and (root / n).is_dir()]


def _of_ovf(path: str) -> Found:
    data = _read(path, MAX_SIZE + 1)
    found = ovf.read_ovf(data, path, fallback_name=Path(path).stem)
    manifest = Path(path).with_suffix(".mf")
    digests = ova.read_manifest(_read(str(manifest), 1024 * 1024), str(manifest)) if manifest.is_file() else []
    return Found(
        found.machine,
        path,
        (str(Path(path).parent),),
        digests=tuple(digests),
        compressed=frozenset(f.name for f in found.files if f.compressed),
    )


def _of_ova(path: str) -> Found:
    with open(path, "rb") as file:

        def read(at: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, at)

        members = ova.list_members(read, os.fstat(file.fileno()).st_size, path)
        described = [m for m in members if m.name.lower().endswith(".ovf")]
        if len(described) != 1:
            raise bad_description(path, f"has {len(described)} OVF descriptors, where one is expected")
        inside = f"{path} ({described[0].name})"
        if described[0].size > MAX_SIZE:
            raise bad_description(inside, f"has {described[0].size} bytes; more than {MAX_SIZE} are not read")
        data = read(described[0].offset, described[0].size)
        found = ovf.read_ovf(data, inside, ForeignKind.OVA, Path(path).stem)
        manifest = next((m for m in members if m.name.lower().endswith(".mf") and m.size <= 1024 * 1024), None)
        digests = ova.read_manifest(read(manifest.offset, manifest.size), path) if manifest else []
    return Found(
        found.machine,
        path,
        (),
        members={m.name: m for m in members},
        digests=tuple(digests),
        compressed=frozenset(f.name for f in found.files if f.compressed),
    )


def _of_own(path: str) -> Found:
    found = own.read_own(_read(path, own.MAX_SIZE + 1), path)
    manifest = Path(path).with_name(own.MANIFEST)
    if not manifest.is_file():
        raise bad_description(
            path, f"has no {own.MANIFEST} beside it, so nobody can say whether its disks are whole", "copy it again"
        )
    digests = own.read_manifest(_read(str(manifest), 1024 * 1024), str(manifest))
    return Found(found.machine, path, (str(Path(path).parent),), found.config, digests=tuple(digests))


def _of_image(path: str) -> Found:
    """A machine around a disk. On IDE (AHCI), since that is what a guest of unknown kind has a driver for."""
    disk = ForeignDisk(bus=ForeignBus.IDE, controller=0, unit=0, media=Media.DISK, name=os.path.basename(path))
    machine = ForeignMachine(kind=ForeignKind.IMAGE, name=Path(path).stem[:100], memory=GiB, disks=(disk,))
    return Found(machine, path, (str(Path(path).parent),))


def base_name(name: str) -> str:
    """The last part of a path as Windows or Unix writes it."""
    return _SEPARATORS.split(name)[-1]


def locate_image(name: str, directories: Sequence[str]) -> str | None:
    """The file of that name in the first directory that has one; Windows does not tell case apart."""
    wanted = base_name(name).lower()
    for directory in directories:
        exact = os.path.join(directory, base_name(name))
        if wanted and os.path.isfile(exact):
            return exact
        try:
            names = _names(directory)
        except (NotFound, NotPermitted):
            continue
        found = next((n for n in names if n.lower() == wanted and os.path.isfile(os.path.join(directory, n))), None)
        if found is not None:
            return os.path.join(directory, found)
    return None


def _names(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for _, entry in zip(range(MAX_NAMES), entries, strict=False))
    except OSError as error:
        raise _explain(f"folder {directory}", error) from error


def _read(path: str, most: int) -> bytes:
    """The first bytes of a regular file; never waits for a FIFO."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise _explain(f"file {path}", error) from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"path {path}", "is neither a file nor a folder", "give the path of one")
        try:
            return file.read(most)
        except OSError as error:
            raise _explain(f"file {path}", error) from error


def _explain(subject: str, error: OSError | ValueError) -> NotFound | NotPermitted | InvalidInput:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(subject, "does not exist", "check the path")
    if isinstance(error, PermissionError):
        return NotPermitted(subject, "may not be read by this daemon", "check its owner and mode")
    return InvalidInput(subject, f"cannot be read: {getattr(error, 'strerror', error)}", "give another path")
