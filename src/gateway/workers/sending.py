"""A worker's metrics on their way to the supervisor: in the background, and at once when somebody looks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import msgspec

from gateway.observability.totals import Changes
from gateway.workers.peer import CallFailed
from gateway.workers.workers import Workers

EVERY_S = 0.5
"""What a worker that is killed has counted since is lost."""


async def send_metrics(workers: Workers, changes: Changes, *, every_s: float = EVERY_S) -> None:
    """Send what changed, until cancelled or the supervisor is gone."""
    turn = asyncio.Lock()

    async def flush(_: Any = None) -> None:
        async with turn:
            for change in changes.take():
                await workers.tell_supervisor("metrics.changes", msgspec.to_builtins(change))

    workers.handle("metrics.flush", flush)
    with suppress(CallFailed):
        while True:
            await flush()
            await asyncio.sleep(every_s)
