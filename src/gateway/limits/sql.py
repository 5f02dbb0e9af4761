"""Counters in the SQL store: the rows of a batch are locked, counted on, and written back in one transaction."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.errors import GatewayError
from gateway.limits.book import Book, counter_of
from gateway.limits.port import Answer, Batch, LimitStoreDown, Rule
from gateway.store.store import Store

if TYPE_CHECKING:  # SQLAlchemy: imported with the store
    from gateway.store.connection import StoreConnection

_SWEEP_EVERY_MS = 600_000
_SHORTEST_MS = 60_000
"""An idle row stays this long: a counter in use is written back, not made anew."""


class SqlLimits:
    """Counters that all processes with the same database share."""

    name = "sql"

    def __init__(self, store: Store, *, clock: Callable[[], int] | None = None) -> None:
        self._store = store
        self._clock = clock
        self._sweep_at = 0

    async def exchange(self, batch: Batch) -> Answer:
        """See `LimitStore.exchange`."""
        rules = batch.rules()
        if not rules:
            return Answer(())
        keys = sorted(rules)  # the same order everywhere, so that no two transactions wait for each other
        try:
            await self._store.open()
            table = importlib.import_module("gateway.limits.tables").COUNTERS
            while True:
                async with self._store.transaction() as connection:
                    wanted = table.select().where(table.c.key.in_(keys)).order_by(table.c.key).with_for_update()
                    states = {row.key: row.state for row in (await connection.execute(wanted)).all()}
                    missing = [key for key in keys if key not in states]
                    if not missing:
                        return await self._apply(connection, table, batch, rules, states)
                # In a transaction of its own, which holds nothing else: nobody waits in a circle.
                async with self._store.transaction() as connection:
                    await self._create(connection, table, missing)
        except GatewayError as error:
            raise LimitStoreDown("the database does not answer") from error

    async def _apply(
        self, connection: StoreConnection, table: Any, batch: Batch, rules: dict[str, Rule], states: dict[str, str]
    ) -> Answer:
        now = await self._now(connection)
        book = Book()
        for key, rule in rules.items():
            book.counters[key] = counter_of(rule, msgspec.json.decode(states[key]))
        answer = book.apply(batch, now)
        for key, rule in rules.items():
            state = msgspec.json.encode(book.counters[key].state()).decode()
            if state != states[key]:
                idle_at = now + rule.lifetime_ms + _SHORTEST_MS
                await connection.execute(table.update().where(table.c.key == key).values(state=state, idle_at=idle_at))
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_EVERY_MS
            await connection.execute(table.delete().where(table.c.idle_at < now, table.c.key.not_in(list(rules))))
        return answer

    async def _create(self, connection: StoreConnection, table: Any, keys: list[str]) -> None:
        dialect = importlib.import_module(f"sqlalchemy.dialects.{connection.backend}")
        rows = [{"key": key, "state": "{}", "idle_at": 2**53} for key in keys]
        await connection.execute(dialect.insert(table).on_conflict_do_nothing(), rows)

    async def _now(self, connection: StoreConnection) -> int:
        if self._clock is not None:
            return self._clock()
        if connection.backend != "postgresql":
            return time.time_ns() // 1_000_000
        found = await connection.exec_driver_sql("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
        return int(found.scalar_one())
