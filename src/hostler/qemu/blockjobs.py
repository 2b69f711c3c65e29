"""Block jobs of a running VM: begun. How they go on and end is in `jobfollow`."""

from __future__ import annotations

from collections.abc import Callable

from hostler.model.blockjob import BlockJob
from hostler.model.disk import Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import InvalidInput, QemuFailed
from hostler.qemu import bitmaps, blockdev, layers
from hostler.qemu import commands_block as block
from hostler.qemu.blockdev import Aio, Options
from hostler.qemu.qmp import QmpSession

OnBlockJob = Callable[[BlockJob], None]


async def mirror(
    qmp: QmpSession, aio: Aio, job: str, disk: Disk, target: DiskSource, export: str | None, speed: int
) -> None:
    """See `Blocks.mirror`. A disk of one layer is copied without the target being zeroed before (`top` means all of it
    then): the target reads as zeroes already."""
    layers.check_seen(disk)
    copy = _written(disk, target)
    node = blockdev.blockdev_options(copy, export, aio)
    if disk.source.base.exported and disk.discard:
        # QEMU's VHD and VHDX drivers do not tell zeroes from data: without this the copy would not be sparse.
        node["detect-zeroes"] = "unmap"
    added = await layers.add_node(qmp, copy, node)
    options: Options = {
        **_common(disk, job, speed),
        "device": blockdev.node_name(disk),
        "target": blockdev.node_name(copy),
        "sync": "top" if disk.source.backing is None else "full",
        "on-source-error": "report",
        "on-target-error": "report",
        "copy-mode": "background",
    }
    try:
        await block.blockdev_mirror(qmp, options)
    except BaseException as error:
        if added:
            await layers.drop_quietly(qmp, [blockdev.node_name(copy)])
        if isinstance(error, QemuFailed):
            raise layers.explained(disk, target, error) from error
        raise


async def commit(
    qmp: QmpSession, aio: Aio, job: str, disk: Disk, top: DiskSource, base: DiskSource, speed: int
) -> None:
    """See `Blocks.commit`. No name of a backing file is written into the layer above."""
    check_commit(disk, top, base)
    above = next((layer for layer in disk.source.layers() if _below(layer, top)), None)
    await bitmaps.extend_down(qmp, aio, disk, top, base)
    await layers.reopen(qmp, aio, disk, base, writes=True)
    options: Options = {
        **_common(disk, job, speed),
        "device": blockdev.node_name(disk),
        "top-node": blockdev.layer_node(disk, top),
        "base-node": blockdev.layer_node(disk, base),
        "on-error": "report",
    }
    if above is not None:
        # QEMU writes this one's header when the job ends, and aborts as a whole where it must not.
        await layers.reopen(qmp, aio, disk, above, writes=True)
        options["backing-file"] = ""
    try:
        await block.block_commit(qmp, options)
    except QemuFailed as error:
        raise layers.explained(disk, disk.source, error) from error


def _below(layer: DiskSource, below: DiskSource) -> bool:
    return layer.backing is not None and layer.backing.node == below.node


def check_commit(disk: Disk, top: DiskSource, base: DiskSource) -> None:
    """InvalidInput when these layers cannot be merged."""
    order = [layer.node for layer in disk.source.layers()]
    if top.node not in order or base.node not in order or order.index(top.node) >= order.index(base.node):
        raise InvalidInput(f"disk {disk.id}", "these are not an upper and a lower layer of it", "read its layers back")
    largest = max(layer.size for layer in disk.source.layers())
    if 0 < base.size < largest and (base.exported or not can_grow(base)):
        raise InvalidInput(
            f"disk {disk.id}",
            f"its layer {base.path} has {base.size} bytes, the disk {largest}, and this format cannot grow",
            "convert the disk instead",
        )


def can_grow(layer: DiskSource) -> bool:
    """Whether QEMU can make this image larger."""
    return layer.kind is SourceKind.VOLUME and layer.format in (ImageFormat.RAW, ImageFormat.QCOW2)


async def stream(qmp: QmpSession, aio: Aio, job: str, disk: Disk, base: DiskSource | None, speed: int) -> None:
    """See `Blocks.stream`. What the lower layers' bitmaps mark is added to the top one's before they go."""
    await bitmaps.lift(qmp, disk, base)
    options: Options = {
        **_common(disk, job, speed),
        "device": blockdev.node_name(disk),
        "on-error": "report",
        # Its switch waits for a word of ours, and nothing of it is left after it: see `jobfollow`.
        "auto-finalize": False,
        "auto-dismiss": True,
    }
    if base is not None:
        options |= {"base-node": blockdev.layer_node(disk, base), "backing-file": ""}
    try:
        await block.block_stream(qmp, options)
    except QemuFailed as error:
        raise layers.explained(disk, disk.source, error) from error


def _written(disk: Disk, target: DiskSource) -> Disk:
    """The disk as it is at its target, which is written to also where the guest only reads."""
    return disk.model_copy(update={"source": target, "read_only": False, "media": Media.DISK})


def _common(disk: Disk, job: str, speed: int) -> Options:
    return {
        "job-id": job,
        "speed": speed,
        "auto-dismiss": False,
        "auto-finalize": True,
        "filter-node-name": blockdev.job_node(disk, job),
    }
