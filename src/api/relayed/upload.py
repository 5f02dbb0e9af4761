"""The body of one request, piece by piece: within its limits, and with an eye on a client that leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from api.routing import Request
from api.sse import Connection
from gateway.errors import BodyTooLarge, RequestTimedOut

_LEAST_BYTES_PER_S = 1_000
"""On the whole, after the first `body_timeout_s`: each piece alone could be a byte for ever."""


class Upload:
    """Reads the body for whoever sends it on; `receive` is for the `Connection` that watches the client afterwards.

    Two readers of one ASGI channel would steal each other's messages, so `receive` waits until the body is read (or
    nobody wants it any more).
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._over = asyncio.Event()
        self.connection: Connection | None = None
        self.complete = False
        self.size = 0
        """Bytes that have come."""

    async def receive(self) -> dict[str, Any]:
        """Return the next message after the body."""
        await self._over.wait()
        return await self._request.receive()

    def finish(self) -> None:
        """Say that the body is read, or not wanted."""
        self._over.set()

    @property
    def declared(self) -> int | None:
        """The size that the client announces."""
        text = self._request.headers.get("content-length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the body as it comes. Raises `BodyTooLarge` or `RequestTimedOut`; a client that left ends it all."""
        settings = self._request.gateway.settings
        limit, seconds = settings.upload_limit_bytes, settings.body_timeout_s
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            if (self.declared or 0) > limit:
                raise _too_large(limit)
            while not self.complete:
                try:
                    async with asyncio.timeout(seconds):
                        message = await self._request.receive()
                except TimeoutError as error:
                    raise RequestTimedOut(f"The upload stood still for {seconds:g} s.") from error
                if message["type"] != "http.request":
                    await self._left()
                piece: bytes = message.get("body", b"")
                self.size += len(piece)
                if self.size > limit:
                    raise _too_large(limit)
                if clock() - started > seconds + self.size / _LEAST_BYTES_PER_S:
                    raise RequestTimedOut(f"The upload came at less than {_LEAST_BYTES_PER_S:,} bytes a second.")
                self.complete = not message.get("more_body")
                yield piece
        finally:
            self.finish()

    async def _left(self) -> None:
        assert self.connection is not None, "the body is read inside a Connection"
        self.connection.leave()
        await asyncio.Event().wait()  # the task that serves the client is being cancelled, and this one with it


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The upload is larger than {limit:,} bytes. Send less, or raise GATEWAY_UPLOAD_LIMIT_BYTES.")
