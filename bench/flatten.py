"""Flattening: a chain of three VHDs made one image, beside qemu-img and dd copying an image that is flat already.

Every contender ends with its file on the disk (fsync). QEMU cannot read a chain: it gets the easier work, the same
content in one file.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import ms, now, workplace
from hostler.model.disk import ImageFormat
from hostler.model.errors import InternalError
from hostler.model.units import GiB, KiB, MiB
from hostler.storage.chains.flatten import flatten
from hostler.storage.formats import QEMU_DRIVER
from hostler.testing import hyperv_vhd

SIZE = 1 * GiB
CHANGED = 32 * MiB
"""What each of the two differencing images has, in runs of RUN."""
RUN = 64 * KiB
FORMATS = (ImageFormat.RAW, ImageFormat.QCOW2, ImageFormat.VHD, ImageFormat.VHDX)
BLOCK = 4 * MiB
"""Bytes that dd copies at a time."""


async def _run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    if process.returncode != 0:
        raise InternalError(argv[0], err.decode(errors="replace")[-500:])


def _synced(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)


def _changes(seed: int) -> dict[int, bytes]:
    rng = random.Random(seed)  # noqa: S311 - content, no secret
    runs = rng.sample(range(SIZE // RUN), CHANGED // RUN)
    return {run * (RUN // 512) + sector: rng.randbytes(512) for run in runs for sector in range(RUN // 512)}


async def _make(place: Path) -> tuple[Path, Path]:
    """The topmost image of the chain, and a flat raw image."""
    flat, base = place / "flat.raw", place / "base.vhd"
    with flat.open("wb") as file:
        for _ in range(SIZE // (16 * MiB)):
            file.write(os.urandom(16 * MiB))
    await _run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size=on", str(flat), str(base))
    last = (hyperv_vhd.id_of(base), base)
    for number in (1, 2):
        path = place / f"point{number}.avhd"
        last = (hyperv_vhd.differencing(path, SIZE, _changes(number), last), path)
    await flatten(str(last[1]), str(flat), "raw")
    return last[1], flat


Work = Callable[[Path, ImageFormat], Awaitable[None]]


async def _timed(place: Path, work: Work, formats: Sequence[ImageFormat]) -> Sample:
    """For each format the milliseconds until the file is on the disk; it is removed then."""
    sample: dict[str, float] = {}
    for format in formats:
        target = place / f"new.{format}"
        begun = now()
        await work(target, format)
        await asyncio.to_thread(_synced, target)
        sample[f"1 GiB to {format}"] = ms(now() - begun)
        target.unlink()
        target.with_name(f"new.journal.{format}").unlink(missing_ok=True)
    return sample


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("flatten")
    with workplace() as place:
        top, flat = await _make(place)

        async def ours(target: Path, format: ImageFormat) -> None:
            await flatten(str(top), str(target), format.value)

        async def qemu(target: Path, format: ImageFormat) -> None:
            options = ("-o", "force_size=on") if format is ImageFormat.VHD else ()
            argv = ("qemu-img", "convert", "-f", "raw", "-O", QEMU_DRIVER[format], *options)
            await _run(*argv, str(flat), str(target))

        async def dd(target: Path, _format: ImageFormat) -> None:
            await _run("dd", f"if={flat}", f"of={target}", f"bs={BLOCK}", "status=none")

        contenders = [
            Contender("qemu", lambda: _timed(place, qemu, FORMATS)),
            Contender("hostler", lambda: _timed(place, ours, FORMATS)),
            Contender("dd", lambda: _timed(place, dd, FORMATS[:1])),
        ]
        result.notes["chain"] = "a dynamic VHD of 1 GiB and two differencing ones with 32 MiB each, in runs of 64 KiB"
        result.notes["qemu, dd"] = "copy one flat raw image with the same content"
        return await in_turns(result, contenders, rounds)
