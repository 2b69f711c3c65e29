"""Real machines whose directories hold what a guest that broke out may have put there."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from hostler.model.errors import BadImage
from hostler.model.machine import MigrationEnd
from hostler.model.migration import MigrationProgress
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component


def ignore(progress: MigrationProgress) -> None:
    """Nobody looks at it."""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as made:
        yield made


async def test_a_fifo_in_the_place_of_a_saved_state_blocks_nobody(rig: Rig) -> None:
    machine = await rig.launch(rig.spec())
    path = str(rig.path / "a.state" / "saved.state")
    os.mkfifo(f"{path}.partial")
    os.mkfifo(path)
    assert (await machine.save_to(path, ignore)).end is MigrationEnd.COMPLETED
    assert os.path.isfile(path)
    await machine.quit()
    restored = await rig.launch(rig.spec(incoming=True))
    os.rename(path, f"{path}.kept")
    os.mkfifo(path)
    with pytest.raises(BadImage):
        await restored.load_from(path)
    os.rename(f"{path}.kept", path)
    await restored.load_from(path)


async def test_directories_in_the_place_of_its_files_do_not_keep_it_from_starting(rig: Rig) -> None:
    spec = rig.spec()
    for name in ("qmp.sock", "serial.sock", "vnc.sock", "swtpm.pid", "qemu.log"):
        os.makedirs(f"{spec.run_dir}/{name}/full")
    machine = await rig.launch(spec)
    assert (await machine.screenshot()).startswith(b"\x89PNG")
