"""The API's description: `python -m hostler.api.rest.openapi > docs/openapi.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from hostler.api.rest.app import bare_app
from hostler.api.rest.guard import endpoints
from hostler.identity.authorize import TABLE

PROBLEM = {"$ref": "#/components/schemas/Problem"}

DESCRIPTION = """\
The API of a Hostler host, over a unix socket (the caller is known by its user id) and over HTTPS (by a token, or by a
host's certificate). Every failure has the body `Problem`. `x-hostler-permission` tells what an endpoint asks for.
"""


def document() -> dict[str, Any]:
    """The OpenAPI document, with what a caller needs for each endpoint. Web sockets, which OpenAPI does not know,
    stand under `x-hostler-websockets`."""
    app = bare_app()
    app.description = DESCRIPTION
    found = app.openapi()
    found["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer"},
        "certificate": {"type": "mutualTLS"},
    }
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            rule = TABLE[f"{method.upper()} {path}"]
            _unmix(operation["responses"])
            # FastAPI gives every answer of a route its media type; a failure is JSON also where success is a picture.
            operation["responses"]["default"]["content"] = {"application/json": {"schema": PROBLEM}}
            operation["x-hostler-permission"] = str(rule)
            operation["security"] = [{"certificate": []}] if path.startswith("/peer/") else [{"token": []}]
    sockets = [e.split(" ", 1)[1] for e in endpoints(app.routes) if e.startswith("WEBSOCKET ")]
    found["x-hostler-websockets"] = {path: str(TABLE[f"WEBSOCKET {path}"]) for path in sockets}
    return found


def _unmix(responses: dict[str, Any]) -> None:
    """FastAPI calls everything that is not JSON a string, also where a model describes it."""
    for response in responses.values():
        for media in response.get("content", {}).values():
            if "$ref" in media.get("schema", {}):
                media["schema"] = {"$ref": media["schema"]["$ref"]}


def text() -> str:
    """The document as it is committed."""
    return json.dumps(document(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
