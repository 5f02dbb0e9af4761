"""Hub: the supervisor's side of the channels: it passes calls to every worker, and keeps the sum of their metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from gateway.observability.metrics import Metrics
from gateway.observability.totals import Change, Sum
from gateway.workers.peer import CallFailed, Peer
from gateway.workers.workers import WorkerReply

_FLUSH_S = 0.25
"""Seconds that a worker has to send its latest numbers for a scrape; one that is busy is shown as it was."""


class Hub:
    """Knows the channel of every worker that serves; nobody but the supervisor renders metrics.

    Workers send what they count as it grows, so that the end of one loses at most the last moment of it.
    """

    def __init__(self) -> None:
        self._sum = Sum()
        self._serving: dict[int, tuple[int, Peer]] = {}
        self._kept: dict[str, Any] = {}
        self._distrusting: set[int] = set()

    def prepare(self, peer: Peer) -> None:
        """Answer what a worker says and asks."""

        async def take_changes(value: Any) -> None:
            self._sum.add(peer, msgspec.convert(value, Change))

        async def keep(value: Any) -> None:
            self._kept |= value

        async def kept(slot: Any) -> Any:
            return {} if slot in self._distrusting else self._kept

        peer.handle("config.keep", keep)
        peer.handle("config.kept", kept)
        peer.handle("metrics.changes", take_changes)
        peer.handle("metrics.render", self._render)
        peer.handle("metrics.summary", self._summary)
        peer.handle("everywhere", self._everywhere)

    @property
    def serving(self) -> int:
        """How many workers serve."""
        return len(self._serving)

    @property
    def metrics(self) -> Metrics:
        """The sum of all, and what the supervisor counts itself."""
        return self._sum.metrics

    def refused(self, slot: int) -> None:
        """Note that a worker could not start: the next one in its place begins with the other configuration.

        That is the disk's where this one had what the others serve, and the other way round.
        """
        self._distrusting ^= {slot}

    def attach(self, slot: int, pid: int, peer: Peer) -> None:
        """Note that a worker serves: from now on it is asked what all are asked."""
        self._serving[slot] = (pid, peer)
        self._distrusting.discard(slot)

    def detach(self, slot: int, peer: Peer) -> None:
        """Forget a worker that is gone."""
        if slot in self._serving and self._serving[slot][1] is peer:
            del self._serving[slot]
        self._sum.end(peer)

    async def everywhere(self, name: str, value: Any = None, *, timeout_s: float) -> list[WorkerReply]:
        """Have every worker do something at the same time; one reply of each, by slot."""

        async def ask(slot: int, pid: int, peer: Peer) -> WorkerReply:
            try:
                return WorkerReply(slot, pid, await peer.call(name, value, timeout_s=timeout_s))
            except CallFailed as error:
                return WorkerReply(slot, pid, error=str(error), failure=error.failure)

        return list(await asyncio.gather(*(ask(slot, *worker) for slot, worker in sorted(self._serving.items()))))

    async def _everywhere(self, value: Any) -> list[Any]:
        name, inner, timeout_s = value
        return [msgspec.to_builtins(reply) for reply in await self.everywhere(name, inner, timeout_s=timeout_s)]

    async def _render(self, openmetrics: bool) -> bytes:
        await self.everywhere("metrics.flush", timeout_s=_FLUSH_S)
        return b"".join([piece async for piece in self._sum.metrics.render(openmetrics=openmetrics)])

    async def _summary(self, _: Any) -> dict[str, Any]:
        await self.everywhere("metrics.flush", timeout_s=_FLUSH_S)
        return self._sum.summary()
