"""Calls and targets: paths, queries, bodies, and which host is meant."""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from hostler.client import answers, calls
from hostler.client.answers import Model
from hostler.client.target import Target, default_socket, find_target
from hostler.identity.authorize import TABLE
from hostler.model.backup_requests import BackupChoice, BackupExport, BackupList, BackupPrune, BackupRestore, BackupRun
from hostler.model.chain import ChainRequest, FlattenRequest
from hostler.model.checkpoint_requests import CheckpointApply, CheckpointChange, CheckpointClone, CheckpointCreate
from hostler.model.disk_requests import DiskChange, DiskFlatten, DiskGrow, DiskLimits, DiskMedium, DiskMove
from hostler.model.errors import HostlerError, InvalidInput, NotFound, NotPermitted
from hostler.model.host import Accelerator
from hostler.model.migration import IncomingRequest, MigrationSettings
from hostler.model.pool import Discover, PoolChange, PoolCreate, PoolScan
from hostler.model.requests import (
    DiskAdd,
    InspectRequest,
    JoinRequest,
    MigrateRequest,
    NicAdd,
    ShutdownRequest,
    TokenCreate,
    VmChange,
    VmCreate,
    VolumeCreate,
    VolumeRegister,
)
from hostler.model.transfer import ExportRequest, ImportRequest
from hostler.model.views import PeerIntroduction
from hostler.model.vm import VmConfig

pytestmark = pytest.mark.unit

PIN = "ab" * 32


def test_answers_are_read_as_what_their_annotations_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are named by text, so that they are imported late; here the texts are compared with the types."""
    namespace = {}
    for module in (
        "backup",
        "chain",
        "checkpoint",
        "foreign",
        "image",
        "limits",
        "job",
        "migration",
        "pool",
        "transfer",
        "views",
        "vm",
        "volume",
    ):
        namespace |= vars(__import__(f"hostler.model.{module}", fromlist=["x"]))
    hints = typing.get_type_hints(answers, globalns=vars(answers) | namespace)
    checked = 0
    for name, value in vars(answers).items():
        if isinstance(value, Model):
            (said,) = typing.get_args(hints[name])
            assert value.model() == said, name
            checked += 1
    assert checked > 15


def test_names_are_escaped() -> None:
    assert calls.vm("näme mit leer? #1%").path == "/v1/vms/n%C3%A4me%20mit%20leer%3F%20%231%25"


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../hosts"])
def test_what_cannot_be_a_name_never_reaches_a_url(name: str) -> None:
    for build in (calls.vm, calls.vm_delete, calls.volume_delete, calls.host_remove, calls.token_revoke, calls.job):
        with pytest.raises(InvalidInput):
            build(name)


def test_queries() -> None:
    assert calls.vm_delete("a", disks=True, dry_run=False).query == {"disks": "true"}
    assert calls.vm_act("a", "start", wait=2.5).query == {"wait": "2.5"}
    assert calls.vm_act("a", "start", wait=1e9).query == {"wait": "3600"}
    assert calls.disk_remove("a", "d", timeout=30, wait=40).query == {"wait": "40", "timeout": "30"}
    assert calls.jobs(state="running", target="web1").query == {"state": "running", "target": "web1"}
    with pytest.raises(InvalidInput):
        calls.vm_act("a", "explode")


def test_of_what_people_ask_only_what_was_said_is_sent() -> None:
    content = calls.vm_change("a", VmChange(notes="")).content()
    assert content is not None
    assert json.loads(content) == {"notes": ""}


def a_backup() -> BackupChoice:
    return BackupChoice(directory="/d", backup="2026")


def a_move() -> IncomingRequest:
    config = VmConfig(id="1", name="a", machine="pc-q35-7.2", cpu_model="Nehalem-v1")
    return IncomingRequest(
        id="m", config=config, generation=2, settings=MigrationSettings(), accelerator=Accelerator.TCG, secret=""
    )


def test_of_records_everything_is_sent() -> None:
    """The other host may have other defaults."""
    request = a_move()
    content = calls.peer_prepare(request).content()
    assert content is not None
    assert IncomingRequest.model_validate_json(content) == request
    assert json.loads(content)["settings"]["downtime_limit"] == 50


def test_only_reading_is_repeatable() -> None:
    assert calls.vms().repeatable
    assert not calls.vm_delete("a").repeatable
    assert not calls.peer_accept("m").repeatable


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}


def remember(home: dict[str, str], content: str, mode: int = 0o600) -> Path:
    path = Path(home["HOME"]) / ".config" / "hostler" / "hosts.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return path


def hosts(**entries: dict[str, str]) -> str:
    return json.dumps({"hosts": entries})


def test_this_machine_is_the_default(home: dict[str, str]) -> None:
    assert default_socket(home, 0) == Path("/run/hostler/api.sock")
    own = Path(home["XDG_RUNTIME_DIR"]) / "hostler" / "api.sock"
    state = Path(home["HOME"]) / ".local/state/hostler/run/api.sock"
    if not os.path.exists("/run/hostler/api.sock"):
        assert default_socket(home, 1000) == own
    state.parent.mkdir(parents=True)
    state.touch()
    assert default_socket(home, 1000) == state
    own.parent.mkdir(parents=True)
    own.touch()
    assert default_socket(home, 1000) == own


def test_sockets(home: dict[str, str]) -> None:
    assert find_target("/a/b.sock", home) == find_target("unix:/a/b.sock", home) == Target(socket="/a/b.sock")
    assert find_target(None, home | {"HOSTLER_HOST": "/a/b.sock"}).socket == "/a/b.sock"
    assert find_target("/c.sock", home | {"HOSTLER_HOST": "/a/b.sock"}).socket == "/c.sock"


def test_a_known_host(home: dict[str, str]) -> None:
    secret = Path(home["HOME"]) / "token"
    secret.write_text("hstl_1\n")
    secret.chmod(0o600)
    pin = ":".join(PIN[i : i + 2] for i in range(0, 64, 2)).upper()
    remember(home, hosts(web={"url": "https://h:1/", "fingerprint": pin, "token_file": str(secret)}))
    target = find_target("web", home)
    assert target == Target(url="https://h:1", token="hstl_1", fingerprint=PIN)
    assert find_target("https://h:1", home) == target
    assert "hstl" not in repr(target)
    assert find_target("web", home | {"HOSTLER_TOKEN": "hstl_2"}).token == "hstl_2"


@pytest.mark.parametrize(
    ("host", "content", "error"),
    [
        ("weeb", hosts(web={"url": "https://h:1"}), NotFound),
        ("web", hosts(web={"url": "http://h:1"}), InvalidInput),
        ("web", hosts(web={"url": "https://h:1/path"}), InvalidInput),
        ("web", hosts(web={"url": "https://h:1", "fingerprint": "abc"}), InvalidInput),
        ("web", hosts(web={"url": "https://h:1", "token_file": "/nonexistent"}), InvalidInput),
        ("web", "not json", InvalidInput),
        ("web", "[]", InvalidInput),
        ("http://h:1", hosts(), InvalidInput),
        ("https://u:p@h", hosts(), InvalidInput),
    ],
)
def test_what_is_no_target(home: dict[str, str], host: str, content: str, error: type[HostlerError]) -> None:
    remember(home, content)
    with pytest.raises(error) as refused:
        find_target(host, home)
    assert refused.value.advice


def test_the_near_host_is_suggested(home: dict[str, str]) -> None:
    remember(home, hosts(web={"url": "https://h:1"}))
    with pytest.raises(NotFound, match="known hosts") as refused:
        find_target("wob", home)
    assert refused.value.advice == "did you mean 'web'?"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_secrets_that_others_can_read_are_refused(home: dict[str, str], mode: int) -> None:
    path = remember(home, hosts(web={"url": "https://h:1"}), mode)
    with pytest.raises(NotPermitted) as refused:
        find_target("web", home)
    assert refused.value.advice == f"run: chmod 600 {path}"


def every_call() -> list[calls.Call[Any]]:
    """One of each, with names that stand for themselves."""
    vm, volume, host, job, token, move = "{vm}", "{volume}", "{host}", "{job}", "{token}", "{id}"
    pool, point = "{pool}", "{checkpoint}"
    migrate, disk = MigrateRequest(host="h"), DiskAdd(volume="v")
    request = a_move()
    return [
        calls.vms(), calls.vm(vm), calls.vm_create(VmCreate(name="a")), calls.vm_change(vm, VmChange(notes="")),
        calls.vm_delete(vm), *(calls.vm_act(vm, action) for action in calls.ACTIONS),
        calls.vm_shutdown(vm, ShutdownRequest()), calls.vm_migrate(vm, migrate), calls.vm_migrate_check(vm, migrate),
        calls.vm_screenshot(vm), calls.disk_add(vm, disk), calls.disk_add_check(vm, disk),
        calls.disk_remove(vm, "{disk}"), calls.disk_change(vm, "{disk}", DiskChange(discard=False)),
        calls.disk_move(vm, "{disk}", DiskMove(to="/v")), calls.disk_move_check(vm, "{disk}", DiskMove(to="/v")),
        calls.disk_flatten(vm, "{disk}", DiskFlatten()),
        calls.disk_grow(vm, "{disk}", DiskGrow(size=512)), calls.disk_limit(vm, "{disk}", DiskLimits(iops=1)),
        calls.disk_medium(vm, "{disk}", DiskMedium()), calls.nic_add(vm, NicAdd()), calls.nic_remove(vm, "{nic}"),
        calls.checkpoints(vm), calls.checkpoint(vm, point), calls.checkpoint_create(vm, CheckpointCreate()),
        calls.checkpoint_change(vm, point, CheckpointChange(notes="")), calls.checkpoint_delete(vm, point),
        calls.checkpoint_apply(vm, point, CheckpointApply()),
        calls.checkpoint_clone(vm, point, CheckpointClone(name="n")),
        calls.volumes(), calls.volume(volume), calls.volume_create(VolumeCreate(name="v", size=512)),
        calls.volume_register(VolumeRegister(name="v", path="/v")), calls.volume_inspect(InspectRequest(path="/v")),
        calls.pools(), calls.pool(pool), calls.pool_create(PoolCreate(name="p", path="/p")),
        calls.pool_change(pool, PoolChange()), calls.pool_delete(pool), calls.pool_scan(pool, PoolScan()),
        calls.volume_delete(volume), calls.volume_details(volume),
        *(calls.volume_act(volume, action) for action in calls.VOLUME_ACTIONS),
        calls.backup_run(vm, BackupRun(directory="/d")), calls.backups(BackupList()), calls.backup(a_backup()),
        calls.backup_export(BackupExport(directory="/d", backup="2026")),
        calls.backup_verify(a_backup()), calls.backup_delete(a_backup()),
        calls.backup_restore(BackupRestore(directory="/d", backup="2026", vm="n")),
        calls.backup_prune(BackupPrune(directory="/d", keep=1)),
        calls.import_inspect(ImportRequest(path="/e")),
        calls.import_run(ImportRequest(path="/e")), calls.export_check(vm, ExportRequest(directory="/e")),
        calls.export_run(vm, ExportRequest(directory="/e")),
        calls.this_host(), calls.hosts(), calls.limits(), calls.host_invite(),
        calls.pool_discover(Discover(portals=("h:1",))),
        calls.volume_chain(ChainRequest(path="/v")), calls.volume_flatten(FlattenRequest(name="v", source="/v")),
        calls.host_join(JoinRequest(invitation="i")), calls.host_remove(host), calls.jobs(), calls.job(job),
        calls.job_cancel(job), calls.tokens(), calls.token_create(TokenCreate(name="t")), calls.token_revoke(token),
        calls.version(), calls.peer_facts(), calls.peer_check(request), calls.peer_prepare(request),
        calls.peer_status(move), calls.peer_accept(move), calls.peer_refuse(move), calls.peer_outgoing(move),
        calls.peer_introduce(PeerIntroduction(id="i", name="n", address="a", certificate="c")),
    ]  # fmt: skip


def test_the_client_can_ask_for_everything_the_api_offers_and_for_nothing_else() -> None:
    asked = {f"{call.method} {unquote(call.path)}" for call in every_call()}
    sockets = {f"WEBSOCKET {unquote(path('{vm}'))}" for path in (calls.serial_path, calls.vnc_path)}
    assert asked | sockets | {"GET /v1/events"} == set(TABLE)
