"""From errors to HTTP, in one place: a status for each code, one body shape, nothing of our insides."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from fastapi.responses import JSONResponse
from pydantic import JsonValue
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from hostler.model.errors import ErrorCode, HostlerError, InternalError, InvalidInput, NotFound
from hostler.model.problem import Problem

C = ErrorCode
STATUS: dict[ErrorCode, int] = {
    C.INVALID_INPUT: 400,
    C.NOT_FOUND: 404,
    C.ALREADY_EXISTS: 409,
    C.WRONG_STATE: 409,
    C.BUSY: 409,
    C.IN_USE: 409,
    C.LIMIT_EXCEEDED: 422,
    C.BLOCKED: 409,
    C.NOT_AUTHENTICATED: 401,
    C.NOT_PERMITTED: 403,
    C.HOST_LACKS: 501,
    C.NO_SPACE: 507,
    C.BAD_IMAGE: 422,
    C.GUEST_REFUSED: 409,
    C.QEMU_FAILED: 500,
    C.PEER_UNREACHABLE: 502,
    C.PEER_REFUSED: 502,
    C.CANCELLED: 409,
    C.TIMED_OUT: 504,
    C.INTERRUPTED: 503,
    C.INTERNAL: 500,
}

PROBLEM = "hostler.problem"
"""Key in the scope under which the audit trail finds why a request failed."""


INTERNAL = Problem.of(InternalError("request", "internal error", "look into the daemon's log, it has the details"))
"""A fault of ours: the log gets everything, the caller no more than that it happened."""


def install(app: FastAPI) -> None:
    """Make every error of `app` a Problem."""
    app.add_exception_handler(HostlerError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(WebSocketRequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)


def problem_response(problem: Problem, status: int | None = None, headers: dict[str, str] | None = None) -> Response:
    """A problem as an HTTP answer; `status` only where HTTP has a more exact one than the code's."""
    headers = dict(headers or {})
    if problem.code is C.NOT_AUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(problem.to_json(), status or STATUS[problem.code], headers)


def _answer(
    connection: HTTPConnection, problem: Problem, status: int | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Before a web socket is accepted too: Starlette sends it as the answer to the handshake then."""
    connection.scope[PROBLEM] = problem
    return problem_response(problem, status, headers)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HostlerError)
    return _answer(request, Problem.of(error))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError | WebSocketRequestValidationError)
    return _answer(request, Problem.of(_invalid(error.errors())))


def _invalid(errors: Any) -> InvalidInput:
    """Names the fields, never repeats the values: one of them may be a secret."""
    if errors[0]["type"] == "json_invalid":
        where = f"is not valid JSON (character {errors[0]['loc'][-1]})"
        return InvalidInput("body of the request", where, "send a JSON object")
    found: list[JsonValue] = [{"field": _field(e["loc"]), "cause": _sentence(e["msg"])} for e in errors[:20]]
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    advice = "send a JSON object, with 'content-type: application/json'" if len(first["loc"]) < 2 else ""
    return InvalidInput(_field(first["loc"]), _sentence(first["msg"]) + more, advice, errors=found)


def _field(location: Any) -> str:
    """("body", "disks", 0, "volume") -> "disks.0.volume"."""
    names = [str(part) for part in location[1:]]
    return ".".join(names) if names and location[0] != "path" else names[0] if names else "body of the request"


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ").rstrip(".")
    return message[:1].lower() + message[1:]


async def _on_http(request: Request, error: Exception) -> Response:
    """What the router or the body reader refuses."""
    assert isinstance(error, HTTPException)
    name = f"{request.scope.get('method', 'WEBSOCKET')} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        problem = Problem.of(NotFound(name, "is not an endpoint of this API", "see docs/openapi.json"))
    elif error.status_code == 405:
        problem = Problem.of(
            InvalidInput(name, "has another method", f"allowed: {headers.get('Allow', 'see the API')}")
        )
    else:
        problem = Problem.of(InvalidInput("body of the request", str(error.detail)))
    return _answer(request, problem, error.status_code, headers)
