"""Redis: one client for what replicas share fast (rate counters, cached answers), opened where it is configured."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway.errors import ConfigError

if TYPE_CHECKING:  # 0.2 s, only where Redis is configured
    from redis.asyncio import Redis

_CONNECT_S = 1.0
_ANSWER_S = 2.0
_MOST_CONNECTIONS = 64
_SCHEMES = ("redis", "rediss", "unix")


@asynccontextmanager
async def open_redis(url: str) -> AsyncIterator[Redis]:
    """Return a client that connects at its first command, and close it at the end.

    A command fails with ``redis.exceptions.RedisError`` or ``OSError``, after 1 s without a connection and 2 s without
    an answer, and is not tried again: whoever asks decides what an outage means. Answers are bytes. Raises
    `ConfigError` for a URL that is none; never for a server that is down.
    """
    check_redis_url(url)
    redis = await asyncio.to_thread(importlib.import_module, "redis.asyncio")
    retries = await asyncio.to_thread(importlib.import_module, "redis.asyncio.retry")
    backoff = importlib.import_module("redis.backoff")
    try:
        client: Redis = redis.Redis.from_url(
            url,
            socket_connect_timeout=_CONNECT_S,
            socket_timeout=_ANSWER_S,
            max_connections=_MOST_CONNECTIONS,
            health_check_interval=30,
            retry=retries.Retry(backoff.NoBackoff(), 0),
        )
    except ValueError as error:
        raise _wrong() from error
    try:
        yield client
    finally:
        await client.aclose()


def check_redis_url(url: str) -> None:
    """Raise `ConfigError` for a URL that no Redis client takes, without a client."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in _SCHEMES and bool(parts.path if parts.scheme == "unix" else parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise _wrong()


def _wrong() -> ConfigError:
    return ConfigError("GATEWAY_REDIS_URL is not accepted; write redis://:PASSWORD@HOST:6379/0 (rediss:// for TLS).")
