"""GET /upstreams and POST /upstreams/refresh: the servers with models as their operator sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from api import states
from api.admin.moments import iso
from api.admin.refreshing import refresh
from gateway.upstreams.client import Upstream
from gateway.upstreams.status import UpstreamStatus

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway


class WorkerRecord(BaseModel):
    """What one worker knows of an upstream's health."""

    slot: int
    pid: int
    healthy: bool | None
    last_checked: str | None
    last_error: str | None
    error: str | None = Field(description="Why the worker told nothing.")


class UpstreamRecord(BaseModel):
    """One upstream and the last word about its health."""

    name: str
    provider: str
    base_url: str | None = Field(description="Without a query; null for the upstream inside the gateway.")
    priority: int
    healthy: bool | None = Field(description="Null until somebody has asked.")
    health_path: str
    health_timeout: float = Field(description="Seconds.")
    last_checked: str | None = Field(description="UTC, ISO 8601.")
    last_error: str | None
    workers: list[WorkerRecord] = Field(
        description="What each worker saw itself; empty where there is one. The fields above are the last word of any."
    )


async def list_upstreams(request: Request) -> list[UpstreamRecord]:
    """List every upstream in order of priority."""
    return await _records(cast("Gateway", request.state.gateway))


async def refresh_upstreams(request: Request, response: Response) -> list[UpstreamRecord]:
    """Read `upstreams.yaml` again in every worker, probe every upstream, fetch their model lists, and list them."""
    gateway = cast("Gateway", request.state.gateway)
    await refresh(gateway, "upstreams", response)
    return await _records(gateway)


async def _records(gateway: Gateway) -> list[UpstreamRecord]:
    upstreams = gateway.holder.current.upstreams.upstreams
    known = await states.upstream_health(gateway)
    return [_record(upstream, *known.get(name, (upstream.status, ()))) for name, upstream in upstreams.items()]


def _record(upstream: Upstream, status: UpstreamStatus, workers: Iterable[states.UpstreamHere]) -> UpstreamRecord:
    config = upstream.config
    return UpstreamRecord(
        name=upstream.name,
        provider=config.provider,
        base_url=urlsplit(upstream.base_url)._replace(query="", fragment="").geturl() or None,
        priority=config.priority,
        healthy=status.healthy,
        health_path=config.health_path,
        health_timeout=config.health_timeout_s,
        last_checked=_moment(status.last_checked),
        last_error=status.last_error,
        workers=[
            WorkerRecord(
                slot=here.slot,
                pid=here.pid,
                healthy=here.healthy,
                last_checked=_moment(here.last_checked),
                last_error=here.last_error,
                error=here.error,
            )
            for here in workers
        ],
    )


def _moment(moment: float | None) -> str | None:
    return iso(moment) if moment is not None else None
