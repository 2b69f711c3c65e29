r"""The hand-over of a running VM between two hosts: every decision, pure. `outgoing` and `incoming` carry them out.

The source's store is the authority. The target's QEMU never runs by itself: it waits, stopped, with its disks closed.

    source                                              target
    ------                                              ------
    KEEPING: mine (generation g)                        PREPARED: QEMU waits for the stream
      | QEMU says "completed": the target has it all
      v
    record GIVEN: target's (generation g+1)  --accept-->  record ACCEPTED (generation g+1), then let it run
      |                                      <---------- answer "accepted"
      v
    QEMU ends, record gone                              record forgotten when the source says so

    the target says "refused" after GIVEN  ->  record TAKEN BACK: mine (generation g+2), let our own QEMU go on
    no answer after GIVEN                  ->  ask again, for ever: the target may be running it
    our daemon dies before GIVEN           ->  ours: let our own QEMU go on, tell the target to refuse
    our daemon dies after GIVEN            ->  go on asking
    our QEMU dies before GIVEN             ->  if the target has it all: GIVEN (it lives on there), else it is off

The target takes its "accepted" back (to "refused", recorded) only if its QEMU is found dead before it was told to run.

"accepted" is recorded on the target's disk before its guest may run, "given" on the source's before the target may
accept. A target that has refused (also because it does not know the VM) can never accept later, so "refused" is safe to
act on. `tests/unit/test_handover_model.py` explores every interleaving of crashes, losses and repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Owner(StrEnum):
    """What the source's record says."""

    KEEPING = "keeping"
    GIVEN = "given"


class Qemu(StrEnum):
    """The source's own QEMU."""

    LIVE = "live"
    """Running, or able to go on: a move that has not completed."""
    COMPLETE = "complete"
    """Stopped, everything sent and loaded by the target."""
    DEAD = "dead"


class Answer(StrEnum):
    """What the target says."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    LOADED = "loaded"
    """Prepared, and the whole state has arrived."""
    WAITING = "waiting"
    """Prepared, not everything has arrived."""
    SILENT = "silent"
    """No answer: unknown."""


class SourceAction(StrEnum):
    GIVE = "give"
    """Record the target as owner."""
    ASK = "ask"
    """Ask the target to accept, again if need be."""
    FINISH = "finish"
    """The target runs it: end our QEMU, forget the VM."""
    TAKE_BACK = "take-back"
    """Record ourselves as owner with a higher generation, then go on."""
    GO_ON = "go-on"
    """It is ours: let our QEMU run on, tell the target to refuse."""
    OFF = "off"
    """It is ours, and its only QEMU is dead."""


def source_recovers(owner: Owner, qemu: Qemu, answer: Answer) -> SourceAction:
    """What a source does that comes back in the middle of a move (its daemon was restarted, or its QEMU died)."""
    if owner is Owner.GIVEN:
        return source_asks(qemu, answer)
    if qemu is Qemu.DEAD:
        return SourceAction.GIVE if answer is Answer.LOADED else SourceAction.OFF
    return SourceAction.GO_ON


def source_asks(qemu: Qemu, answer: Answer) -> SourceAction:
    """What a source does that has given the VM away, by the target's answer to "accept"."""
    if answer is Answer.ACCEPTED:
        return SourceAction.FINISH
    if answer is Answer.REFUSED:
        return SourceAction.OFF if qemu is Qemu.DEAD else SourceAction.TAKE_BACK
    return SourceAction.ASK


@dataclass(frozen=True, slots=True)
class SourceWord:
    """What the source says of a move when the target asks."""

    known: bool
    """Whether it knows the move at all."""
    over: bool
    """Whether the move has ended there."""
    given: bool
    """Whether its record says the VM is the target's."""


def target_may_refuse(word: SourceWord | None, loaded: bool, silent_for: float, patience: float) -> bool:
    """Whether a target that was prepared may give up on its own. `word` None: the source does not answer; `silent_for`
    seconds since it was last heard. Refusing is always safe (the source takes the VM back), except that it throws away
    the only complete copy when the source's QEMU has died: so a loaded target waits for a word."""
    if word is None:
        return not loaded and silent_for >= patience
    if not word.known:
        return True
    return word.over and not word.given
