"""The composition root: opens everything in order, hands it down by constructor, closes it in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from gateway.config import Settings
from gateway.observability.logs import configure_logging, log_event
from gateway.observability.metrics import Metrics
from gateway.registry.catalogue import AgentCatalogue
from gateway.registry.registry import Registry
from gateway.reloading import Reloader
from gateway.runs.engine import RunEngine
from gateway.security.keys import Keyring
from gateway.snapshot import Snapshot, SnapshotHolder

_log = logging.getLogger("api.bootstrap")


@dataclass(slots=True)
class Gateway:
    """Everything a handler may reach; one per process, alive between start-up and shutdown.

    ``loaded`` is set once every drop-in present at start-up has been loaded or given up.
    """

    settings: Settings
    holder: SnapshotHolder
    metrics: Metrics
    engine: RunEngine
    catalogue: AgentCatalogue
    reloader: Reloader
    loaded: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_agents(self) -> None:
        """Return when the registry changed or the first load is complete, whichever comes first."""
        waits = [asyncio.ensure_future(self.holder.wait_for_change()), asyncio.ensure_future(self.loaded.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
