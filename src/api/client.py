"""Client: the one who sent a request, as handlers answer him: over ASGI, or on his connection where that is ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from api.connection import EXTENSION, ClientExchange
from api.routing import Response, Scope, Send

_TYPE = b"content-type"


class Client:
    """Puts the headers that every answer has on each, and knows the status that went out (0: none yet).

    ``headers`` are those of every answer. ``exchange`` is there under our own protocol, None under any other server.
    """

    __slots__ = ("_send", "exchange", "headers", "status")

    def __init__(self, scope: Scope, send: Send, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        extensions = scope.get("extensions")
        self.exchange: ClientExchange | None = extensions.get(EXTENSION) if extensions else None
        self.status = 0
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

    def begin(self, exchange: ClientExchange, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin a stream at once, without waiting; the exchange writes what follows."""
        self.status = 200
        exchange.begin(200, [*headers, *self.headers])
