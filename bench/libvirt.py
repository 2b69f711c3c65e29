"""libvirt as a contender: libvirtd and virsh in namespaces of their own, so that this machine's libvirt is not touched.

Each libvirtd sees private, empty copies of the directories it writes to and has a host name of its own, so that two of
them on one machine are two hosts to each other. Needs root, since mounts do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from hostler.model.errors import InternalError, TimedOut
from hostler.testing.microguest import MicroGuest

DOMAIN = "bench"
ASKED = "HOSTLER_BENCH_LIBVIRT"
"""Environment variable; "no" leaves libvirt out."""
READY = 30.0
COMMAND = 120.0
PRIVATE = ("/run/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/etc/libvirt")
CONFIG = """\
auth_unix_rw = "none"
auth_tcp = "none"
listen_tls = 0
listen_tcp = 1
listen_addr = "127.0.0.1"
"""
QEMU_CONFIG = """\
security_driver = "none"
user = "root"
group = "root"
namespaces = []
stdio_handler = "file"
cgroup_controllers = []
"""
UUID = str(uuid.uuid5(uuid.NAMESPACE_DNS, "hostler bench"))


def missing() -> str | None:
    """Why libvirt cannot take part; None if it can."""
    if os.environ.get(ASKED) == "no":
        return f"left out by {ASKED}=no"
    if not (shutil.which("virsh") and shutil.which("libvirtd", path="/usr/sbin:/usr/bin")):
        return "libvirt is not installed (packages libvirt-daemon-system, libvirt-clients)"
    if os.geteuid() != 0:
        return "its namespaces need root"
    if not shutil.which("unshare"):
        return "unshare is not installed"
    return None


class Libvirtd:
    """One libvirtd. `port` is where others reach it (TCP, on the loopback interface)."""

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self.place = place
        self.port = free_port()
        self._pid = 0

    @property
    def uri(self) -> str:
        """How another libvirtd reaches it."""
        return f"qemu+tcp://127.0.0.1:{self.port}/system"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Libvirtd]:
        """The daemon, until the block is left; its domain is ended first."""
        self._prepare()
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", self._script()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self._pid = process.pid
        try:
            await self._wait_ready(process)
            yield self
        finally:
            with contextlib.suppress(InternalError, TimedOut):  # it is off, or libvirtd is gone: nothing left to end
                await self.virsh("destroy", DOMAIN)
            process.terminate()
            await process.wait()

    def _prepare(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for path in PRIVATE:
            (self.place / "root" / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        etc = self.place / "root/etc/libvirt"
        (etc / "libvirtd.conf").write_text(CONFIG + f'tcp_port = "{self.port}"\nhost_uuid = "{uuid.uuid4()}"\n')
        (etc / "qemu.conf").write_text(QEMU_CONFIG)

    def _script(self) -> str:
        binds = [f"mount --bind {self.place}/root{path} {path}" for path in PRIVATE if Path(path).exists()]
        daemon = f"exec libvirtd --listen -p {self.place}/pid >{self.place}/log 2>&1"
        return " && ".join([*binds, f"echo {self.name}.bench >/proc/sys/kernel/hostname", daemon])

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        async with asyncio.timeout(READY):
            while process.returncode is None:
                with contextlib.suppress(InternalError):
                    await self.virsh("uri")
                    return
                await asyncio.sleep(0.1)
        log = self.place / "log"
        raise InternalError(f"libvirtd {self.name}", log.read_text()[-1000:] if log.exists() else "ended")

    async def virsh(self, *words: str) -> str:
        """Run virsh as a whole command in the daemon's namespaces. InternalError with its words where it fails."""
        process = await asyncio.create_subprocess_exec(
            *("nsenter", f"--target={self._pid}", "--mount", "--uts"),
            *("virsh", "-q", "-c", "qemu:///system", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), COMMAND)
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise TimedOut(f"virsh {words[0]}", f"is not done after {COMMAND:g} s") from error
        if process.returncode != 0:
            raise InternalError(f"virsh {words[0]}", err.decode(errors="replace").strip() or "failed")
        return out.decode()


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def domain(place: Path, guest: MicroGuest, memory_mib: int, cmdline: str) -> Path:
    """The description of the same machine for libvirt, as a file."""
    text = f"""\
<domain type='qemu'>
  <name>{DOMAIN}</name>
  <uuid>{UUID}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <kernel>{guest.kernel}</kernel>
    <initrd>{guest.initrd}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>Westmere</model></cpu>
  <iothreads>1</iothreads>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='scsi' index='0' model='virtio-scsi'><driver iothread='1'/></controller>
    <controller type='virtio-serial' index='0'/>
    <controller type='usb' model='none'/>
    <interface type='user'>
      <mac address='52:54:00:12:34:56'/><model type='virtio'/><rom enabled='no'/>
    </interface>
    <serial type='unix'><source mode='bind' path='{place}/serial.sock'/><target port='0'/></serial>
    <channel type='unix'>
      <source mode='bind' path='{place}/qga.sock'/><target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='builtin'/></rng>
  </devices>
</domain>
"""
    path = place / "domain.xml"
    path.write_text(text)
    return path
