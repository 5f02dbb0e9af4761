"""What the application tells the server at start-up: any failure is a failed start, never a server half open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api import main
from gateway.config import Settings
from gateway.errors import ConfigError


def start(application: main.GatewayApp) -> list[dict[str, Any]]:
    """Drive the start-up half of the lifespan; return what was sent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(application({"type": "lifespan"}, receive, send))
    return sent


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("upstreams.yaml:3: say what to do"), "upstreams.yaml:3: say what to do"),
        (RuntimeError("boom"), "could not start: RuntimeError"),
        (ImportError("boom"), "could not start: ImportError"),
    ],
)
def test_a_failure_while_opening_is_a_failed_start(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    @asynccontextmanager
    async def broken(settings: Settings, **_: object) -> AsyncIterator[None]:
        raise error
        yield

    monkeypatch.setattr(main, "open_gateway", broken)
    (message,) = start(main.create_app(Settings()))
    assert message["type"] == "lifespan.startup.failed"
    assert words in message["message"]
