"""Client: the one who sent a request, as handlers answer him: over ASGI, or on his connection where that is ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from api.connection import EXTENSION, ClientExchange
from api.routing import Receive, Response, Scope, Send

_TYPE = b"content-type"

_DRAIN_S = 10.0
_DRAIN_BYTES = 64_000_000
_DRAIN_IDLE_S = 2.0
"""For how long, and how much, a client that was refused may go on sending before its connection is cut; and pause."""


class Client:
    """Puts the headers that every answer has on each, and knows the status that went out (0: none yet).

    ``headers`` are those of every answer. ``exchange`` is there under our own protocol, None under any other server.
    ``is_refused``: the client was answered while it may still be sending, and has to be let `drain`.
    """

    __slots__ = ("_send", "exchange", "headers", "is_refused", "status")

    def __init__(self, scope: Scope, send: Send, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        extensions = scope.get("extensions")
        self.exchange: ClientExchange | None = extensions.get(EXTENSION) if extensions else None
        self.status = 0
        self.is_refused = False
        self._send, self.headers = send, headers

    async def send(self, message: dict[str, Any]) -> None:
        """Send one ASGI message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self.headers]
        await self._send(message)

    async def respond(self, response: Response, *, last: bool = False) -> None:
        """Send a whole answer; ``last``: the connection ends with it."""
        self.status = response.status
        fields = (_TYPE, response.content_type), *response.headers, *self.headers
        if self.exchange is not None and self.exchange.answer(response.status, fields, response.body, last=last):
            return
        fields += ((b"content-length", b"%d" % len(response.body)),)
        if last:
            fields += ((b"connection", b"close"),)
        await self._send({"type": "http.response.start", "status": response.status, "headers": fields})
        await self._send({"type": "http.response.body", "body": response.body})

    async def refuse(self, response: Response, headers: Mapping[str, str]) -> None:
        """Send the last answer of a connection; where the client may still be sending, `drain` ends it."""
        if not self._is_sending(headers):
            await self.respond(response, last=True)
            return
        self.status, self.is_refused = response.status, True
        length = (b"content-length", b"%d" % len(response.body)), (b"connection", b"close")
        fields = (_TYPE, response.content_type), *response.headers, *self.headers, *length
        await self._send({"type": "http.response.start", "status": response.status, "headers": fields})
        await self._send({"type": "http.response.body", "body": response.body, "more_body": True})

    async def drain(self, receive: Receive) -> None:
        """Take what a client that was refused still sends, for a while, and end its connection.

        A socket that is closed while there is something to read answers with a reset, and clients that write first and
        read afterwards see the reset instead of the answer.
        """
        left, loop = _DRAIN_BYTES, asyncio.get_running_loop()
        ends_at = loop.time() + _DRAIN_S
        with suppress(TimeoutError):
            while left > 0:
                async with asyncio.timeout_at(min(ends_at, loop.time() + _DRAIN_IDLE_S)):
                    message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    break
        await self._send({"type": "http.response.body", "body": b""})

    def begin(self, exchange: ClientExchange, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin a stream at once, without waiting; the exchange writes what follows."""
        self.status = 200
        exchange.begin(200, [*headers, *self.headers])

    def _is_sending(self, headers: Mapping[str, str]) -> bool:
        if self.exchange is not None:
            return self.exchange.is_receiving
        return "content-length" in headers or "transfer-encoding" in headers
