"""`/`, `/health` and `/readyz`: what the process says of itself without a key, before any agent is loaded."""

from __future__ import annotations

import msgspec

from api.routing import Request, Response
from gateway import __version__

_LINKS = {
    "chat": "/v1/chat/completions",
    "models": "/v1/models",
    "agents": "/agents",
    "metrics": "/metrics",
    "health": "/health",
    "readiness": "/readyz",
    "docs": "/docs",
    "openapi": "/openapi.json",
}
_NOT_STORED = ((b"cache-control", b"no-store"),)


async def overview(request: Request) -> Response:
    """Say which service this is, its version, and where things are."""
    service = request.gateway.settings.project_name
    return _json({"status": "ok", "service": service, "version": __version__, "links": _LINKS})


async def health(request: Request) -> Response:
    """Answer 200 while the process serves at all."""
    return _json({"status": "ok", "service": request.gateway.settings.project_name})


async def ready(request: Request) -> Response:
    """Answer 503 until every agent that was there at start-up has been loaded or given up."""
    loaded = request.gateway.loaded.is_set()
    body = {
        "status": "ready" if loaded else "starting",
        "service": request.gateway.settings.project_name,
        "components": {"agents": "ready" if loaded else "loading"},
    }
    return _json(body, 200 if loaded else 503)


def _json(value: object, status: int = 200) -> Response:
    retry = () if status == 200 else ((b"retry-after", b"1"),)
    return Response(msgspec.json.encode(value), status, headers=(*_NOT_STORED, *retry))
