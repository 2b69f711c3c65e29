"""The process that flattens a chain: `python -m hostler.storage.chains.flatten_process PART FORMAT SIZE IMAGE DIR...`.

A process of its own, so that a hostile image can neither take the daemon's memory nor its time, and so that cancelling
is killing. It writes PART and the journal beside it, goes on where an earlier one was killed, and prints lines of JSON:
{"done": BYTES, "size": BYTES} on the way, {"error": {...}} when it gives up. PART is on disk when it ends with 0.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID, uuid4

from hostler.model.errors import HostlerError, NoSpace, NotPermitted
from hostler.storage.chains.chain import Chain, open_chain
from hostler.storage.chains.copying import Changed, Copier
from hostler.storage.chains.journal import Journal, identities, read_journal
from hostler.storage.chains.layouts import layout
from hostler.storage.image_locks import lock_for_reading


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: done. 1: gave up, and said why."""
    part, format, size, image, *search = arguments
    try:
        with open_chain(image, search) as chain:
            chain.require_sound()
            for layer in chain.layers:
                lock_for_reading(layer.file.fd, layer.file.path)
            flatten(chain, part, format, int(size))
    except HostlerError as error:
        problem = {"code": error.code, "object": error.object, "cause": error.cause, "advice": error.advice}
        print(json.dumps({"error": problem}), flush=True)
        return 1
    return 0


def flatten(chain: Chain, part: str, format: str, size: int) -> None:
    """Copy a sound chain into the file `part`, which may hold the beginning of it already, as a disk of `size` bytes
    (at least the chain's). HostlerError."""
    try:
        target = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _meaning(part, error) from error
    try:
        fresh = Journal(format, max(size, chain.size), str(uuid4()), identities(chain.layers))
        known = read_journal(part)
        journal = known if known is not None and known.continues(fresh) else fresh
        try:
            _copy(chain, target, part, journal)
        except Changed:
            _copy(chain, target, part, replace(journal, done=0, units=0))
        os.fsync(target)
    except OSError as error:
        raise _meaning(part, error) from error
    finally:
        os.close(target)


def _copy(chain: Chain, target: int, part: str, journal: Journal) -> None:
    if not journal.done:
        os.ftruncate(target, 0)
        journal.write(part)

    def tell(done: int) -> None:
        print(json.dumps({"done": done, "size": journal.size}), flush=True)

    new = layout(journal.format, journal.size, UUID(journal.id))
    Copier(chain.layers, target, part, journal, tell).run(new)


def _meaning(part: str, error: OSError) -> HostlerError:
    directory = os.path.dirname(part)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"directory {directory}", "its disk is full", "free some space, or choose another place")
    if error.errno == errno.EFBIG:
        return NoSpace(
            f"directory {directory}", "its file system does not hold a file of that size", "use another file system"
        )
    return NotPermitted(f"directory {directory}", f"cannot be written to: {error.strerror}", "check its owner and mode")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
