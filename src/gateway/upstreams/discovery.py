"""Asks upstreams for their own model lists in the background, so that GET /v1/models never waits for one."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Iterable

from gateway.errors import GatewayError
from gateway.observability.logs import log_event
from gateway.upstreams.client import Upstream
from gateway.upstreams.table import OpenUpstreams, UpstreamTable

RETRY_S = 15.0
"""Seconds until an upstream that did not answer is asked again, where the interval is longer."""

_LOG = logging.getLogger(__name__)


class ModelDiscovery:
    """Keeps the lists of a table's upstreams fresh; an upstream that does not answer keeps its last one.

    ``publish`` is given a new table whenever a list has changed. `run` belongs to a background task.
    """

    def __init__(
        self, upstreams: OpenUpstreams, publish: Callable[[UpstreamTable], None], *, interval_s: float
    ) -> None:
        self._upstreams = upstreams
        self._publish = publish
        self._interval_s = interval_s
        self._due: weakref.WeakKeyDictionary[Upstream, float] = weakref.WeakKeyDictionary()
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look for upstreams that nobody has asked yet: the table has changed."""
        self._wake.set()

    async def refresh(self) -> None:
        """Ask every upstream that lists its models, now."""
        await self._ask_all(self._listing())

    async def run(self) -> None:
        """Ask when it is time to, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = loop.time()
            await self._ask_all(upstream for upstream in self._listing() if self._due.get(upstream, now) <= now)
            due = [self._due.get(upstream, loop.time()) for upstream in self._listing()]
            try:
                async with asyncio.timeout_at(min(due) if due else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _listing(self) -> list[Upstream]:
        return [upstream for upstream in self._upstreams.table.upstreams.values() if upstream.config.discover]

    async def _ask_all(self, upstreams: Iterable[Upstream]) -> None:
        await asyncio.gather(*(self._ask(upstream) for upstream in upstreams))

    async def _ask(self, upstream: Upstream) -> None:
        wait_s = min(RETRY_S, self._interval_s)
        try:
            models = await upstream.fetch_models()
        except GatewayError as error:
            if upstream.status.healthy is not False:
                log_event(
                    _LOG,
                    "upstream.models.failed",
                    level=logging.WARNING,
                    message=f"The models of the upstream '{upstream.name}' could not be listed: {error.message}",
                    upstream=upstream.name,
                    error=type(error).__name__,
                )
            upstream.status.failed(error.message)
        except Exception as error:  # noqa: BLE001 - a background loop outlives what nobody foresaw
            log_event(_LOG, "upstream.models.crashed", level=logging.ERROR, upstream=upstream.name, exc_info=error)
        else:
            wait_s = self._interval_s
            upstream.status.succeeded()
            table = self._upstreams.list_discovered(upstream, models)
            if table is not None:
                log_event(_LOG, "upstream.models.listed", upstream=upstream.name, models=len(models))
                self._publish(table)
        self._due[upstream] = asyncio.get_running_loop().time() + wait_s
