"""What the host agent needs of a running machine's disks beyond plugging them in and out. `hostler.qemu.blocks` is the
real one, `hostler.testing.simulated_blocks` a simulated one; the same contract tests run against both.

Layers are named by `Disk.layer_name` and the sources of the model; job ids are chosen by the caller, letters, digits
and dashes, and survive a restart of the daemon. Errors and deadlines as for `hostler.host.hypervisor.Machine`: every
method may be called again after its outcome was unknown. One work on a disk at a time: a second is refused as Busy,
also while an ended job of it is not forgotten. A disk with `reservations` takes none of this (InvalidInput): its guest
talks to the device itself, and QEMU does not see what it writes.

A job that has ended stays in QEMU until `forget`: a daemon that was away learns how it ended (but for `stream`).
Nothing switches a disk to another image by itself: `finish` does, and whoever calls it has stopped the guest before and
records the outcome before the guest goes on, so that at no moment the record names an image that is not the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hostler.host.backups.moments import Moments
from hostler.model.blockjob import BlockJob
from hostler.model.disk import Disk, DiskSource, IoLimits
from hostler.model.pool import Connection

OnBlockJob = Callable[[BlockJob], None]


class Blocks(Protocol):
    """The disks of one running machine."""

    @property
    def moments(self) -> Moments:
        """Its disks as they were at one moment, for backups."""

    async def layers(self) -> dict[str, tuple[str, ...]]:
        """For each disk id, the node names of the layers QEMU has under its device now, top first."""

    async def connect(self, connection: Connection) -> None:
        """From now on this QEMU can reach that network pool, whose files of secrets are there. Harmless when repeated;
        later values count for what is opened later."""

    # layers

    async def push(self, disks: Sequence[Disk], bitmaps: Mapping[str, Sequence[str]] = {}) -> None:
        """Put a new top layer on each of these disks, all at one moment or none. Each `source` is the new layer, an
        empty qcow2 made already, whose `backing` is what QEMU has now. `bitmaps`: for each disk id, names of dirty
        bitmaps that go on in the new layer. Harmless for disks that have it already (by node name)."""

    async def reopen(self, disk: Disk, layer: DiskSource, writes: bool) -> None:
        """Open one of its layers for writing, or for reading only again. Jobs do so by themselves with the layers they
        write to, and leave them open for writing."""

    async def flush(self, disk: Disk) -> None:
        """Put everything written to its top layer on the storage, tables of its format included. A stream does not do
        so at its end: until this was done the layers below are needed. Errors as of a write."""

    # jobs

    async def mirror(self, job: str, disk: Disk, target: DiskSource, export: str | None = None, speed: int = 0) -> None:
        """Begin to copy the disk, whole, to `target` (an image of the same size, made already and reading as zeroes;
        its node token is new), and keep it up to date. `export`: the socket that serves the target's base. Bytes/s, 0:
        unlimited. `finish` makes the target the disk, without any layer below it. Harmless when that job exists. A
        dynamic VHD or VHDX grows to its full size, unless the disk is one layer of qcow2 that never held zeroes: QEMU
        writes zeroes into it where the source has none."""

    async def commit(self, job: str, disk: Disk, top: DiskSource, base: DiskSource, speed: int = 0) -> None:
        """Begin to merge the layers from `top` down to `base` (without) into `base`. When `top` is the disk's top layer
        the job becomes ready and keeps up, and `finish` makes `base` the top layer; otherwise it ends by itself and the
        layer above `top` builds on `base` from then on. QEMU writes to `base` and, in the second case, to the layer
        above `top`: it must have the right to. InvalidInput when `base` is smaller and cannot grow. Harmless when that
        job exists."""

    async def stream(self, job: str, disk: Disk, base: DiskSource | None = None, speed: int = 0) -> None:
        """Begin to copy everything below the top layer, down to `base` (without; None: everything), into the top layer.
        It ends while somebody watches it, and then only the session that watched knows how, until `forget`; `layers`
        tells any other. Harmless when that job exists."""

    async def job(self, job: str) -> BlockJob | None:
        """How that job is; None when QEMU knows none of that name."""

    async def watch(self, job: str, on_progress: OnBlockJob | None = None, until_ready: bool = False) -> BlockJob:
        """Wait until it is over (or ready); QemuFailed, NoSpace, ... with QEMU's words when it failed, NotFound when
        QEMU has no such job, QemuFailed(gone) when QEMU ends. No deadline: guests may write as fast as a job copies."""

    async def speed(self, job: str, speed: int) -> None:
        """Change its speed limit; bytes/s, 0: unlimited."""

    async def finish(self, job: str) -> None:
        """Let a ready job switch the disk over; returns when it is over (and not yet forgotten). Errors as `watch`.
        Harmless when it is over."""

    async def cancel(self, job: str) -> None:
        """End it without a switch; returns when it is over. Harmless when it is over or unknown."""

    async def forget(self, job: str) -> None:
        """Drop an ended job, and close images no disk uses any more. Harmless when it is unknown."""

    async def close(self, disk_id: str, layer: str) -> None:
        """Close one layer's image that no device uses any more, by node name. Harmless when it is not open."""

    # live changes

    async def resize(self, disk: Disk, size: int) -> None:
        """Make the image larger, bytes, and tell the guest. InvalidInput for a format that QEMU cannot grow."""

    async def limit(self, disk_id: str, limits: IoLimits) -> None:
        """Set what the disk may do from now on."""

    async def change_medium(self, disk: Disk, export: str | None = None, force: bool = False) -> None:
        """Put another medium into a drive (EMPTY: take it out). GuestRefused when the guest has locked it; `force`
        pulls it out all the same. The image is opened before the old medium goes where its node token is new.
        Harmless when it is in."""

    # what changed

    async def bitmaps(self, disk: Disk) -> dict[str, int]:
        """Names of its dirty bitmaps, with the bytes each marks at most (all layers together). One that does not know
        all that changed, because QEMU was killed or a layer lacks it, is not among them."""

    async def add_bitmaps(self, disks: Sequence[Disk], name: str) -> None:
        """Begin to note what changes, on all of them at one moment; kept in the image where the format can (qcow2),
        else until QEMU ends. Harmless for disks where it is known already."""

    async def drop_bitmaps(self, disks: Sequence[Disk], name: str) -> None:
        """Forget that bitmap, in every layer. Harmless when it is not there."""

    async def keep_bitmaps(self, disk: Disk, target: DiskSource) -> None:
        """Give the target of a ready mirror job what the disk's dirty bitmaps mark. Between stopping the guest and
        `finish`: a bitmap that was begun earlier would mark the whole copy."""

    # guest

    async def freeze(self, deadline: float) -> int:
        """Ask the guest agent to flush and freeze the file systems; how many. GuestRefused without an agent."""

    async def thaw(self) -> None:
        """Thaw them; safe to call always, tried hard."""
