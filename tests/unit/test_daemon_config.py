"""How a daemon is told what to be."""

from __future__ import annotations

import json
import logging as stdlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from hostler.daemon import logging
from hostler.daemon.config import DEFAULT_LISTEN, Config, parse_config
from hostler.daemon.lock import RunLock
from hostler.daemon.notify import notify
from hostler.model.errors import InUse, InvalidInput
from hostler.model.host import Accelerator
from hostler.model.limits import Profile

pytestmark = pytest.mark.unit

USER = {"HOME": "/home/u"}


def test_root_gets_the_systems_directories_and_listens_to_the_machine_itself_only() -> None:
    found = parse_config([], {}, uid=0)
    assert (found.state_dir, found.run_dir) == (Path("/var/lib/hostler"), Path("/run/hostler"))
    assert found.listen == DEFAULT_LISTEN == "127.0.0.1:8690"
    assert found.socket_path == Path("/run/hostler/api.sock")
    assert (found.profile, found.accelerator, found.log_level) == (Profile.HOSTLER, None, "info")
    assert found.name == socket.gethostname()


@pytest.mark.parametrize(
    ("env", "state", "run"),
    [
        ({}, "/home/u/.local/state/hostler", "/home/u/.local/state/hostler/run"),
        ({"XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r"}, "/s/hostler", "/r/hostler"),
        ({"HOSTLER_STATE_DIR": "/x", "XDG_RUNTIME_DIR": "/r"}, "/x", "/x/run"),
        ({"HOSTLER_RUN_DIR": "/y", "XDG_STATE_HOME": "/s"}, "/s/hostler", "/y"),
    ],
)
def test_an_ordinary_user_gets_its_own(env: dict[str, str], state: str, run: str) -> None:
    found = parse_config([], {**USER, **env}, uid=1000)
    assert (str(found.state_dir), str(found.run_dir)) == (state, run)


def test_the_client_looks_where_the_daemon_listens() -> None:
    from hostler.client.target import default_socket  # noqa: PLC0415 - the other side, for this one comparison

    assert default_socket({}, 0) == parse_config([], {}, uid=0).socket_path
    for env in (USER, {**USER, "XDG_STATE_HOME": "/s"}, {**USER, "XDG_RUNTIME_DIR": "/r"}):
        assert default_socket(env, 1000) == parse_config([], env, uid=1000).socket_path


def test_the_command_line_goes_before_the_environment() -> None:
    env = {**USER, "HOSTLER_NAME": "env", "HOSTLER_LISTEN": "none", "HOSTLER_ACCELERATOR": "kvm", "HOSTLER_QEMU": "/q"}
    found = parse_config(["--name", "cli", "--profile", "hyper-v-2008-r2"], env, uid=0)
    assert (found.name, found.listen, found.accelerator) == ("cli", None, Accelerator.KVM)
    assert (found.qemu, found.profile) == ("/q", Profile.HYPER_V_2008_R2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--listen", "8690"], "8690"),
        (["--listen", "h:99999"], "h:99999"),
        (["--profile", "big"], "--profile"),
        (["--accelerator", "fast"], "--accelerator"),
        (["--log-level", "loud"], "--log-level"),
        (["--name", "a/b"], "host name"),
        (["--migration-address", "h:1/x"], "--migration-address"),
        (["--lisen", "none"], "command line"),
        (["--state", "/x"], "command line"),
        (["extra"], "command line"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], named: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_config(arguments, USER, uid=0)
    assert named in caught.value.object
    assert caught.value.advice


def _config(listen: str, *more: str) -> Config:
    return parse_config(["--listen", listen, *more], USER, uid=0)


def test_other_hosts_are_told_an_address_they_can_reach() -> None:
    assert _config("10.0.0.1:8690").advertised("10.0.0.1:8690") == "10.0.0.1:8690"
    assert _config("10.0.0.1:0").migration_address == "10.0.0.1"
    assert _config("0.0.0.0:0", "--migration-address", "web1.lan").advertised("0.0.0.0:1234") == "web1.lan:1234"
    assert _config("[::]:0", "--migration-address", "[fd00::7]").advertised("[::]:1") == "[fd00::7]:1"
    assert _config("0.0.0.0:0").migration_address not in ("", "0.0.0.0")
    assert _config("none").advertised(None) == ""


def test_one_daemon_has_a_run_directory_at_a_time(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    with pytest.raises(InUse) as caught:
        RunLock(tmp_path / "run")
    assert "--run-dir" in caught.value.advice
    first.release()
    first.release()
    RunLock(tmp_path / "run").release()


def test_systemd_is_told_and_its_absence_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
    for address, bound in ((str(tmp_path / "n"), str(tmp_path / "n")), ("@hostler-test-n", "\0hostler-test-n")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(bound)
            manager.settimeout(10)
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            notify("READY=1")
            assert manager.recv(100) == b"READY=1"


@pytest.fixture
def restored_logging() -> Iterator[None]:
    handlers, level = stdlib.root.handlers[:], stdlib.root.level
    yield
    structlog.reset_defaults()
    stdlib.root.handlers[:] = handlers
    stdlib.root.setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_events_are_json_lines_from_the_chosen_level_on(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("info", people=False)
    log = structlog.get_logger()
    log.debug("unseen")
    log.info("vm.start", vm="web1")
    stdlib.getLogger("some.library").info("unseen")
    stdlib.getLogger("some.library").warning("strange %s", "thing")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("fault")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("vm.start", "info"),
        ("strange thing", "warning"),
        ("fault", "error"),
    ]
    assert lines[0]["vm"] == "web1"
    assert lines[1]["logger"] == "some.library"
    assert "ValueError: why" in lines[2]["exception"]


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize("people", [True, False])
def test_a_fault_is_logged_without_the_values_of_variables(capsys: pytest.CaptureFixture[str], people: bool) -> None:
    logging.configure("info", people=people)

    def fail(secret: str) -> None:
        raise ValueError("why" + secret[:0])

    try:
        fail("hstl_" + "geheim")
    except ValueError:
        structlog.get_logger().exception("fault")
    written = capsys.readouterr().err
    assert "ValueError: why" in written
    assert "hstl_geheim" not in written
