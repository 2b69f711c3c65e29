"""The one error hierarchy of Hostler.

Errors know no transport: the REST edge turns `code` into an HTTP status, the CLI into an exit code. Every error carries
the object it is about, the cause as a sentence, and what to do next. Codes are part of the public API: append only.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # pydantic takes 30 ms to import; the command line must answer without it
    from pydantic import JsonValue


class ErrorCode(StrEnum):
    """Closed, append-only list of what can go wrong, as callers see it."""

    INVALID_INPUT = "invalid-input"
    """A value given by a person or program is malformed; nothing was tried."""
    NOT_FOUND = "not-found"
    ALREADY_EXISTS = "already-exists"
    WRONG_STATE = "wrong-state"
    """The object is in a state in which this request makes no sense (e.g. pause a VM that is off)."""
    BUSY = "busy"
    """Another operation holds the object; the `job` detail names it."""
    IN_USE = "in-use"
    """A volume, device, port or name is held by something else; `holder` detail names it."""
    LIMIT_EXCEEDED = "limit-exceeded"
    """Details: limit, value, maximum, profile."""
    BLOCKED = "blocked"
    """A check found blockers; details.blockers lists every one."""
    NOT_AUTHENTICATED = "not-authenticated"
    NOT_PERMITTED = "not-permitted"
    HOST_LACKS = "host-lacks"
    """This host lacks a program, device, right or capability that the request needs."""
    NO_SPACE = "no-space"
    BAD_IMAGE = "bad-image"
    """A disk image is corrupt, of another format than said, or refers to files it must not refer to."""
    GUEST_REFUSED = "guest-refused"
    """The guest did not do what it was asked (unplug, shut down) within the time allowed."""
    QEMU_FAILED = "qemu-failed"
    """QEMU refused a command or died; details.output holds its last words."""
    PEER_UNREACHABLE = "peer-unreachable"
    PEER_REFUSED = "peer-refused"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed-out"
    """No answer within the deadline: the outcome is unknown and is resolved by reading back."""
    INTERRUPTED = "interrupted"
    """The daemon stopped in the middle; the operation was unwound at the next start."""
    INTERNAL = "internal"


class HostlerError(Exception):
    """Base of every refusal and failure.

    `object` names what it is about ("vm web1", "volume /srv/a.vhd"); `cause` says why, in a sentence without a final
    full stop; `advice` says what to do next. `details` are facts for programs (JSON values only, never secrets).
    """

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(self, object: str, cause: str, advice: str = "", **details: JsonValue) -> None:
        self.object = object
        self.cause = cause
        self.advice = advice
        self.details: dict[str, JsonValue] = details
        super().__init__(f"{object}: {cause}")


class InvalidInput(HostlerError):
    code = ErrorCode.INVALID_INPUT


class NotFound(HostlerError):
    code = ErrorCode.NOT_FOUND


class AlreadyExists(HostlerError):
    code = ErrorCode.ALREADY_EXISTS


class WrongState(HostlerError):
    code = ErrorCode.WRONG_STATE


class Busy(HostlerError):
    code = ErrorCode.BUSY


class InUse(HostlerError):
    code = ErrorCode.IN_USE


class LimitExceeded(HostlerError):
    code = ErrorCode.LIMIT_EXCEEDED


class Blocked(HostlerError):
    code = ErrorCode.BLOCKED


class NotAuthenticated(HostlerError):
    code = ErrorCode.NOT_AUTHENTICATED


class NotPermitted(HostlerError):
    code = ErrorCode.NOT_PERMITTED


class HostLacks(HostlerError):
    code = ErrorCode.HOST_LACKS


class NoSpace(HostlerError):
    code = ErrorCode.NO_SPACE


class BadImage(HostlerError):
    code = ErrorCode.BAD_IMAGE


class GuestRefused(HostlerError):
    code = ErrorCode.GUEST_REFUSED


class QemuFailed(HostlerError):
    code = ErrorCode.QEMU_FAILED


class PeerUnreachable(HostlerError):
    code = ErrorCode.PEER_UNREACHABLE


class PeerRefused(HostlerError):
    code = ErrorCode.PEER_REFUSED


class Cancelled(HostlerError):
    code = ErrorCode.CANCELLED


class TimedOut(HostlerError):
    code = ErrorCode.TIMED_OUT


class Interrupted(HostlerError):
    code = ErrorCode.INTERRUPTED


class InternalError(HostlerError):
    code = ErrorCode.INTERNAL


BY_CODE: dict[ErrorCode, type[HostlerError]] = {
    cls.code: cls
    for cls in (
        InvalidInput,
        NotFound,
        AlreadyExists,
        WrongState,
        Busy,
        InUse,
        LimitExceeded,
        Blocked,
        NotAuthenticated,
        NotPermitted,
        HostLacks,
        NoSpace,
        BadImage,
        GuestRefused,
        QemuFailed,
        PeerUnreachable,
        PeerRefused,
        Cancelled,
        TimedOut,
        Interrupted,
        InternalError,
    )
}
