"""ResponseCache: the answers and the calls under way of one process; owns its stores and its background work."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

from gateway.caching.config import CacheRule, CacheRules
from gateway.caching.entry import Entry
from gateway.caching.flights import Flight
from gateway.caching.memory import MemoryStore
from gateway.caching.redis import RedisStore
from gateway.events import RunEvent
from gateway.store.redis import open_redis

Result = Literal["hit", "joined", "miss", "bypass"]


class CacheMetrics(Protocol):
    """The part of `gateway.observability.metrics.Metrics` that the cache feeds."""

    def cache_request(self, model: str, result: str) -> None:
        """Count a request for a model that has a cache."""
        ...

    def cache_error(self, backend: str) -> None:
        """Count a command that failed."""
        ...

    def cache_memory(self, entries: int, size: int) -> None:
        """Set what is kept in memory: answers, and their bytes."""
        ...


class ResponseCache:
    """``async with`` it. What is kept outlives a change of the rules; keys say what an answer is an answer to."""

    def __init__(self, metrics: CacheMetrics, redis_url: str | None = None) -> None:
        self._metrics = metrics
        self._redis_url = redis_url
        self._memory = MemoryStore()
        self._redis: RedisStore | None = None
        self._flights: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def follow(self, rules: CacheRules) -> CacheTable | None:
        """Take new rules and return what a snapshot holds of them: None where no model is cached.

        Raises `ConfigError` for an address of Redis that is none.
        """
        self._memory.limits = rules.config.memory
        self._memory.shrink()
        if self._redis is not None:
            self._redis.rules = rules.config.redis
        elif self._redis_url is not None and any(rule.backend == "redis" for rule in rules.config.models):
            client = await self._stack.enter_async_context(open_redis(self._redis_url))
            self._redis = RedisStore(client, rules.config.redis, self._metrics, self._spawn)
        return CacheTable(rules, self) if rules else None

    def counted(self, model: str, result: Result) -> None:
        """Count what the cache did for a request."""
        self._metrics.cache_request(model, result)

    def now(self) -> float:
        """Return the time that entries are stamped with, epoch seconds."""
        return time.time()

    def age_s(self, entry: Entry) -> float:
        """Return how old an answer is; clocks of processes may differ."""
        return max(0.0, self.now() - entry.stored_at)

    async def find(self, rule: CacheRule, key: str, max_age_s: float | None) -> Entry | None:
        """Return a kept answer, not older than the caller wants it."""
        if rule.backend == "redis":
            entry = await self._redis.get(key) if self._redis is not None else None
        else:
            entry = self._memory.get(key)
        if entry is None or self.age_s(entry) > min(rule.ttl_s, rule.ttl_s if max_age_s is None else max_age_s):
            return None
        return entry

    async def keep(self, rule: CacheRule, key: str, entry: Entry) -> None:
        """Keep an answer."""
        if rule.backend == "redis":
            if self._redis is not None:
                await self._redis.put(key, entry, rule.ttl_s)
            return
        self._memory.put(key, entry, rule.ttl_s)
        self._metrics.cache_memory(len(self._memory), self._memory.bytes)

    def find_flight(self, key: str) -> Flight | None:
        """Return a call under way whose answer another request may have."""
        flight = self._flights.get(key)
        return flight if flight is not None and flight.is_joinable else None

    def start_flight(self, key: str, source: AsyncGenerator[RunEvent, None], limit_bytes: int) -> Flight:
        """Begin a call that others may join."""
        flight = self._flights[key] = Flight(limit_bytes)

        def ended() -> None:
            if self._flights.get(key) is flight:
                del self._flights[key]

        self._track(flight.start(source, ended))
        return flight

    @asynccontextmanager
    async def turn(self, rule: CacheRule, key: str, *, waits: bool) -> AsyncIterator[Entry | None]:
        """Hold the turn to fetch an answer, among processes that share a store; or give what another one fetched.

        Waits ``rule.wait_s`` at most, and not at all where there is nobody to wait for.
        """
        store = self._redis
        if rule.backend != "redis" or store is None or not waits or not rule.wait_s:
            yield None
            return
        token = secrets.token_hex(8)
        entry, held = await store.await_turn(key, token, rule.wait_s)
        try:
            yield entry
        finally:
            if held:
                self._spawn(store.release(key, token))

    def _spawn(self, work: Awaitable[None]) -> None:
        self._track(asyncio.ensure_future(work))

    def _track(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class CacheTable(NamedTuple):
    """The cache under the rules of one snapshot."""

    rules: CacheRules
    cache: ResponseCache
