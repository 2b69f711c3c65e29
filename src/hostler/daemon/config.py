"""How a daemon is told what to be: options, environment, and defaults that fit root and an ordinary user."""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from hostler import __version__
from hostler.api.rest.listeners import split_address
from hostler.model.errors import InvalidInput
from hostler.model.host import Accelerator
from hostler.model.limits import Profile
from hostler.model.names import check_name

DEFAULT_LISTEN = "127.0.0.1:8690"
"""Local only: a fresh host opens nothing to the network. For other hosts and clients use --listen 0.0.0.0:8690."""
DEFAULT_QEMU = "qemu-system-x86_64"

LOG_LEVELS = ("debug", "info", "warning", "error")

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
_HOST = re.compile(r"^[A-Za-z0-9_.:%-]{1,253}$")
_E = TypeVar("_E", Accelerator, Profile)


@dataclass(frozen=True, slots=True)
class Config:
    """`listen` None: no HTTPS. `migration_address` is the host (name or address) at which other hosts reach this
    machine. `accelerator` None: the best that works here. `qemu`: program name or path."""

    state_dir: Path
    run_dir: Path
    name: str
    migration_address: str
    listen: str | None = DEFAULT_LISTEN
    profile: Profile = Profile.HOSTLER
    accelerator: Accelerator | None = None
    qemu: str = DEFAULT_QEMU
    log_level: str = "info"

    @property
    def socket_path(self) -> Path:
        """Where the API's unix socket is."""
        return self.run_dir / "api.sock"

    def advertised(self, listening: str | None) -> str:
        """host:port that other hosts are told, for the address that is really listened on; "" without HTTPS."""
        if listening is None:
            return ""
        host, port = split_address(listening)
        host = self.migration_address if host in _WILDCARDS else host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_config(argv: Sequence[str], env: Mapping[str, str], uid: int | None = None) -> Config:
    """The configuration from command line (first) and HOSTLER_* variables. InvalidInput names the option that is
    wrong; --help and --version print and raise SystemExit."""
    given = vars(_parser().parse_args(argv))

    def value(option: str, default: str) -> str:
        return str(given[option] or env.get("HOSTLER_" + option.upper()) or default)

    state, run = _directories(env, os.geteuid() if uid is None else uid)
    state = Path(value("state_dir", str(state))).absolute()
    chosen_state = given["state_dir"] or env.get("HOSTLER_STATE_DIR")
    run = Path(value("run_dir", str(state / "run" if chosen_state else run))).absolute()
    listen = _listen(value("listen", DEFAULT_LISTEN))
    accelerator = value("accelerator", "auto")
    return Config(
        state_dir=state,
        run_dir=run,
        name=check_name("host", value("name", socket.gethostname())),
        listen=listen,
        migration_address=_host(value("migration_address", "") or _reachable(listen)),
        profile=_choice("--profile", Profile, value("profile", Profile.HOSTLER)),
        accelerator=None if accelerator == "auto" else _choice("--accelerator", Accelerator, accelerator),
        qemu=value("qemu", DEFAULT_QEMU),
        log_level=_log_level(value("log_level", "info")),
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput("command line", message, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hostlerd",
        allow_abbrev=False,
        description="The Hostler daemon: makes this machine a host for virtual machines. Stopping it stops no VM.",
        epilog="Each option can be given as an environment variable too: --state-dir is HOSTLER_STATE_DIR.",
    )
    add = parser.add_argument
    add("--state-dir", metavar="DIR", help="what must survive a reboot (root: /var/lib/hostler)")
    add("--run-dir", metavar="DIR", help="sockets (root: /run/hostler; with --state-dir: DIR/run)")
    add("--listen", metavar="HOST:PORT", help=f"HTTPS for clients and other hosts, or none (default {DEFAULT_LISTEN})")
    add("--name", help="name of this host (default: the machine's)")
    add("--migration-address", metavar="HOST", help="where other hosts reach this machine (default: as --listen)")
    add("--profile", help=f"limits: {', '.join(Profile)} (default {Profile.HOSTLER})")
    add("--accelerator", help="auto, kvm or tcg (default auto: kvm where it really works)")
    add("--qemu", metavar="PROGRAM", help=f"QEMU to use (default {DEFAULT_QEMU})")
    add("--log-level", help=f"{', '.join(LOG_LEVELS)} (default info)")
    add("--version", action="version", version=f"hostlerd {__version__}")
    return parser


def _directories(env: Mapping[str, str], uid: int) -> tuple[Path, Path]:
    """Where root's and a user's state and sockets are (XDG base directories); the client looks in the same places."""
    if uid == 0:
        return Path("/var/lib/hostler"), Path("/run/hostler")
    home = Path(env.get("HOME") or "~").expanduser()
    state = Path(env.get("XDG_STATE_HOME") or home / ".local" / "state") / "hostler"
    runtime = env.get("XDG_RUNTIME_DIR")
    return state, Path(runtime) / "hostler" if runtime else state / "run"


def _listen(text: str) -> str | None:
    if text == "none":
        return None
    split_address(text)
    return text


def _host(text: str) -> str:
    text = text.removeprefix("[").removesuffix("]")
    if not _HOST.match(text):
        raise InvalidInput(f"--migration-address {text!r}", "is not a host name or address", "leave out the port")
    return text


def _reachable(listen: str | None) -> str:
    """The address that was listened on, or that of the interface which leads out, where all were."""
    host = split_address(listen)[0] if listen else "127.0.0.1"
    if host not in _WILDCARDS:
        return host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only asks the routing table. Addresses for documentation.
            probe.connect(("2001:db8::1" if ":" in host else "192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:  # no way out of this machine
            return "::1" if ":" in host else "127.0.0.1"


def _choice(option: str, kind: type[_E], text: str) -> _E:
    try:
        return kind(text)
    except ValueError as error:
        raise InvalidInput(f"{option} {text!r}", "is not known", f"one of: {', '.join(kind)}") from error


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise InvalidInput(f"--log-level {text!r}", "is not known", f"one of: {', '.join(LOG_LEVELS)}")
    return text.lower()
