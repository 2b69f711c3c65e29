"""Damaged and forged chains: every one is read or refused, never a crash, a hang or much memory."""

from __future__ import annotations

import random
import struct
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostler.model.errors import BadImage
from hostler.model.units import MiB
from hostler.storage.chains.chain import open_chain, open_image
from hostler.storage.crc32c import crc32c
from hostler.testing import hostile_images, hyperv_vhdx

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def images(place: Path) -> dict[str, bytes]:
    return hostile_images.make(place)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**64))
def test_damage_is_read_or_refused(place: Path, images: dict[str, bytes], seed: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(sorted(images))
    path = place / f"hostile{Path(name).suffix}"
    path.write_bytes(hostile_images.damage(rng, name, images[name]))
    hostile_images.read_all(path)


def test_the_damage_does_reach_the_code(place: Path, images: dict[str, bytes]) -> None:
    """Else the test above could not fail: sound ones are read, and many kinds of refusal are met."""
    rng = random.Random(7)
    outcomes = []
    for _ in range(150):
        name = rng.choice(sorted(images))
        path = place / f"hostile{Path(name).suffix}"
        path.write_bytes(hostile_images.damage(rng, name, images[name]))
        outcomes.append(hostile_images.read_all(path).translate(str.maketrans("", "", "0123456789")))
    assert "sound" in outcomes
    assert len(set(outcomes)) > 8


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=3000), at=st.integers(0, 3000))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, at: int) -> None:
    path = tmp_path_factory.mktemp("any") / "any.vhd"
    path.write_bytes(content[:at] + b"conectix" + content[at:])
    with pytest.raises(BadImage):
        open_chain(str(path))


def forged_log(path: Path, log: bytes, length: int) -> None:
    """A sound VHDX whose headers name this log at its end."""
    hyperv_vhdx.Vhdx(MiB, {}).write(path)
    id = uuid.UUID(int=5).bytes_le
    with path.open("r+b") as file:
        at = file.seek(0, 2)
        file.write(log.ljust(length, b"\0"))
        for start in (64 * 1024, 128 * 1024):
            header = bytearray(hyperv_vhdx.header(uuid.uuid4(), 3, id))
            struct.pack_into("<IQ", header, 68, length, at)
            header[4:8] = bytes(4)
            header[4:8] = struct.pack("<I", crc32c(bytes(header)))
            file.seek(start)
            file.write(header)


def test_a_log_of_entries_that_overlap_is_given_up_early(tmp_path: Path) -> None:
    """Each page claims to begin an entry of the whole log: summing them all would take hours."""
    length, id = 16 * MiB, uuid.UUID(int=5).bytes_le
    page = struct.pack("<4sIIIQII16sQQ", b"loge", 0, length, 0, 1, 0, 0, id, 0, 0).ljust(4096, b"\0")
    forged_log(tmp_path / "a.vhdx", page * (length // 4096), length)
    with pytest.raises(BadImage, match="overlap"):
        open_image(str(tmp_path / "a.vhdx"))


def test_a_log_longer_than_any_program_makes_is_refused(tmp_path: Path) -> None:
    forged_log(tmp_path / "a.vhdx", b"", 17 * MiB)
    with pytest.raises(BadImage, match="longer than"):
        open_image(str(tmp_path / "a.vhdx"))
