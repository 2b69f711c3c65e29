"""The block graph and the device of a disk, as data."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler.model.disk import Bus, CacheMode, Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import InvalidInput
from hostler.qemu import blockdev

pytestmark = pytest.mark.unit

SIZE = 64 * 1024**2
IDS = st.from_regex(r"\A[a-z][a-z0-9-]{0,30}\Z")


def disk(format: ImageFormat = ImageFormat.RAW, **changes: object) -> Disk:
    source = DiskSource(path="/srv/vm/a.img", format=format, size=SIZE)
    return Disk.model_validate({"id": "root", "source": source, **changes})


@given(IDS, IDS)
def test_node_names_are_legal_and_of_one_disk_only(one: str, other: str) -> None:
    first, second = disk(id=one), disk(id=other)
    names = {blockdev.node_name(first), blockdev.protocol_node_name(first)}
    assert len(names) == 2
    assert all(len(name) <= blockdev.NODE_NAME_MAX for name in names)
    if one != other:
        assert not names & {blockdev.node_name(second), blockdev.protocol_node_name(second)}


@given(IDS)
def test_device_id_leads_back_to_the_disk(name: str) -> None:
    assert blockdev.disk_id(blockdev.device_id(disk(id=name))) == name


def test_other_devices_are_no_disks() -> None:
    assert blockdev.disk_id("scsi0") is None


@pytest.mark.parametrize("format", list(ImageFormat))
@pytest.mark.parametrize("cache", list(CacheMode))
def test_every_format_keeps_flushes_and_locks(format: ImageFormat, cache: CacheMode) -> None:
    options = blockdev.blockdev_options(disk(format, cache=cache), aio="native")
    below = options["file"]
    assert isinstance(below, dict)
    assert below["locking"] == "on"
    for layer in (options, below):
        assert layer["cache"] == {"direct": cache is CacheMode.NONE, "no-flush": False}
        assert layer["auto-read-only"] is False
    assert below["aio"] == ("native" if cache is CacheMode.NONE else "threads")
    assert json.loads(json.dumps(options)) == options


def test_backing_files_of_an_image_are_never_followed() -> None:
    options = blockdev.blockdev_options(disk(ImageFormat.QCOW2))
    assert "backing" in options and options["backing"] is None


def test_fixed_vhd_is_raw_without_its_footer() -> None:
    options = blockdev.blockdev_options(disk(ImageFormat.VHD_FIXED))
    assert (options["driver"], options["size"]) == ("raw", SIZE)


@pytest.mark.parametrize("size", [0, 513])
def test_fixed_vhd_of_unknown_size_is_refused(size: int) -> None:
    source = DiskSource(path="/srv/vm/a.vhd", format=ImageFormat.VHD_FIXED, size=size)
    with pytest.raises(InvalidInput, match="multiple of 512"):
        blockdev.blockdev_options(disk(source=source))


@pytest.mark.parametrize("format", [ImageFormat.VHD, ImageFormat.VHDX])
def test_dynamic_vhd_and_vhdx_come_over_nbd(format: ImageFormat) -> None:
    one = disk(format)
    assert blockdev.needs_export(one)
    options = blockdev.blockdev_options(one, export="/run/h/x.sock")
    below = options["file"]
    assert isinstance(below, dict)
    assert options["driver"] == "raw"
    assert below["driver"] == "nbd"
    assert below["server"] == {"type": "unix", "path": "/run/h/x.sock"}
    assert below["export"] == blockdev.export_name(one)
    assert "/srv/vm/a.img" not in json.dumps(options)


def test_pass_through_uses_the_block_device_driver() -> None:
    source = DiskSource(kind=SourceKind.DEVICE, path="/dev/loop7", size=SIZE)
    below = blockdev.blockdev_options(disk(source=source))["file"]
    assert isinstance(below, dict)
    assert below["driver"] == "host_device"


def test_read_only_and_cdrom_never_write_or_discard() -> None:
    for one in (disk(read_only=True), disk(media=Media.CDROM)):
        options = blockdev.blockdev_options(one)
        assert options["read-only"] is True
        assert options["discard"] == "ignore"


def test_scsi_address_is_a_lun_of_target_0() -> None:
    options = blockdev.device_options(
        disk(controller=2, unit=63, serial="s" * 36, wwn=0x5000000000000001, boot_index=1)
    )
    assert options == {
        "driver": "scsi-hd",
        "id": "disk-root",
        "bus": "scsi2.0",
        "channel": 0,
        "scsi-id": 0,
        "lun": 63,
        "device_id": "s" * 20,
        "drive": "root",
        "serial": "s" * 36,
        "wwn": 0x5000000000000001,
        "bootindex": 1,
        "write-cache": "on",
        "werror": "stop",
        "rerror": "stop",
        "rotation_rate": 1,
    }


def test_ide_address_is_a_port_of_the_built_in_controller() -> None:
    options = blockdev.device_options(disk(bus=Bus.IDE, unit=3, media=Media.CDROM))
    assert options == {"driver": "ide-cd", "id": "disk-root", "bus": "ide.3", "unit": 0, "drive": "root"}


def test_writethrough_tells_the_guest_that_there_is_no_write_cache() -> None:
    assert blockdev.device_options(disk(cache=CacheMode.WRITETHROUGH))["write-cache"] == "off"


def test_read_only_ide_hard_disk_is_refused_with_a_way_out() -> None:
    with pytest.raises(InvalidInput) as caught:
        blockdev.device_options(disk(bus=Bus.IDE, read_only=True))
    assert "SCSI" in caught.value.advice


def test_a_disk_with_reservations_is_the_device_itself() -> None:
    source = DiskSource(kind=SourceKind.DEVICE, path="/dev/sdb", size=SIZE)
    options = blockdev.device_options(disk(source=source, reservations=True, unit=4, serial="x", boot_index=2))
    assert options == {
        "driver": "scsi-block",
        "id": "disk-root",
        "bus": "scsi0.0",
        "channel": 0,
        "scsi-id": 0,
        "lun": 4,
        "drive": "root",
        "bootindex": 2,
        "werror": "report",
        "rerror": "report",
    }


@given(IDS, st.from_regex(r"\A[a-z0-9]{1,8}\Z"), st.from_regex(r"\A[a-z0-9-]{1,30}\Z"))
def test_names_of_later_layers_and_jobs(name: str, token: str, job: str) -> None:
    one = disk(id=name, source=DiskSource(path="/srv/b", format=ImageFormat.QCOW2, node=token))
    layer, file = blockdev.layer_nodes(one, one.source)
    filter_ = blockdev.job_node(one, job)
    assert len({layer, file, filter_, name, f"{name}.file"}) == 5
    assert all(len(node) <= blockdev.NODE_NAME_MAX for node in (layer, file, filter_))
    assert blockdev.is_layer_of(name, layer)
    assert blockdev.is_job_of(name, filter_)
    assert not any(blockdev.is_layer_of(name, node) for node in (file, filter_))
    assert not any(blockdev.is_job_of(name, node) for node in (layer, file, name))


@given(IDS, IDS, st.from_regex(r"\A[a-z0-9]{1,8}\Z"))
def test_layers_of_two_disks_never_meet(one: str, other: str, token: str) -> None:
    if one != other:
        layer = blockdev.layer_node(disk(id=other), DiskSource(path="/srv/b", node=token))
        assert not blockdev.is_layer_of(one, layer)
