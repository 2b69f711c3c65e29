"""Descriptions made to hold up or to fill the daemon: each is refused in a moment. (A regular expression that runs
wild holds Python's lock, and with it every VM's actor.)"""

from __future__ import annotations

import os
import stat
import tarfile
import time
from pathlib import Path

import pytest

from hostler.foreign import ova
from hostler.foreign.xml import read_xml
from hostler.model.errors import BadImage, InvalidInput
from hostler.model.units import MiB
from hostler.storage import vmdk

pytestmark = pytest.mark.unit

MOMENT = 5.0
"""Seconds. Each of these took minutes, or for ever."""


@pytest.mark.parametrize(
    "text",
    [
        b"\n" * MiB,
        b"a=" + b" " * (MiB - 10) + b'"x"x',
        b"A" * MiB,
        b" " * (MiB - 1),
        b'RW 1 SPARSE "' * 80_000,
        b"RW" + b" " * (MiB - 2),
    ],
)
def test_a_vmdk_descriptor_takes_a_moment(tmp_path: Path, text: bytes) -> None:
    sectors = -(-len(text) // 512)
    header = vmdk._HEADER.pack(b"KDMV", 1, 3, 2048, 128, 1, sectors, 512, 0, 0, 0, False, b"\n \r\n", 0)
    path = tmp_path / "x.vmdk"
    path.write_bytes(header.ljust(512, b"\0") + text.ljust(sectors * 512, b"\0"))
    began = time.monotonic()
    with pytest.raises(BadImage, match="is a VMDK of the kind"):
        vmdk.inspect_vmdk(str(path))
    assert time.monotonic() - began < MOMENT


def test_a_tar_header_of_digits_takes_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "x.ova"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("web.ovf"))
    plain = path.read_bytes()[:512]
    digits = tarfile.TarInfo("x")
    digits.type, digits.size = tarfile.XHDTYPE, ova.MAX_EXTENDED
    data = (digits.tobuf(tarfile.USTAR_FORMAT) + b"1" * ova.MAX_EXTENDED) * 8 + plain
    began = time.monotonic()
    assert [m.name for m in ova.list_members(lambda at, n: data[at : at + n], len(data), "x.ova")] == ["web.ovf"]
    assert time.monotonic() - began < MOMENT


def test_a_tar_of_nothing_but_headers_ends(tmp_path: Path) -> None:
    empty = tarfile.TarInfo("x")
    empty.type = tarfile.XGLTYPE
    data = empty.tobuf(tarfile.USTAR_FORMAT) * (ova.MAX_HEADERS + 1)
    with pytest.raises(InvalidInput, match="headers"):
        ova.list_members(lambda at, n: data[at : at + n], len(data), "x.ova")


@pytest.mark.parametrize(
    "content", [b"<b/>" * 3_900_000, b"<b " + b" ".join(b"a%x=''" % i for i in range(10**6)) + b"/>"]
)
def test_xml_that_would_take_a_gibibyte_is_refused_before_it_is_parsed(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lxml import etree  # noqa: PLC0415 - as the reader does

    monkeypatch.setattr(etree, "fromstring", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(InvalidInput, match="more elements"):
        read_xml(b"<a>" + content + b"</a>", "x.xml")


def test_an_archive_with_whole_disks_is_its_owners_only(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"secret")
    before = os.umask(0)
    try:
        ova.write_archive(str(tmp_path / "archive"), [("disk", str(tmp_path / "disk"))], lambda: False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "archive").stat().st_mode) == 0o600
    with tarfile.open(tmp_path / "archive") as made:
        assert made.getnames() == ["disk"]
