"""Calls of a real `HttpUpstream` in unit tests: open one, ask it, read its streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import uvloop

from gateway.upstreams.client import HttpUpstream
from gateway.upstreams.config import Timeouts, UpstreamConfig

UPSTREAM_KEY = "sk-upstream-secret-123456"
QUICK = Timeouts(connect_s=0.5, first_byte_s=0.3, idle_s=0.3, total_s=0.6)


class UpstreamCalls:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int | str]] = []

    def credential_used(self, operation: str) -> None:
        raise AssertionError("no caller lends a key here")

    def upstream_request(self, upstream: str, status: int | str, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append((upstream, status))


@asynccontextmanager
async def connected(
    base_url: str, *, metrics: UpstreamCalls | None = None, timeouts: Timeouts | None = None, **options: Any
) -> AsyncIterator[HttpUpstream]:
    config = UpstreamConfig(
        name="up",
        base_url=base_url,
        api_key=UPSTREAM_KEY,
        timeouts=timeouts or Timeouts(first_byte_s=60, idle_s=60),
        **options,
    )
    upstream = HttpUpstream(config, metrics)
    try:
        yield upstream
    finally:
        await upstream.aclose()


def chat_request(text: str = "Hi", **fields: Any) -> bytes:
    return json.dumps({"model": "scripted", "messages": [{"role": "user", "content": text}], **fields}).encode()


async def collect(stream: Any) -> list[Any]:
    async with aclosing(stream) as events:
        return [json.loads(data) async for data in events]


def text_of(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def each_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on asyncio's own loop and on uvloop, which differ in how sockets close."""
    asyncio.run(test())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for a state of the event loop that announces itself to nobody."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 — there is no event to wait for
            await asyncio.sleep(0.005)
