"""The command line against a real API server: what it prints, what it asks for, and how it ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_run import Run, ok, runner
from client_host import RunningHost, running_host

from hostler.cli.exit_codes import Exit
from hostler.model.errors import Blocked, NoSpace
from hostler.model.migration import Blocker, BlockerKind
from hostler.model.requests import TokenCreate
from hostler.model.vm import VmState

pytestmark = pytest.mark.component


@pytest.fixture
def host() -> Iterator[RunningHost]:
    with running_host() as running:
        yield running


@pytest.fixture
def run(host: RunningHost, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(host, capsys, monkeypatch)


# lists and facts


def test_an_empty_list_says_what_to_do_and_prints_nothing(run: Run) -> None:
    done = run("vm", "list")
    assert (done.code, done.out) == (Exit.OK, "")
    assert "hostler vm create" in done.err
    assert ok(run("vm", "list", "--json")) == "[]\n"


def test_vm_list_in_a_pipe_is_plain(run: Run) -> None:
    for name, memory in (("web2", "512M"), ("a", "2G")):
        ok(run("vm", "create", name, "--memory", memory))
    assert ok(run("vm", "list")) == (
        "NAME  STATE  VCPUS   MEMORY  DISKS  NICS  NOTE\n"
        "a     off        1    2 GiB      0     0\n"
        "web2  off        1  512 MiB      0     0\n"
    )
    assert ok(run("vm", "list", "--quiet")) == "a\nweb2\n"
    assert ok(run("-q", "vm", "list")) == "a\nweb2\n"


def test_json_is_exactly_what_the_api_says(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    out = ok(run("vm", "show", "web1", "--json"))
    assert out == host.app.vms.get("web1").model_dump_json() + "\n"


def test_show_names_everything_that_matters(run: Run) -> None:
    ok(run("vm", "create", "web1", "--notes", "first\nsecond", "--tpm", "--disk", "/srv/a.qcow2"))
    out = ok(run("vm", "show", "web1"))
    for line in ("name       web1", "memory     1 GiB", "tpm        yes", "notes      first", "           second"):
        assert line + "\n" in out
    assert "disk0  scsi 0:0  1 GiB  raw     disk  /srv/a.qcow2\n" in out


def test_host_show_says_which_accelerator_and_why(run: Run) -> None:
    out = ok(run("host", "show"))
    assert "accelerator    tcg\nbecause        the processor has neither vmx nor svm\n" in out
    assert "state        unreachable" in ok(run("host", "show", "beta"))
    assert run("host", "show", "betta").err.endswith("did you mean 'beta'?\n")
    assert "alpha *  up" in ok(run("host", "list"))
    assert ok(run("host", "list", "-q")) == "alpha\nbeta\n"
    assert "vm_memory" in ok(run("host", "limits"))


def test_a_mistyped_name_suggests_the_near_one(run: Run) -> None:
    ok(run("vm", "create", "web1"))
    done = run("vm", "start", "wob1")
    assert (done.code, done.out) == (Exit.NOT_FOUND, "")
    assert done.err == "error: vm wob1: does not exist\n  did you mean 'web1'?\n"


# life of a VM


@pytest.mark.parametrize(
    ("word", "state", "text"),
    [
        ("start", VmState.RUNNING, "vm web1 is running\n"),
        ("pause", VmState.PAUSED, "vm web1 is paused\n"),
        ("resume", VmState.RUNNING, "vm web1 is running\n"),
        ("save", VmState.SAVED, "vm web1 is saved\n"),
        ("restore", VmState.RUNNING, "vm web1 is running\n"),
        ("discard-saved", VmState.OFF, "vm web1 is off\n"),
        ("turn-off", VmState.OFF, "vm web1 is off\n"),
        ("reset", VmState.OFF, "vm web1 was reset\n"),
        ("shutdown", VmState.OFF, "vm web1 is off\n"),
    ],
)
def test_power(run: Run, host: RunningHost, word: str, state: VmState, text: str) -> None:
    ok(run("vm", "create", "web1"))
    assert ok(run("vm", word, "web1")) == text
    assert host.app.vms.get("web1").state is state
    assert host.job().kind == f"vm.{word}"
    assert json.loads(ok(run("vm", word, "web1", "--json")))["state"] == "done"
    assert ok(run("vm", word, "web1", "--quiet")) == ""


def test_shutdown_options(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    ok(run("vm", "shutdown", "web1", "--timeout", "7", "--then", "turn-off"))
    assert host.job().params == {"timeout": 7, "then": "turn-off"}


def test_no_wait_prints_the_job_and_goes(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.held = True
    out = ok(run("vm", "start", "web1", "--no-wait"))
    job = host.job()
    assert out == f"job {job.id} is running; wait for it: hostler job watch {job.id}\n"
    assert json.loads(ok(run("vm", "start", "web1", "--no-wait", "--json")))["state"] == "running"
    assert run("vm", "start", "web1", "--no-wait", "--quiet").out == f"{host.job().id}\n"


def test_a_failed_job_is_its_error(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.failure = NoSpace("vm web1", "the disk is full", "make room")
    done = run("vm", "save", "web1")
    assert (done.code, done.out, done.err) == (
        Exit.FAILURE,
        "",
        "error: vm web1: the disk is full\n  make room\n",
    )
    done = run("vm", "save", "web1", "--json")
    assert json.loads(done.out)["state"] == "failed"
    assert json.loads(done.err)["code"] == "no-space"
    assert run("job", "watch", host.job().id).code == Exit.FAILURE


def test_change(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1", "--kernel", "/boot/k"))
    ok(run("vm", "set", "web1", "--memory", "3G", "--autostart", "--shutdown-timeout", "5", "--append", "quiet"))
    ok(run("vm", "set", "web1", "--autostart-order", "3", "--tpm"))
    ok(run("vm", "rename", "web1", "web9"))
    config = host.app.vms.get("web9").config
    assert (config.memory, config.tpm, config.shutdown.timeout) == (3 * 1024**3, True, 5)
    assert (config.autostart.enabled, config.autostart.order) == (True, 3)
    assert config.kernel is not None
    assert (config.kernel.kernel, config.kernel.cmdline) == ("/boot/k", "quiet")
    assert run("vm", "set", "web9").code == Exit.USAGE


def test_delete(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1", "--disk", "/srv/a"))
    assert ok(run("vm", "delete", "web1", "--dry-run")) == "would delete vm web1\nwould keep /srv/a\n"
    assert ok(run("vm", "delete", "web1", "--dry-run", "--disks")) == "would delete vm web1\nwould remove /srv/a\n"
    assert host.app.vms.list()
    assert ok(run("vm", "delete", "web1", "--disks")) == "vm web1 is deleted\nremoved /srv/a\n"
    assert host.app.vms.list() == []


def test_screenshot(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ok(run("vm", "create", "web1"))
    assert ok(run("vm", "screenshot", "web1")) == "written to web1.png\n"
    assert (tmp_path / "web1.png").read_bytes() == b"\x89PNG of web1"
    assert run("vm", "screenshot", "web1").code == Exit.REFUSED
    ok(run("vm", "screenshot", "web1", "--force"))
    assert run("vm", "screenshot", "web1", "/nonexistent/x.png").code == Exit.FAILURE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web1.png"]


# disks, adapters, volumes


def test_create_with_new_disks(run: Run, host: RunningHost) -> None:
    out = ok(run("vm", "create", "web1", "--new-disk", "20G", "--new-disk", "1G,format=vhdx", "--start"))
    assert out == "volume web1 is made\nvolume web1-2 is made\nvm web1 is made\nvm web1 is running\n"
    assert [disk.source.path for disk in host.app.vms.get("web1").config.disks] == ["web1", "web1-2"]
    assert host.app.volumes.by_name["web1-2"].format == "vhdx"
    assert host.app.vms.get("web1").state is VmState.RUNNING


def test_dry_run_of_create_makes_nothing(run: Run, host: RunningHost) -> None:
    out = ok(run("vm", "create", "web1", "--new-disk", "20G", "--dry-run"))
    assert out.startswith("would make volume web1, 20 GiB, qcow2\nwould make vm web1:\nname")
    assert (host.app.vms.list(), host.app.volumes.by_name, host.app.jobs.list()) == ([], {}, [])
    assert json.loads(ok(run("vm", "create", "web1", "--dry-run", "--json")))["config"]["name"] == "web1"


def test_a_failed_create_removes_the_volumes_it_made(run: Run, host: RunningHost) -> None:
    host.app.vms.refuse_create = Blocked("vm web1", "is refused", "do something else")
    done = run("vm", "create", "web1", "--new-disk", "1G", "--new-disk", "1G")
    assert done.code == Exit.REFUSED
    assert host.app.volumes.by_name == {}
    assert "error: vm web1: is refused" in done.err
    assert "volume web1, made for this, is removed again" in done.err


def test_a_json_create_prints_one_document(run: Run) -> None:
    out = ok(run("vm", "create", "web1", "--new-disk", "1G", "--start", "--json"))
    assert json.loads(out)["state"] == "running"


def test_disk_commands(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    assert ok(run("disk", "add", "web1", "--volume", "data", "--read-only")) == "vm web1 has disk disk0\n"
    assert ok(run("disk", "add", "web1", "--new", "20G", "--format", "vhd")) == (
        "volume web1 is made\nvm web1 has disk disk1\n"
    )
    assert host.app.volumes.by_name["web1"].format == "vhd"
    assert "disk2" in ok(run("disk", "add", "web1", "--device", "/dev/loop0", "--dry-run"))
    assert ok(run("disk", "add", "web1", "--new", "1G", "--volume", "n", "--dry-run")) == (
        "would make volume n, 1 GiB, and attach it to vm web1\n"
    )
    assert ok(run("disk", "list", "web1", "-q")) == "disk0\ndisk1\n"
    assert ok(run("disk", "remove", "web1", "disk0", "--timeout", "9")) == "vm web1 no longer has disk disk0\n"
    assert host.job().params == {"timeout": 9.0}
    for words in ([], ["--path", "/x", "--volume", "a"], ["--device", "/dev/x", "--new", "1G"]):
        assert run("disk", "add", "web1", *words).code == Exit.USAGE


def test_a_disk_that_cannot_be_attached_leaves_no_volume(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    jobs = host.app.jobs

    async def fail(*_: Any) -> Any:
        jobs.failure = Blocked("vm web1", "takes no disk", "leave it")
        return await jobs.begin("vm.attach-disk", "web1", {}, lambda: None)

    host.app.vms.attach_disk = fail  # type: ignore[method-assign]
    done = run("disk", "add", "web1", "--new", "1G")
    assert done.code == Exit.REFUSED
    assert host.app.volumes.by_name == {}


def test_nic_commands(run: Run) -> None:
    ok(run("vm", "create", "web1"))
    assert "nic0  52:54:00:00:00:01  bridge br0       2\n" in ok(
        run("nic", "add", "web1", "bridge:br0", "--queues", "2")
    )
    assert ok(run("nic", "list", "web1", "-q")) == "nic0\n"
    assert ok(run("nic", "remove", "web1", "nic0")) == "vm web1 no longer has nic nic0\n"


def test_volume_commands(run: Run, host: RunningHost) -> None:
    assert ok(run("volume", "create", "data", "20G", "--format", "vhdx")) == "volume data is made\n"
    assert ok(run("volume", "import", "copy", "/srv/x.img", "--source-format", "raw")) == (
        "volume copy is made from /srv/x.img\n"
    )
    assert "path       /srv/old" in ok(run("volume", "register", "old", "/srv/old", "--format", "raw"))
    assert "format     qcow2" in ok(run("volume", "inspect", "/x"))
    assert "20 GiB (21474836480 bytes)" in ok(run("volume", "show", "data"))
    chain = ok(run("volume", "chain", "/srv/x.avhd", "--search", "/srv"))
    assert "missing: builds on nothing" in chain and "-> find it" in chain
    assert "volume flat is made from /srv/x.avhd" in ok(run("volume", "flatten", "/srv/x.avhd", "flat", "--size", "2G"))
    ok(run("volume", "delete", "flat", "--yes"))
    assert ok(run("volume", "list", "-q")) == "copy\ndata\nold\n"
    assert (
        ok(run("volume", "delete", "data", "--dry-run"))
        == "would delete volume data\nwould remove /volumes/data.vhdx\n"
    )
    assert ok(run("volume", "delete", "old", "--keep-file")) == "volume old is deleted\nkept /srv/old\n"
    ok(run("volume", "delete", "data", "--yes"))
    assert list(host.app.volumes.by_name) == ["copy"]


# hosts, tokens, jobs


def test_trust(run: Run, host: RunningHost, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("host", "invite")
    assert done.out == "hstj_secret\n"
    assert "hostler host join" in done.err
    assert "--listen 0.0.0.0" not in done.err, "it can be reached already"
    assert ok(run("host", "invite", "-q")) == "hstj_secret\n"
    assert "trust each other now" in ok(run("host", "join", "abc"))
    read, write = os.pipe()
    os.write(write, b"def\n")
    os.close(write)
    with os.fdopen(read) as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        ok(run("host", "join"))
    assert host.app.hosts.joined == ["abc", "def"]
    assert ok(run("host", "remove", "beta", "--yes")) == "host beta is no longer trusted\n"


def test_tokens(run: Run) -> None:
    done = run("token", "create", "backup", "--role", "viewer")
    assert done.out.startswith("hstl_")
    assert done.out.count("\n") == 1
    assert ok(run("token", "list", "-q")) == "backup\n"
    ok(run("token", "revoke", "backup", "-y"))
    assert ok(run("token", "list", "--json")) == "[]\n"


def test_jobs(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    host.app.jobs.held = True
    ok(run("vm", "start", "web1", "--no-wait"))
    job = host.job()
    assert ok(run("job", "list", "--state", "running", "-q")) == f"{job.id}\n"
    assert ok(run("job", "list")).splitlines()[1].startswith(f"{job.id[:8]}  running")
    assert ok(run("job", "list", "--state", "done", "--json")) == "[]\n"
    assert "work  running" in ok(run("job", "show", job.id))
    assert ok(run("job", "cancel", job.id)) == f"job {job.id} is cancelled\n"
    done = run("job", "watch", job.id)
    assert done.code == Exit.CANCELLED


def test_version(run: Run) -> None:
    assert ok(run("version")).startswith("hostler ")
    found = json.loads(ok(run("version", "--json")))
    assert found["client"] == found["host"]["version"]


def test_over_https(run: Run, host: RunningHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = host.do(host.tokens.create(TokenCreate(name="t"))).secret
    config = tmp_path / "hostler" / "hosts.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"hosts": {"web": {"url": host.url, "fingerprint": host.identity.fingerprint}}}))
    config.chmod(0o600)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOSTLER_TOKEN", secret)
    assert ok(run("--host", "web", "vm", "list", "--json")) == "[]\n"
    assert run("--host", "web", "vm", "create", "a").code == Exit.NOT_PERMITTED
    assert run("--host", "wob", "vm", "list").code == Exit.NOT_FOUND


# moves


def test_dry_run_of_a_move_names_every_blocker(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    assert ok(run("vm", "move", "web1", "beta", "--dry-run")) == (
        "move of vm web1 to host beta (live): possible, at most 1 GiB of memory to send\n"
    )
    host.app.migrations.blockers = (
        Blocker(kind=BlockerKind.NO_TPM, text="no swtpm there", advice="install it"),
        Blocker(kind=BlockerKind.NO_BRIDGE, text="no br0 there"),
    )
    done = run("vm", "move", "web1", "beta", "--dry-run", "--quick")
    assert done.code == Exit.REFUSED
    assert done.out == (
        "move of vm web1 to host beta (quick): not possible\n"
        "  no-tpm: no swtpm there\n    install it\n  no-bridge: no br0 there\n"
    )


def test_move(run: Run, host: RunningHost) -> None:
    ok(run("vm", "create", "web1"))
    words = ["--bandwidth", "100M", "--downtime-limit", "20", "--streams", "2", "--quick"]
    assert ok(run("vm", "move", "web1", "beta", *words)).startswith("vm web1 is on host beta, after ")
    assert host.job().params == {
        "host": "beta", "mode": "quick", "bandwidth": 100 * 1024**2, "downtime_limit": 20, "streams": 2,
    }  # fmt: skip
