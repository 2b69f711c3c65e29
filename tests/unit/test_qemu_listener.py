"""A socket made in a directory that its future owner, who may be hostile, controls already."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostler.model.errors import HostLacks
from hostler.qemu import listener
from hostler.qemu.connector import connect_to
from hostler.testing.inprocess import short_directory

pytestmark = [pytest.mark.unit]

OTHER = 1_900_000_321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def test_only_its_owner_may_connect_whatever_the_umask_is() -> None:
    before = os.umask(0)
    try:
        with short_directory() as room, listener.listening_socket(f"{room}/s", None) as made:
            assert stat.S_IMODE(os.stat(f"{room}/s").st_mode) == 0o600
            connect_to(f"{room}/s", os.geteuid()).close()
            with pytest.raises(PermissionError):
                connect_to(f"{room}/s", OTHER)
            made.accept()[0].close()
    finally:
        os.umask(before)


@needs_root
def test_it_belongs_to_the_vms_user() -> None:
    with short_directory() as room, listener.listening_socket(f"{room}/s", OTHER):
        found = os.stat(f"{room}/s")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, OTHER, OTHER)


@needs_root
@pytest.mark.parametrize("kind", ["link", "hard link", "socket of another", "nothing", "directory"])
def test_what_is_put_in_its_place_is_neither_opened_up_nor_given_away(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def replace(path: str, precious: Path) -> None:
        os.rename(path, f"{path}.real")
        make: dict[str, Callable[[], object]] = {
            "link": lambda: os.symlink(precious, path),
            "hard link": lambda: os.link(precious, path),
            "socket of another": lambda: (os.rename(f"{path}.real", path), os.chown(path, OTHER + 1, OTHER)),
            "nothing": lambda: None,
            "directory": lambda: os.mkdir(path),
        }
        make[kind]()

    class Raced(socket.socket):
        """The other side is quickest: it acts the moment the socket's file is there."""

        def bind(self, address: Any) -> None:
            super().bind(address)
            replace(address, Path(address).parent / "precious")

    with short_directory() as room:
        precious = room / "precious"
        precious.touch(0o640)
        before = os.stat(precious)
        monkeypatch.setattr(socket, "socket", Raced)
        with pytest.raises(HostLacks), listener.listening_socket(f"{room}/s", OTHER):
            pass
        after = os.stat(precious)
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert not os.path.lexists(f"{room}/s")
