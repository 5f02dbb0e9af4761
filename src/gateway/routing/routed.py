"""RoutedUpstream: what a model name means, in the shape of one upstream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Literal, NamedTuple

from gateway.errors import GatewayError
from gateway.events import Routed
from gateway.routing.call import Route, RoutedCall
from gateway.routing.targets import OnHead, TargetConfig

CHAT_PATH = "/chat/completions"


class StartedStream:
    """An answer whose first event is there; ``async with`` it, and read `first`, then `events`.

    ``events`` is the upstream's own generator: nothing stands between it and the reader. ``first`` is None where the
    answer ended without an event. Leaving the block closes the socket and tells routing how it went.
    """

    __slots__ = ("_call", "events", "first")

    def __init__(self, first: bytes | None, events: AsyncGenerator[bytes, None], call: RoutedCall) -> None:
        self.first, self.events = first, events
        self._call = call

    async def __aenter__(self) -> StartedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._call.succeeded()
        elif isinstance(error, GatewayError):
            self._call.failed(error)
        else:
            self._call.abandoned()
        await self.events.aclose()


class RoutedUpstream:
    """Sends each call to one of a route's targets; `call` is the latest one, for whoever reports the decision.

    ``config``, ``api`` and ``base_url`` are the first target's: every target of a route that agents use speaks the
    same API. Bodies carry the first target's model name; for another target it is replaced.
    """

    __slots__ = ("_route", "call")

    def __init__(self, route: Route) -> None:
        self._route = route
        self.call: RoutedCall | None = None

    @property
    def route(self) -> Route:
        """Where calls may go."""
        return self._route

    @property
    def decision(self) -> Routed | None:
        """Who serves the latest call, at which try; None before any."""
        call = self.call
        return Routed(call.candidate.target.name, call.attempts) if call is not None else None

    @property
    def name(self) -> str:
        """The upstream that serves the latest call; before any, the first target's."""
        return (self.call.candidate if self.call is not None else self._route.candidates[0]).target.name

    @property
    def served(self) -> tuple[str, str]:
        """Upstream and model that serve the latest call; before any, the first target's."""
        candidate = self.call.candidate if self.call is not None else self._route.candidates[0]
        return candidate.target.name, candidate.model

    @property
    def api(self) -> Literal["chat", "responses"]:
        """What agents speak to it."""
        return self._route.candidates[0].target.api

    @property
    def base_url(self) -> str:
        """The first target's address."""
        return self._route.candidates[0].target.base_url

    @property
    def config(self) -> TargetConfig:
        """The first target's configuration."""
        return self._route.candidates[0].target.config

    async def post(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> bytes:
        """Send one JSON request and return the JSON answer of whoever gave one."""
        self.call = call = RoutedCall(self._route)
        while True:
            call.begin()
            started = time.perf_counter()
            try:
                answer = await call.candidate.target.post(
                    path, call.body(body), request_id=request_id, headers=headers, on_head=on_head
                )
            except GatewayError as error:
                if not await call.goes_on(error):
                    raise
            except BaseException:
                call.abandoned()
                raise
            else:
                call.answered(time.perf_counter() - started)
                call.succeeded()
                return answer

    async def start(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> StartedStream:
        """Send one streamed request and return with the first event; whatever fails later is not tried again."""
        self.call = call = RoutedCall(self._route)
        while True:
            call.begin()
            started = time.perf_counter()
            events = call.candidate.target.stream(
                path, call.body(body), request_id=request_id, headers=headers, on_head=on_head
            )
            try:
                first = await anext(events, None)
            except GatewayError as error:
                if not await call.goes_on(error):
                    raise
            except BaseException:
                call.abandoned()
                raise
            else:
                call.answered(time.perf_counter() - started)
                return StartedStream(first, events, call)

    async def stream(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the payload of each event as it comes."""
        async with await self.start(path, body, request_id=request_id, headers=headers, on_head=on_head) as started:
            if started.first is not None:
                yield started.first
            async for data in started.events:
                yield data

    async def chat(
        self, body: bytes, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Return a finished chat completion."""
        return await self.post(CHAT_PATH, body, request_id=request_id, headers=headers)

    def chat_stream(
        self, body: bytes, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield chat completion chunks up to the finished end."""
        return self.stream(CHAT_PATH, body, request_id=request_id, headers=headers)

    async def relay(
        self, request: Any, *, request_id: str | None = None, on_head: OnHead | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Relay bytes, once: a body that is read while it is sent cannot be sent again, nor its model be replaced."""
        self.call = call = RoutedCall(self._route)
        if call.candidate.model != self._route.model:
            call.candidate = self._route.candidates[0]
        call.begin()
        events = call.candidate.target.relay(request, request_id=request_id, on_head=on_head)
        async with StartedStream(None, events, call) as started:
            async for piece in started.events:
                yield piece


class RoutedBinding(NamedTuple):
    """A model name of the gateway, bound to whoever serves it; made for one run, so it is made quickly."""

    upstream: RoutedUpstream
    model: str
