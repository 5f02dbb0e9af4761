"""Run: one admitted request on its way through an executor, and the protocol every executor speaks."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from msgspec import Struct, field

from gateway.chat import ChatRequest, RelayRequest
from gateway.events import RunEvent
from gateway.principal import Principal


class Run(Struct, frozen=True):
    """What an executor is given: judged, frozen, complete.

    ``id`` is a UUID; every surface derives its own spelling from its hex digits (``chatcmpl-…``, ``run_…``).
    ``model`` is the canonical id. ``headers`` are the allow-listed request headers, lower-case. ``streamed`` says
    whether somebody wants deltas. ``deadline_s`` is the total time the run may take. ``upstream`` is the one that the
    caller chose for every model call, if any.
    """

    id: uuid.UUID
    request_id: str
    principal: Principal
    model: str
    request: ChatRequest | RelayRequest
    streamed: bool
    created: int
    deadline_s: float
    session_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    upstream: str | None = None


class Executor(Protocol):
    """Turns a run into one stream of events."""

    def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """Yield the run's events; raise `GatewayError` on failure; stop all work when closed or cancelled."""
        ...
