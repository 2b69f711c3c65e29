"""Which format an image has, told from crafted content: every rule of refusal, and no crash on any bytes."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage, HostlerError, InvalidInput, NotFound, NotPermitted
from hostler.model.units import MiB
from hostler.storage.footer import checksum
from hostler.storage.formats import recognise

pytestmark = pytest.mark.unit

SIZE = 4 * MiB


def footer(kind: int, size: int = SIZE) -> bytes:
    """A VHD footer as the specification has it (offsets 0 to 511)."""
    block = bytearray(512)
    struct.pack_into(
        ">8sIIQI4sI4sQQIII", block, 0, b"conectix", 2, 0x10000, 512, 0, b"win ", 0, b"Wi2k", size, size, 0, kind, 0
    )
    struct.pack_into(">I", block, 64, checksum(bytes(block), 64))
    return bytes(block)


def dynamic(kind: int = 3, blocks: tuple[int, ...] = (0xFFFFFFFF, 0xFFFFFFFF), tail: int = 0) -> bytes:
    header = bytearray(1024)
    struct.pack_into(">8sQQIIII", header, 0, b"cxsparse", 2**64 - 1, 1536, 0x10000, len(blocks), 2 * MiB, 0)
    struct.pack_into(">I", header, 36, checksum(bytes(header), 36))
    table = struct.pack(f">{len(blocks)}I", *blocks).ljust(512, b"\xff")
    return footer(kind) + bytes(header) + table + bytes(tail) + footer(kind)


def qcow2(backing: bytes = b"", features: int = 0, version: int = 3, encryption: int = 0) -> bytes:
    at = 1024 if backing else 0
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", version, at, len(backing), 16, SIZE, encryption)
    head = head.ljust(72, b"\0") + struct.pack(">Q", features)
    return head.ljust(1024, b"\0") + backing.ljust(65_536, b"\0")


def vhdx_header(damage: bytes = b"") -> bytes:
    """One of the two headers, with its checksum, and the damage done afterwards."""
    header = b"head".ljust(4096, b"\0")
    crc = 0xFFFFFFFF
    for byte in header:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    header = header[:4] + struct.pack("<I", crc ^ 0xFFFFFFFF) + header[8:]
    return header[: 4096 - len(damage)] + damage


VHDX_HEADER = vhdx_header()


def vhdx(
    flags: int = 0,
    size: int = SIZE,
    regions: bytes = b"regi",
    headers: tuple[bytes, bytes] = (VHDX_HEADER, VHDX_HEADER),
) -> bytes:
    image = bytearray(2 * MiB + 128 * 1024)
    image[:8] = b"vhdxfile"
    for number, header in enumerate(headers, 1):
        image[number * 64 * 1024 : number * 64 * 1024 + 4096] = header
    guid = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
    struct.pack_into("<4sII4x16sQII", image, 192 * 1024, regions, 0, 1, guid, 2 * MiB, MiB, 1)
    parameters = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
    length = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
    struct.pack_into("<8s2xH20x", image, 2 * MiB, b"metadata", 2)
    struct.pack_into("<16sII8x", image, 2 * MiB + 32, parameters, 65_536, 8)
    struct.pack_into("<16sII8x", image, 2 * MiB + 64, length, 65_544, 8)
    struct.pack_into("<IIQ", image, 2 * MiB + 65_536, 32 * MiB, flags, size)
    return bytes(image)


SOUND: dict[ImageFormat, Callable[[], bytes]] = {
    ImageFormat.VHD: dynamic,
    ImageFormat.VHD_FIXED: lambda: bytes(SIZE) + footer(2),
    ImageFormat.VHDX: vhdx,
    ImageFormat.QCOW2: qcow2,
    ImageFormat.RAW: lambda: bytes(SIZE),
}


def write(tmp_path: Path, content: bytes, name: str = "image") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("format", ImageFormat)
def test_each_format_is_told_from_content_whatever_its_name(tmp_path: Path, format: ImageFormat) -> None:
    for name in ("image", "image.iso", "IMAGE.raw") + (("image.vhd",) if format is not ImageFormat.RAW else ()):
        shape = recognise(write(tmp_path, SOUND[format](), name), deep=True)
        assert (shape.format, shape.size) == (format, SIZE)
        assert shape.allocated > 0 or format is ImageFormat.RAW
        assert recognise(str(tmp_path / name), format).format is format


@pytest.mark.parametrize("format", ImageFormat)
def test_what_is_said_to_be_raw_is_raw(tmp_path: Path, format: ImageFormat) -> None:
    """A guest may write any header onto its raw disk; its record says raw, and that holds."""
    content = SOUND[format]()
    shape = recognise(write(tmp_path, content), ImageFormat.RAW, deep=True)
    assert (shape.format, shape.size) == (ImageFormat.RAW, len(content))


@pytest.mark.parametrize("said", ImageFormat)
@pytest.mark.parametrize("format", ImageFormat)
def test_another_format_than_said_is_refused(tmp_path: Path, format: ImageFormat, said: ImageFormat) -> None:
    path = write(tmp_path, SOUND[format]())
    if said in (format, ImageFormat.RAW):
        recognise(path, said)
        return
    with pytest.raises(BadImage) as refused:
        recognise(path, said)
    assert refused.value.details["found"] == format


REFUSED: dict[str, tuple[bytes, str]] = {
    "backing file": (qcow2(b"/etc/shadow"), "backing file '/etc/shadow'"),
    "relative backing file": (qcow2(b"../base.qcow2"), "backing file '../base.qcow2'"),
    "protocol backing file": (qcow2(b'json:{"driver":"nbd"}'), "backing file 'json:"),
    "backing file of version 2": (qcow2(b"/etc/shadow", version=2), "backing file '/etc/shadow'"),
    "external data file": (qcow2(features=4), "external data file"),
    "corrupt bit": (qcow2(features=2), "marked it as corrupt"),
    "encrypted": (qcow2(encryption=1), "encrypted"),
    "qcow version 1": (qcow2(version=1), "version 1"),
    "cut qcow2": (qcow2()[:60], "cut off"),
    "differencing VHD": (dynamic(kind=4), "differencing VHD"),
    "differencing VHD without its start": (bytes(SIZE) + footer(4), "differencing VHD"),
    "differencing VHDX": (vhdx(flags=2), "differencing VHDX"),
    "VHD of an unknown type": (dynamic(kind=7), "disk type is 7"),
    "dynamic VHD without its start": (bytes(SIZE) + footer(3), "lost its beginning"),
    "fixed VHD of another length": (bytes(SIZE - 512) + footer(2), "footer says"),
    "VHDX with two damaged headers": (vhdx(headers=(bytes(4096), vhdx_header(b"x"))), "neither of its headers"),
    "VHDX without regions": (vhdx(regions=b"none"), "region table"),
    "VMDK": (b"KDMV".ljust(SIZE, b"\0"), "VMDK"),
    "VDI": (bytes(64) + b"\x7f\x10\xda\xbe" + bytes(SIZE), "VDI"),
    "LUKS": (b"LUKS\xba\xbe".ljust(SIZE, b"\0"), "LUKS"),
}


def test_one_valid_header_of_a_vhdx_is_enough(tmp_path: Path) -> None:
    """The other may be half written: its writer was killed."""
    for headers in ((VHDX_HEADER, vhdx_header(b"x")), (bytes(4096), VHDX_HEADER)):
        path = tmp_path / "image"
        path.write_bytes(vhdx(headers=headers))
        assert recognise(str(path)).format is ImageFormat.VHDX


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = REFUSED[case]
    with pytest.raises(BadImage, match=reason) as refused:
        recognise(write(tmp_path, content), deep=True)
    assert refused.value.advice
    assert not refused.value.cause.endswith(".")


@pytest.mark.parametrize("at", [0, 8, 30, 40, 63, 66, 100])
def test_a_flipped_byte_of_a_vhd_footer_is_found_by_its_checksum(tmp_path: Path, at: int) -> None:
    for content, start in ((dynamic(), 0), (bytes(SIZE) + footer(2), SIZE)):
        broken = bytearray(content)
        broken[start + at] ^= 0x40
        if at == 0:  # the cookie itself: then it is no VHD at all, and only its name promises one
            with pytest.raises(BadImage, match="damaged"):
                recognise(write(tmp_path, bytes(broken[: start + 512]), "a.vhd"))
            continue
        with pytest.raises(BadImage, match="checksum"):
            recognise(write(tmp_path, bytes(broken)))


def test_a_name_that_promises_a_format_is_not_taken_for_raw(tmp_path: Path) -> None:
    for name in ("a.vhd", "a.VHDX", "a.qcow2", "a.avhd"):
        path = write(tmp_path, bytes(SIZE), name)
        with pytest.raises(BadImage, match="no such content"):
            recognise(path)
        assert recognise(path, ImageFormat.RAW).format is ImageFormat.RAW


def test_lost_blocks_of_a_dynamic_vhd_are_found_when_looked_for(tmp_path: Path) -> None:
    whole = dynamic(blocks=(4, 0xFFFFFFFF), tail=512 + 2 * MiB)
    assert recognise(write(tmp_path, whole), deep=True).size == SIZE
    cut = write(tmp_path, whole[: 1 * MiB])
    assert recognise(cut).size == SIZE
    with pytest.raises(BadImage, match="data at its end is lost"):
        recognise(cut, deep=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((512, b"nonsense"), "header is missing"),
        ((512 + 32, b"\xff"), "checksum of its dynamic"),
    ],
)
def test_a_damaged_dynamic_header_is_found(tmp_path: Path, change: tuple[int, bytes], reason: str) -> None:
    at, replacement = change
    content = bytearray(dynamic())
    content[at : at + len(replacement)] = replacement
    with pytest.raises(BadImage, match=reason):
        recognise(write(tmp_path, bytes(content)), deep=True)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error in (
        (tmp_path, InvalidInput),
        (tmp_path / "fifo", InvalidInput),
        (Path("/dev/zero"), InvalidInput),
        (tmp_path / "missing", NotFound),
        (Path("/etc/passwd/x"), NotFound),
        (tmp_path / ("x" * 300), InvalidInput),
        (Path("/bad\0name"), InvalidInput),
    ):
        with pytest.raises(error):
            recognise(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_not_permitted(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(512))
    os.chmod(path, 0)
    with pytest.raises(NotPermitted):
        recognise(path)


def test_an_empty_file_is_raw_of_no_size(tmp_path: Path) -> None:
    assert recognise(write(tmp_path, b"")).size == 0


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_headers_only_ever_raise_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    format = data.draw(st.sampled_from(ImageFormat))
    content = bytearray(SOUND[format]())
    places = {ImageFormat.VHD_FIXED: (SIZE,), ImageFormat.VHDX: (0, 192 * 1024, 2 * MiB, 2 * MiB + 65_536)}
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from(places.get(format, (0, 512))))
        piece = data.draw(st.binary(min_size=1, max_size=16))
        at = start + data.draw(st.integers(0, 120))
        content[at : at + len(piece)] = piece
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    path = str(tmp_path_factory.getbasetemp() / "mutated")
    Path(path).write_bytes(bytes(content[:cut]))
    try:
        shape = recognise(path, deep=True)
    except HostlerError as error:
        assert error.cause
    else:
        assert shape.size >= 0
