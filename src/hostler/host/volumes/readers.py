"""The users that programs reading images run as: one for each run, with access to just the files of that run."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import structlog

from hostler.model.errors import HostLacks, HostlerError
from hostler.qemu import access
from hostler.storage.guard import Admitted

log = structlog.get_logger()

BASE = access.UID_BASE + access.UID_SPAN
SPAN = 10_000
"""Behind the users of VMs. Many, so that one whose access was not taken back, since the daemon was killed, is not soon
used again."""


class Readers:
    """Gives each run of a program a user of its own. Needs root."""

    def __init__(self) -> None:
        self._numbers = itertools.count(secrets.randbelow(SPAN))

    @contextmanager
    def admit(self, files: Mapping[str, bool]) -> Iterator[Admitted | None]:
        """See `Guard`. The access ends with the block."""
        uid = BASE + next(self._numbers) % SPAN
        with ExitStack() as stack:
            names: dict[str, str] = {}
            fds: list[int] = []
            try:
                for path, write in files.items():
                    mode = os.O_RDWR if write else os.O_RDONLY
                    fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
                    stack.callback(os.close, fd)
                    name = f"/proc/self/fd/{fd}"
                    access.grant(name, uid, write)
                    stack.callback(_take_back, name, uid)
                    fds.append(fd)
                    names[path] = name
            except HostLacks as error:
                log.debug("readers.not-confined", why=str(error))
                yield None
                return
            yield Admitted(uid, tuple(fds), names)


def _take_back(name: str, uid: int) -> None:
    try:
        access.revoke(name, uid)
    except HostlerError as error:
        log.warning("readers.access-stays", file=os.path.realpath(name), uid=uid, why=str(error))
