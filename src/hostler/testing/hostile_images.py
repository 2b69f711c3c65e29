"""Chains with damage done to them: bytes anywhere in what describes the data, their checksums made right again or not.

`python -m hostler.testing.hostile_images SEED COUNT` reads that many and says how they fared; only a refusal is
allowed, in little memory and time.
"""

from __future__ import annotations

import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from hostler.model.errors import HostlerError
from hostler.storage.chains import plan
from hostler.storage.chains.chain import open_chain
from hostler.storage.chains.survey import survey
from hostler.testing import hyperv_vhd, hyperv_vhdx

KiB, MiB = 1024, 1024 * 1024
SIZE = 6 * MiB
MAX_EXTENTS = 20_000
"""Extents looked at of one image: a hostile table may describe very many, one after the other."""
MEMORY = 512 * MiB
"""Bytes of address space that reading them may take, Python and libraries included."""
SECONDS = 10.0
"""Wall time one image may take here; the slowest are logs that are summed to the end."""
INTERESTING = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF)

Damage = Callable[[random.Random, bytearray], None]


def make(place: Path) -> dict[str, bytes]:
    """The sound images, written into `place`: the tops of chains, by name, and their bytes."""
    sectors = {n: bytes([n % 251]) * 512 for n in range(0, SIZE // 512, 61)}
    over = {n: b"o" * 512 for n in range(3, SIZE // 512, 97)}
    id = hyperv_vhd.dynamic(place / "base.vhd", SIZE, sectors)
    hyperv_vhd.differencing(place / "top.avhd", SIZE, over, (id, place / "base.vhd"))
    guid = hyperv_vhdx.Vhdx(SIZE, sectors).write(place / "base.vhdx")
    parent = hyperv_vhdx.Parent.of(guid, place / "base.vhdx")
    hyperv_vhdx.Vhdx(SIZE, over, parent).write(place / "top.avhdx")
    hyperv_vhdx.Vhdx(SIZE, over, parent).write(place / "log.avhdx")
    with (place / "log.avhdx").open("rb") as file:
        file.seek(hyperv_vhdx.TABLE_AT)
        table = file.read(4 * KiB)
    hyperv_vhdx.crash(place / "log.avhdx", [(hyperv_vhdx.TABLE_AT, table)] * 3)
    return {name: (place / name).read_bytes() for name in ("base.vhd", "top.avhd", "top.avhdx", "log.avhdx")}


def damage(rng: random.Random, name: str, content: bytes) -> bytes:
    """A damaged copy."""
    image = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.choice(_places(name, len(image)))
        at = min(len(image) - 1, at + rng.randrange(64))
        kind = rng.randrange(4)
        if kind == 0:
            image[at] = rng.choice(INTERESTING)
        elif kind == 1:
            image[at : at + 8] = rng.randbytes(min(8, len(image) - at))
        elif kind == 2:
            image[at] ^= 1 << rng.randrange(8)
        else:
            number = rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            image[at : at + 8] = struct.pack(rng.choice("<>") + "Q", number)[: len(image) - at]
    if rng.random() < 0.1:
        del image[rng.randrange(len(image)) :]
    if rng.random() < 0.7 and len(image) > 400 * KiB:
        (_resum_vhd if name.endswith("vhd") else _resum_vhdx)(image)
    return bytes(image)


def _places(name: str, length: int) -> list[int]:
    """Where what describes the data begins, in steps of 64 bytes."""
    if name.endswith("vhd"):
        return [*range(0, 3 * KiB, 64), *range(length - 512, length, 64)]
    headers = [start + step for start in (0, 64 * KiB, 128 * KiB, 192 * KiB, 256 * KiB) for step in (0, 64)]
    metadata = [hyperv_vhdx.METADATA_AT + step for step in (0, 64, 128, 192, 64 * KiB, 64 * KiB + 64, 64 * KiB + 128)]
    log = [hyperv_vhdx.LOG_AT + page * 4096 + step for page in range(6) for step in (0, 64, 4032)]
    return [*headers, *metadata, *log, hyperv_vhdx.TABLE_AT, hyperv_vhdx.TABLE_AT + 48]


def _resum_vhd(image: bytearray) -> None:
    for start, length, field in ((0, 512, 64), (512, 1024, 36), (len(image) - 512, 512, 64)):
        block = image[start : start + length]
        block[field : field + 4] = bytes(4)
        image[start + field : start + field + 4] = struct.pack(">I", ~sum(block) & 0xFFFFFFFF)


def _resum_vhdx(image: bytearray) -> None:
    blocks = [(64 * KiB, 4 * KiB), (128 * KiB, 4 * KiB), (192 * KiB, 64 * KiB)]
    at = hyperv_vhdx.LOG_AT
    for _ in range(4):
        (length,) = struct.unpack_from("<I", image, at + 8) if at + 64 < len(image) else (0,)
        if not 0 < length <= 64 * KiB:
            break
        blocks.append((at, length))
        at += length
    for start, length in blocks:
        block = bytes(image[start : start + length])
        if len(block) == length:
            summed = hyperv_vhdx.crc32c(block[:4] + bytes(4) + block[8:])
            image[start + 4 : start + 8] = struct.pack("<I", summed)


def read_all(path: Path) -> str:
    """Everything that is read of an image: "sound", or the refusal."""
    try:
        survey(str(path))
        with open_chain(str(path)) as chain:
            chain.require_sound()
            for extent in islice(
                plan.without_holes(chain.layers, plan.extents(chain.layers, 0, chain.size)), MAX_EXTENTS
            ):
                if extent.at >= 0:
                    chain.layers[extent.source].file.read(extent.at, min(extent.length, 4096))
    except HostlerError as error:
        return error.cause
    return "sound"


def main(seed: int, count: int) -> None:
    """Print how many were sound, how many kinds of refusal there were, and the slowest."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rng = random.Random(seed)  # noqa: S311 - damage that can be done again, no secret
    refusals: set[str] = set()
    sound, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        images = make(place)
        for _ in range(count):
            name = rng.choice(list(images))
            path = place / f"hostile{Path(name).suffix}"
            path.write_bytes(damage(rng, name, images[name]))
            begun = time.monotonic()
            outcome = read_all(path)
            slowest = max(slowest, time.monotonic() - begun)
            sound += outcome == "sound"
            refusals.add(outcome.translate(str.maketrans("", "", "0123456789"))[:40])
    print(f"{sound} sound, {len(refusals)} kinds of outcome, slowest {slowest:.2f} s")
    if slowest > SECONDS:
        raise SystemExit(f"one took {slowest:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
