"""A save whose daemon has died: the real QEMU goes on writing until the next daemon stops it, before the guest runs."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from hostler.host.operations.save import WRITING, stop_writing
from hostler.model.machine import RunStatus
from hostler.qemu import commands
from hostler.testing.machines import Rig

pytestmark = pytest.mark.component

PATIENCE = 60.0
"""Seconds for anything that must happen; a loaded machine is slow."""


async def test_qemu_stops_writing_before_the_guest_goes_on() -> None:
    async with Rig() as rig:
        spec = rig.spec()
        machine = await rig.launch(spec)
        await machine.run()
        reader, writer = os.pipe()  # nobody reads: storage that hangs
        await machine.stop()
        await commands.getfd(machine._qmp, "saved-state", writer)
        os.close(writer)
        await commands.migrate(machine._qmp, "fd:saved-state")
        async with asyncio.timeout(PATIENCE):
            while (await machine.migration_state()).status != "active":  # noqa: ASYNC110 - QEMU tells nobody here
                await asyncio.sleep(0.01)
        await machine.close()

        adopted = await rig.adopt(spec)
        assert adopted is not None
        assert (await adopted.migration_state()).status == "active"
        stopping = asyncio.create_task(stop_writing("vm rig", adopted))
        async with asyncio.timeout(PATIENCE):
            while (await adopted.migration_state()).status != "cancelling":  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        assert not stopping.done()
        threading.Thread(target=_drain, args=(reader,), daemon=True).start()
        await asyncio.wait_for(stopping, PATIENCE)
        assert (await adopted.migration_state()).status not in WRITING
        await adopted.run()
        assert await adopted.status() is RunStatus.RUNNING


def _drain(reader: int) -> None:
    """The storage works again."""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while pipe.read(65536):
            pass
