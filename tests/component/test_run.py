"""`./run` itself, with stand-ins for Python, pip and apt: quick, without network, and nothing is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.component

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0

PYTHON = """#!/bin/sh
# Makes "environments" whose every program is this script; pip waits for, or fails on, what the test says.
here=$(dirname "$0")
case "$(basename "$0") $*" in
"python -V") echo "Python ${FAKE_VERSION:-3.11.2}" ;;
"python -I "*) exit 0 ;;
"python -m venv -- "*) mkdir -p "$4/bin"; for name in python hostler hostlerd; do cp "$0" "$4/bin/$name"; done ;;
"python -m pip "*)
    echo pip >>"$FAKE_LOG"
    case "${FAKE_GATE:-} $*" in /*requirements.lock*) read -r _ <"$FAKE_GATE" ;; esac
    exit "${FAKE_PIP:-0}" ;;
*) echo "$(basename "$0") $*" ;;
esac
"""
DPKG_QUERY = """#!/bin/sh
for name in $FAKE_INSTALLED; do echo "$name installed"; done
[ -z "$FAKE_APT" ] || cat "$FAKE_APT" 2>/dev/null
exit 1
"""
APT_GET = """#!/bin/sh
echo "apt-get $*" >>"$FAKE_LOG"
case "$*" in *install*) for last in "$@"; do :; done; echo "$last installed" >>"$FAKE_APT" ;; esac
"""
SUDO = '#!/bin/sh\nshift\nexec "$@"\n'


class Checkout:
    """A checkout with nothing in it but what `./run` reads."""

    def __init__(self, base: Path) -> None:
        self.path = base / "checkout"
        self.path.mkdir()
        for name in ("run", "pyproject.toml"):
            shutil.copy(ROOT / name, self.path / name)
        (self.path / "packages.txt").write_text(
            "[runtime]\nqemu-thing  runs VMs\n[runtime-extra]\nnice-thing  is nice\n"
        )
        (self.path / "requirements.lock").write_text("a==1\n")
        tools = base / "bin"
        tools.mkdir()
        scripts = {"python": PYTHON, "dpkg-query": DPKG_QUERY, "apt-get": APT_GET, "sudo": SUDO}
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.started: list[subprocess.Popen[str]] = []
        self.log = base / "log"
        self.log.touch()
        self.env = {
            "PATH": f"{tools}:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(base / "home"),
            "HOSTLER_PYTHON": str(tools / "python"),
            "FAKE_LOG": str(self.log),
            "FAKE_INSTALLED": "qemu-thing nice-thing",
            "FAKE_APT": str(base / "apt"),
        }

    def start(self, *arguments: str, user: int | None = None, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self.path / "run", *arguments],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            user=user,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, user: int | None = None, **env: str) -> tuple[int, str, str]:
        process = self.start(*arguments, user=user, **env)
        out, err = process.communicate(timeout=DEADLINE)
        return process.returncode, out, err

    def pips(self) -> int:
        """How often pip was called: twice for each environment."""
        return self.log.read_text().count("pip\n")

    def ready(self) -> list[Path]:
        return sorted(self.path.glob(".cache/venv/*/ready"))


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=DEADLINE)


def test_the_first_start_makes_the_environment_and_the_second_uses_it(checkout: Checkout) -> None:
    code, out, err = checkout.run("hostler", "vm", "list", "--json")
    assert (code, out) == (0, "hostler vm list --json\n")
    assert "making the Python environment" in err
    assert checkout.run("hostler", "a b") == (0, "hostler a b\n", "")
    assert checkout.pips() == 2
    assert (checkout.path / ".venv").resolve() == checkout.ready()[0].parent


def test_it_works_through_a_link_and_from_elsewhere(checkout: Checkout, tmp_path: Path) -> None:
    link = tmp_path / "hostler-run"
    link.symlink_to(checkout.path / "run")
    done = subprocess.run(
        [link, "setup"], env=checkout.env, cwd="/", timeout=DEADLINE, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert len(checkout.ready()) == 1


def test_a_failed_set_up_is_told_and_made_afresh(checkout: Checkout) -> None:
    code, out, err = checkout.run("hostler", FAKE_PIP="3")
    assert (code, out) == (3, "")
    assert "the next ./run starts it afresh" in err
    assert checkout.ready() == []
    assert checkout.run("hostler")[0] == 0
    assert len(checkout.ready()) == 1


def test_a_killed_set_up_is_made_afresh(checkout: Checkout, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    process = checkout.start("hostler", FAKE_GATE=str(gate))
    with gate.open("w"):  # opens when pip has begun to wait
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE)
    assert checkout.ready() == []
    assert checkout.run("hostler")[0] == 0


def test_two_at_the_same_time_make_one_environment(checkout: Checkout, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = checkout.start("hostler", "1", FAKE_GATE=str(gate))
    with gate.open("w") as open_gate:
        second = checkout.start("hostler", "2")
        assert second.stderr is not None
        assert "another ./run is setting up" in second.stderr.readline()
        open_gate.write("\n")
    assert first.communicate(timeout=DEADLINE)[0] == "hostler 1\n"
    assert second.communicate(timeout=DEADLINE)[0] == "hostler 2\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert checkout.pips() == 2


def test_a_new_lock_makes_a_new_environment_and_leaves_the_old(checkout: Checkout) -> None:
    checkout.run("hostler")
    old = (checkout.path / ".venv").resolve()
    (checkout.path / "requirements.lock").write_text("a==2\n")
    checkout.run("hostler")
    new = (checkout.path / ".venv").resolve()
    assert old != new
    assert {path.parent for path in checkout.ready()} == {old, new}


def test_a_new_python_makes_it_anew_but_not_a_fix_of_the_same(checkout: Checkout) -> None:
    checkout.run("hostler")
    checkout.run("hostler", FAKE_VERSION="3.11.9")
    assert checkout.pips() == 2
    checkout.run("hostler", FAKE_VERSION="3.12.0")
    assert checkout.pips() == 4


def test_a_handmade_venv_is_left_alone(checkout: Checkout) -> None:
    (checkout.path / ".venv").mkdir()
    assert checkout.run("hostler")[0] == 0
    assert not (checkout.path / ".venv").is_symlink()


def test_in_somebody_elses_checkout_the_environment_is_in_the_users_cache(checkout: Checkout, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    user = 65534 if os.geteuid() == 0 else None
    if user is not None:
        os.chown(cache, user, -1)
        checkout.log.chmod(0o666)
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(folder.stat().st_mode | 0o011)
    checkout.path.chmod(0o555)
    code, out, _ = checkout.run("hostler", user=user, XDG_CACHE_HOME=str(cache))
    checkout.path.chmod(0o755)
    assert (code, out) == (0, "hostler \n")
    assert len(list(cache.glob("hostler/venv/*/ready"))) == 1
    assert not (checkout.path / ".cache").exists()


def test_a_missing_package_is_named_with_its_reason_and_the_command(checkout: Checkout) -> None:
    code, out, err = checkout.run("up", FAKE_INSTALLED="nice-thing", HOSTLER_INSTALL="no")
    assert (code, out) == (1, "")
    assert "qemu-thing" in err
    assert "runs VMs" in err
    assert "apt-get install -y --no-install-recommends qemu-thing" in err


def test_what_is_not_essential_is_warned_about_only(checkout: Checkout) -> None:
    code, out, err = checkout.run("up", "--name", "x", FAKE_INSTALLED="qemu-thing", HOSTLER_INSTALL="no")
    assert (code, out) == (0, "hostlerd --name x\n")
    assert "going on without: nice-thing" in err


def test_a_missing_package_is_installed(checkout: Checkout) -> None:
    code, out, _ = checkout.run("up", FAKE_INSTALLED="nice-thing")
    assert (code, out) == (0, "hostlerd \n")
    assert "install -y --no-install-recommends qemu-thing\n" in checkout.log.read_text()


def test_nothing_is_installed_when_nothing_is_missing(checkout: Checkout) -> None:
    assert checkout.run("up")[0] == 0
    assert "apt-get" not in checkout.log.read_text()


def test_a_python_that_does_not_fit_is_refused(checkout: Checkout) -> None:
    code, _, err = checkout.run("hostler", HOSTLER_PYTHON="/bin/false")
    assert code == 1
    assert "no Python 3.11 or newer" in err
    assert "/bin/false" in err
