"""Tap interfaces: the host's end of a guest's network cable, each on a bridge. The only module that speaks netlink.

A tap is persistent and belongs to the VM's user, so that an unprivileged QEMU can open it and it outlives this daemon.
Its name is a short hash of host, VM and adapter: two daemons on one machine never collide, and whatever a killed daemon
left is found by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from hostler.model.errors import HostLacks, NotPermitted, QemuFailed, TimedOut
from hostler.model.names import nearest

PREFIX = "hl"
DEADLINE = 10.0
"""Seconds for one change; the kernel answers in milliseconds unless the network lock is stuck."""
_EPERM = 1


class Taps:
    """The taps of one host, told apart by its id."""

    def __init__(self, host_id: str) -> None:
        self._host_id = host_id

    @property
    def _host_prefix(self) -> str:
        return PREFIX + hashlib.sha256(self._host_id.encode()).hexdigest()[:4]

    def name(self, vm_id: str, nic_id: str) -> str:
        """The interface name of that adapter: 14 characters (Linux allows 15)."""
        return self._host_prefix + hashlib.sha256(f"{vm_id}/{nic_id}".encode()).hexdigest()[:8]

    async def create(self, vm_id: str, nic_id: str, bridge: str, queues: int, uid: int | None) -> str:
        """Make the tap, owned by `uid` (None: by the daemon's own), on the bridge, up, with the bridge's MTU. One that
        is there already stays if it is as wanted, and is made anew if not. On failure nothing is left.
        HostLacks when there is no such bridge, NotPermitted without the rights."""
        name = self.name(vm_id, nic_id)
        # A tap without an owner could be opened by every user of the host (drivers/net/tun.c, tun_not_capable).
        owner = os.geteuid() if uid is None else uid
        async with _netlink(f"adapter {nic_id}") as ip, AsyncExitStack() as undo:
            bridge_index, mtu = await _bridge(ip, bridge)
            index = await _index(ip, name)
            if index is not None and await _kind(ip, index) != (owner, queues > 1):
                await ip.link("del", index=index)
                index = None
            if index is None:
                undo.push_async_callback(self._remove, name)
                flags = {"no_pi": 1, "vnet_hdr": 1, "multi_queue": int(queues > 1)}
                await ip.link("add", ifname=name, kind="tuntap", mode="tap", uid=owner, ifr=flags)
                index = await _index(ip, name)
            await ip.link("set", index=index, master=bridge_index, mtu=mtu, state="up")
            undo.pop_all()
        return name

    async def delete(self, vm_id: str, nic_id: str) -> None:
        """Remove it; harmless when it is gone."""
        await self._remove(self.name(vm_id, nic_id))

    async def _remove(self, name: str) -> None:
        async with _netlink(f"interface {name}") as ip:
            index = await _index(ip, name)
            if index is not None:
                await ip.link("del", index=index)

    async def leftovers(self, known: set[str]) -> list[str]:
        """Taps of this host that are not in `known`."""
        async with _netlink("interfaces") as ip:
            names = [link.get_attr("IFLA_IFNAME") async for link in await ip.get_links()]
        return sorted(n for n in names if n.startswith(self._host_prefix) and n not in known)

    async def remove_leftovers(self, known: set[str]) -> list[str]:
        """Remove those; returns their names."""
        found = await self.leftovers(known)
        for name in found:
            await self._remove(name)
        return found

    async def bridges(self) -> list[str]:
        """The bridges of this host, by name."""
        async with _netlink("bridges") as ip:
            return await _bridges(ip)

    async def check_bridge(self, bridge: str) -> None:
        """HostLacks unless there is a bridge of that name."""
        async with _netlink(f"bridge {bridge}") as ip:
            await _bridge(ip, bridge)


@asynccontextmanager
async def _netlink(subject: str) -> AsyncIterator[Any]:
    """A netlink socket; the kernel's errors become ours."""
    try:
        async with asyncio.timeout(DEADLINE), AsyncIPRoute() as ip:
            yield ip
    except TimeoutError as error:
        raise TimedOut(subject, f"the kernel has not answered within {DEADLINE:.0f} s") from error
    except NetlinkError as error:
        if error.code == _EPERM:
            raise NotPermitted(
                subject, "changing the network needs root", "run hostlerd as root, or use the network 'user'"
            ) from error
        raise QemuFailed(subject, f"the kernel refuses: {error}", "look at 'ip link'") from error
    except FileNotFoundError as error:
        raise HostLacks(subject, "this host has no /dev/net/tun", "load the module: modprobe tun") from error


async def _kind(ip: Any, index: int) -> tuple[int | None, bool]:
    """Owner of a tap, and whether it has several queues."""
    (link,) = await ip.link("get", index=index)
    info = link.get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info is not None else None
    if data is None:
        return None, False
    return data.get_attr("IFLA_TUN_OWNER"), bool(data.get_attr("IFLA_TUN_MULTI_QUEUE"))


async def _index(ip: Any, name: str) -> int | None:
    found = await ip.link_lookup(ifname=name)
    return int(found[0]) if found else None


async def _bridges(ip: Any) -> list[str]:
    found = [
        link.get_attr("IFLA_IFNAME")
        async for link in await ip.get_links()
        if (info := link.get_attr("IFLA_LINKINFO")) is not None and info.get_attr("IFLA_INFO_KIND") == "bridge"
    ]
    return sorted(found)


async def _bridge(ip: Any, bridge: str) -> tuple[int, int]:
    """Index and MTU of a bridge. HostLacks, naming the ones there are."""
    known = await _bridges(ip)
    index = await _index(ip, bridge) if bridge in known else None
    if index is None:
        near = nearest(bridge, known)
        have = ", ".join(known) or "none"
        make = f"make it: ip link add {bridge} type bridge; ip link set {bridge} up"
        advice = f"did you mean {near!r}?" if near else make
        raise HostLacks(f"bridge {bridge}", f"this host has no such bridge; it has: {have}", advice)
    (link,) = await ip.link("get", index=index)
    return index, int(link.get_attr("IFLA_MTU"))
