"""What the blocking and the asyncio transport share: headers, reading errors, explaining failed connections, TLS.

The most important thing a failed call can tell is whether the host may have acted on it. `details.sent` of the error is
False only when the request certainly never left this machine.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import socket
import ssl
from collections.abc import Iterator
from typing import Any, TypeVar

import httpx2

from hostler import __version__
from hostler.client.calls import Call
from hostler.client.target import Target
from hostler.model.errors import (
    HostlerError,
    InternalError,
    InvalidInput,
    NotAuthenticated,
    NotPermitted,
    PeerUnreachable,
    TimedOut,
)

T = TypeVar("T")

DEADLINE = 30.0
"""Seconds a host may take for an answer, unless the caller says otherwise."""
CONNECT_DEADLINE = 5.0
"""Seconds to connect: a host that is there answers a connection at once."""
SENDING = "send_request_headers.started"
"""The trace event of httpcore after which bytes of the request may be on the wire."""
UNIX_BASE = "http://hostler"
_LONGEST_SHOWN = 300


def headers(target: Target) -> dict[str, str]:
    """The headers of every request."""
    found = {"user-agent": f"hostler/{__version__}", "accept": "application/json"}
    if target.token is not None and target.url is not None:
        found["authorization"] = f"Bearer {target.token}"
    return found


def request_headers(call: Call[Any]) -> dict[str, str]:
    """The headers of this request."""
    return {} if call.body is None else {"content-type": "application/json"}


def timeout(call: Call[Any], deadline: float) -> httpx2.Timeout:
    """The time limits of one request; what the host was asked to wait comes on top."""
    return httpx2.Timeout(deadline + call.wait, connect=min(CONNECT_DEADLINE, deadline), pool=deadline)


def check(status: int, content: bytes, what: str) -> bytes:
    """The content of a successful answer; otherwise the error the host raised, as the same class."""
    if status < 300:
        return content
    from hostler.model.problem import Problem  # noqa: PLC0415 - pydantic is imported only when something went wrong

    try:
        raise Problem.model_validate_json(content).to_error()
    except ValueError as error:
        shown = content[:_LONGEST_SHOWN].decode(errors="replace").strip()
        raise InternalError(
            what,
            f"answered {status} without saying why: {shown or 'nothing'}",
            "check that this is a Hostler host of the same version",
            status=status,
        ) from error


def parse(call: Call[T], content: bytes) -> T:
    """The answer as a value."""
    try:
        return call.answer.parse(content)
    except ValueError as error:
        raise InternalError(
            f"{call.method} {call.path}",
            "the answer is not what this client expects",
            "check that host and client are of the same version",
        ) from error


def explain(error: httpx2.HTTPError, target: Target, sent: bool, seconds: float) -> HostlerError:
    """A failed exchange as an error of ours."""
    where = f"host {target.text}"
    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout) or (
        not sent and isinstance(error, httpx2.TimeoutException)
    ):
        return PeerUnreachable(where, "no connection within the deadline", "check the network between", sent=False)
    if isinstance(error, httpx2.TimeoutException):
        return TimedOut(
            where,
            f"gave no answer within {seconds:g} s",
            "the outcome is unknown: look at the object and its jobs before trying again",
            sent=True,
        )
    if not sent:
        return no_connection(error, target)
    return PeerUnreachable(
        where,
        f"the connection broke before the answer: {error or type(error).__name__}",
        "the outcome is unknown: look at the object and its jobs before trying again",
        sent=True,
    )


def no_connection(error: BaseException, target: Target) -> HostlerError:
    """Why no connection came about, from the first cause that says something."""
    where = f"host {target.text}"
    for cause in _causes(error):
        if isinstance(cause, WrongCertificate):
            return NotAuthenticated(where, str(cause), "compare it with the one the host shows", sent=False)
        if isinstance(cause, ssl.SSLError):
            text = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or str(cause)
            advice = "pin its fingerprint in hosts.json, or name its ca_file there"
            return NotAuthenticated(where, f"its certificate is not trusted: {text}", advice, sent=False)
        if isinstance(cause, socket.gaierror):
            return PeerUnreachable(where, "its name is not known", "check the name", sent=False)
        if isinstance(cause, OSError) and cause.errno:
            return _refused(cause, target, where)
    return PeerUnreachable(where, f"no connection: {error}", "is hostlerd running there?", sent=False)


def _refused(cause: OSError, target: Target, where: str) -> HostlerError:
    if cause.errno in (errno.EACCES, errno.EPERM):
        advice = "run it as root, or as a user the daemon lets in"
        return NotPermitted(where, "this user may not open the socket", advice, sent=False)
    missing = cause.errno == errno.ENOENT and target.socket
    text = "there is no such socket" if missing else (cause.strerror or str(cause)).lower()
    advice = "is hostlerd running? start it with ./run up"
    return PeerUnreachable(where, f"no connection: {text}", advice, sent=False)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class WrongCertificate(ssl.SSLError):
    """The host showed another certificate than the pinned one."""


def tls_context(target: Target) -> ssl.SSLContext:
    """How to know an https host: by its pinned certificate, by the given authority, or by the system's."""
    if target.socket is not None:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; loading no authorities saves 20 ms
    if target.fingerprint is not None:
        return _pinned(target.fingerprint)
    try:
        context = ssl.create_default_context(cafile=target.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"CA file {target.ca_file}", f"cannot be used: {error}", "give a PEM file") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _pinned(fingerprint: str) -> ssl.SSLContext:
    """A context that accepts exactly one certificate, whoever signed it. It is compared at the end of the handshake,
    before a byte of the request, and so of the token, is sent."""

    def compare(certificate: bytes | None) -> None:
        found = hashlib.sha256(certificate or b"").hexdigest()
        if not hmac.compare_digest(found, fingerprint):
            raise WrongCertificate(f"its certificate has the fingerprint {found}, pinned is {fingerprint}")

    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            compare(self.getpeercert(binary_form=True))

    class PinnedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            compare(self.getpeercert(binary_form=True))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = PinnedSocket
    context.sslobject_class = PinnedObject
    return context
