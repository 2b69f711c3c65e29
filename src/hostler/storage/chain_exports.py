"""Exports of chains: a differencing VHD or VHDX, with its parents, served read-only to a VM by a process of ours.

QEMU cannot open such an image. The daemon opens and checks the files, and holds QEMU's locks for reading on them; the
process gets them open (its user need not be able to reach them) and is found again like the storage daemons of the
other exports, by its control socket and command line.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from hostler.model.disk import Disk
from hostler.model.errors import BadImage, QemuFailed
from hostler.model.mark import Part, mark
from hostler.storage.chains.chain import Chain, open_chain
from hostler.storage.export_process import await_start, control_option
from hostler.storage.image_locks import lock_for_reading
from hostler.storage.waiting import in_thread

PROGRAM = "hostler.storage.chains.serve"


async def start_chain(control: str, nbd: str, disk: Disk, run_as: int | None) -> None:
    """Serve the chain that is the disk's source on the socket `nbd`, under the disk's id. BadImage when it is not sound
    or has another size than recorded, InUse when a QEMU writes one of its files, NotFound, NotPermitted, QemuFailed."""
    base = disk.source
    chain = await in_thread(f"image {base.path}", lambda: _open(base.path))
    try:
        if chain.size != base.size:
            raise BadImage(
                f"disk {disk.id} ({base.path})",
                f"has {chain.size} bytes, the VM's configuration says {base.size}",
                "attach it anew, so that its size is taken from the image",
            )
        await _spawn(control, nbd, disk.id, chain, run_as)
    finally:
        chain.close()


def serves_chain(pid: int) -> bool:
    """Whether an export process is one of these."""
    with suppress(OSError):
        return os.fsencode(PROGRAM) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def search_of(path: str) -> tuple[str, ...]:
    """Where parents of a chain that a VM uses may be beside its own directory: below the directory above it, since an
    export folder has Snapshots beside Virtual Hard Disks."""
    above = os.path.dirname(os.path.dirname(os.path.realpath(path)))
    return () if above == "/" else (above,)


def _open(path: str) -> Chain:
    chain = open_chain(path, search_of(path))
    try:
        chain.require_sound()
        for layer in chain.layers:
            lock_for_reading(layer.file.fd, layer.file.path)
    except BaseException:
        chain.close()
        raise
    return chain


async def _spawn(control: str, nbd: str, name: str, chain: Chain, run_as: int | None) -> None:
    """The locks are of the open files and so go along with them."""
    argv = [sys.executable, "-P", "-m", PROGRAM, "--daemonize", "--chardev", control_option(control), "--nbd", nbd]
    argv += ["--name", name]
    if run_as is not None and os.geteuid() == 0:
        argv += ["--user", f"{run_as}:{mark(os.path.dirname(control), Part.EXPORT)}"]
    for layer in chain.layers:
        argv += ["--layer", f"{layer.file.fd}:{layer.file.path}"]
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        pass_fds=[layer.file.fd for layer in chain.layers],
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
    )
    output = await await_start(process, nbd, "the chain server")
    if process.returncode != 0:
        raise QemuFailed(f"export {nbd}", f"the chain server did not start: {output}", output=output)
