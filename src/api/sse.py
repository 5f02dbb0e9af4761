"""Server-sent events on a plain ASGI connection: the head at the right moment, comments in silence, the client's leave.

One `EventStream` per request. Its head (status 200) goes out with the first bytes, so that whatever fails before
them is still an ordinary JSON error. After ``ping_s`` of silence a comment goes out, and with it the head. A client
that leaves, or that stops reading for ``stall_s``, cancels the task that serves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from api.client import Client
from api.connection import ClientExchange
from api.errors import routed_headers
from api.routing import Headers, Receive
from gateway.events import RelayedHead, Routed

_HEAD: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
PING = b": ping\n\n"
STALL_S = 60.0
"""Seconds a client may leave its receive window full before it counts as gone."""


class ClientGone(Exception):
    """The client closed the connection (or stopped reading) before the answer was complete."""


WATCH_AFTER_S = 0.02
"""Seconds after which a client is watched: a task for every short answer would cost more than it could save."""


class Connection:
    """Watches one client while its answer is made; ``with`` raises `ClientGone` once it has left.

    Under our own protocol the ``exchange`` calls; elsewhere a task waits for ASGI's word.
    """

    def __init__(self, receive: Receive, exchange: ClientExchange | None = None) -> None:
        self._receive = receive
        self._exchange = exchange
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.gone = False

    def __enter__(self) -> Connection:
        self._task = asyncio.current_task()
        if self._exchange is not None:
            self._exchange.on_gone = self.leave
            if self._exchange.disconnected:
                self.leave()
            return self
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        if self._exchange is not None:
            self._exchange.on_gone = None
        if self._timer is not None:
            self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self.gone and isinstance(error, asyncio.CancelledError) and self._task.uncancel() == 0:
            raise ClientGone from error

    def leave(self) -> None:
        """Treat the client as gone: cancel the task that serves it, once."""
        if not self.gone and self._task is not None:
            self.gone = True
            self._task.cancel()

    def _start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.leave()


class EventStream:
    """Writes one event stream; use inside a `Connection`. ``headers`` go out beside the stream's own.

    It is also the `Outlet` of a run without events, where the ``client`` has a connection of ours.
    """

    def __init__(self, client: Client, connection: Connection, ping_s: float) -> None:
        self._client = client
        self._connection = connection
        self._ping_s = ping_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._sending_since: float | None = None
        self._ping: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(ping_s, self._tick)
        self.on_ready: Callable[[], None] | None = None
        self.headers: Headers = ()
        self.started = False
        if client.exchange is not None:
            client.exchange.on_resume = self._resumed

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send bytes, waiting while the client's buffer is full."""
        self._last = self._sending_since = self._loop.time()
        if not self.started:
            self.started = True
            await self._client.send({"type": "http.response.start", "status": 200, "headers": (*_HEAD, *self.headers)})
        await self._client.send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending_since = None

    def begin(self, routed: Routed | None, head: RelayedHead) -> None:
        """See `Outlet.begin`."""
        if routed is not None:
            self.headers += routed_headers(routed.upstream, routed.attempts, routed.hedged)
        self.headers += head.headers

    def push(self, chunks: list[bytes]) -> bool:
        """See `Outlet.push`; only for a client with an exchange."""
        exchange = self._client.exchange
        assert exchange is not None, "the client's connection is ours"
        if not self.started:
            self.started = True
            self._client.begin(exchange, (*_HEAD, *self.headers))
        exchange.write(b"data: %b\n\n" % b"\n\ndata: ".join(chunks))
        self._last = self._loop.time()
        if not exchange.paused:
            return True
        self._sending_since = self._last
        return False

    def close(self) -> None:
        """Stop the timer; call it however the stream ended."""
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    def _resumed(self) -> None:
        self._sending_since = None
        if self.on_ready is not None:
            self.on_ready()

    def _tick(self) -> None:
        now = self._loop.time()
        if self._sending_since is not None:
            if now - self._sending_since >= STALL_S:
                self._connection.leave()
                return
        elif now - self._last >= self._ping_s * 0.99:
            self._ping = self._loop.create_task(self.write(PING))
        wait = self._last + self._ping_s - now
        self._timer = self._loop.call_later(wait if wait > 0.001 else self._ping_s, self._tick)
