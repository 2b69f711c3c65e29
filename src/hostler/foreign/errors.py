"""What is wrong with a description, as errors."""

from __future__ import annotations

from hostler.model.errors import InvalidInput


def bad_description(path: str, cause: str, advice: str = "") -> InvalidInput:
    """A description that cannot be read."""
    return InvalidInput(f"description {path}", cause, advice or "export the VM again, or import its disks alone")
