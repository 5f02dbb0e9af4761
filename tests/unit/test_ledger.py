"""The ledger: every run and call in rows whose sums are right, written aside, and never in the way of a call."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, func, select, update

from gateway.chat import RelayRequest
from gateway.config import Settings
from gateway.errors import StoreUnavailable
from gateway.events import Usage
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.run import Run
from gateway.store.store import Store, database_url
from gateway.usage import ledger as ledger_module
from gateway.usage import rows as rows_module
from gateway.usage.ledger import Entry, Ledger, open_ledger
from gateway.usage.question import Question, Totals
from gateway.usage.rows import USAGE, Row
from tests.support.databases import BACKENDS, database

MODULES = ("gateway.usage.rows",)
ALWAYS = {"from_ms": 0, "to_ms": 10**14, "limit": 100, "offset": 0}


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as found:
        yield database_url(Settings(database_url=found))


def run(model: str = "local/m", key: str = "alice", end_user: str | None = None) -> Run:
    caller = Principal(key, key, ("*",), namespace="team")
    request = RelayRequest(model=model, fields={})
    return Run(uuid.uuid4(), "request-1", caller, model, request, False, 1, 60.0, end_user=end_user)


def relay(ledger: Ledger, usage: Usage, *, byok: bool = False, **options: Any) -> None:
    """A relayed call, from its charge to its end."""
    of, path = run(**options), "/chat/completions"
    ledger.charged(of, usage, path=path, agent=None, upstream="local", model="m", price_version="v1", byok=byok)
    end(ledger, of)


def end(ledger: Ledger, of: Run, *, agent: bool = False, error: str | None = None, cached: bool = False) -> None:
    outcome = "failure" if error else "success"
    ledger.ended(
        of,
        path="/chat/completions",
        is_agent=agent,
        outcome=outcome,
        error_code=error,
        seconds=0.25,
        cached=cached,
    )


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[tuple[Ledger, Store, Metrics]]:
    metrics = Metrics()
    settings = {"flush_s": 3_600.0, "retention_days": 30} | options
    async with Store(url, MODULES) as store, open_ledger(store, metrics, **settings) as ledger:
        yield ledger, store, metrics


async def ask(ledger: Ledger, **question: Any) -> Totals:
    return await ledger.ask(Question(**question))


async def rows(store: Store) -> list[dict[str, Any]]:
    async with store.reading() as connection:
        found = await connection.execute(select(USAGE).order_by(USAGE.c.id))
        return [dict(row) for row in found.mappings()]


async def written(metrics: Metrics) -> dict[str, float]:
    text = b"".join([piece async for piece in metrics.render()]).decode()
    return {
        line.partition('outcome="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("agent_gateway_usage_rows_total{")
    }


def test_a_relayed_call_is_one_row_and_an_agents_run_one_and_one_for_each_call(url: str) -> None:
    async def work() -> None:
        async with opened(url) as (ledger, store, _):
            relay(ledger, Usage(10, 5, 2, 1, 1, cost=123, cache_write_tokens=3), end_user="zoë\0")
            agent = run("default/helper")
            for upstream in ("local", "other"):
                ledger.charged(
                    agent,
                    Usage(100, 10, requests=1, estimated=True),
                    path="/chat/completions",
                    agent="default/helper",
                    upstream=upstream,
                    model="m",
                    price_version=None,
                )
            end(ledger, agent, agent=True, error="agent_error")
            end(ledger, run(), cached=True)
            await ledger.flush()
            relayed, first, second, ended, hit = await rows(store)
            assert (relayed["runs"], relayed["calls"], relayed["status"]) == (1, 1, "success")
            assert (relayed["key_id"], relayed["namespace"], relayed["end_user"]) == ("alice", "team", "zoë")
            assert (relayed["upstream"], relayed["upstream_model"], relayed["model"]) == ("local", "m", "local/m")
            assert (relayed["cost"], relayed["price_version"], relayed["duration_ms"]) == (123, "v1", 250.0)
            assert (relayed["cached_input_tokens"], relayed["cache_write_tokens"]) == (2, 3)
            assert relayed["run_id"] == relayed["run_id"].lower()
            assert abs(relayed["at_ms"] / 1000 - time.time()) < 60
            assert [(r["runs"], r["calls"], r["agent"], r["upstream"]) for r in (first, second, ended)] == [
                (0, 1, "default/helper", "local"),
                (0, 1, "default/helper", "other"),
                (1, 0, "default/helper", None),
            ]
            assert first["run_id"] == ended["run_id"]
            assert (ended["status"], ended["error_code"], ended["input_tokens"]) == ("failure", "agent_error", 0)
            assert (hit["runs"], hit["calls"], hit["cached"]) == (1, 0, True)

    asyncio.run(work())


def test_sums_by_any_group_are_exact_and_come_in_pages(url: str) -> None:
    async def work() -> None:
        async with opened(url) as (ledger, _, _):
            dear = 9 * 10**18  # two of them pass 64 bits
            relay(ledger, Usage(1, 1, requests=1, cost=dear))
            relay(ledger, Usage(2, 1, requests=1, cost=dear + 1), key="bob", byok=True)
            relay(ledger, Usage(4, 1, requests=1), key="bob", end_user="u")
            end(ledger, run(key="carol"), error="upstream_error")
            everything = await ask(ledger, **ALWAYS, group_by=(), only={})
            (total,) = everything.groups
            assert (total.requests, total.failures, total.model_calls) == (4, 1, 3)
            assert (total.cost, total.calls_without_cost, total.tokens["input_tokens"]) == (2 * dear + 1, 1, 7)
            assert (total.byok_calls, total.byok_cost) == (1, dear + 1)
            by_key = await ask(ledger, **ALWAYS, group_by=("key",), only={})
            assert [g.byok_calls for g in by_key.groups] == [0, 1, 0]
            assert [(g.group["key"], g.requests) for g in by_key.groups] == [("alice", 1), ("bob", 2), ("carol", 1)]
            used = [group.record() for group in by_key.groups]
            assert [record["avg_tokens_per_request"] for record in used] == [2.0, 4.0, 0.0]
            last = datetime.fromisoformat(used[1]["last_used_at"]).timestamp()
            assert abs(last - time.time()) < 60
            page = await ask(ledger, **(ALWAYS | {"limit": 1, "offset": 1}), group_by=("key",), only={})
            assert [g.group for g in page.groups] == [{"key": "bob"}]
            assert page.has_more
            bobs = await ask(ledger, **ALWAYS, group_by=("end_user", "day"), only={"key": "bob"})
            today = int(time.time()) // 86_400
            assert [g.group["end_user"] for g in bobs.groups] == ["u", None]
            assert all(g.group["day"] in (today, today - 1) for g in bobs.groups)
            later = await ask(ledger, **(ALWAYS | {"from_ms": 10**13}), group_by=("key",), only={})
            assert later.groups == []

    asyncio.run(work())


def test_a_ledger_from_before_own_keys_is_read_on(url: str) -> None:
    def turn_back(connection: Connection) -> None:
        connection.exec_driver_sql("ALTER TABLE gateway_usage DROP COLUMN byok")
        connection.exec_driver_sql("UPDATE gateway_schemas SET version = 1 WHERE name = 'usage'")

    async def work() -> None:
        async with opened(url) as (ledger, store, _):
            relay(ledger, Usage(1, 1, requests=1, cost=5))
            await ledger.flush()
            async with store.transaction() as connection:
                await connection.run(turn_back)
        async with opened(url) as (ledger, _, _):
            relay(ledger, Usage(1, 1, requests=1, cost=7), byok=True)
            (total,) = (await ask(ledger, **ALWAYS)).groups
            assert (total.cost, total.byok_calls, total.byok_cost) == (12, 1, 7)

    asyncio.run(work())


def test_what_waits_is_written_when_the_gateway_stops(url: str) -> None:
    async def work() -> int:
        async with opened(url) as (ledger, _, _):
            for _ in range(300):
                relay(ledger, Usage(1, requests=1))
        async with Store(url, MODULES) as store:
            return len(await rows(store))

    assert asyncio.run(work()) == 300


def test_rows_are_written_by_themselves(url: str) -> None:
    async def work() -> None:
        async with opened(url, flush_s=0.01) as (ledger, store, _):
            relay(ledger, Usage(1, requests=1))
            await until(lambda: _count(store), 1)

    asyncio.run(work())


def test_while_the_store_is_down_calls_go_on_rows_wait_and_what_is_too_much_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "MOST_WAITING", 2)
    monkeypatch.setattr("gateway.store.store._AGAIN_S", 0.0)
    (tmp_path / "state").write_text("in the way")
    url = database_url(Settings(state_dir=tmp_path / "state"))

    async def work() -> None:
        async with opened(url) as (ledger, store, metrics):
            for _ in range(3):
                relay(ledger, Usage(1, requests=1))  # the third finds no room, neither for its call nor for its end
            with pytest.raises(StoreUnavailable):
                await ledger.flush()
            assert await written(metrics) == {"dropped": 2}
            (tmp_path / "state").unlink()
            await ledger.flush()
            assert len(await rows(store)) == 2
            assert await written(metrics) == {"dropped": 2, "written": 2}

    asyncio.run(work())
    dropped = [record for record in caplog.records if getattr(record, "event", None) == "usage.rows.dropped"]
    assert len(dropped) == 1


def test_a_flush_of_a_thousand_rows_leaves_the_loop_its_turns(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are made in slices with turns of the loop in between, and go into the database in another thread."""
    turns = 0
    slices: list[tuple[int, int]] = []
    threads: set[int] = set()

    def add_rows(made: list[Row], entries: Sequence[Entry]) -> None:
        slices.append((turns, len(entries)))
        rows_module_add_rows(made, entries)

    def insert(connection: Connection, batch: Sequence[Row]) -> None:
        threads.add(threading.get_ident())
        rows_module_insert(connection, batch)

    rows_module_add_rows, rows_module_insert = rows_module.add_rows, rows_module.insert
    monkeypatch.setattr(rows_module, "add_rows", add_rows)
    monkeypatch.setattr(rows_module, "insert", insert)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def check() -> int:
        async with opened(url) as (ledger, store, _):
            await store.open()
            for _ in range(1_000):
                relay(ledger, Usage(1, 1, requests=1))
            other = asyncio.create_task(others())
            await asyncio.sleep(0)
            await ledger.flush()
            other.cancel()
            return await _count(store)

    assert asyncio.run(check()) == 1_000
    assert sum(count for _, count in slices) == 1_000
    assert max(count for _, count in slices) <= 200
    starts = [turn for turn, _ in slices]
    assert all(later > earlier for earlier, later in itertools.pairwise(starts)), starts
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(("backend", "most"), [("sqlite", 50), ("postgresql", 500)])
def test_no_statement_takes_the_interpreter_for_more_than_a_few_rows(backend: str, most: int) -> None:
    """Binding the values of one statement holds up every thread, that of the event loop too."""

    class Cursor:
        def __init__(self) -> None:
            self.counts: list[int] = []

        def execute(self, statement: str, values: Sequence[Any]) -> None:
            is_json = "json" in statement
            self.counts.append(len(msgspec.json.decode(values[0])) if is_json else len(values) // columns)

        def executemany(self, statement: str, values: Sequence[Any]) -> None:
            self.counts += [1] * len(values)

        def close(self) -> None:
            pass

    columns = len(Row.__struct_fields__)
    cursor = Cursor()
    connection: Any = SimpleNamespace(
        connection=SimpleNamespace(cursor=lambda: cursor), dialect=SimpleNamespace(name=backend)
    )
    of = run()
    entry = Entry(time.time(), of.id, of.request_id, of.principal, of.model, None, "/chat/completions", None, "local")
    made: list[Row] = []
    rows_module.add_rows(made, [entry] * 1_120)
    rows_module.insert(connection, made)
    assert sum(cursor.counts) == 1_120
    assert max(cursor.counts) <= most


def test_rows_that_cannot_be_written_at_the_end_are_counted(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    metrics = Metrics()

    async def work() -> dict[str, float]:
        url = database_url(Settings(state_dir=tmp_path / "state"))
        async with (
            Store(url, MODULES) as store,
            open_ledger(store, metrics, flush_s=3_600, retention_days=30) as ledger,
        ):
            relay(ledger, Usage(1, requests=1))
        return await written(metrics)

    assert asyncio.run(work()) == {"dropped": 1}


def test_old_rows_are_pruned_and_young_ones_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_PRUNED_AT_ONCE", 2)

    async def work() -> None:
        async with opened(url) as (ledger, store, _):
            for _ in range(7):
                relay(ledger, Usage(1, requests=1))
            await ledger.flush()
            async with store.transaction() as connection:
                old = int(time.time() * 1000) - 31 * 86_400_000
                await connection.execute(update(USAGE).where(USAGE.c.id > 2).values(at_ms=old))
        async with opened(url, flush_s=0.01) as (ledger, store, _):
            relay(ledger, Usage(1, requests=1))
            await until(lambda: _count(store), 3)

    asyncio.run(work())


async def _count(store: Store) -> int:
    async with store.reading() as connection:
        return await connection.scalar(select(func.count()).select_from(USAGE)) or 0


async def until(ask: Callable[[], Awaitable[int]], expected: int) -> None:
    async with asyncio.timeout(60):
        while await ask() != expected:  # noqa: ASYNC110 - another process's rows: there is no event to wait for
            await asyncio.sleep(0.01)
