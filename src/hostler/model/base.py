"""What every noun of the model shares: frozen, strict about people's input, tolerant about stored records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Self

from pydantic import BaseModel, ConfigDict, JsonValue


class Record(BaseModel):
    """A stored or transmitted value. Unknown fields are dropped, so that an older daemon reads a newer record."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def but(self, **changes: object) -> Self:
        """The same record with some fields changed. Changes are validated; TypeError for a field it has not."""
        unknown = changes.keys() - type(self).model_fields.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        return type(self).model_validate({**dict(self), **changes})

    def to_json(self) -> dict[str, JsonValue]:
        """JSON-ready dictionary of all fields."""
        dumped: dict[str, JsonValue] = self.model_dump(mode="json")
        return dumped


class Input(BaseModel):
    """What a person or program sends. Unknown fields are refused, so that a mistyped option is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def utc_now() -> datetime:
    """Wall-clock time for records people read; never used to measure or to order."""
    return datetime.now(UTC)
