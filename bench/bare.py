"""Bare QEMU as a contender: the command line that Hostler built, run by hand over QMP."""

from __future__ import annotations

import re
from pathlib import Path

from hostler.model.errors import InternalError


def by_hand(hostler_line: list[str], run_dir: Path, place: Path, incoming: bool = False) -> list[str]:
    """Hostler's command line with the sockets in `place`, an ordinary QMP socket, and a guest that starts by itself."""
    line: list[str] = []
    words = iter(hostler_line)
    for word in words:
        if word == "-S":
            continue
        if word == "-incoming":
            next(words)
            continue
        line.append(_qmp_socket(word.replace(str(run_dir), str(place)), place))
    return [*line, *(("-incoming", "defer") if incoming else ())]


def _qmp_socket(word: str, place: Path) -> str:
    """Hostler hands QEMU a listening socket; by hand QEMU makes its own."""
    if re.match(r"socket,.*\bfd=", word):
        id = re.search(r"\bid=([^,]+)", word)
        return f"socket,id={id.group(1) if id else 'qmp'},path={place}/qmp.sock,server=on,wait=off"
    return word


def scsi_bus(line: list[str]) -> str:
    """The bus of the first virtio-scsi controller of a command line."""
    for word in line:
        if "virtio-scsi-pci" in word:
            found = re.search(r'"id":"([^"]+)"|\bid=([^,]+)', word)
            if found:
                return f"{found.group(1) or found.group(2)}.0"
    raise InternalError("command line", "has no virtio-scsi controller")
