"""Whatever a hostile user has put in a VM's directory goes away, and nothing outside of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hostler.qemu import psk
from hostler.removal import FEW, remove_tree
from hostler.storage.exports import Exports

pytestmark = pytest.mark.unit

DEEP = 1_500
"""More than Python recurses, more than a process may have descriptors, and a path longer than the system allows."""


def nested(path: Path, depth: int = DEEP) -> None:
    """Directories in each other, with a file and a FIFO at the bottom."""
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("directory", dir_fd=here)
        below = os.open("directory", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.mkfifo("fifo", dir_fd=here)
    os.close(here)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))


def many(path: Path) -> None:
    path.mkdir()
    for number in range(2 * FEW + 1):
        (path / str(number)).touch()


def branches(path: Path) -> None:
    for branch in "abc":
        (path / branch / "same" / branch).mkdir(parents=True)
        (path / branch / "same" / "file").touch()


KINDS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "file": Path.touch,
    "fifo": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("/none"),
    "socket": a_socket,
    "empty directory": Path.mkdir,
    "deep directory": nested,
    "wide directory": many,
    "branches": branches,
    "name that is no text": lambda path: os.makedirs(os.fsencode(path) + b"/\xff/\xfe"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_anything_is_removed(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "x")
    assert remove_tree(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "x" / "in").mkdir(parents=True)
    (tmp_path / "x" / "in" / "link").symlink_to(tmp_path / "precious")
    assert remove_tree(tmp_path / "x")
    (tmp_path / "x").symlink_to(tmp_path / "precious")
    assert remove_tree(tmp_path / "x")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["precious", "precious/file"]


def test_too_much_and_a_refusal_are_said_and_not_raised(tmp_path: Path) -> None:
    many(tmp_path / "x")
    assert not remove_tree(tmp_path / "x", FEW)
    assert len(list((tmp_path / "x").iterdir())) == FEW + 1
    (tmp_path / "file").touch()
    assert not remove_tree(tmp_path / "file" / "no directory above it")
    assert not remove_tree("/proc/self/status")


def test_a_fifo_in_the_place_of_a_key_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "psk-0")
    nested(tmp_path / "psk-1", 400)
    written = psk.write_key(str(tmp_path), "00" * 32, os.geteuid())
    assert [str(path) for path in tmp_path.iterdir()] == [written]
    psk.remove_keys(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


async def test_an_exports_files_may_be_anything(tmp_path: Path) -> None:
    for stop in (lambda: Exports().stop(str(tmp_path), "disk"), lambda: Exports().stop_all(str(tmp_path))):
        branches(tmp_path / "x-disk.nbd")
        os.mkfifo(tmp_path / "x-disk.pid")
        (tmp_path / "x-disk.qmp").mkdir()
        await stop()
        assert list(tmp_path.iterdir()) == []
