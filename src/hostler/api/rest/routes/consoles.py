"""A VM's serial line and screen as web sockets."""

from __future__ import annotations

import os

from fastapi import WebSocket

from hostler.api.rest.console import bridge
from hostler.api.rest.guard import ADMITTED, noun_router
from hostler.api.rest.routes.vms import VmRef
from hostler.api.rest.state import App, Shared

router = noun_router("console")


@router.websocket("/vms/{vm}/serial", dependencies=ADMITTED)
async def serial(websocket: WebSocket, vm: VmRef, app: App, rest: Shared) -> None:
    """The first serial port: binary frames both ways."""
    await bridge(websocket, rest, f"serial console of vm {vm}", app.vms.serial_socket(vm), _owner(app, vm))


@router.websocket("/vms/{vm}/vnc", dependencies=ADMITTED)
async def vnc(websocket: WebSocket, vm: VmRef, app: App, rest: Shared) -> None:
    """The screen: raw RFB bytes (RFC 6143) in binary frames."""
    await bridge(websocket, rest, f"screen of vm {vm}", app.vms.vnc_socket(vm), _owner(app, vm))


def _owner(app: App, vm: str) -> int | None:
    """The user its QEMU runs as; None where the daemon is not root, and QEMU runs as the daemon does."""
    return app.vms.get(vm).config.run_as if os.geteuid() == 0 else None
