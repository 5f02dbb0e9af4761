"""`/`, `/health` and `/readyz`: what the process says of itself without a key, before any agent is loaded."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from api.dependencies import caller
from api.endpoint_stats import summarise
from api.routing import Request, Response
from api.shared import endpoint_times
from gateway import __version__
from gateway.errors import GatewayError

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway

_WORDS = {True: "healthy", False: "unhealthy", None: "unknown"}

_LINKS = {
    "chat": "/v1/chat/completions",
    "models": "/v1/models",
    "agents": "/agents",
    "metrics": "/metrics",
    "health": "/health",
    "readiness": "/readyz",
    "providers": "/api/v1/providers/status",
    "endpoints": "/api/health/endpoints",
    "docs": "/docs",
    "openapi": "/openapi.json",
}
_NOT_STORED = ((b"cache-control", b"no-store"),)


async def overview(request: Request) -> Response:
    """Say which service this is, its version, and where things are."""
    service = request.gateway.settings.project_name
    return _json({"status": "ok", "service": service, "version": __version__, "links": _LINKS})


async def health(request: Request) -> Response:
    """Answer 200 while the process serves at all; to a key with the scope `admin`, with the state of its parts."""
    body: dict[str, Any] = {"status": "ok", "service": request.gateway.settings.project_name}
    if _is_asked_by_admin(request):
        body["components"] = await _components(request.gateway)
    return _json(body)


async def ready(request: Request) -> Response:
    """Answer 503 until every agent that was there at start-up has been loaded or given up, and once the process ends.

    What else is down is shown, and changes nothing unless `GATEWAY_READY_NEEDS` names it: keys, prices and agents are
    served from memory, and a part that is down is down for every replica.
    """
    gateway = request.gateway
    loaded = gateway.loaded.is_set() and gateway.keys.tried.is_set()
    stopping = gateway.engine.ends_at is not None
    needs = await gateway.needs.look(gateway)
    lacking = any(
        word in ("down", "timeout") or (word == "unknown" and need != "store") for need, word in needs.items()
    )
    body = {
        "status": "stopping" if stopping else "starting" if not loaded else "waiting" if lacking else "ready",
        "service": gateway.settings.project_name,
        "components": {
            "agents": "ready" if loaded else "loading",
            "store": await gateway.store.check(),
            "upstreams": _together(gateway),
        },
        "needs": needs,
    }
    return _json(body, 200 if loaded and not stopping and not lacking else 503)


async def endpoints(request: Request) -> Response:
    """Answer how often and how fast each route has answered, in all workers."""
    return _json(summarise(await endpoint_times(request.gateway)))


def _together(gateway: Gateway) -> str:
    """Return how the upstreams are by the last word about each, without asking: ``ok`` where one of them is."""
    words = {upstream.status.healthy for upstream in gateway.holder.current.upstreams.upstreams.values()}
    return "ok" if True in words else "unknown" if None in words else "down"


def _is_asked_by_admin(request: Request) -> bool:
    if not request.headers.keys() & {"authorization", "x-api-key"}:
        return False
    shown = caller(request.scope, request.headers)
    try:
        return request.gateway.throttle.authenticate(request.gateway.holder.current.keyring, shown).is_admin
    except GatewayError:
        return False  # liveness is no secret, whatever key is shown


async def _components(gateway: Gateway) -> dict[str, Any]:
    upstreams = gateway.holder.current.upstreams.upstreams.values()
    states = Counter(_WORDS[upstream.status.healthy] for upstream in upstreams)
    agents = Counter(entry.status for entry in gateway.holder.current.registry.list_entries())
    return {
        "agents": dict(agents),
        "upstreams": dict(states),
        "store": await gateway.store.check(),
        "process": {
            "worker": gateway.workers.slot,
            "workers": gateway.workers.count,
            "cpu_s": round(time.process_time(), 2),
            "memory_bytes": _memory_bytes(),
            "live_runs": len(gateway.engine.deadlines.watched),
        },
    }


def _memory_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _json(value: object, status: int = 200) -> Response:
    retry = () if status == 200 else ((b"retry-after", b"1"),)
    return Response(msgspec.json.encode(value), status, headers=(*_NOT_STORED, *retry))
