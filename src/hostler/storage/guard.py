"""Programs that read untrusted images run as nobody in particular: a user of their own who may open just those images.

The files are opened here and handed over as descriptors; the program opens them by /proc/self/fd/N, so that it needs no
right on the directories above, and a name that is exchanged meanwhile changes nothing. Who gives the user access to the
file behind a descriptor is the host's matter (`Guard`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Admitted:
    """Who a program runs as, which descriptors it inherits, and under which names it finds its files."""

    uid: int
    fds: tuple[int, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def rewritten(self, argv: Sequence[str]) -> list[str]:
        """The command with those names in place of the paths: alone, inside JSON, or at the end of an option."""
        return [self._argument(word) for word in argv]

    def restored(self, text: str) -> str:
        """What the program said to people, with the paths as they know them."""
        for path, name in self.names.items():
            text = text.replace(name, path)
        return text

    def _argument(self, word: str) -> str:
        for path, name in self.names.items():
            if word == path:
                return name
            word = word.replace(json.dumps(path, ensure_ascii=False), json.dumps(name))
            option = f"filename={path.replace(',', ',,')}"
            if word.endswith(option):
                return word.removesuffix(option) + f"filename={name}"
        return word


class Guard(Protocol):
    def admit(self, files: Mapping[str, bool]) -> AbstractContextManager[Admitted | None]:
        """Let a fresh user open these files (True: also write them) while the block runs. None where that cannot be
        had (a file system without access control lists): then the program runs as we do. OSError."""
