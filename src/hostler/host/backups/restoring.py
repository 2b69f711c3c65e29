"""From a backup back to volumes, a new VM, or the VM it was made of.

Each disk becomes a new volume, and every block is checked before it is written. Nothing that is there is overwritten.
What was made is the job's, by its record: undone, it goes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pydantic import JsonValue

from hostler.host.backups.state import bring_state
from hostler.host.configure import check_config
from hostler.host.context import Host
from hostler.host.steps import JobContext
from hostler.model.backup import BackedDisk, Backup, chain
from hostler.model.disk import Disk, DiskSource, ImageFormat, SourceKind
from hostler.model.errors import HostlerError, NotFound
from hostler.model.job import Progress
from hostler.model.names import new_id
from hostler.model.nic import Network, Nic
from hostler.model.vm import KernelBoot, VmConfig
from hostler.network.mac import new_mac
from hostler.storage.backups.directory import BackupDirectory
from hostler.storage.backups.reading import Link
from hostler.storage.backups.restoring import restore_image
from hostler.storage.formats import SUFFIX
from hostler.storage.qemu_img import QemuImg
from hostler.storage.waiting import in_thread


def links_of(directory: BackupDirectory, backup: Backup, disk_id: str) -> list[Link]:
    """The files that disk is made of, newest first. NotFound, BadImage. Blocking."""
    known = {b.id: b for b in directory.backups(backup.vm)[0]}
    return [directory.link(b, d) for b, d in chain(backup, disk_id, known)]


def format_for(disk: BackedDisk, backup: Backup, wanted: ImageFormat | None) -> ImageFormat:
    """The format of the new volume: as it was, where it was a volume."""
    was = backup.config.disk(disk.id)
    if wanted is not None:
        return wanted
    return disk.format if was is not None and was.source.kind is SourceKind.VOLUME else ImageFormat.QCOW2


class Restoring:
    """The work of one restore. `params`: directory, backup, disks (disk, volume, format, path) and what the last step
    needs."""

    def __init__(self, host: Host, params: dict[str, JsonValue]) -> None:
        self.host = host
        self.params: dict[str, Any] = dict(params)
        self._directory = BackupDirectory(str(self.params["directory"]))

    async def backup(self) -> Backup:
        """Its manifest."""
        backup_id = str(self.params["backup"])
        return await in_thread(f"backup {backup_id}", lambda: self._directory.find(backup_id))

    async def make_volumes(self, context: JobContext) -> None:
        """Each disk as a volume. One that this job has made before is taken as it is."""
        backup = await self.backup()
        with self._directory.locked(backup.vm, shared=True):
            todo = list(self.params["disks"])
            for number, item in enumerate(todo):

                def show(fraction: float, number: int = number, disk: str = item["disk"]) -> None:
                    part = (number + fraction) / len(todo)
                    context.progress(Progress(fraction=min(1.0, part), text=f"restoring {disk}"))

                if await self.mine(item, context.job.id) is None:
                    await self._make(backup, item, context.job.id, show)

    async def _make(self, backup: Backup, item: dict[str, Any], job_id: str, show: Any) -> None:
        links = await in_thread(f"backup {backup.id}", lambda: links_of(self._directory, backup, item["disk"]))
        format = ImageFormat(item["format"])

        async def fill(path: str, image: QemuImg) -> None:
            await restore_image(path, links, format, image, show)

        size = links[0].disk.size
        volume = await self.host.volumes.service.create_filled(
            item["volume"], size, format, fill, item["path"], made_by=job_id
        )
        self.host.events.publish("volume", volume.name, volume)

    async def bring_state(self, backup: Backup, vm_id: str, uid: int | None) -> None:
        """What belongs to the VM beside its disks, if the backup has it."""
        place = self._directory.path / backup.vm / backup.id
        state_dir = self.host.paths.vm_state(vm_id)
        await in_thread(f"backup {backup.id}", lambda: bring_state(place, backup.uefi_vars, state_dir, uid))

    async def mine(self, item: dict[str, Any], job_id: str) -> DiskSource | None:
        """What became of a disk, if this job has made it."""
        with suppress(NotFound):
            volume = await self.host.volumes.get(item["volume"])
            if volume.made_by == job_id:
                return DiskSource(path=volume.path, format=volume.format, size=volume.size)
        return None

    async def sources(self, job_id: str) -> dict[str, DiskSource]:
        """What is behind each restored disk."""
        found = {item["disk"]: await self.mine(item, job_id) for item in self.params["disks"]}
        missing = [disk for disk, source in found.items() if source is None]
        if missing:
            raise NotFound(f"volume of disk {missing[0]}", "was removed meanwhile", "restore again")
        return {disk: source for disk, source in found.items() if source is not None}

    async def remove_volumes(self, job_id: str, kept: Sequence[str] = ()) -> None:
        """Remove this job's volumes but those whose path is in `kept`."""
        for item in reversed(self.params["disks"]):
            source = await self.mine(item, job_id)
            if source is not None and source.path not in kept:
                await self.host.volumes.delete(item["volume"], f"job {job_id}")


def disks_to_restore(
    backup: Backup, stem: str, taken: Sequence[str], wanted: ImageFormat | None, directory: str | None
) -> list[JsonValue]:
    """What becomes of each disk, as a job keeps it."""
    names = set(taken)
    made: list[JsonValue] = []
    for disk in backup.disks:
        format = format_for(disk, backup, wanted)
        base = f"{stem[:60]}-{disk.id}"
        name = next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(names) + 3))) if n not in names)
        names.add(name)
        path = None if directory is None else os.path.join(directory, name + SUFFIX[format])
        made.append({"disk": disk.id, "volume": name, "format": str(format), "path": path})
    return made


# the VM


async def restored_config(
    host: Host, old: VmConfig, vm_id: str, name: str, sources: dict[str, DiskSource]
) -> tuple[VmConfig, list[str]]:
    """The VM as it was, with its new volumes, and what had to be changed for this host. The guest learns by a new
    generation id that it was brought back."""
    changed: list[str] = []
    others = [a.record.config for a in host.actors.values() if a.record.id != vm_id]
    taken = {n.mac for c in others for n in c.nics}
    nics = [await _restored_nic(host, nic, taken, changed) for nic in old.nics]
    known = host.actors.get(old.id)
    trusted = None if known is None else known.record.config
    disks = [d for disk in old.disks if (d := _restored_disk(disk, sources, trusted, changed)) is not None]
    config = old.but(
        id=vm_id,
        name=name,
        disks=tuple(disks),
        nics=tuple(nics),
        kernel=_restored_kernel(old.kernel, trusted, changed),
        generation_id=new_id(),
        run_as=host.resources.user_for(vm_id, others),
    )
    check_config(host, config)
    return config, changed


def _restored_disk(
    disk: Disk, sources: dict[str, DiskSource], trusted: VmConfig | None, changed: list[str]
) -> Disk | None:
    """A disk that is not in the backup is a file of this host, which the manifest only names. Who can write manifests
    must not reach by one what he could not reach himself."""
    if disk.id in sources:
        return disk.but(source=sources[disk.id], reservations=False)
    if disk.source.kind is SourceKind.EMPTY:
        return disk
    same = trusted is not None and trusted.disk(disk.id) == disk
    if not disk.writes and (same or (disk.source.kind is SourceKind.VOLUME and _is_everybodys(disk.source.path))):
        return disk
    why = "is not in the backup, and not here as a file that everybody may read; attach it anew"
    changed.append(f"disk {disk.id} is left out: {disk.source.path} {why}")
    return None


def _restored_kernel(kernel: KernelBoot | None, trusted: VmConfig | None, changed: list[str]) -> KernelBoot | None:
    """As with disks: the VM's user is let in to a kernel and what goes with it."""
    if kernel is None or (trusted is not None and trusted.kernel == kernel):
        return kernel
    if all(_is_everybodys(path) for path in (kernel.kernel, kernel.initrd) if path is not None):
        return kernel
    changed.append(f"its kernel is left out: {kernel.kernel} is not here as a file that everybody may read")
    return None


def _is_everybodys(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) and bool(mode & stat.S_IROTH)


async def _restored_nic(host: Host, nic: Nic, taken: set[str], changed: list[str]) -> Nic:
    if nic.mac in taken:
        fresh = new_mac(os.urandom)
        changed.append(f"adapter {nic.id} has a new MAC address: {nic.mac} belongs to another VM here")
        nic = nic.but(mac=fresh)
    try:
        await host.resources.check_nic(nic)
    except HostlerError as error:
        changed.append(f"adapter {nic.id} is unplugged: {error.object} {error.cause}")
        nic = nic.but(network=Network.NONE, bridge=None)
    return nic
