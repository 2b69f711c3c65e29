"""A guest on a bridge, moved between two QEMUs: one TCP connection and a row of datagrams survive it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostler.testing import microguest, qemu_raw
from hostler.testing.observer import PauseMeter
from hostler.testing.qemu_raw import RawQemu, RawSettings

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(os.geteuid() != 0, reason="a bridge and taps in a network namespace need root"),
]

GUEST = "10.98.0.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


@pytest.fixture
def network() -> Iterator[list[str]]:
    """A namespace with a bridge and two taps on it; the command that runs others in it."""
    name = f"htest{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "add", "br0", "type", "bridge")
        ip("-n", name, "address", "add", "10.98.0.1/24", "dev", "br0")
        ip("-n", name, "link", "set", "br0", "up")
        for tap in ("tap0", "tap1"):
            ip("-n", name, "tuntap", "add", tap, "mode", "tap")
            ip("-n", name, "link", "set", tap, "master", "br0", "up")
        yield ["ip", "netns", "exec", name]
    finally:
        ip("netns", "delete", name)


def tap(name: str) -> str:
    return f"tap,ifname={name},script=no,downscript=no"


async def test_connections_survive_a_move(network: list[str]) -> None:
    kept = microguest.build()
    with tempfile.TemporaryDirectory(prefix="hg") as folder:
        here, there = Path(folder) / "a", Path(folder) / "b"
        here.mkdir()
        there.mkdir()
        cmdline = kept.with_network(f"{GUEST}/24")
        first = qemu_raw.command_line(here, kept, 256, cmdline, network=tap("tap0"))
        second = qemu_raw.command_line(there, kept, 256, cmdline, incoming=True, network=tap("tap1"))
        async with (
            await RawQemu.start([*network, *first], here / "qmp.sock") as source,
            PauseMeter.echo(GUEST, prefix=network) as datagrams,
        ):
            await datagrams.hearing(deadline=90)
            async with (
                PauseMeter.echo(GUEST, tcp=True, prefix=network) as stream,
                await RawQemu.start([*network, *second], there / "qmp.sock") as target,
            ):
                await stream.hearing()
                await qemu_raw.migrate(source, target, RawSettings())
                await source.close()
                # Whoever still answers now is the moved guest.
                async with PauseMeter.echo(GUEST, prefix=network) as fresh:
                    await fresh.hearing()
                reports = await asyncio.gather(datagrams.report(), stream.report())
        for report in reports:
            assert report.continuous, report
            assert report.gaps[-1].after == 0
        assert reports[1].lost == reports[1].pending, "a stream loses nothing but what was under way at the end"
