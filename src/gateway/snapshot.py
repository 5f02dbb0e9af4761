"""Snapshot: the frozen view of everything that can be reloaded; one holder swaps it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.caching.cache import CacheTable
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.registry.registry import Registry
from gateway.routing.call import Route
from gateway.routing.table import RouteTable
from gateway.security.acl import AccessList
from gateway.security.keys import Keyring
from gateway.tools.table import ToolTable
from gateway.upstreams.table import UpstreamTable
from gateway.usage.meter import Meter


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a request sees from admission to its last byte; ``version`` grows by one with each swap.

    ``routes`` says what a model name means: `upstreams` with routing on top; ``meter`` what a call costs; ``access``
    who reaches what.
    """

    version: int
    registry: Registry
    upstreams: UpstreamTable
    keyring: Keyring
    routes: RouteTable
    meter: Meter = field(default_factory=Meter)
    access: AccessList = field(default_factory=AccessList)
    tools: ToolTable = field(default_factory=ToolTable)
    cache: CacheTable | None = None
    """Which answers are kept, under the rules of this snapshot; None where no model has a cache."""
    metrics: Metrics = field(default_factory=Metrics, repr=False, compare=False)
    """Where what is decided by this snapshot is counted."""
    derived: dict[Any, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Answers that follow from this snapshot alone, such as model lists: made once, gone with it."""
    reached: dict[tuple[str, str], tuple[Principal, Route]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Where the raw models that callers have named lead them, by key and name; see `gateway.admission`."""


class SnapshotHolder:
    """Owns the current `Snapshot`. Swapping is atomic on the event loop: no reader needs a lock.

    ``on_swap`` is called after each swap.
    """

    def __init__(self, first: Snapshot, *, on_swap: Callable[[], None] | None = None) -> None:
        self._current = first
        self._on_swap = on_swap
        self._changed = asyncio.Event()

    def model_label(self, model: str) -> str | None:
        """Return what a run's model is counted under in metrics, or None for one that is gone."""
        current = self._current
        return model if current.registry.find(model) is not None else current.routes.label_of(model)

    @property
    def current(self) -> Snapshot:
        """The snapshot for a request that starts now."""
        return self._current

    def swap(self, **changes: Any) -> Snapshot:
        """Replace parts of the snapshot (``registry=…``, ``upstreams=…``, ``keyring=…``) and wake whoever waits."""
        self._current = replace(self._current, version=self._current.version + 1, **changes)
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_swap is not None:
            self._on_swap()
        return self._current

    async def wait_for_change(self) -> None:
        """Return at the next swap."""
        await self._changed.wait()
