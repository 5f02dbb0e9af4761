"""GET /upstreams and POST /upstreams/refresh: the servers with models as their operator sees them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from starlette.requests import Request

from gateway.errors import ConfigError, InvalidRequest
from gateway.upstreams.client import Upstream

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway


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


async def list_upstreams(request: Request) -> list[UpstreamRecord]:
    """List every upstream in order of priority."""
    return _records(cast("Gateway", request.state.gateway))


async def refresh_upstreams(request: Request) -> list[UpstreamRecord]:
    """Read `upstreams.yaml` again, probe every upstream, fetch their model lists, and list them."""
    gateway = cast("Gateway", request.state.gateway)
    try:
        await gateway.refresh_upstreams()
    except ConfigError as error:
        raise InvalidRequest(f"Nothing was changed. {error.message}", code="configuration_error") from error
    return _records(gateway)


def _records(gateway: Gateway) -> list[UpstreamRecord]:
    return [_record(upstream) for upstream in gateway.holder.current.upstreams.upstreams.values()]


def _record(upstream: Upstream) -> UpstreamRecord:
    config, status = upstream.config, upstream.status
    moment = status.last_checked
    return UpstreamRecord(
        name=upstream.name,
        provider=config.provider,
        base_url=urlsplit(upstream.base_url)._replace(query="", fragment="").geturl() or None,
        priority=config.priority,
        healthy=status.healthy,
        health_path=config.health_path,
        health_timeout=config.health_timeout_s,
        last_checked=datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if moment is not None
        else None,
        last_error=status.last_error,
    )
