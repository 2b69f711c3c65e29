"""A move that cannot be: every reason is named, by the dry run and by the attempt, and the guest notices nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from userview import User, traces

from hostler.model.errors import ErrorCode
from hostler.testing.bench_vm import Bench
from hostler.testing.lab import Lab

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0, reason="a host that sees other files than its neighbour needs root"),
]


@pytest.fixture(scope="module")
def apart(short_dir: Path) -> Iterator[Bench]:
    """The guest runs on host a; host b has nothing of the storage of a."""
    (short_dir / "shared").mkdir()
    with Lab(short_dir, isolated=False) as lab:
        first = lab.add_host("a")
        lab.join(first, lab.add_host("b", hides=short_dir / "shared"))
        bench = Bench(lab, short_dir)
        bench.create(first)
        bench.start(first)
        yield bench


def test_every_reason_is_named(apart: Bench) -> None:
    """The disk, kernel and initial RAM disk are not there, and the name is taken."""
    here, there = (User(host) for host in apart.hosts)
    there("vm", "create", "guest", "--memory", "64M")
    before = traces(here.host, apart.shared), traces(there.host)

    dry = here.run("vm", "move", "guest", "b", "--dry-run", "--json")
    assert dry.returncode == 4, dry
    shown = here.run("vm", "move", "guest", "b", "--dry-run")
    tried = here.refused(ErrorCode.BLOCKED, 4, "vm", "move", "guest", "b")
    details = tried["details"]["blockers"]
    kinds = sorted(blocker["kind"] for blocker in details)
    assert kinds == ["kernel-file-missing", "kernel-file-missing", "name-taken", "volume-not-shared"]
    for blocker in details:
        assert blocker["text"] in tried["cause"]
        assert blocker["text"] in dry.stdout and blocker["text"] in shown.stdout + shown.stderr
        assert blocker["advice"]
    assert "journal.qcow2" in tried["cause"]

    assert (traces(here.host, apart.shared), traces(there.host)) == before
    there("vm", "delete", "guest", "--yes")
    apart.check(apart.hosts[0])


def test_hosts_that_cannot_be_the_target(apart: Bench) -> None:
    user = User(apart.hosts[0])
    problem = user.refused(ErrorCode.NOT_FOUND, 3, "vm", "move", "guest", "c")
    assert "host" in problem["object"]
    itself = user.refused(ErrorCode.BLOCKED, 4, "vm", "move", "guest", "a")
    assert [b["kind"] for b in itself["details"]["blockers"]] == ["same-host"]
    user("vm", "create", "idle", "--memory", "64M")
    user.refused(ErrorCode.WRONG_STATE, 4, "vm", "move", "idle", "b")
    assert "the VM is off" in user.run("vm", "move", "idle", "b", "--dry-run").stdout
    apart.check(apart.hosts[0])


def test_a_host_that_does_not_answer(apart: Bench) -> None:
    user, there = User(apart.hosts[0]), apart.hosts[1]
    there.stop()
    before = traces(user.host)
    user.refused(ErrorCode.PEER_UNREACHABLE, 6, "vm", "move", "guest", "b", "--dry-run")
    user.refused(ErrorCode.PEER_UNREACHABLE, 6, "vm", "move", "guest", "b")
    assert traces(user.host) == before
    assert {h["name"]: h["state"] for h in user("host", "list")} == {"a": "up", "b": "unreachable"}
    there.start()
    apart.check(apart.hosts[0])
