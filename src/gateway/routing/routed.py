"""RoutedUpstream: what a model name means, in the shape of one upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from gateway.chat import CHAT_PATH
from gateway.errors import GatewayError
from gateway.events import Routed
from gateway.routing.call import NOTHING_SENT, Route, RoutedCall
from gateway.routing.hedging import ask_hedged, may_hedge
from gateway.routing.strategies import Candidate
from gateway.routing.targets import OnHead, Target, TargetConfig, TargetStream

T = TypeVar("T")


class RoutedStream:
    """A streamed answer that has begun; leaving ``async with`` closes its socket and tells routing how it went."""

    __slots__ = ("_call", "_stream", "first", "pipe", "read", "release")

    def __init__(self, stream: TargetStream, call: RoutedCall) -> None:
        self._stream, self._call = stream, call
        # The upstream's own: nothing stands between it and the reader.
        self.first, self.read, self.pipe, self.release = stream.first, stream.read, stream.pipe, stream.release

    async def __aenter__(self) -> RoutedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.ended(error)
        await self._stream.__aexit__(kind, error, trace)


class LostHedge(NamedTuple):
    """A request that was given up because another was faster; its upstream may count the input all the same."""

    upstream: str
    model: str
    body_bytes: int
    is_lent: bool


class RoutedUpstream:
    """Sends each call to one of a route's targets; `call` is the latest one, for whoever reports the decision.

    ``config``, ``api`` and ``base_url`` are the first target's: every target of a route that agents use speaks the
    same API. Bodies carry the first target's model name; for another target it is replaced. ``sent`` are headers of
    credentials of the caller it is made for: keys that it lends.
    """

    __slots__ = ("_route", "_sent", "call")

    def __init__(self, route: Route, sent: Mapping[str, str] = NOTHING_SENT) -> None:
        self._route = route
        self._sent = sent
        self.call: RoutedCall | None = None

    @property
    def route(self) -> Route:
        """Where calls may go."""
        return self._route

    @property
    def decision(self) -> Routed | None:
        """Who serves the latest call, at which try; None before any."""
        call = self.call
        return Routed(call.candidate.target.name, call.attempts, call.hedged) if call is not None else None

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
    def is_lent(self) -> bool:
        """Whether the latest call is made with a key that the caller lent."""
        return self.call is not None and self.call.is_lent(self.call.candidate)

    def for_caller(self, sent: Mapping[str, str]) -> RoutedUpstream:
        """Return the same route for a caller who sent these headers."""
        return RoutedUpstream(self._route, sent) if sent else self

    @property
    def lost(self) -> LostHedge | None:
        """Who was asked beside the upstream that serves the latest call, and was given up; None if nobody was."""
        if self.call is None or self.call.lost is None:
            return None
        candidate, body_bytes = self.call.lost
        return LostHedge(candidate.target.name, candidate.model, body_bytes, self.call.is_lent(candidate))

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
        self.call = call = RoutedCall(self._route, self._sent)
        hedges = self._route.hedge is not None and may_hedge(path, body)
        while True:
            call.begin()
            try:
                if hedges and not call.hedged:
                    answer = await self._hedged(
                        call,
                        lambda target: target.post,
                        _drop_answer,
                        path,
                        body,
                        request_id,
                        headers,
                        on_head,
                        streamed=False,
                    )
                else:
                    answer = await call.target().post(
                        path, call.body(path, body), request_id=request_id, headers=headers, on_head=on_head
                    )
            except GatewayError as error:
                if not await call.goes_on(error):
                    raise
            except BaseException:
                call.abandoned()
                raise
            else:
                call.answered()
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
    ) -> RoutedStream:
        """Send one streamed request and return with its first events; whatever fails later is not tried again."""
        self.call = call = RoutedCall(self._route, self._sent)
        hedges = self._route.hedge is not None and may_hedge(path, body)
        while True:
            call.begin()
            try:
                if hedges and not call.hedged:
                    stream = await self._hedged(
                        call,
                        lambda target: target.start,
                        _drop_stream,
                        path,
                        body,
                        request_id,
                        headers,
                        on_head,
                        streamed=True,
                    )
                else:
                    stream = await call.target().start(
                        path, call.body(path, body), request_id=request_id, headers=headers, on_head=on_head
                    )
            except GatewayError as error:
                if not await call.goes_on(error):
                    raise
            except BaseException:
                call.abandoned()
                raise
            else:
                call.answered()
                return RoutedStream(stream, call)

    async def _hedged(
        self,
        call: RoutedCall,
        method: Callable[[Target], Callable[..., Coroutine[Any, Any, T]]],
        drop: Callable[[T], Awaitable[None]],
        path: str,
        body: bytes,
        request_id: str | None,
        headers: Mapping[str, str] | None,
        on_head: OnHead | None,
        *,
        streamed: bool,
    ) -> T:
        """Ask the present target, and a second one if that is late; ``on_head`` hears of the one that answers."""
        heads: dict[str, tuple[int, Mapping[bytes, bytes]]] = {}

        async def ask(candidate: Candidate) -> T:
            def keep(status: int, fields: Mapping[bytes, bytes]) -> None:
                heads[candidate.id] = (status, fields)

            send = method(call.target(candidate))
            given = call.body(path, body, candidate)
            return await send(path, given, request_id=request_id, headers=headers, on_head=keep)

        answer = await ask_hedged(call, ask, drop, streamed=streamed, body_bytes=len(body))
        head = heads.get(call.candidate.id)
        if head is not None and on_head is not None:
            on_head(*head)
        return answer

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
        async with await self.start(path, body, request_id=request_id, headers=headers, on_head=on_head) as stream:
            chunks = stream.first
            while chunks:
                for chunk in chunks:
                    yield chunk.data
                chunks = await stream.read()

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
        self.call = call = RoutedCall(self._route, self._sent)
        if call.candidate.model != self._route.model:
            call.candidate = self._route.candidates[0]
        target = call.target()
        call.begin()
        error: BaseException | None = None
        try:
            async with aclosing(target.relay(request, request_id=request_id, on_head=on_head)) as pieces:
                async for piece in pieces:
                    yield piece
        except BaseException as raised:
            error = raised
            raise
        finally:
            call.ended(error)


async def _drop_answer(answer: bytes) -> None:
    """Nothing is open any more."""


async def _drop_stream(stream: TargetStream) -> None:
    error = asyncio.CancelledError()
    await stream.__aexit__(type(error), error, None)


class RoutedBinding(NamedTuple):
    """A model name of the gateway, bound to whoever serves it; made for one run, so it is made quickly."""

    upstream: RoutedUpstream
    model: str

    @classmethod
    def of(cls, route: Route) -> RoutedBinding:
        """Return what a run is bound to that takes a route."""
        return cls(RoutedUpstream(route), route.candidates[0].model)
