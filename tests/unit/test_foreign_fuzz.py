"""Whatever bytes a description is made of: it is read, or refused as invalid input; nothing else happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_foreign_ovf import CONFIG, VMWARE

from hostler.foreign import hyperv_exp, hyperv_xml, ova, ovf, own, vmcx
from hostler.foreign.hyperv_config import machine_of
from hostler.foreign.mapping import places, remarks
from hostler.model.errors import InvalidInput
from hostler.model.foreign import ForeignKind, ForeignMachine
from hostler.model.limits import PROFILES, Profile
from hostler.testing import hyperv_export as made
from hostler.testing.hyperv_export import Drive, Machine

pytestmark = pytest.mark.unit

MACHINE = Machine(ide={(0, 0): Drive("D:\\a.vhd")}, scsi=({0: Drive("D:\\b.vhd")},), saved=True)


def of_vmcx(data: bytes) -> ForeignMachine:
    return machine_of(vmcx.read_vmcx(data, "x").root, ForeignKind.HYPER_V_VMCX, "x")


def of_xml(data: bytes) -> ForeignMachine:
    return machine_of(hyperv_xml.read_configuration(data, "x"), ForeignKind.HYPER_V_XML, "x")


def of_exp(data: bytes) -> ForeignMachine:
    return hyperv_exp.read_exp(data, "x", "x")


def of_ovf(data: bytes) -> ForeignMachine:
    return ovf.read_ovf(data, "x").machine


def of_own(data: bytes) -> ForeignMachine:
    return own.read_own(data, "x").machine


READERS: dict[str, tuple[Callable[[bytes], ForeignMachine], bytes]] = {
    "vmcx": (of_vmcx, made.vmcx(MACHINE)),
    "xml": (of_xml, made.xml(MACHINE)),
    "exp": (of_exp, made.exp("a", {(0, 0): "C:\\a.vhd"})),
    "ovf": (of_ovf, VMWARE.encode()),
    "own": (of_own, own.write_own(CONFIG, {"disk0": "d.qcow2"}, "1", "")),
}
PATCHES = st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=9)), min_size=1, max_size=8)


def tried(read: Callable[[bytes], ForeignMachine], data: bytes) -> None:
    try:
        machine = read(data)
    except InvalidInput:
        return
    remarks(machine, places(machine.disks), PROFILES[Profile.HOSTLER])


@pytest.mark.parametrize("form", READERS)
@settings(max_examples=60, deadline=None)
@given(patches=PATCHES, end=st.one_of(st.none(), st.integers(0, 2**16)))
def test_damaged_descriptions(form: str, patches: list[tuple[int, bytes]], end: int | None) -> None:
    read, good = READERS[form]
    data = bytearray(good[:end])
    for at, patch in patches:
        place = at % max(1, len(data))
        data[place : place + len(patch)] = patch
    tried(read, bytes(data))


@pytest.mark.parametrize("form", READERS)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=4000))
def test_random_bytes(form: str, data: bytes) -> None:
    tried(READERS[form][0], data)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6), at=st.integers(0, 400))
def test_numbers_of_the_binary_form(values: list[int], at: int) -> None:
    """Offsets, sizes and counts in the headers and the first table are the ones that hurt."""
    data = bytearray(made.vmcx(MACHINE))
    for index, value in enumerate(values):
        place = (0, 0x1000, 0x2000, 0x2008, 0x4000, 0x4000 + at)[index] + at % 40
        data[place : place + 8] = value.to_bytes(8, "little")
    tried(of_vmcx, bytes(data))


@settings(max_examples=60, deadline=None)
@given(patches=PATCHES)
def test_damaged_archives(patches: list[tuple[int, bytes]]) -> None:
    data = bytearray(archive())
    for at, patch in patches:
        place = at % len(data)
        data[place : place + len(patch)] = patch
    try:
        found = ova.list_members(lambda at, n: bytes(data[at : at + n]), len(data), "x")
    except InvalidInput:
        return
    assert all(0 <= m.offset <= m.offset + m.size <= len(data) + 9 for m in found)


def archive() -> bytes:
    import io  # noqa: PLC0415 - only here
    import tarfile  # noqa: PLC0415

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.ovf", "d" * 150 + ".vmdk"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))
    return file.getvalue()
