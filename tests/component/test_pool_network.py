"""iSCSI and NBD pools: secrets, certificates, several ways, LUNs that are exchanged, and servers that mean ill."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hostler.model.errors import HostLacks, HostlerError, InvalidInput, NotFound, NotPermitted, TimedOut
from hostler.model.pool import Discover, Pool, PoolKind, PoolSecrets, PoolState
from hostler.model.units import MiB
from hostler.storage.pools import iscsi, nbd
from hostler.storage.pools.contract import PoolDriver
from hostler.storage.pools.drivers import driver_of
from hostler.storage.pools.iscsi import discover
from hostler.storage.pools.scsi import best_name
from hostler.testing.targets import Authority, IscsiTarget, NbdServer, free_port

pytestmark = pytest.mark.component

SIZE = 16 * MiB
CHAP = ("vms", "hush-hush-hush")
ME = "iqn.2020-01.com.example:me"
TLS_FILES = {"ca": "ca-cert.pem", "certificate": "client-cert.pem", "key": "client-key.pem"}


@pytest.fixture
def target(tmp_path: Path) -> Iterator[IscsiTarget]:
    with IscsiTarget(tmp_path / "t", CHAP) as started:
        yield started


def lun_pool(system: IscsiTarget, secret: str = CHAP[1], **fields: object) -> PoolDriver:
    record = {"portals": system.portals, "target": system.name, "initiator": ME, "chap_user": CHAP[0], **fields}
    return driver_of(
        Pool.model_validate({"name": "p", "kind": PoolKind.ISCSI, **record}), PoolSecrets(chap_secret=secret)
    )


# iSCSI


async def test_targets_are_discovered(target: IscsiTarget) -> None:
    [found] = await discover(Discover(portals=target.portals))
    assert (found.target, found.portals) == (target.name, target.portals)
    with pytest.raises(NotFound, match="cannot be connected"):
        await discover(Discover(portals=(f"127.0.0.1:{free_port()}",)))
    reached = await discover(Discover(portals=(f"127.0.0.1:{free_port()}", *target.portals)))
    assert [t.target for t in reached] == [target.name]


@pytest.mark.parametrize("login", [{"secret": "wrong"}, {"chap_user": "else"}, {"chap_user": ""}])
async def test_a_wrong_secret_is_told_clearly_and_never_repeated(target: IscsiTarget, login: dict[str, str]) -> None:
    driver = lun_pool(target, **login)
    health = await driver.check()
    assert health.state is PoolState.UNREACHABLE
    assert "wrong CHAP name or secret" in health.text
    with pytest.raises(NotPermitted, match="CHAP") as refused:
        await driver.scan(frozenset())
    assert "wrong" not in str(refused.value).replace("wrong CHAP", "") and CHAP[1] not in str(refused.value)


async def test_a_target_without_chap_is_taken_as_it_is(tmp_path: Path) -> None:
    with IscsiTarget(tmp_path / "open") as target:
        target.add(SIZE)
        for driver in (lun_pool(target, chap_user=""), lun_pool(target)):
            assert (await driver.check()).state is PoolState.READY
            assert len((await driver.scan(frozenset())).found) == 1


async def test_a_target_that_is_not_there(target: IscsiTarget) -> None:
    with pytest.raises(NotFound, match="no such target"):
        await lun_pool(target, target="iqn.2020-01.com.example:else").scan(frozenset())


async def test_the_first_portal_that_answers_is_taken(target: IscsiTarget) -> None:
    target.add(SIZE)
    dead, live = f"127.0.0.1:{free_port()}", target.portals[0]
    driver = lun_pool(target, portals=(dead, live))
    connection = await driver.connection()
    assert connection is not None and connection.portal == live
    [found] = (await driver.scan(frozenset())).found
    assert found.path.startswith(f"iscsi://{dead}/"), "its name stays, by whichever way it is reached"
    assert (await driver.find(found.path)).identity == found.identity


async def test_luns_come_go_and_are_told_apart(target: IscsiTarget) -> None:
    first, second = target.add(SIZE), target.add(2 * SIZE, None, "scsi_id=different")
    driver = lun_pool(target)
    found = {f.path: f for f in (await driver.scan(frozenset())).found}
    assert {f.size for f in found.values()} == {SIZE, 2 * SIZE}
    one, two = found[target.url(first)], found[target.url(second)]
    assert one.identity and two.identity and one.identity != two.identity
    target.remove(first)
    with pytest.raises(NotFound):
        await driver.find(one.path)
    assert [f.path for f in (await driver.scan(frozenset())).found] == [two.path]


async def test_a_storage_system_that_hangs_is_given_up(target: IscsiTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iscsi, "DEADLINE", 0.5)
    target.freeze()
    health = await lun_pool(target).check()
    assert health.state is PoolState.UNREACHABLE and "does not answer" in health.text
    target.thaw()
    assert (await lun_pool(target).check()).state is PoolState.READY


@pytest.mark.parametrize(
    ("designators", "name"),
    [
        ([(1, 3, "6001405aabbccdd00112233445566778")], "naa.6001405aabbccdd00112233445566778"),
        ([(1, 3, "5000c50012345678")], "naa.5000c50012345678"),
        ([(1, 3, "3000000100000001")], "naa.3000000100000001@iqn.x:t"),
        ([(1, 3, "60000000000000000e00000000010001")], "naa.60000000000000000e00000000010001@iqn.x:t"),
        ([(0x11, 3, "5000c50012345678"), (1, 2, "0011223344556677")], "eui.0011223344556677"),
        ([(1, 8, b"iqn.x:lun\0".hex())], "iqn.x:lun"),
        ([(2, 1, b"VENDOR  serial 1".hex())], "t10.VENDOR__serial_1@iqn.x:t"),
        ([], ""),
        ([(1, 3, "00")], ""),
    ],
)
def test_what_a_lun_calls_itself(designators: list[tuple[int, int, str]], name: str) -> None:
    body = b""
    for association, kind, value in designators:
        raw = bytes.fromhex(value)
        body += bytes([1, (association & 0x10) | kind, 0, len(raw)]) + raw
    assert best_name(struct.pack(">BBH", 0, 0x83, len(body)) + body, "iqn.x:t") == name


# NBD


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[NbdServer]:
    with NbdServer(tmp_path / "n", authority) as made:
        made.add("a", SIZE)
        made.start()
        yield made


def export_pool(server: NbdServer, files: Path | None, **fields: object) -> PoolDriver:
    texts = {field: (files / name).read_text() for field, name in TLS_FILES.items()} if files else {}
    record = {"name": "p", "kind": PoolKind.NBD, "portals": (server.portal,), "tls": files is not None, **fields}
    return driver_of(Pool.model_validate(record), PoolSecrets.model_validate(texts))


async def test_a_server_of_another_authority_is_not_trusted(server: NbdServer, tmp_path: Path) -> None:
    health = await export_pool(server, Authority(tmp_path / "other").client()).check()
    assert health.state is PoolState.UNREACHABLE and "certificate" in health.text


async def test_a_server_that_is_another_one_is_not_trusted(server: NbdServer, authority: Authority) -> None:
    mine = authority.client()
    assert (await export_pool(server, mine, tls_hostname="storage.example.com").check()).state is PoolState.READY
    health = await export_pool(server, mine, tls_hostname="other.example.com").check()
    assert health.state is PoolState.UNREACHABLE and "certificate" in health.text


async def test_a_client_that_the_server_does_not_know_is_told_so(
    server: NbdServer, authority: Authority, tmp_path: Path
) -> None:
    """Signed by another authority, though it trusts the right one."""
    stranger = Authority(tmp_path / "other").client()
    (stranger / "ca-cert.pem").write_bytes((authority.client() / "ca-cert.pem").read_bytes())
    with pytest.raises((NotPermitted, NotFound), match=r"certificate|connection"):
        await export_pool(server, stranger).scan(frozenset())


async def test_a_server_that_wants_tls_is_not_talked_to_in_clear(server: NbdServer) -> None:
    with pytest.raises(NotPermitted, match="wants TLS"):
        await export_pool(server, None).scan(frozenset())


async def test_a_server_without_tls_is_not_talked_to_when_tls_was_asked_for(
    tmp_path: Path, authority: Authority
) -> None:
    with NbdServer(tmp_path / "clear", None) as server:
        server.add("a", SIZE)
        server.start()
        with pytest.raises(HostLacks, match="no TLS"):
            await export_pool(server, authority.client()).scan(frozenset())
        assert [f.name for f in (await export_pool(server, None).scan(frozenset())).found] == ["a"]


async def test_exports_that_were_named_are_asked_for_one_by_one(server: NbdServer, authority: Authority) -> None:
    found = (await export_pool(server, authority.client(), exports=("a", "gone")).scan(frozenset())).found
    assert [f.name for f in found] == ["a"]


def test_certificates_that_nobody_can_use_are_refused_at_once(server: NbdServer, authority: Authority) -> None:
    files = authority.client()
    (files / "client-key.pem").write_bytes((authority.client("other") / "client-key.pem").read_bytes())
    with pytest.raises(InvalidInput, match="cannot be used"):
        export_pool(server, files)


# servers that mean ill


@asynccontextmanager
async def hostile(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> AsyncIterator[str]:
    """A server that answers whatever it is told to; its portal."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)  # type: ignore[misc]
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


def says(*pieces: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        await reader.read()

    return answer


def says_for_ever(piece: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(piece)
            await writer.drain()

    return answer


LOGIN_DONE = struct.pack(">BBBB", 0x23, 0x87, 0, 0) + bytes(44)
PING = struct.pack(">BB", 0x20, 0x80) + bytes(14) + struct.pack(">II", 0xFFFFFFFF, 0xFFFFFFFF) + bytes(24)
ISCSI_ILL = {
    "nothing": says(),
    "half a header": says(b"\0" * 10),
    "text": says(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100),
    "huge segment": says(struct.pack(">BBBBI", 0x23, 0x81, 0, 0, 0x00FFFFFF) + bytes(40)),
    "never ends the log-in": says_for_ever(struct.pack(">BB", 0x23, 0x04) + bytes(46)),
    "pings": says_for_ever(PING),
    "done, then junk": says(LOGIN_DONE * 8, bytes([0x3F]) + bytes(47)),
}
GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
REPLY = struct.pack(">Q", 0x3E889045565A9)
NBD_ILL = {
    "nothing": says(),
    "text": says(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100),
    "old style": says(b"NBDMAGIC" + struct.pack(">QQI", 0x00420281861253, 2**30, 0) + bytes(124)),
    "huge reply": says(GREETING, REPLY + struct.pack(">III", 3, 2, 0xFFFFFFFF)),
    "endless list": says(GREETING + (REPLY + struct.pack(">IIII", 3, 2, 5, 1) + b"x") * 5000),
    "short entry": says(GREETING, REPLY + struct.pack(">III", 3, 2, 1) + b"x"),
    "other option": says(GREETING, REPLY + struct.pack(">III", 7, 1, 0)),
}


@pytest.mark.parametrize("ill", ISCSI_ILL)
async def test_an_ill_iscsi_portal_is_an_error_in_time(ill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iscsi, "DEADLINE", 0.7)
    monkeypatch.setattr(iscsi, "SCAN_DEADLINE", 0.7)
    async with hostile(ISCSI_ILL[ill]) as portal, asyncio.timeout(20):
        with pytest.raises((NotFound, HostLacks, NotPermitted, TimedOut)):
            await discover(Discover(portals=(portal,)))
        pool = Pool(name="p", kind=PoolKind.ISCSI, portals=(portal,), target="iqn.x:t", initiator=ME)
        driver = driver_of(pool, PoolSecrets())
        assert (await driver.check()).state is PoolState.UNREACHABLE
        with pytest.raises(HostlerError):
            await driver.scan(frozenset())


@pytest.mark.parametrize("ill", NBD_ILL)
async def test_an_ill_nbd_server_is_an_error_in_time(ill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "DEADLINE", 0.7)
    monkeypatch.setattr(nbd, "SCAN_DEADLINE", 0.7)
    async with hostile(NBD_ILL[ill]) as portal, asyncio.timeout(20):
        driver = driver_of(Pool(name="p", kind=PoolKind.NBD, portals=(portal,)), PoolSecrets())
        assert (await driver.check()).state is PoolState.UNREACHABLE
        with pytest.raises(HostlerError):
            await driver.scan(frozenset())
