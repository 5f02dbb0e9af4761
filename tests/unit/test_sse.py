"""An event stream sends its head with its first bytes, a comment in silence, and stops when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from api import sse
from api.client import Client
from api.sse import PING, ClientGone, Connection, EventStream


class Wire:
    """The server's side of one connection: what was sent, and a client that leaves when told."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.stalled: asyncio.Event | None = None
        self.grew = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.grew.set()
        if self.stalled is not None:
            await self.stalled.wait()

    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def run(scenario: Callable[[Wire], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(5):
            await scenario(Wire())

    asyncio.run(main())


def test_nothing_is_sent_before_the_first_bytes() -> None:
    async def scenario(wire: Wire) -> None:
        with Connection(wire.receive) as connection:
            stream = EventStream(Client({}, wire.send, ()), connection, ping_s=60)
            assert not stream.started and not wire.sent
            await stream.write(b"data: 1\n\n")
            await stream.write(b"", more=False)
            stream.close()
        assert [message["type"] for message in wire.sent] == [
            "http.response.start",
            "http.response.body",
            "http.response.body",
        ]
        assert (b"content-type", b"text/event-stream; charset=utf-8") in wire.sent[0]["headers"]

    run(scenario)


def test_silence_sends_a_comment_and_with_it_the_head() -> None:
    async def scenario(wire: Wire) -> None:
        with Connection(wire.receive) as connection:
            stream = EventStream(Client({}, wire.send, ()), connection, ping_s=0.01)
            while wire.body().count(PING) < 3:
                wire.grew.clear()
                await wire.grew.wait()
            assert stream.started
            stream.close()
        assert wire.sent[0]["status"] == 200

    run(scenario)


def test_a_client_that_leaves_cancels_the_work_at_once() -> None:
    async def scenario(wire: Wire) -> None:
        cleaned = False

        async def serve() -> None:
            nonlocal cleaned
            with Connection(wire.receive):
                try:
                    wire.left.set()
                    await asyncio.Event().wait()
                finally:
                    cleaned = True

        with pytest.raises(ClientGone):
            await asyncio.create_task(serve())
        assert cleaned

    run(scenario)


def test_cancelling_from_outside_is_not_mistaken_for_a_client() -> None:
    async def scenario(wire: Wire) -> None:
        entered = asyncio.Event()

        async def serve() -> None:
            with Connection(wire.receive):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(serve())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario)


def test_a_client_that_stops_reading_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALL_S", 0.02)

    async def scenario(wire: Wire) -> None:
        wire.stalled = asyncio.Event()

        async def serve() -> None:
            with Connection(wire.receive) as connection:
                stream = EventStream(Client({}, wire.send, ()), connection, ping_s=0.01)
                try:
                    await stream.write(b"data: 1\n\n")
                finally:
                    stream.close()

        with pytest.raises(ClientGone):
            await asyncio.create_task(serve())

    run(scenario)
