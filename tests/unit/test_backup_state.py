"""The firmware's variables go into a backup and come back; nothing a VM's user puts in their place leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostler.host.backups.state import MOST, NAME, bring_state, keep_state
from hostler.model.backup_requests import BackupList, BackupRestore, BackupRun
from hostler.model.disk import ImageFormat
from hostler.model.errors import BadImage
from hostler.model.job import JobState
from hostler.model.requests import DiskAdd, VmCreate
from hostler.model.units import MiB
from hostler.testing.inprocess import Site

pytestmark = pytest.mark.unit


def places(tmp_path: Path) -> tuple[Path, Path]:
    state, place = tmp_path / "state", tmp_path / "place"
    state.mkdir()
    place.mkdir()
    return state, place


def test_links_pipes_and_giants_are_left_alone(tmp_path: Path) -> None:
    state, place = places(tmp_path)
    assert keep_state(state, place) == ""
    (tmp_path / "secret").write_bytes(b"secret")
    (state / NAME).symlink_to(tmp_path / "secret")
    assert keep_state(state, place) == ""
    (state / NAME).unlink()
    os.mkfifo(state / NAME)
    assert keep_state(state, place) == ""
    (state / NAME).unlink()
    (state / NAME).touch()
    os.truncate(state / NAME, MOST + 1)
    assert keep_state(state, place) == ""
    assert not list(place.iterdir())


def test_damaged_variables_are_refused(tmp_path: Path) -> None:
    state, place = places(tmp_path)
    (state / NAME).write_bytes(b"variables")
    digest = keep_state(state, place)
    (place / NAME).write_bytes(b"other")
    with pytest.raises(BadImage):
        bring_state(place, digest, tmp_path / "new", None)


async def test_they_come_back_with_the_vm(site: Site) -> None:
    node = await site.add("a")
    application = node.application
    request = DiskAdd(volume=site.image("a.img"), format=ImageFormat.RAW)
    record = await application.vms.create(VmCreate(name="web", memory=64 * MiB, disks=(request,)), "test")
    state = node.paths.vm_state(record.id)
    state.mkdir(parents=True, exist_ok=True)
    (state / NAME).write_bytes(b"boot entries")
    directory = str(site.directory / "backups")
    made = await node.finish(await application.backups.run("web", BackupRun(directory=directory), "test"))
    assert made.state is JobState.DONE, made.error
    (backup,) = await application.backups.list(BackupList())
    again = BackupRestore(directory=directory, backup=backup.id, vm="again")
    restored = await node.finish(await application.backups.restore(again, "test"))
    assert restored.state is JobState.DONE, restored.error
    other = node.paths.vm_state(application.vms.get("again").id)
    assert (other / NAME).read_bytes() == b"boot entries"
    (state / NAME).write_bytes(b"changed since")
    back = BackupRestore(directory=directory, backup=backup.id, replace=True)
    replaced = await node.finish(await application.backups.restore(back, "test"))
    assert replaced.state is JobState.DONE, replaced.error
    assert (state / NAME).read_bytes() == b"boot entries"
