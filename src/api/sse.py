"""Server-sent events on a plain ASGI connection: the head at the right moment, comments in silence, the client's leave.

One `EventStream` per request. Its head (status 200) goes out with the first bytes, so that whatever fails before
them is still an ordinary JSON error. After ``ping_s`` of silence a comment goes out, and with it the head. A client
that leaves, or that stops reading for ``stall_s``, cancels the task that serves it.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from api.routing import Headers, Receive, Send

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
    """Watches one client while its answer is made; ``async with`` raises `ClientGone` once it has left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.gone = False

    async def __aenter__(self) -> Connection:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._timer is not None and self._task is not None
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
    """Writes one event stream; use inside a `Connection`. ``headers`` go out beside the stream's own."""

    def __init__(self, send: Send, connection: Connection, ping_s: float) -> None:
        self._send = send
        self._connection = connection
        self._ping_s = ping_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._sending_since: float | None = None
        self._ping: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(ping_s, self._tick)
        self.started = False
        self.headers: Headers = ()

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send bytes, waiting while the client's buffer is full."""
        self._last = self._sending_since = self._loop.time()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEAD, *self.headers]})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending_since = None

    def close(self) -> None:
        """Stop the timer; call it however the stream ended."""
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

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
