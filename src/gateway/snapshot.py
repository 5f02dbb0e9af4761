"""Snapshot: the frozen view of everything that can be reloaded; one holder swaps it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.registry.registry import Registry
from gateway.routing.table import RouteTable
from gateway.security.keys import Keyring
from gateway.upstreams.table import UpstreamTable
from gateway.usage.meter import Meter


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a request sees from admission to its last byte; ``version`` grows by one with each swap.

    ``routes`` says what a model name means: `upstreams` with routing on top; ``meter`` what a call costs.
    """

    version: int
    registry: Registry
    upstreams: UpstreamTable
    keyring: Keyring
    routes: RouteTable
    meter: Meter = field(default_factory=Meter)
    derived: dict[Any, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Answers that follow from this snapshot alone, such as model lists: made once, gone with it."""


class SnapshotHolder:
    """Owns the current `Snapshot`. Swapping is atomic on the event loop: no reader needs a lock."""

    def __init__(self, first: Snapshot) -> None:
        self._current = first
        self._changed = asyncio.Event()

    @property
    def current(self) -> Snapshot:
        """The snapshot for a request that starts now."""
        return self._current

    def swap(self, **changes: Any) -> Snapshot:
        """Replace parts of the snapshot (``registry=…``, ``upstreams=…``, ``keyring=…``) and wake whoever waits."""
        self._current = replace(self._current, version=self._current.version + 1, **changes)
        self._changed.set()
        self._changed = asyncio.Event()
        return self._current

    async def wait_for_change(self) -> None:
        """Return at the next swap."""
        await self._changed.wait()
