"""How the network pools of a VM's disks are reached, and the files with their secrets, which only its QEMU can read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable

from hostler.host.paths import Paths
from hostler.model.disk import Disk
from hostler.model.pool import Connection, PoolSecrets
from hostler.model.vm import VmConfig
from hostler.qemu import secret_files

Reach = Callable[[str], Awaitable[tuple[Connection, PoolSecrets]]]


class Connections:
    """The connections that were made for this host's VMs. `reach`: how a network pool is reached now, and its
    secrets."""

    def __init__(self, paths: Paths, reach: Reach) -> None:
        self._paths = paths
        self._reach = reach
        self._made: dict[str, dict[str, Connection]] = {}

    def made(self, config: VmConfig) -> tuple[Connection, ...]:
        """What `make` has made for the disks of this VM."""
        made = self._made.get(config.id, {})
        return tuple(made[pool] for pool in sorted(pools_of(config.disks)) if pool in made)

    async def make(self, config: VmConfig, disks: Iterable[Disk]) -> list[Connection]:
        """Find out how the pools of these disks are reached now, and lay out their secrets. The VM's run directory is
        there. Errors of the storage system."""
        made = []
        for pool in sorted(pools_of(disks)):
            connection, secrets = await self._reach(pool)
            connection = await asyncio.to_thread(self._lay_out, config, connection, secrets)
            self._made.setdefault(config.id, {})[pool] = connection
            made.append(connection)
        return made

    def forget(self, vm_id: str) -> None:
        """Its QEMU has ended. The files go with its run directory."""
        self._made.pop(vm_id, None)

    def _lay_out(self, config: VmConfig, connection: Connection, secrets: PoolSecrets) -> Connection:
        files: dict[str, bytes] = {}
        if secrets.chap_secret:
            files["secret"] = secrets.chap_secret.encode()
        if secrets.ca:
            texts = {"ca-cert": secrets.ca, "client-cert": secrets.certificate, "client-key": secrets.key}
            files = {f"{name}.pem": text.encode() for name, text in texts.items()}
        if not files:
            return connection
        uid = os.geteuid() if config.run_as is None else config.run_as
        run_dir = str(self._paths.vm_run(config.id))
        directory = secret_files.write(run_dir, f"pool-{connection.pool}+", files, uid)
        if secrets.ca:
            return connection.but(tls_dir=directory)
        return connection.but(secret_file=f"{directory}/secret")


def pools_of(disks: Iterable[Disk]) -> set[str]:
    """The network pools that these disks are in."""
    return {layer.pool for disk in disks for layer in disk.source.layers() if layer.networked}
