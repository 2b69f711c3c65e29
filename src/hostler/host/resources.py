"""What a VM needs from its host beside QEMU itself: directories, access rights, taps, exports. Made before its QEMU
starts, given back after it ended; every method may be repeated.

Dynamic VHD and VHDX are served by an export of their own, since QEMU's drivers for them cannot be migrated or saved
(decision 0005).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import structlog

from hostler.host.hypervisor import Machine
from hostler.host.paths import Paths
from hostler.host.pools.connections import Connections, Reach
from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import HostlerError
from hostler.model.host import AcceleratorChoice, QemuFacts
from hostler.model.machine import LaunchSpec
from hostler.model.nic import Network, Nic
from hostler.model.vm import VmConfig
from hostler.network.taps import Taps
from hostler.qemu import access
from hostler.removal import FEW, remove_tree
from hostler.storage.exports import Exports

log = structlog.get_logger()


class Settings(Protocol):
    """What of the host matters here."""

    @property
    def id(self) -> str: ...
    @property
    def privileged(self) -> bool: ...
    @property
    def accelerator(self) -> AcceleratorChoice: ...
    @property
    def qemu(self) -> QemuFacts: ...


class Resources:
    """Makes and gives back what VMs need from this host. `reach`: how a network pool is reached now, and its secrets;
    `machine_of`: the running machine of a VM, to which a pool is connected while it runs."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        taps: Taps,
        exports: Exports,
        reach: Reach,
        machine_of: Callable[[str], Machine | None],
    ) -> None:
        self._connections = Connections(paths, reach)
        self._machine_of = machine_of
        self._paths = paths
        self._settings = settings
        self._taps = taps
        self._exports = exports

    # pure

    def user_for(self, vm_id: str, others: Iterable[VmConfig]) -> int | None:
        """The user id for a new VM's QEMU; None where the daemon is not root."""
        if not self._settings.privileged:
            return None
        return access.user_for(vm_id, {c.run_as for c in others if c.run_as is not None})

    def spec(self, config: VmConfig, incoming: bool = False) -> LaunchSpec:
        """What its QEMU is launched with."""
        return LaunchSpec(
            config=config,
            accelerator=self._settings.accelerator.kind,
            run_dir=str(self._paths.vm_run(config.id)),
            state_dir=str(self._paths.vm_state(config.id)),
            taps={n.id: self._taps.name(config.id, n.id) for n in config.nics if n.network is Network.BRIDGE},
            exports={d.id: socket for d in config.disks if (socket := self.export_of(config, d)) is not None},
            incoming=incoming,
            connections=self._connections.made(config),
        )

    def export_of(self, config: VmConfig, disk: Disk) -> str | None:
        """The socket of the export that serves this disk; None where QEMU opens it itself."""
        if not needs_export(disk):
            return None
        return self._exports.socket(str(self._paths.vm_run(config.id)), base_name(disk))

    def saved_path(self, config: VmConfig) -> str:
        """Where its saved state goes."""
        return str(self._paths.saved_state(config.id))

    def discard_saved(self, path: str) -> None:
        """Remove a saved state; harmless when there is none."""
        remove_tree(path, FEW)

    # a whole VM

    async def prepare(self, config: VmConfig, placeholder: bool = False) -> None:
        """Everything its QEMU needs, or nothing. `placeholder`: its images stay closed until `open_exports`."""
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.release, config)
            await asyncio.to_thread(self._directories, config)
            await asyncio.to_thread(self._grant_all, config)
            await self._connections.make(config, config.disks)
            for disk in config.disks:
                await self._start_export(config, disk, placeholder)
            await self._make_taps(config)
            undo.pop_all()

    def _directories(self, config: VmConfig) -> None:
        access.prepare_directory(str(self._paths.vm_run(config.id)), config.run_as)
        access.prepare_directory(str(self._paths.vm_state(config.id)), config.run_as)

    def _grant_all(self, config: VmConfig) -> None:
        if config.run_as is None:
            return
        for disk in config.disks:
            _grant_layers(disk, config.run_as)
        if config.kernel is not None:
            for path in (config.kernel.kernel, config.kernel.initrd):
                if path is not None:
                    self._grant_readable(path, config.run_as)

    @staticmethod
    def _grant_readable(path: str, uid: int) -> None:
        """Kernels are readable for everybody as a rule; then nothing is changed."""
        access.check_reachable(path, uid)
        if not os.stat(path).st_mode & stat.S_IROTH:
            access.grant(os.path.realpath(path), uid, write=False)

    async def _make_taps(self, config: VmConfig) -> None:
        for nic in config.nics:
            if nic.network is Network.BRIDGE and nic.bridge is not None:
                await self._taps.create(config.id, nic.id, nic.bridge, nic.queues, config.run_as)

    async def release(self, config: VmConfig, moved: bool = False, forget: bool = False) -> None:
        """Give everything back. `moved`: its access rights to shared volumes stay, for they went along with it.
        `forget`: also what would survive a reboot."""
        for nic in config.nics:
            if nic.network is Network.BRIDGE:
                await self._quietly("tap", self._taps.delete(config.id, nic.id))
        for disk in config.disks:
            if needs_export(disk):
                await self._quietly("export", self._exports.stop(str(self._paths.vm_run(config.id)), base_name(disk)))
        if not moved:
            await asyncio.to_thread(self._revoke_all, config)
        self._connections.forget(config.id)
        await asyncio.to_thread(remove_tree, self._paths.vm_run(config.id))
        if forget:
            await asyncio.to_thread(remove_tree, self._paths.vm_state(config.id))

    def _revoke_all(self, config: VmConfig) -> None:
        for disk in config.disks:
            self._revoke_one(config, disk)

    @staticmethod
    def _revoke_one(config: VmConfig, disk: Disk) -> None:
        if config.run_as is None:
            return
        for layer in disk.source.layers():
            if not layer.local:
                continue
            try:
                access.revoke(os.path.realpath(layer.path), config.run_as)
            except HostlerError as error:
                log.warning("vm.revoke-failed", vm=config.id, disk=disk.id, why=str(error))

    @staticmethod
    async def _quietly(what: str, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        except (HostlerError, OSError) as error:
            log.warning("vm.release-failed", what=what, why=str(error))

    async def clear(self, run_dir: Path) -> None:
        """Remove a run directory that belongs to no VM, and the exports that work in it."""
        await self._quietly("export", self._exports.stop_all(str(run_dir)))
        await asyncio.to_thread(remove_tree, run_dir)

    async def remove_stray_taps(self, running: Iterable[VmConfig], coming: Iterable[str]) -> None:
        """Remove this host's taps that belong to no VM that runs or is on its way here (ids)."""
        if not self._settings.privileged or list(coming):
            return
        known = {self._taps.name(c.id, n.id) for c in running for n in c.nics}
        await self._quietly("tap", self._taps.remove_leftovers(known))

    # one disk

    async def grant(self, config: VmConfig, disk: Disk) -> None:
        """Let a running VM's QEMU reach one more disk, or change nothing."""
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self.revoke, config, disk)
            if config.run_as is not None:
                await asyncio.to_thread(_grant_layers, disk, config.run_as)
            for connection in await self._connections.make(config, (disk,)):
                machine = self._machine_of(config.id)
                if machine is not None:
                    await machine.blocks.connect(connection)
            await self._start_export(config, disk, placeholder=False)
            undo.pop_all()

    async def revoke(self, config: VmConfig, disk: Disk) -> None:
        """Take it back."""
        if needs_export(disk):
            await self._quietly("export", self._exports.stop(str(self._paths.vm_run(config.id)), base_name(disk)))
        await asyncio.to_thread(self._revoke_one, config, disk)

    async def open_layer(self, config: VmConfig, disk: Disk, layer: DiskSource) -> None:
        """Let a running VM's QEMU write one of a disk's lower layers, which something is to be merged into."""
        if layer.local and config.run_as is not None:
            await asyncio.to_thread(access.grant, os.path.realpath(layer.path), config.run_as, True)
        if layer.exported:
            await self._exports.reopen(str(self._paths.vm_run(config.id)), base_of(disk.at(layer)))

    async def _start_export(self, config: VmConfig, disk: Disk, placeholder: bool) -> None:
        if needs_export(disk):
            run_dir = str(self._paths.vm_run(config.id))
            await self._exports.start(run_dir, base_of(disk), config.run_as, placeholder)

    # hand-over

    async def open_exports(self, config: VmConfig) -> None:
        """Open the images behind the exports: this host owns them now. Harmless when they are open."""
        for disk in config.disks:
            if needs_export(disk):
                await self._exports.open_image(str(self._paths.vm_run(config.id)), base_of(disk))

    async def close_exports(self, config: VmConfig) -> None:
        """Close the images behind the exports, so that another host can open them."""
        for disk in config.disks:
            if needs_export(disk):
                await self._exports.close_image(str(self._paths.vm_run(config.id)), base_of(disk))

    # network

    async def bridges(self) -> frozenset[str]:
        """The bridges of this host."""
        return frozenset(await self._taps.bridges())

    async def check_nic(self, nic: Nic) -> None:
        """HostLacks if this host cannot connect that adapter."""
        if nic.network is Network.BRIDGE and nic.bridge is not None:
            await self._taps.check_bridge(nic.bridge)


async def renew(config: VmConfig, disk: Disk) -> None:
    """After its layers changed: the top one may be written, those below only read."""
    if config.run_as is not None:
        await asyncio.to_thread(_grant_layers, disk, config.run_as)


def _grant_layers(disk: Disk, uid: int) -> None:
    """Its top layer for writing, what is below for reading. (The process that serves a chain gets its files open.)"""
    for layer in disk.source.layers():
        if layer.local and layer.kind is not SourceKind.CHAIN:
            access.check_reachable(layer.path, uid)
            access.grant(os.path.realpath(layer.path), uid, disk.writes and layer is disk.source)


def needs_export(disk: Disk) -> bool:
    """Whether the base of a disk is served by an export of its own."""
    return disk.source.base.exported


def base_name(disk: Disk) -> str:
    """What identifies the export of its base."""
    return disk.layer_name(disk.source.base)


def base_of(disk: Disk) -> Disk:
    """The base as the export knows it: a disk of its own, named like the layer, and written only where it is the disk's
    only layer."""
    base = disk.at(disk.source.base)
    alone = disk.source.backing is None
    return base.model_copy(update={"id": base_name(disk), "read_only": disk.read_only or not alone})
