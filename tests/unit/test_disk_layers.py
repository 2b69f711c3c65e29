"""Disks of several layers: what is a legal chain, and how QEMU is told of it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hostler.model.disk import MAX_LAYERS, Bus, Disk, DiskSource, ImageFormat, IoLimits, Media, SourceKind
from hostler.qemu import blockdev

pytestmark = pytest.mark.unit

BASE = DiskSource(path="/v/base.vhdx", format=ImageFormat.VHDX, size=1024)
MIDDLE = DiskSource(path="/v/one.qcow2", format=ImageFormat.QCOW2, size=1024, node="aa11", backing=BASE)
TOP = DiskSource(path="/v/two.qcow2", format=ImageFormat.QCOW2, size=1024, node="bb22", backing=MIDDLE)


def test_layers_come_from_the_top_down() -> None:
    assert [layer.path for layer in TOP.layers()] == ["/v/two.qcow2", "/v/one.qcow2", "/v/base.vhdx"]
    assert TOP.base is BASE
    assert TOP.base.exported
    assert not TOP.exported


def test_a_record_of_the_first_version_is_one_layer() -> None:
    old = {"id": "disk0", "source": {"kind": "volume", "path": "/v/a.qcow2", "format": "qcow2", "size": 512}}
    disk = Disk.model_validate(old)
    assert list(disk.source.layers()) == [disk.source]
    assert blockdev.node_name(disk) == "disk0"
    assert disk.limits.unlimited


@pytest.mark.parametrize(
    "chain",
    [
        lambda: DiskSource(path="/v/x", format=ImageFormat.RAW, node="c", backing=BASE),
        lambda: DiskSource(path="/v/x", format=ImageFormat.QCOW2, node="", backing=BASE),
        lambda: DiskSource(path="/v/x", format=ImageFormat.QCOW2, node="UPPER", backing=BASE),
        lambda: Disk(id="d", source=DiskSource(kind=SourceKind.EMPTY, path="")),
        lambda: Disk(id="d", source=BASE, reservations=True),
        lambda: Disk(id="d", source=BASE, bus=Bus.FLOPPY),
        lambda: Disk(id="d", source=BASE, bus=Bus.SCSI, media=Media.FLOPPY),
        lambda: Disk(id="d", source=BASE, media=Media.FLOPPY, unit=2),
        lambda: IoLimits(iops=5, iops_read=3),
        lambda: IoLimits(bandwidth_burst=5),
    ],
)
def test_nonsense_is_refused(chain: object) -> None:
    with pytest.raises(ValidationError):
        chain()  # type: ignore[operator]


def test_a_chain_has_an_end() -> None:
    source = BASE
    for number in range(MAX_LAYERS - 1):
        source = DiskSource(path=f"/v/{number}", format=ImageFormat.QCOW2, node=f"n{number}", backing=source)
    with pytest.raises(ValidationError, match="at most"):
        DiskSource(path="/v/one-more", format=ImageFormat.QCOW2, node="more", backing=source)


def test_an_empty_drive_writes_nothing_a_floppy_does() -> None:
    empty = DiskSource(kind=SourceKind.EMPTY, path="")
    assert not Disk(id="cd0", source=empty, media=Media.CDROM).writes
    floppy = Disk(id="fd0", source=empty, media=Media.FLOPPY)
    assert floppy.writes
    assert floppy.bus is Bus.FLOPPY


def test_the_block_graph_is_the_recorded_chain() -> None:
    options = blockdev.blockdev_options(Disk(id="disk0", source=TOP), export="/run/x.nbd")
    middle = options["backing"]
    assert isinstance(middle, dict)
    base = middle["backing"]
    assert isinstance(base, dict)
    assert [o["node-name"] for o in (options, middle, base)] == ["disk0.bb22", "disk0.aa11", "disk0"]
    assert [o["read-only"] for o in (options, middle, base)] == [False, True, True]
    assert base["driver"] == "raw"
    assert isinstance(base["file"], dict)
    assert base["file"]["driver"] == "nbd"
    assert "backing" not in base


def test_only_a_disks_own_nodes_are_its_layers() -> None:
    for node in ("disk1", "disk1.aa11"):
        assert blockdev.is_layer_of("disk1", node)
    for node in ("disk1.file", "disk10", "disk10.aa11", "disk1.aa11.file"):
        assert not blockdev.is_layer_of("disk1", node)
