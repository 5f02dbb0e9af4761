"""RedisStore: answers that every process shares, and short locks so that one of them fetches; never in the way.

Whatever Redis does, a request goes on: a command that fails or takes too long counts as a miss, and Redis is then left
alone until a ping in the background has been answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import msgspec

from gateway.caching.config import RedisRules
from gateway.caching.entry import Entry, decode_entry, encode_entry
from gateway.observability.logs import log_event

if TYPE_CHECKING:  # 0.2 s, only where Redis is configured
    from redis.asyncio import Redis

T = TypeVar("T")

_PREFIX = "gateway:cache:"
_LOCK_PREFIX = "gateway:cache-lock:"
_POLL_S = 0.05
_LOG_EVERY_S = 60.0
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"

_LOG = logging.getLogger(__name__)


class ErrorCounter(Protocol):
    """The part of `gateway.observability.metrics.Metrics` that failures feed."""

    def cache_error(self, backend: str) -> None:
        """Count a command that failed."""
        ...


class RedisStore:
    """``spawn`` runs background work (a ping) and awaits it in the end."""

    def __init__(
        self,
        client: Redis,
        rules: RedisRules,
        metrics: ErrorCounter,
        spawn: Callable[[Awaitable[None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules = rules
        self._client = client
        self._metrics, self._spawn, self._clock = metrics, spawn, clock
        self._is_down = False
        self._ping_at = 0.0
        self._logged_at = -_LOG_EVERY_S

    async def get(self, key: str) -> Entry | None:
        """Return an answer that is still good."""
        data = await self._ask(lambda: self._client.get(_PREFIX + key))
        return self._decoded(cast("bytes | None", data))

    async def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        """Keep an answer."""
        await self._ask(lambda: self._client.set(_PREFIX + key, encode_entry(entry), px=max(1, round(ttl_s * 1000))))

    async def await_turn(self, key: str, token: str, wait_s: float) -> tuple[Entry | None, bool]:
        """Return the answer another process has fetched, or whether the lock that others wait for is held.

        Waits at most ``wait_s`` for somebody else's call; the lock ends by itself after as long.
        """
        lock, deadline = _LOCK_PREFIX + key, self._clock() + wait_s
        while True:
            taken, data = await self._take(lock, token, key, wait_s)
            entry = self._decoded(data)
            if taken or entry is not None:
                return entry, taken
            if self._is_down or self._clock() + _POLL_S >= deadline:
                return None, False
            await asyncio.sleep(_POLL_S)

    async def release(self, key: str, token: str) -> None:
        """Give the lock back, if it is still ours."""
        await self._ask(lambda: self._client.eval(_RELEASE, 1, _LOCK_PREFIX + key, token))

    async def _take(self, lock: str, token: str, key: str, wait_s: float) -> tuple[bool, bytes | None]:
        async def both() -> list[Any]:
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.set(lock, token, nx=True, px=max(1, round(wait_s * 1000)))
                pipe.get(_PREFIX + key)
                return list(await pipe.execute())

        taken, data = await self._ask(both) or (None, None)
        return bool(taken), data

    def _decoded(self, data: bytes | None) -> Entry | None:
        if data is None:
            return None
        try:
            return decode_entry(data)
        except msgspec.DecodeError:
            self._metrics.cache_error("redis")
            return None

    async def _ask(self, command: Callable[[], Awaitable[T]]) -> T | None:
        if self._is_down:
            if self._clock() >= self._ping_at:
                self._ping_at = self._clock() + self.rules.pause_s
                self._spawn(self._ping())
            return None
        try:
            async with asyncio.timeout(self.rules.timeout_s):
                return await command()
        except Exception as error:  # noqa: BLE001 - the border: no failure of the cache is a failure of the request
            self._failed(error)
            return None

    async def _ping(self) -> None:
        try:
            async with asyncio.timeout(self.rules.timeout_s):
                await self._client.ping()
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
        else:
            self._is_down = False
            log_event(_LOG, "cache.redis.recovered")

    def _failed(self, error: Exception) -> None:
        now = self._clock()
        self._metrics.cache_error("redis")
        self._is_down, self._ping_at = True, now + self.rules.pause_s
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            log_event(
                _LOG,
                "cache.redis.failed",
                level=logging.WARNING,
                message="Redis does not answer; cached models go to their upstreams meanwhile",
                error=type(error).__name__,
                pause_s=self.rules.pause_s,
            )
