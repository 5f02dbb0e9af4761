"""Client: the one who sent a request, as handlers answer him: over ASGI, or on his connection where that is ours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from api.connection import EXTENSION, ClientExchange
from api.routing import Scope, Send


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

    def begin(self, exchange: ClientExchange, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin a stream at once, without waiting; the exchange writes what follows."""
        self.status = 200
        exchange.begin(200, [*headers, *self.headers])
