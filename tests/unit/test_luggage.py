"""What another host says of the layers it sends is what this host may delete later."""

from __future__ import annotations

import pytest

from hostler.cluster.luggage import own_volumes
from hostler.model.checkpoint import Luggage
from hostler.model.disk import Disk, DiskSource, ImageFormat
from hostler.model.migration import Incoming
from hostler.model.vm import VmConfig
from hostler.model.volume import Volume, VolumeState

pytestmark = pytest.mark.unit

VM = "8c5ab1c6-21f8-4c4c-9d5e-35a1a9f0a001"


def incoming(*volumes: Volume) -> Incoming:
    base = DiskSource(path="/s/base.raw", format=ImageFormat.RAW, size=512)
    top = DiskSource(path="/s/top.qcow2", format=ImageFormat.QCOW2, size=512, node="abc", backing=base)
    config = VmConfig(id=VM, name="web", machine="q", cpu_model="c", disks=(Disk(id="d", source=top),))
    return Incoming(id="m", config=config, luggage=Luggage(volumes=volumes), generation=1, source="h")


def volume(path: str, **changes: object) -> Volume:
    return Volume(name="v", path=path, format=ImageFormat.QCOW2, size=512, owner=VM, node="abc").but(**changes)


def test_a_layer_made_for_the_vm_is_known_here_too() -> None:
    made = volume("/s/top.qcow2")
    assert own_volumes(incoming(made)) == [made]


@pytest.mark.parametrize("path", ["/etc/shadow", "/s/base.raw"])
def test_no_other_file_is(path: str) -> None:
    assert own_volumes(incoming(volume(path))) == []
    assert own_volumes(incoming(volume("/s/top.qcow2", owner=None))) == []


def test_no_record_says_that_a_file_is_to_go() -> None:
    """The next daemon would delete it at its start."""
    sent = volume("/s/top.qcow2", state=VolumeState.DELETING, job="j", made_by="j")
    assert own_volumes(incoming(sent)) == [volume("/s/top.qcow2")]
