"""Run: one admitted request on its way through an executor, and the protocol every executor speaks."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from msgspec import Struct, field

from gateway.caller_context import NOTHING, CallerContext
from gateway.chat import ChatRequest, RelayRequest
from gateway.events import RelayedBody, RelayedHead, RelayEnded, Routed, RunEvent
from gateway.limits.reservation import Reservation
from gateway.principal import Principal
from gateway.routing.targets import Binding


class Run(Struct, frozen=True):
    """What an executor is given: judged, frozen, complete.

    ``id`` is a UUID; every surface derives its own spelling from its hex digits (``chatcmpl-…``, ``run_…``).
    ``model`` is the canonical id. ``headers`` are the allow-listed request headers, lower-case. ``streamed`` says
    whether somebody wants deltas. ``deadline_s`` is the total time the run may take. ``upstream`` is the one that the
    caller chose for every model call, if any. ``end_user`` is whom the caller asks for, by its own word.
    ``binding`` is what a raw model's name was bound to. ``reservation`` is what it holds of its caller's limits; the
    engine ends it. ``caller`` is what the caller sent along for the agents that act in its name.
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
    end_user: str | None = None
    reservation: Reservation | None = None
    binding: Binding | None = None
    caller: CallerContext = NOTHING


class Executor(Protocol):
    """Turns a run into one stream of events."""

    def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """Yield the run's events; raise `GatewayError` on failure; stop all work when closed or cancelled."""
        ...


class RelayedAnswer(Struct, frozen=True):
    """A whole relayed answer: what the three events of an unstreamed relay say."""

    routed: Routed | None
    head: RelayedHead
    body: RelayedBody


class Outlet(Protocol):
    """Where a stream goes that is written without events: the client of one run."""

    on_ready: Callable[[], None] | None
    """Is called when a client that took no more takes more."""

    def begin(self, routed: Routed | None, head: RelayedHead) -> None:
        """Note what is known before the first byte; comes before anything else, or never."""
        ...

    def push(self, chunks: list[bytes]) -> bool:
        """Send the payloads of events; return whether the client takes more now, else wait for ``on_ready``."""
        ...


class DirectExecutor(ABC):
    """An executor that also answers without events: the short way of relayed bytes, with the same outcome."""

    @abstractmethod
    def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        """See `Executor.execute`."""

    @abstractmethod
    async def answer(self, run: Run) -> RelayedAnswer:
        """Return the whole answer of an unstreamed run."""

    @abstractmethod
    async def pipe(self, run: Run, outlet: Outlet, began: Callable[[], None]) -> RelayEnded:
        """Write the stream to ``outlet`` as it comes, calling ``began`` before the first of it."""
