"""Background health: asks every upstream, with its key, whether it is well, so that routing prefers those that are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gateway.observability.logs import log_event
from gateway.routing.table import RouteTable
from gateway.routing.targets import Server

_LOG = logging.getLogger(__name__)


async def watch_health(routes: Callable[[], RouteTable]) -> None:
    """Check until cancelled; where there is one upstream only, there is nothing to prefer and nothing is asked."""
    while True:
        await asyncio.sleep(routes().health_interval_s)
        servers = list(routes().servers.upstreams.values())
        if len(servers) > 1:
            await asyncio.gather(*map(_check, servers))


async def _check(server: Server) -> None:
    before = server.status.healthy
    await server.check()
    now = server.status.healthy
    if now is not before and (before is not None or now is False):
        level = logging.INFO if now else logging.WARNING
        log_event(_LOG, "routing.health.changed", level=level, upstream=server.name, healthy=now)
