"""Conversion of images against `qemu-img convert` with its own settings, and against `dd` of the same bytes; checksums
against `sha256sum`, whole copies against `cp`. What a contender wrote is on the disk when its time ends: a copy that is
not may not take the place of its source."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Contender, Result, Sample, in_turns
from bench.stage import ms, now, workplace
from hostler.model.disk import ImageFormat
from hostler.model.errors import InternalError
from hostler.model.units import MiB
from hostler.storage.checksum import checksum
from hostler.storage.content import Content
from hostler.storage.copying import copy_file
from hostler.storage.formats import QEMU_DRIVER
from hostler.storage.qemu_img import QemuImg

SIZE = 512 * MiB
DATA = 128 * MiB
"""Random, in pieces of 1 MiB with as much of a hole behind each; the rest of the disk was never written."""
TO = (ImageFormat.QCOW2, ImageFormat.RAW, ImageFormat.VHD, ImageFormat.VHDX)
FROM = (ImageFormat.QCOW2, ImageFormat.VHD, ImageFormat.VHDX)
HASH, COPY = "sha-256 of all content", "copy of the file"
OPTIONS = {
    ImageFormat.VHD: ("-o", "subformat=dynamic,force_size=on"),
    ImageFormat.VHDX: ("-o", "subformat=dynamic"),
}


def pairs() -> Sequence[tuple[ImageFormat, ImageFormat]]:
    """From which format to which."""
    return [(ImageFormat.RAW, f) for f in TO] + [(f, ImageFormat.RAW) for f in FROM]


@dataclass(frozen=True, slots=True)
class Sources:
    """The same content in every format."""

    place: Path

    def of(self, format: ImageFormat) -> str:
        return str(self.place / f"source.{format}")

    async def make(self) -> None:
        with open(self.of(ImageFormat.RAW), "wb") as file:
            for number in range(DATA // MiB):
                file.seek(number * 2 * MiB)
                file.write(os.urandom(MiB))
            file.truncate(SIZE)
        for format in FROM:
            await QemuImg().convert(self.of(ImageFormat.RAW), ImageFormat.RAW, self.of(format), format, SIZE)


async def command(*words: str) -> None:
    """A program that must succeed."""
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise InternalError(f"command {words[0]}", "failed")


async def settled() -> None:
    """Nothing that another contender wrote is still on its way to the disk."""
    await asyncio.to_thread(os.sync)


async def _qemu(sources: Sources) -> Sample:
    found: dict[str, float] = {}
    for old, new in pairs():
        target = str(sources.place / "by-qemu")
        await settled()
        begun = now()
        formats = ("-f", QEMU_DRIVER[old], "-O", QEMU_DRIVER[new])
        await command("qemu-img", "convert", *formats, *OPTIONS.get(new, ()), sources.of(old), target)
        await command("sync", target)
        found[f"{old} to {new}"] = ms(now() - begun)
        os.unlink(target)
    return found


async def _hostler(sources: Sources) -> Sample:
    found: dict[str, float] = {}
    for old, new in pairs():
        target = str(sources.place / "by-hostler")
        await settled()
        begun = now()
        await QemuImg().convert(sources.of(old), old, target, new, SIZE)
        found[f"{old} to {new}"] = ms(now() - begun)
        os.unlink(target)
    await settled()
    begun = now()
    async with Content(sources.of(ImageFormat.QCOW2), ImageFormat.QCOW2, SIZE, QemuImg()) as content:
        await checksum(content)
    found[HASH] = ms(now() - begun)
    found[COPY] = await _copy(sources)
    return found


async def _copy(sources: Sources) -> float:
    target = sources.place / "copy"

    def work() -> None:
        with open(sources.of(ImageFormat.RAW), "rb") as old, target.open("wb") as new:
            copy_file(old.fileno(), new.fileno(), lambda _: None, threading.Event())
            os.fsync(new.fileno())

    await settled()
    begun = now()
    await asyncio.to_thread(work)
    took = ms(now() - begun)
    target.unlink()
    return took


async def _dd(sources: Sources) -> Sample:
    """Bytes of the raw image as they are, holes left out; the other rows have no such thing."""
    target = str(sources.place / "by-dd")
    await settled()
    begun = now()
    source = sources.of(ImageFormat.RAW)
    await command("dd", f"if={source}", f"of={target}", "bs=4M", "conv=sparse,fsync", "status=none")
    found = {f"{ImageFormat.RAW} to {ImageFormat.RAW}": ms(now() - begun)}
    os.unlink(target)
    await settled()
    begun = now()
    await command("sha256sum", source)
    found[HASH] = ms(now() - begun)
    await settled()
    begun = now()
    await command("cp", "--sparse=always", source, target)
    await command("sync", target)
    found[COPY] = ms(now() - begun)
    os.unlink(target)
    return found


async def run(rounds: int) -> Result:
    """The whole comparison."""
    result = Result("convert")
    with workplace() as place:
        sources = Sources(place)
        await sources.make()
        result.notes["content"] = f"{DATA // MiB} MiB of data in {SIZE // MiB} MiB, on the disk at the end"
        if shutil.which("dd") is None:
            result.skipped["dd"] = "not installed"
        contenders = [
            Contender("qemu", lambda: _qemu(sources)),
            Contender("hostler", lambda: _hostler(sources)),
            Contender("coreutils", lambda: _dd(sources), optional=True),
        ]
        return await in_turns(result, contenders, rounds)
