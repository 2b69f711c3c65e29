"""What a target finds at itself, for the check of a move to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Sequence

from hostler.cluster.check import TargetView
from hostler.cluster.luggage import files_of
from hostler.host.configure import check_limits
from hostler.host.context import Host
from hostler.model.disk import SourceKind
from hostler.model.errors import HostlerError
from hostler.model.migration import Incoming, IncomingRequest
from hostler.model.vm import VmConfig


async def look(host: Host, request: IncomingRequest, pending: Sequence[Incoming]) -> TargetView:
    """Look at this host with the eyes of one move. `pending`: the moves to it that are under way."""
    config = request.config
    others = [a.record for a in host.actors.values() if a.record.id != config.id]
    coming = [r.config for r in pending if r.config.id != config.id]
    paths = [s.path for d in config.disks for s in d.source.layers() if s.local]
    paths += files_of(request.luggage)
    boot = config.kernel
    boot_files = [boot.kernel, boot.initrd or boot.kernel] if boot else []
    devices = [d.source.path for d in config.disks if d.source.kind is SourceKind.DEVICE]
    return TargetView(
        facts=host.facts,
        inodes=await asyncio.to_thread(_files, paths, boot_files),
        devices=frozenset(path for path in devices if os.path.exists(path)),
        bridges=await host.resources.bridges(),
        names=frozenset([r.name for r in others] + [c.name for c in coming]),
        users={c.run_as: c.name for c in [*(r.config for r in others), *coming] if c.run_as is not None},
        claimed=await _claimed(host, config),
        unreached=await _unreached(host, config),
        incoming=frozenset(r.id for r in pending if r.config.id == config.id),
        admission=_admission(host, config),
        present=config.id in host.actors,
    )


def _admission(host: Host, config: VmConfig) -> HostlerError | None:
    try:
        check_limits(host.limits, config)
        host.admit(config)
    except HostlerError as error:
        return error
    return None


async def _claimed(host: Host, config: VmConfig) -> dict[str, str]:
    """Paths of its disks that other VMs hold here in a way that excludes it, each with the holder's name."""
    found: dict[str, str] = {}
    for disk, layer in [(d, s) for d in config.disks for s in d.source.layers() if s.kind is not SourceKind.EMPTY]:
        for claim in await host.claims.on(layer.path, layer.identity):
            settled = claim.shared and disk.reservations
            if claim.vm != config.id and not settled and (claim.write or (disk.writes and layer is disk.source)):
                holder = host.actors.get(claim.vm)
                found[layer.path] = holder.record.name if holder else claim.vm
    return found


async def _unreached(host: Host, config: VmConfig) -> dict[str, HostlerError]:
    """Its network disks that this host cannot open, or where it finds something else."""
    found: dict[str, HostlerError] = {}
    for disk, layer in [(d, s) for d in config.disks for s in d.source.layers() if s.networked]:
        try:
            await host.places.verify(layer, f"disk {disk.id}")
        except HostlerError as error:
            found[layer.path] = error
    return found


def _files(paths: Sequence[str], boot_files: Sequence[str]) -> dict[str, int]:
    """Inodes of the disks, and of those boot files that everybody may read: another host must not make this one open
    to its guest what is closed to others here."""
    open_to_all = []
    for path in boot_files:
        with contextlib.suppress(OSError):
            if os.stat(path).st_mode & stat.S_IROTH:
                open_to_all.append(path)
    return inodes_of([*paths, *open_to_all])


def inodes_of(paths: Sequence[str]) -> dict[str, int]:
    """Inode numbers of those paths that exist (file systems shared between hosts show the same number to each)."""
    found: dict[str, int] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found[path] = os.stat(path).st_ino
    return found
