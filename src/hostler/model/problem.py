"""The one shape in which an error crosses a wire or is stored in a job."""

from __future__ import annotations

from pydantic import JsonValue

from hostler.model.base import Record
from hostler.model.errors import BY_CODE, ErrorCode, HostlerError


class Problem(Record):
    """An error as data. Turning it back with `to_error` gives the same class, so clients catch what the host raised."""

    code: ErrorCode
    object: str
    cause: str
    advice: str = ""
    details: dict[str, JsonValue] = {}

    @classmethod
    def of(cls, error: HostlerError) -> Problem:
        """The error as data."""
        return cls(
            code=error.code, object=error.object, cause=error.cause, advice=error.advice, details=dict(error.details)
        )

    def to_error(self) -> HostlerError:
        """The error this problem was made from."""
        error = BY_CODE[self.code](self.object, self.cause, self.advice)
        error.details.update(self.details)
        return error
