"""Which host to talk to, and how to be sure that it is that one.

A host is named by a unix socket (`unix:/run/hostler/api.sock`, or just the path), by `https://host:port`, or by a name
from `~/.config/hostler/hosts.json` (mode 0600):

    {"hosts": {"web": {"url": "https://10.0.0.1:8443", "fingerprint": "<SHA-256>", "token_file": "/root/web.token"}}}

Either `fingerprint` (exactly that certificate, in hex) or `ca_file` may stand there; without both, the system's
authorities decide. A token comes from $HOSTLER_TOKEN, the file named by $HOSTLER_TOKEN_FILE, or the entry's
`token_file`; never from the command line, which every user of the machine can read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from hostler.model.errors import HostlerError, InvalidInput, NotFound, NotPermitted
from hostler.model.names import nearest

SYSTEM_SOCKET = Path("/run/hostler/api.sock")
_FINGERPRINT_DIGITS = 64
"""SHA-256 in hex."""
_LARGEST_FILE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect: exactly one of `socket` and `url` is set. `token` is never shown."""

    socket: str | None = None
    url: str | None = None
    token: str | None = field(default=None, repr=False)
    fingerprint: str | None = None
    ca_file: str | None = None

    @property
    def text(self) -> str:
        """For people."""
        return self.socket or self.url or ""


def config_file(env: Mapping[str, str]) -> Path:
    """Where known hosts are remembered."""
    base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or "~").expanduser() / ".config")
    return Path(base) / "hostler" / "hosts.json"


def default_socket(env: Mapping[str, str], uid: int) -> Path:
    """The socket of the daemon on this machine: root's is the system's; a user's own one goes before that."""
    if uid == 0:
        return SYSTEM_SOCKET
    home = Path(env.get("HOME") or "~").expanduser()
    own = [Path(run) / "hostler" / "api.sock"] if (run := env.get("XDG_RUNTIME_DIR")) else []
    own.append(Path(env.get("XDG_STATE_HOME") or home / ".local" / "state") / "hostler" / "run" / "api.sock")
    return next((path for path in [*own, SYSTEM_SOCKET] if path.exists()), own[0])


def find_target(host: str | None, env: Mapping[str, str] | None = None) -> Target:
    """The target that `host` (or $HOSTLER_HOST, or nothing: this machine) names.

    InvalidInput for a text that names none, NotFound for an unknown name, NotPermitted for a file with secrets that
    others can read.
    """
    env = os.environ if env is None else env
    text = host or env.get("HOSTLER_HOST") or ""
    if not text:
        return Target(socket=str(default_socket(env, os.geteuid())))
    if text.startswith(("unix:", "/")):
        return Target(socket=text.removeprefix("unix:"))
    if text.startswith("https://"):
        known = [entry for entry in _known(env).values() if entry.get("url", "").rstrip("/") == text.rstrip("/")]
        return _https(text, known[0] if known else {}, env)
    if "://" in text:
        raise InvalidInput(f"host {text!r}", "is not a unix socket or an https address", "write https://host:port")
    return _by_name(text, env)


def _by_name(name: str, env: Mapping[str, str]) -> Target:
    known = _known(env)
    entry = known.get(name)
    if entry is None:
        near = nearest(name, known)
        advice = f"did you mean {near!r}?" if near else f"add it to {config_file(env)}, or write https://host:port"
        raise NotFound(f"host {name!r}", "is not among the known hosts of this user", advice)
    return _https(entry.get("url", ""), entry, env)


def _https(url: str, entry: Mapping[str, str], env: Mapping[str, str]) -> Target:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or parts.username:
        raise InvalidInput(f"host {url!r}", "is not an address like https://host:port", "leave out path and user")
    pin = entry.get("fingerprint", "").replace(":", "").lower()
    if pin and (len(pin) != _FINGERPRINT_DIGITS or not set(pin) <= set("0123456789abcdef")):
        raise InvalidInput(f"fingerprint of {url}", "is not a SHA-256 in hex", "it has 64 digits 0-9 and a-f")
    return Target(
        url=url.rstrip("/"), token=_token(entry, env), fingerprint=pin or None, ca_file=entry.get("ca_file") or None
    )


def _token(entry: Mapping[str, str], env: Mapping[str, str]) -> str | None:
    if token := env.get("HOSTLER_TOKEN"):
        return token.strip()
    name = env.get("HOSTLER_TOKEN_FILE") or entry.get("token_file")
    return _secret_file(Path(name)).strip() if name else None


def _known(env: Mapping[str, str]) -> dict[str, dict[str, str]]:
    path = config_file(env)
    if not path.exists():
        return {}
    try:
        hosts = json.loads(_secret_file(path))["hosts"]
        return {str(name): {str(k): str(v) for k, v in entry.items()} for name, entry in hosts.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_understood(path) from error


def _not_understood(path: Path) -> HostlerError:
    return InvalidInput(
        f"file {path}", "is not a list of hosts", 'it looks like {"hosts": {"web": {"url": "https://host:port"}}}'
    )


def _secret_file(path: Path) -> str:
    """The text of a file that only its owner may read."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise NotPermitted(f"file {path}", "can be read by other users", f"run: chmod 600 {path}")
            return file.read(_LARGEST_FILE).decode()
    except OSError as error:
        raise InvalidInput(f"file {path}", f"cannot be read: {error.strerror}", "check its name and mode") from error
    except UnicodeDecodeError as error:
        raise _not_understood(path) from error
