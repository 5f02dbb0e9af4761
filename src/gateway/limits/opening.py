"""Opening: the limiter of a process, over the store that the settings choose."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.limits.alerts import BudgetAlerts, alert_config
from gateway.limits.limiter import Limiter
from gateway.limits.memory import MemoryLimits
from gateway.limits.port import LimitStore
from gateway.observability.metrics import Metrics
from gateway.store.redis import open_redis
from gateway.store.store import Store

TABLES = "gateway.limits.tables"
"""The module that the store must know."""


@asynccontextmanager
async def open_limiter(
    settings: Settings, store: Store, metrics: Metrics, *, is_alone: bool = True
) -> AsyncIterator[Limiter]:
    """Return the limiter, and give back at the end what it has leased.

    ``is_alone``: no other worker process serves. Raises `ConfigError` for settings that do not go together.
    """
    alerts = alert_config(settings)
    async with AsyncExitStack() as stack:
        counters = await _counters(settings, store, stack, is_alone=is_alone)
        if alerts is None:
            yield await stack.enter_async_context(Limiter(counters, metrics))
            return
        sender = await stack.enter_async_context(BudgetAlerts(alerts, counters, metrics))
        yield await stack.enter_async_context(Limiter(counters, metrics, on_spent=sender.spent))


def choose_store(settings: Settings, *, is_alone: bool) -> Literal["memory", "redis", "sql"]:
    """Return where is counted; raise `ConfigError` for settings that do not go together."""
    kind = settings.limits_store
    if kind == "redis" and settings.redis_url is None:
        raise ConfigError("GATEWAY_LIMITS_STORE=redis needs GATEWAY_REDIS_URL.")
    if kind == "memory" and not is_alone:
        raise ConfigError("GATEWAY_LIMITS_STORE=memory counts in each worker process alone; use auto, redis or sql.")
    if kind != "auto":
        return kind
    if settings.redis_url is not None:
        return "redis"
    return "memory" if is_alone and settings.database_url is None else "sql"


async def _counters(settings: Settings, store: Store, stack: AsyncExitStack, *, is_alone: bool) -> LimitStore:
    kind = choose_store(settings, is_alone=is_alone)
    if kind == "redis":
        assert settings.redis_url is not None, "`choose_store` saw to it"
        from gateway.limits.redis import RedisLimits  # noqa: PLC0415 - Redis: only where it is configured

        return RedisLimits(await stack.enter_async_context(open_redis(settings.redis_url)))
    if kind == "sql":
        from gateway.limits.sql import SqlLimits  # noqa: PLC0415 - SQLAlchemy: only where it is needed

        return SqlLimits(store)
    return MemoryLimits()
