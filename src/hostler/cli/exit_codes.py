"""What the exit code of `hostler` says. The numbers are part of the interface: scripts rely on them, so append only."""

from __future__ import annotations

from enum import IntEnum

from hostler.model.errors import ErrorCode


class Exit(IntEnum):
    """Exit codes. 130 and 141 are what a shell reports for SIGINT (128 + 2) and SIGPIPE (128 + 13)."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    NOT_PERMITTED = 5
    UNREACHABLE = 6
    UNKNOWN = 7
    CANCELLED = 8
    INTERRUPTED = 130
    PIPE = 141


MEANING: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILURE: "it was tried and failed",
    Exit.USAGE: "the command line or a value in it is wrong; nothing was tried",
    Exit.NOT_FOUND: "the object named does not exist",
    Exit.REFUSED: "refused because of the state things are in: wrong state, in use, blocked, above a limit",
    Exit.NOT_PERMITTED: "the caller, or the host that was called, is not known or not allowed to",
    Exit.UNREACHABLE: "the host did not answer",
    Exit.UNKNOWN: "no answer in time: whether it was done is unknown, look before trying again",
    Exit.CANCELLED: "the job was cancelled, or interrupted by a restart of the daemon, and undone",
    Exit.INTERRUPTED: "Ctrl-C while waiting; the job runs on",
    Exit.PIPE: "the reader of the output went away",
}

BY_ERROR: dict[ErrorCode, Exit] = {
    ErrorCode.INVALID_INPUT: Exit.USAGE,
    ErrorCode.NOT_FOUND: Exit.NOT_FOUND,
    ErrorCode.ALREADY_EXISTS: Exit.REFUSED,
    ErrorCode.WRONG_STATE: Exit.REFUSED,
    ErrorCode.BUSY: Exit.REFUSED,
    ErrorCode.IN_USE: Exit.REFUSED,
    ErrorCode.LIMIT_EXCEEDED: Exit.REFUSED,
    ErrorCode.BLOCKED: Exit.REFUSED,
    ErrorCode.NOT_AUTHENTICATED: Exit.NOT_PERMITTED,
    ErrorCode.NOT_PERMITTED: Exit.NOT_PERMITTED,
    ErrorCode.HOST_LACKS: Exit.FAILURE,
    ErrorCode.NO_SPACE: Exit.FAILURE,
    ErrorCode.BAD_IMAGE: Exit.FAILURE,
    ErrorCode.GUEST_REFUSED: Exit.REFUSED,
    ErrorCode.QEMU_FAILED: Exit.FAILURE,
    ErrorCode.PEER_UNREACHABLE: Exit.UNREACHABLE,
    ErrorCode.PEER_REFUSED: Exit.REFUSED,
    ErrorCode.CANCELLED: Exit.CANCELLED,
    ErrorCode.TIMED_OUT: Exit.UNKNOWN,
    ErrorCode.INTERRUPTED: Exit.CANCELLED,
    ErrorCode.INTERNAL: Exit.FAILURE,
}

EXPLAINED: dict[ErrorCode, str] = {
    ErrorCode.INVALID_INPUT: "a value is malformed; nothing was tried",
    ErrorCode.NOT_FOUND: "there is no such object",
    ErrorCode.ALREADY_EXISTS: "the name is taken",
    ErrorCode.WRONG_STATE: "the object is in a state in which this makes no sense",
    ErrorCode.BUSY: "another operation holds the object; the detail `job` names it",
    ErrorCode.IN_USE: "something else holds it; the detail `holder` names it",
    ErrorCode.LIMIT_EXCEEDED: "above a limit; details: `limit`, `value`, `maximum`, `profile`",
    ErrorCode.BLOCKED: "a check found blockers; the detail `blockers` lists every one",
    ErrorCode.NOT_AUTHENTICATED: "who calls, or who answers, is not known",
    ErrorCode.NOT_PERMITTED: "the role of the caller does not allow it",
    ErrorCode.HOST_LACKS: "the host lacks a program, device, right or capability",
    ErrorCode.NO_SPACE: "not enough disk space",
    ErrorCode.BAD_IMAGE: "the disk image is damaged, of another format, or refers to files it must not refer to",
    ErrorCode.GUEST_REFUSED: "the guest did not do what it was asked within the time allowed",
    ErrorCode.QEMU_FAILED: "QEMU refused or died; the detail `output` holds its last words",
    ErrorCode.PEER_UNREACHABLE: "the host does not answer; the detail `sent` tells whether it may have got the request",
    ErrorCode.PEER_REFUSED: "another host refused",
    ErrorCode.CANCELLED: "somebody cancelled it",
    ErrorCode.TIMED_OUT: "no answer within the deadline; the outcome is unknown",
    ErrorCode.INTERRUPTED: "the daemon stopped in the middle; it was undone at the next start",
    ErrorCode.INTERNAL: "a defect of Hostler",
}


def exit_code(code: ErrorCode) -> Exit:
    """The exit code for an error."""
    return BY_ERROR[code]
