"""The sockets on which the API listens, and clear words when one cannot be had."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from hostler.model.errors import HostLacks, HostlerError, InternalError, InUse, InvalidInput, NoSpace, NotPermitted

BACKLOG = 512
SOCKET_PATH_MAX = 107
"""sizeof(sun_path) - 1 on Linux, unix(7)."""
PROBE_TIME = 2.0
"""Seconds to find out whether somebody still listens on an old socket; the kernel answers at once."""


class Listeners:
    """The open sockets of one daemon. They are opened before anything else is begun: a port that is taken must not be
    found out after VMs were adopted. Whoever connects before the daemon is ready waits in the queue."""

    def __init__(self, unix_path: Path, listen: str | None = None) -> None:
        """`listen`: host:port for HTTPS, None for the unix socket alone. InUse, InvalidInput, NotPermitted, NoSpace
        when one cannot be had; nothing stays open then."""
        self._closed = False
        self.tcp: socket.socket | None = None
        self.unix = unix_listener(unix_path)
        found = unix_path.stat()
        self._path, self._inode = unix_path, (found.st_dev, found.st_ino)
        try:
            self.tcp = tcp_listener(listen) if listen else None
        except HostlerError:
            self.close()
            raise

    @property
    def https_address(self) -> str | None:
        """host:port where HTTPS is served, with the real port where 0 was asked for."""
        if self.tcp is None:
            return None
        host, port = self.tcp.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Close both and remove the unix socket, if it is still ours: a next daemon may have made its own there.
        Harmless when closed."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(FileNotFoundError):
                found = self._path.stat()
                if (found.st_dev, found.st_ino) == self._inode:
                    self._path.unlink()
        self.unix.close()
        if self.tcp is not None:
            self.tcp.close()


def unix_listener(path: Path) -> socket.socket:
    """A socket at `path` that every local user may connect to: who may do what is decided by peer credentials.

    What a dead daemon left there is replaced. InUse when somebody listens on it, InvalidInput when the path is too
    long, NotPermitted, NoSpace.
    """
    subject = f"api socket {path}"
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise InvalidInput(subject, f"is longer than {SOCKET_PATH_MAX} bytes", "choose a shorter --run-dir")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(subject, path)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise _explain(subject, error, "choose another --run-dir") from error
    except HostlerError:
        listener.close()
        raise
    return listener


def tcp_listener(address: str) -> socket.socket:
    """A socket on `address` ("host:port", "[v6]:port", port 0 for any free one). InUse when the port is taken,
    InvalidInput when the address is not one of this machine, NotPermitted for a port below 1024 without the right."""
    host, port = split_address(address)
    subject = f"listen address {address}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidInput(subject, f"cannot be resolved: {error.strerror}", "give --listen an IP address") from error
    family, kind, protocol, _, where = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Accepted connections inherit these. No delay: one small answer is in a migration's pause. Keep-alive: a peer
        # whose machine died would hold its connection for ever.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise _explain(subject, error, "choose another --listen address, or 'none'") from error
    return listener


def split_address(address: str) -> tuple[str, int]:
    """("::1", 8690) for "[::1]:8690". InvalidInput for anything that is not host:port."""
    host, colon, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidInput(f"address {address!r}", "is not HOST:PORT", "write for example 0.0.0.0:8690")
    return host, int(port)


def _clear(subject: str, path: Path) -> None:
    """Remove a socket nobody listens on."""
    if not path.is_socket():
        if path.exists():
            raise InUse(subject, "is there and is not a socket", "remove it, or choose another --run-dir")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIME)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return
        except (BlockingIOError, TimeoutError):
            pass  # its queue is full: alive, if busy
    raise InUse(subject, "another daemon is listening there", "stop that one, or choose another --run-dir")


def _explain(subject: str, error: OSError, advice: str) -> HostlerError:
    if error.errno == errno.EADDRINUSE:
        return InUse(subject, "is in use by another program", f"stop that program ('ss -tlnp' shows it), or {advice}")
    if error.errno == errno.EADDRNOTAVAIL:
        return InvalidInput(subject, "is not an address of this machine", advice)
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(subject, "may not be used by this user", f"{advice}, or run as root")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(subject, "cannot be made: the disk is full", "free some space on it")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return HostLacks(subject, "there are too many open files", "raise the limit ('ulimit -n')")
    return InternalError(subject, f"cannot be opened: {error.strerror}", advice)
