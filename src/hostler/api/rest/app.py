"""Puts the REST API together."""

from __future__ import annotations

from fastapi import FastAPI

from hostler import __version__
from hostler.api.rest import errors
from hostler.api.rest.edge import Edge
from hostler.api.rest.guard import check_routes
from hostler.api.rest.routes import ROUTERS
from hostler.api.rest.services import Application
from hostler.api.rest.state import Rest
from hostler.identity.gate import Identity


def create_app(application: Application, identity: Identity) -> FastAPI:
    """The API over these functions. InternalError when a route is missing from the authorization table.

    FastAPI's own pages and its OpenAPI route are left out: they would be open to everybody.
    """
    app = bare_app()
    app.state.rest = Rest(application, identity)
    return app


def bare_app() -> FastAPI:
    """The routes without anything behind them: enough to describe them."""
    app = FastAPI(
        title="Hostler",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for router in ROUTERS:
        app.router.routes.extend(router.routes)
    check_routes(app.router.routes)
    errors.install(app)
    app.add_middleware(Edge)
    return app
