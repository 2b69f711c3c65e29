"""The API over a real unix socket: local users, bounds on input, errors, streams, start and stop."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from rest_world import PATIENCE, Connection, World, record, running

from hostler.api.rest import body, protocol
from hostler.api.rest.listeners import Listeners
from hostler.model.errors import InUse, InvalidInput, NotPermitted
from hostler.model.principal import Role
from hostler.model.requests import TokenCreate
from hostler.model.vm import VmRecord

pytestmark = pytest.mark.component


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as made:
        yield made


async def test_a_call_ends_in_the_function_and_its_value_comes_back(world: World) -> None:
    status, answer = await world.ask("POST", "/v1/vms", {"name": "web9", "vcpus": 2})
    assert status == 201
    assert VmRecord.model_validate(answer) == record("web9")
    name, request, by, dry_run = world.app.calls[0]
    assert (name, request.name, request.vcpus, by, dry_run) == ("create", "web9", 2, f"uid {os.geteuid()}", False)
    status, _ = await world.ask("POST", "/v1/vms?dry_run=true", {"name": "web9"})
    assert status == 200
    assert world.app.calls[1][3] is True


async def test_many_requests_go_over_one_connection(world: World) -> None:
    connection = await world.connect()
    for _ in range(5):
        status, answer = await connection.ask("GET", "/v1/vms")
        assert (status, [VmRecord.model_validate(a).config.name for a in answer]) == (200, ["web1", "web2"])
    await connection.close()


@pytest.mark.parametrize(
    "action", ["start", "pause", "resume", "save", "restore", "discard-saved", "turn-off", "reset"]
)
async def test_each_action_reaches_the_application_under_its_own_name(world: World, action: str) -> None:
    status, answer = await world.ask("POST", f"/v1/vms/web%201/{action}")
    assert (status, answer["state"]) == (202, "running")
    assert world.app.calls[0][:3] == ("act", "web 1", action)


async def test_wait_answers_when_the_job_is_over_or_the_time_is_up(world: World) -> None:
    status, answer = await world.ask("POST", "/v1/vms/web1/start?wait=0.05")
    assert (status, answer["state"]) == (202, "running")
    world.app.over.set()
    status, answer = await world.ask("POST", "/v1/vms/web1/shutdown?wait=60", {"timeout": 5})
    assert (status, answer["state"]) == (200, "done")
    for wrong in ("-1", "3601", "soon", "nan"):
        status, answer = await world.ask("POST", f"/v1/vms/web1/start?wait={wrong}")
        assert (status, answer["code"], answer["object"]) == (400, "invalid-input", "wait")


async def test_a_wait_ends_with_the_client_that_asked_for_it(world: World) -> None:
    connection = await world.connect()
    await connection.send("POST", "/v1/vms/web1/start?wait=3600")
    await _until(lambda: any(call[0] == "wait" for call in world.app.calls))
    await connection.close()
    await _until(lambda: world.app.calls[-1][0] == "waited")


async def test_attaching_answers_with_a_job_or_with_the_vm_as_it_would_be(world: World) -> None:
    status, answer = await world.ask("POST", "/v1/vms/web1/disks", {"volume": "data"})
    assert (status, answer["kind"]) == (202, "vm.attach-disk")
    status, answer = await world.ask("POST", "/v1/vms/web1/disks?dry_run=true", {"volume": "data"})
    assert (status, VmRecord.model_validate(answer)) == (200, record("web1"))


async def test_a_picture_is_a_picture(world: World) -> None:
    assert await world.ask("GET", "/v1/vms/web1/screenshot") == (200, b"\x89PNG web1")


async def test_an_error_keeps_its_code_cause_advice_and_details(world: World) -> None:
    status, answer = await world.ask("GET", "/v1/vms/wbe1")
    assert status == 404
    assert answer == {
        "code": "not-found",
        "object": "vm wbe1",
        "cause": "there is no such VM on this host",
        "advice": "did you mean 'web1'?",
        "details": {"near": "web1"},
    }


async def test_a_fault_of_ours_shows_nothing_of_our_insides(world: World) -> None:
    connection = await world.connect()
    status, answer = await connection.ask("GET", "/v1/vms/broken")
    assert (status, answer["code"]) == (500, "internal")
    assert "secret" not in json.dumps(answer)
    assert (await connection.ask("GET", "/v1/vms/web1"))[0] == 200  # and the connection lives on
    await connection.close()


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"name": "a", "vcpu": 2}, "vcpu"),
        ({"name": "a", "disks": [{"volume": "x"}, {"volume": "y", "unit": 99}]}, "disks.1.unit"),
        ({"name": "a", "disks": [{}]}, "disks.0"),
        ({"name": 7}, "name"),
        ([], "body of the request"),
        (b"{", "body of the request"),
        (b"\xff\xfe", "body of the request"),
        (b"", "body of the request"),
    ],
)
async def test_input_that_is_wrong_names_the_field(world: World, sent: object, field: str) -> None:
    status, answer = await world.ask("POST", "/v1/vms", sent)
    assert (status, answer["code"]) == (400, "invalid-input")
    assert answer["object"].startswith(field)
    assert world.app.calls == []


async def test_what_is_no_endpoint_is_told_in_the_one_shape(world: World) -> None:
    status, answer = await world.ask("GET", "/v2/vms")
    assert (status, answer["code"]) == (404, "not-found")
    status, answer = await world.ask("PUT", "/v1/vms")
    assert (status, answer["code"]) == (405, "invalid-input")


async def test_a_body_that_is_too_large_is_refused_while_it_comes(world: World) -> None:
    for announced in (True, False):
        connection = await world.connect()
        data = b'{"name":"' + b"a" * (2 * body.MAX_BODY) + b'"}'
        if announced:
            await connection.send("POST", "/v1/vms", data)
        else:
            connection.writer.write(b"POST /v1/vms HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
            await connection.writer.drain()
        status, answer = await connection.answer()
        assert (status, answer["code"]) == (413, "invalid-input")
        await connection.close()
    assert world.app.calls == []


async def test_the_largest_allowed_body_is_allowed(world: World) -> None:
    data = json.dumps({"name": "a"}).encode()
    data += b" " * (body.MAX_BODY - len(data))
    assert (await world.ask("POST", "/v1/vms", data))[0] == 201


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * (body.MAX_DEPTH + 1) + b"]" * (body.MAX_DEPTH + 1)]
)
async def test_json_that_is_too_deep_is_refused_without_being_parsed(world: World, text: bytes) -> None:
    status, answer = await world.ask("POST", "/v1/vms", text)
    assert (status, answer["code"]) == (400, "invalid-input")
    assert "deep" in answer["cause"]


async def test_a_head_that_is_too_large_and_what_is_not_http_get_the_one_error_shape(world: World) -> None:
    for raw in (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, b"\x16\x03\x01nonsense\r\n\r\n"):
        connection = await world.connect()
        connection.writer.write(raw)
        status, answer = await connection.answer()
        assert (status, answer["code"]) == (400, "invalid-input")
        await connection.close()


async def test_a_client_that_does_not_finish_its_request_is_cut_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIME", 0.2)
    monkeypatch.setattr(protocol, "BODY_TIME", 0.2)
    for begun in (
        b"",
        b"GET /v1/vms HTTP/1.1\r\nHost:",
        b"POST /v1/vms HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{",
    ):
        connection = await world.connect()
        connection.writer.write(begun)
        status, answer = await connection.answer()
        assert (status, answer["code"]) == (408, "invalid-input"), begun
        assert await connection.reader.read() == b""
        await connection.close()


async def test_a_body_that_trickles_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIME", 0.2)
    connection = await world.connect()
    connection.writer.write(b"POST /v1/vms HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{")
    status, answer = await connection.answer()
    assert (status, answer["code"]) == (408, "invalid-input")
    await connection.close()


async def test_events_come_as_they_happen_from_the_first_line_on(world: World) -> None:
    connection = await world.connect()
    await connection.send("GET", "/v1/events?kind=vm&key=id-web1")
    status, headers = await connection.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert b": listening" in await _chunk(connection)
    world.app.events.publish("job", "j", None)
    world.app.events.publish("vm", "id-web2", record("web2"))
    world.app.events.publish("vm", "id-web1", record("web1"))
    lines = (await _chunk(connection)).decode().splitlines()
    assert lines[:2] == ["id: 3", "event: vm"]
    event = json.loads(lines[2].removeprefix("data: "))
    assert VmRecord.model_validate(event["data"]) == record("web1")
    await connection.close()
    await _until(lambda: not world.app.events._listeners)


async def test_a_stream_that_ends_at_its_source_ends_for_the_client(world: World) -> None:
    connection = await world.connect()
    await connection.send("GET", "/v1/events")
    await connection.head()
    await _chunk(connection)
    world.app.events.close()
    assert await _chunk(connection) == b""
    await connection.close()


async def test_stopping_ends_streams_and_waits_at_once_and_removes_the_socket(world: World) -> None:
    stream, waiting, idle = [await world.connect() for _ in range(3)]
    await stream.send("GET", "/v1/events")
    await stream.head()
    await _chunk(stream)
    await waiting.send("POST", "/v1/vms/web1/start?wait=3600")
    await _until(lambda: any(call[0] == "wait" for call in world.app.calls))
    async with asyncio.timeout(PATIENCE):
        await world.server.stop()
        assert (await waiting.answer())[0] == 202
        for connection in (stream, waiting, idle):
            await connection.reader.read()
            await connection.close()
    assert not world.unix.exists()


async def test_a_change_is_in_the_audit_trail_and_a_look_is_not(world: World) -> None:
    await world.ask("GET", "/v1/vms")
    await world.ask("POST", "/v1/vms?dry_run=true", {"name": "web9", "notes": "my password"})
    await world.ask("POST", "/v1/vms/web1/start")
    await world.ask("POST", "/v1/tokens", {"name": "t", "role": "host"})
    made, started, refused = world.audit()
    assert made["who"] == f"uid {os.geteuid()}"
    assert (made["what"], made["object"], made["outcome"]) == ("POST /v1/vms", "/v1/vms?dry_run=true", "done")
    assert made["facts"] == {"name": "web9"}
    assert (started["what"], started["object"]) == ("POST /v1/vms/{vm}/start", "/v1/vms/web1/start")
    assert started["outcome"] == "accepted"
    assert refused["outcome"] == "invalid-input"
    assert "password" not in json.dumps(world.audit())


async def test_a_full_disk_under_the_audit_trail_keeps_nobody_from_stopping_a_vm(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.identity.audit.__class__, "record", full)
    assert (await world.ask("POST", "/v1/vms/web1/turn-off"))[0] == 202


AS_ANOTHER_USER = """
import os, socket, sys
os.setgroups([int(g) for g in sys.argv[2].split(",") if g])
os.setgid(54321)
os.setuid(54321)
s = socket.socket(socket.AF_UNIX)
s.settimeout(30)
s.connect(sys.argv[1])
extra = f"Authorization: Bearer {sys.argv[3]}\\r\\n" if len(sys.argv) > 3 else ""
s.sendall(f"GET /v1/vms HTTP/1.1\\r\\nHost: h\\r\\nConnection: close\\r\\n{extra}\\r\\n".encode())
data = b""
while chunk := s.recv(65536):
    data += chunk
print(data.split()[1].decode())
print(data.split(b"\\r\\n\\r\\n", 1)[1].decode())
"""


async def _as_another_user(world: World, groups: str = "", *token: str) -> tuple[int, object]:
    arguments = [sys.executable, "-I", "-c", AS_ANOTHER_USER, str(world.unix), groups, *token]
    done = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True, check=True, timeout=60)
    status, answer = done.stdout.split("\n", 1)
    return int(status), json.loads(answer)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_needs_the_group_or_a_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostler.identity.local.admin_group", lambda: 54399)
    status, answer = await _as_another_user(world, "54398")
    assert isinstance(answer, dict)
    assert (status, answer["code"]) == (403, "not-permitted")
    assert "54321" in answer["object"]
    assert (await _as_another_user(world, "54398,54399"))[0] == 200
    token = (await world.tokens.create(TokenCreate(name="t", role=Role.VIEWER))).secret
    assert (await _as_another_user(world, "", token))[0] == 200


async def test_a_socket_that_a_dead_daemon_left_is_replaced_a_live_one_is_not(world: World, tmp_path: Path) -> None:
    with pytest.raises(InUse) as caught:
        Listeners(world.unix)
    assert "--run-dir" in caught.value.advice
    assert (await world.ask("GET", "/v1/vms"))[0] == 200
    stale = world.directory / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
        dead.listen()
    assert stale.exists()
    replaced = Listeners(stale)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(stale))
    assert stale.stat().st_mode & 0o777 == 0o666
    replaced.close()
    assert not stale.exists()


async def test_a_daemon_that_ends_late_leaves_the_socket_of_the_next_one(world: World) -> None:
    path = world.directory / "next.sock"
    first = Listeners(path)
    path.unlink()
    second = Listeners(path)
    first.close()
    assert path.exists()
    second.close()


async def test_what_is_not_a_socket_is_not_removed(world: World) -> None:
    path = world.directory / "file.sock"
    path.write_text("precious")
    with pytest.raises(InUse):
        Listeners(path)
    assert path.read_text() == "precious"


async def test_an_address_that_cannot_be_had_is_explained_and_leaves_nothing(world: World) -> None:
    path = world.directory / "second.sock"
    with pytest.raises(InUse) as caught:
        Listeners(path, f"127.0.0.1:{world.port}")
    assert "--listen" in caught.value.advice
    assert not path.exists()
    with pytest.raises(InvalidInput, match="not an address of this machine"):
        Listeners(path, "192.0.2.1:0")
    for wrong in ("nonsense", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000", ":80"):
        with pytest.raises(InvalidInput):
            Listeners(path, wrong)
    with pytest.raises(InvalidInput, match="107"):
        Listeners(world.directory / ("x" * 100))
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every directory")
async def test_a_directory_of_somebody_else_is_explained() -> None:
    with pytest.raises(NotPermitted):
        Listeners(Path("/hostler-test.sock"))


async def _chunk(connection: Connection) -> bytes:
    """The next piece of a chunked answer; b"" is its end."""
    async with asyncio.timeout(PATIENCE):
        size = int(await connection.reader.readline(), 16)
        return (await connection.reader.readexactly(size + 2))[:-2]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the stand-in has no event for each of these
            await asyncio.sleep(0.01)
