"""Taps on real bridges, in a network namespace of their own: nothing here touches the machine's network."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostler.model.errors import HostLacks, HostlerError
from hostler.network.taps import Taps

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network interfaces, which needs root"),
]

CLONE_NEWNET = 0x40000000
UID = 64_200


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """This thread in a fresh network namespace with two bridges; back in the old one afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    old = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(CLONE_NEWNET) != 0:
        os.close(old)
        pytest.skip("this machine allows no network namespaces")
    try:
        ip("link", "add", "br0", "type", "bridge")
        ip("link", "add", "br-lab", "mtu", "1400", "type", "bridge")
        yield
    finally:
        assert libc.setns(old, CLONE_NEWNET) == 0
        os.close(old)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def links() -> dict[str, dict[str, Any]]:
    text = subprocess.run(["ip", "-json", "-details", "link"], check=True, capture_output=True, text=True).stdout
    return {link["ifname"]: link for link in json.loads(text)}


async def test_a_tap_is_made_on_its_bridge_for_its_user(taps: Taps) -> None:
    name = await taps.create("vm1", "n0", "br-lab", 1, UID)
    assert name == taps.name("vm1", "n0")
    link = links()[name]
    data = link["linkinfo"]["info_data"]
    assert (link["master"], link["mtu"]) == ("br-lab", 1400)
    assert "UP" in link["flags"]
    assert (data["type"], data["persist"], data["vnet_hdr"], data["multi_queue"]) == ("tap", True, True, False)
    assert str(data["user"]) == str(UID)


@pytest.fixture
def taps() -> Taps:
    return Taps("host-1")


async def test_several_queues(taps: Taps) -> None:
    name = await taps.create("vm1", "n0", "br0", 4, UID)
    assert links()[name]["linkinfo"]["info_data"]["multi_queue"] is True


async def test_without_a_user_only_root_may_use_it(taps: Taps) -> None:
    """A tap without an owner could be taken by everybody."""
    name = await taps.create("vm1", "n0", "br0", 1, None)
    assert links()[name]["linkinfo"]["info_data"]["user"] in ("root", 0, "0")


async def test_making_it_again_keeps_it_and_mends_it(taps: Taps) -> None:
    name = await taps.create("vm1", "n0", "br0", 1, UID)
    index = links()[name]["ifindex"]
    ip("link", "set", name, "nomaster", "down")
    assert await taps.create("vm1", "n0", "br-lab", 1, UID) == name
    link = links()[name]
    assert (link["ifindex"], link["master"]) == (index, "br-lab")
    assert "UP" in link["flags"]


async def test_one_that_is_for_another_user_or_has_other_queues_is_made_anew(taps: Taps) -> None:
    name = await taps.create("vm1", "n0", "br0", 1, UID)
    await taps.create("vm1", "n0", "br0", 1, UID + 1)
    assert str(links()[name]["linkinfo"]["info_data"]["user"]) == str(UID + 1)
    await taps.create("vm1", "n0", "br0", 2, UID + 1)
    assert links()[name]["linkinfo"]["info_data"]["multi_queue"] is True


async def test_removing_is_harmless_when_it_is_gone(taps: Taps) -> None:
    name = await taps.create("vm1", "n0", "br0", 1, UID)
    for _ in range(2):
        await taps.delete("vm1", "n0")
        assert name not in links()


async def test_leftovers_of_this_host_only(taps: Taps) -> None:
    keep = await taps.create("vm1", "n0", "br0", 1, UID)
    lost = await taps.create("vm2", "n0", "br0", 1, UID)
    other = await Taps("host-2").create("vm2", "n0", "br0", 1, UID)
    assert await taps.leftovers({keep}) == [lost]
    assert await taps.remove_leftovers({keep}) == [lost]
    assert {keep, other} <= set(links())
    assert lost not in links()


async def test_a_bridge_that_is_not_there(taps: Taps) -> None:
    assert await taps.bridges() == ["br-lab", "br0"]
    await taps.check_bridge("br0")
    with pytest.raises(HostLacks, match="br-lab, br0") as missing:
        await taps.create("vm1", "n0", "br1", 1, UID)
    assert "br0" in missing.value.advice
    with pytest.raises(HostLacks):
        await taps.check_bridge("lo")
    assert not [name for name in links() if name.startswith("hl")]


async def test_a_failure_on_the_way_leaves_no_tap(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge goes while the tap is made."""

    async def gone(netlink: Any, bridge: str) -> tuple[int, int]:
        return 4_000_000, 1500

    monkeypatch.setattr("hostler.network.taps._bridge", gone)
    with pytest.raises(HostlerError, match="adapter n0"):
        await taps.create("vm1", "n0", "br0", 1, UID)
    assert not [name for name in links() if name.startswith("hl")]


UNPRIVILEGED = """
import asyncio
from hostler.model.errors import NotPermitted
from hostler.network.taps import Taps

async def main():
    taps = Taps("host-1")
    assert await taps.bridges() == ["br-lab", "br0"]
    try:
        await taps.create("vm1", "n0", "br0", 1, None)
    except NotPermitted as error:
        print("refused:", error.advice)

asyncio.run(main())
"""


@pytest.mark.skipif(not os.access("/dev/net/tun", os.W_OK), reason="no /dev/net/tun")
def test_without_the_right_it_says_what_to_do() -> None:
    argv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", UNPRIVILEGED]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("refused: run hostlerd as root"), done.stderr
    assert not [name for name in links() if name.startswith("hl")]


def test_a_guests_qemu_can_open_it(taps: Taps, tmp_path: Path) -> None:
    """As the VM's user, without any right."""
    import asyncio  # noqa: PLC0415

    name = asyncio.run(taps.create("vm1", "n0", "br0", 1, UID))
    argv = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "qemu-system-x86_64", "-machine", "q35"]
    argv += ["-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-monitor", "stdio"]
    argv += [
        "-netdev",
        f"tap,id=n0,ifname={name},script=no,downscript=no,vhost=off",
        "-device",
        "virtio-net-pci,netdev=n0",
    ]
    done = subprocess.run(argv, input="info network\nquit\n", capture_output=True, text=True, timeout=60, check=False)
    assert f"ifname={name}" in done.stdout, done.stderr
