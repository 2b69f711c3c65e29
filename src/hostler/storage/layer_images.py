"""Layers of disks as files: made, merged while nobody uses them, copied into one image.

Whatever is opened here is opened by a description of the whole chain, made from our record (`json:`): the backing file
that an image names in its header is for people with other tools, and is never followed, since who writes an image can
write there what he likes. A layer that says its data is in another file is refused: QEMU would open that as root. A
merge may be broken off at any moment and done again: the upper layer keeps all it has.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from hostler.model.disk import DiskSource, ImageFormat, SourceKind
from hostler.model.errors import HostlerError, WrongState
from hostler.storage import programs
from hostler.storage.formats import QEMU_DRIVER, require_own_data
from hostler.storage.qemu_img import COPY_BOUNDS, QUICK, OnProgress, explain, explain_os, new_file, teller
from hostler.storage.waiting import in_thread

NEVER_WRITTEN = frozenset({SourceKind.CHAIN})
"""What a merge never goes into: files of Hyper-V's that others may build on."""
NEVER_GROWS = frozenset({ImageFormat.VHD, ImageFormat.VHD_FIXED, ImageFormat.VHDX})
"""Formats QEMU cannot make larger, so that no layer of a disk that has grown can be merged into them."""


class LayerImages:
    """Makes and merges layers with the program `binary` (qemu-img)."""

    def __init__(self, binary: str = "qemu-img") -> None:
        self._binary = binary

    async def create(self, layer: DiskSource) -> None:
        """The file of a new, empty layer. AlreadyExists if the name is taken, NoSpace, NotFound (the directory),
        NotPermitted. The layer below is not looked at."""
        below = layer.backing
        assert below is not None
        async with new_file(layer.path) as part:
            options = ["-u", "-o", "compat=1.1,lazy_refcounts=off", *_named(below)]
            argv = [self._binary, "create", "-q", "-f", "qcow2", *options, "--", part, str(layer.size)]
            outcome = await programs.run(argv, f"layer {layer.path}", QUICK)
            if outcome.status != 0:
                raise explain(f"layer {layer.path}", outcome, Path(layer.path).parent)

    async def commit(self, top: DiskSource, on_progress: OnProgress | None = None) -> None:
        """Write what a layer has into the one below it, which grows where it is smaller; on disk at return. The chain
        must be open nowhere. InUse, NoSpace, BadImage, WrongState (a source that only a running VM can reach)."""
        below = top.backing
        assert below is not None
        await in_thread(f"layer {top.path}", lambda: require_own_data(top))
        argv = [self._binary, "commit", "-d", "-p", "--", described(top)]
        outcome = await programs.run(argv, f"layer {top.path}", None, COPY_BOUNDS, teller(on_progress))
        if outcome.status != 0:
            raise explain(f"layer {below.path}", outcome, Path(below.path).parent)
        await asyncio.to_thread(_sync, below.path)

    async def name_below(self, layer: DiskSource, below: DiskSource) -> None:
        """Write into a layer's header what it builds on now. Nobody may have it open."""
        await in_thread(f"layer {layer.path}", lambda: require_own_data(layer))
        named = _named(below) or ["-b", ""]
        argv = [self._binary, "rebase", "-q", "-u", "-f", "qcow2", *named, "--", layer.path]
        outcome = await programs.run(argv, f"layer {layer.path}", QUICK)
        if outcome.status != 0:
            raise explain(f"layer {layer.path}", outcome, Path(layer.path).parent)

    async def flatten(
        self, top: DiskSource, path: str, format: ImageFormat, on_progress: OnProgress | None = None
    ) -> None:
        """A new image with all that the chain has, and nothing below it. Errors as `create`; InUse when a running VM
        writes the top layer. Cancelled, nothing is left."""
        await in_thread(f"layer {top.path}", lambda: require_own_data(top))
        async with new_file(path) as part:
            argv = [self._binary, "create", "-q", "-f", QEMU_DRIVER[format], *_options(format), "--", part]
            outcome = await programs.run([*argv, str(top.size)], f"image {path}", QUICK)
            if outcome.status == 0:
                argv = [self._binary, "convert", "-p", "-n", "--target-is-zero", "-O", QEMU_DRIVER[format], "--"]
                argv += [described(top), part]
                outcome = await programs.run(argv, f"image {path}", None, COPY_BOUNDS, teller(on_progress))
            if outcome.status != 0:
                raise explain(f"image {path}", outcome, Path(path).parent)


def described(source: DiskSource) -> str:
    """A chain as qemu-img takes it. WrongState for layers that only a running VM can reach."""
    return "json:" + json.dumps(_node(source), ensure_ascii=False)


def _node(source: DiskSource) -> dict[str, Any]:
    if not source.local or source.kind is SourceKind.CHAIN:
        raise WrongState(
            f"layer {source.path}", "can be reached only while its VM runs", "start the VM, then do it again"
        )
    protocol = "host_device" if source.kind is SourceKind.DEVICE else "file"
    node: dict[str, Any] = {
        "driver": QEMU_DRIVER[source.format],
        "file": {"driver": protocol, "filename": source.path, "locking": "on"},
    }
    if source.format is ImageFormat.QCOW2:
        node["backing"] = _node(source.backing) if source.backing is not None else None
    elif source.format is ImageFormat.VHD_FIXED:  # as the VM opens it: the data before the footer
        node |= {"driver": "raw", "size": source.size}
    return node


def _named(below: DiskSource) -> list[str]:
    """How a layer's header names the one below it. Only where QEMU opens that as a file: it takes a name in a header as
    the file's name where the description of the layer below has none, as that of an export, and then refuses both."""
    if not below.local or below.exported:
        return []
    return ["-b", below.path, "-F", QEMU_DRIVER[below.format]]


def _options(format: ImageFormat) -> list[str]:
    if format in (ImageFormat.VHD, ImageFormat.VHD_FIXED):
        return ["-o", f"subformat={'dynamic' if format is ImageFormat.VHD else 'fixed'},force_size=on"]
    return ["-o", "subformat=dynamic"] if format is ImageFormat.VHDX else []


def _sync(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise explain_os(f"image {path}", error, Path(path).parent) from error


def can_take(base: DiskSource, size: int) -> bool:
    """Whether layers of a disk of that size (bytes) can be merged into that layer."""
    return base.kind not in NEVER_WRITTEN and (size <= base.size or base.format not in NEVER_GROWS)


async def copy_file(source: str, path: str) -> None:
    """A copy of a file, mode 0600, by reference where the file system can; complete and on disk or not there at all."""
    async with new_file(path) as part:
        try:
            await asyncio.to_thread(_copy, source, part)
        except OSError as error:
            raise _copy_failed(path, error) from error


def _copy(source: str, target: str) -> None:
    read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
        try:
            left = os.fstat(read).st_size
            while left > 0:
                # The kernel shares the blocks (Btrfs, XFS), lets a server copy them (NFS), or copies them itself.
                done = os.copy_file_range(read, write, min(left, 1 << 30))
                if done == 0:
                    break
                left -= done
        finally:
            os.close(write)
    finally:
        os.close(read)


def _copy_failed(path: str, error: OSError) -> HostlerError:
    return explain_os(f"file {path}", error, Path(path).parent)
