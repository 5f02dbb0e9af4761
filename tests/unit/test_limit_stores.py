"""Every implementation of the limits' counters gives the answers of one simple model: in process, Redis, SQL."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.config import Settings
from gateway.limits.memory import MemoryLimits
from gateway.limits.port import (
    SCARCE,
    Answer,
    Ask,
    Batch,
    Change,
    Grant,
    LimitStore,
    LimitStoreDown,
    Refusal,
    Renewal,
    Rule,
)
from gateway.limits.redis import RedisLimits
from gateway.limits.sql import SqlLimits
from gateway.store.redis import open_redis
from gateway.store.store import Store, database_url
from tests.support import databases

REDIS_URL = os.environ.get("GATEWAY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
KINDS = ("memory", "redis", "sqlite", "postgresql")

Clock = Callable[[], int]
START = 1_700_000_000_000


class Hands:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


@asynccontextmanager
async def opened(kind: str, folder: Path, clock: Clock | None = None) -> AsyncIterator[LimitStore]:
    async with AsyncExitStack() as stack:
        if kind == "memory":
            yield MemoryLimits() if clock is None else MemoryLimits(clock)
        elif kind == "redis":
            client = await stack.enter_async_context(open_redis(REDIS_URL))
            prefix = f"test-{uuid.uuid4().hex}"
            store = RedisLimits(client, prefix=prefix, clock=clock)
            await reachable(store, "Redis at GATEWAY_TEST_REDIS_URL")
            yield store
            async for key in client.scan_iter(f"{prefix}:*", count=1000):
                await client.delete(key)
        else:
            given = stack.enter_context(databases.database(kind, folder / uuid.uuid4().hex))
            url = database_url(Settings.from_env({"GATEWAY_DATABASE_URL": given}))
            database = await stack.enter_async_context(Store(url, ["gateway.limits.tables"]))
            yield SqlLimits(database, clock=clock)


async def reachable(store: LimitStore, what: str) -> None:
    try:
        await store.exchange(Batch("probe", changes=(Change(Rule(unique("probe"), 1, 1_000), 1),)))
    except LimitStoreDown:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no {what}")


def unique(name: str) -> str:
    return f"{name}/{uuid.uuid4().hex}"


class Model:
    """The counters as a list of what was taken, looked through from end to end each time."""

    def __init__(self) -> None:
        self.taken: dict[str, list[list[int]]] = {}
        self.held: dict[str, dict[str, tuple[int, int]]] = {}

    def used(self, rule: Rule, now: int) -> int:
        if rule.window_ms:
            return sum(amount for slot, amount in self.live(rule, now))
        held = self.held.setdefault(rule.key, {})
        return sum(amount for amount, until in held.values() if until > now)

    def live(self, rule: Rule, now: int) -> list[list[int]]:
        entries = self.taken.setdefault(rule.key, [])
        return [e for e in entries if e[1] and e[0] + rule.slot_ms + rule.window_ms + rule.hold_ms > now]

    def add(self, rule: Rule, now: int, amount: int, holder: str) -> int:
        if not rule.window_ms:
            before, until = self.held.setdefault(rule.key, {}).get(holder, (0, 0))
            before = before if until > now else 0
            self.held[rule.key][holder] = (before + amount, now + rule.hold_ms)
            return 0
        slot = max([now - now % rule.slot_ms, *(e[0] for e in self.live(rule, now))])
        self.taken[rule.key].append([slot, amount])
        return slot

    def give_back(self, rule: Rule, now: int, slot: int, amount: int, holder: str) -> None:
        if not rule.window_ms:
            before, until = self.held.setdefault(rule.key, {}).get(holder, (0, 0))
            self.held[rule.key][holder] = (max(before - amount, 0), until)
            return
        for entry in self.live(rule, now):
            if entry[0] == slot:
                given = min(entry[1], amount)
                entry[1] -= given
                amount -= given

    def wait(self, rule: Rule, now: int, amount: int) -> int:
        if amount > rule.limit:
            return -1
        if not rule.window_ms:
            return 1_000
        ends = sorted(e[0] + rule.slot_ms + rule.window_ms + rule.hold_ms for e in self.live(rule, now))
        return next((end - now for end in ends if self.used(rule, end) + amount <= rule.limit), 0)

    def reset(self, rule: Rule, now: int) -> int:
        slots = [e[0] for e in self.live(rule, now)] if rule.window_ms else []
        return min(slots) + rule.slot_ms + rule.window_ms + rule.hold_ms - now if slots else 0

    def apply(self, batch: Batch, now: int) -> Answer:
        totals = []
        for change in batch.changes:
            if change.amount < 0:
                self.give_back(change.rule, now, change.slot, -change.amount, batch.holder)
            else:
                self.add(change.rule, now, change.amount, batch.holder)
            totals.append(self.used(change.rule, now))
        for renewal in batch.renewals:
            held = self.held.setdefault(renewal.rule.key, {})
            held[batch.holder] = (renewal.amount, now + renewal.rule.hold_ms)
        return Answer(tuple(self.take(group, now, batch.holder) for group in batch.groups), tuple(totals))

    def take(self, group: tuple[Ask, ...], now: int, holder: str) -> tuple[Grant, ...] | Refusal:
        for index, ask in enumerate(group):
            wanted = ask.amount or 1
            if self.used(ask.rule, now) + wanted > ask.rule.limit:
                return Refusal(index, self.used(ask.rule, now), self.wait(ask.rule, now, wanted))
        grants = []
        for ask in group:
            left = ask.rule.limit - self.used(ask.rule, now)
            amount = ask.block if ask.block > ask.amount and left >= SCARCE * ask.block else ask.amount
            slot = self.add(ask.rule, now, amount, holder)
            grants.append(Grant(amount, slot, self.used(ask.rule, now), self.reset(ask.rule, now)))
        return tuple(grants)


RULES = (
    Rule("small", 3, 1_000),
    Rule("blocks", 100, 1_000, 100, 200),
    Rule("money", 9_000_000_000_000_000, 60_000, 5_000, 1_000),
    Rule("held", 4, 0, 1, 500),
)


def asks(rule: Rule) -> st.SearchStrategy[Ask]:
    top = rule.limit + 1 if rule.limit < 1_000 else rule.limit
    blocks = st.sampled_from((0, 5, 10)) if rule.key == "blocks" else st.just(0)
    return st.builds(Ask, st.just(rule), st.integers(0, top), blocks)


groups = st.lists(st.sampled_from(RULES), min_size=1, max_size=4, unique_by=lambda rule: rule.key).flatmap(
    lambda rules: st.tuples(*(asks(rule) for rule in rules))
)
steps = st.tuples(
    st.integers(0, 700),
    st.sampled_from(("one", "two")),
    st.lists(groups, max_size=3),
    st.lists(st.tuples(st.sampled_from(RULES), st.integers(-20, 20), st.integers(0, 5)), max_size=2),
    st.one_of(st.none(), st.integers(0, 4)),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_answers_as_the_model_does(kind: str, tmp_path: Path) -> None:
    clock = Hands()
    runner = asyncio.Runner()

    @settings(
        max_examples=150 if kind == "memory" else 20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(steps, min_size=1, max_size=12))
    def agree(story: list[tuple[int, str, list[tuple[Ask, ...]], list[tuple[Rule, int, int]], int | None]]) -> None:
        runner.run(told(story))

    async def told(
        story: list[tuple[int, str, list[tuple[Ask, ...]], list[tuple[Rule, int, int]], int | None]],
    ) -> None:
        model, own = Model(), uuid.uuid4().hex
        slots: dict[str, list[int]] = {}

        def named(rule: Rule) -> Rule:
            return Rule(f"{rule.key}/{own}", rule.limit, rule.window_ms, rule.slot_ms, rule.hold_ms)

        for ms, holder, wanted, changed, renewed in story:
            clock.now += ms
            changes = []
            for rule, amount, index in changed:
                known = slots.get(rule.key) or [0]
                changes.append(Change(named(rule), amount, known[index % len(known)]))
            batch = Batch(
                holder,
                tuple(tuple(Ask(named(ask.rule), ask.amount, ask.block) for ask in group) for group in wanted),
                tuple(changes),
                () if renewed is None else (Renewal(named(RULES[3]), renewed),),
            )
            expected = model.apply(batch, clock.now)
            assert await store.exchange(batch) == expected
            for group, answer in zip(wanted, expected.groups, strict=True):
                if isinstance(answer, tuple):
                    for ask, grant in zip(group, answer, strict=True):
                        slots.setdefault(ask.rule.key, []).append(grant.slot)

    stack = AsyncExitStack()
    try:
        store = runner.run(stack.enter_async_context(opened(kind, tmp_path, clock)))
        agree()
    finally:
        runner.run(stack.aclose())
        runner.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_at_the_same_time_never_passes_the_limit(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(kind, tmp_path) as store:
            rule, other = Rule(unique("n"), 25, 60_000), Rule(unique("other"), 1_000, 60_000)
            batches = [Batch("one", ((Ask(rule, 1), Ask(other, 1)),)) for _ in range(60)]
            answers = await asyncio.gather(*(store.exchange(batch) for batch in batches))
            assert sum(isinstance(answer.groups[0], tuple) for answer in answers) == 25
            left = await store.exchange(Batch("one", ((Ask(other, 0),),)))
            assert isinstance(left.groups[0], tuple)
            assert left.groups[0][0].used == 25, "a group that was refused took nothing"

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_the_clock_of_the_store_frees_what_was_taken(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(kind, tmp_path) as store:
            rule = Rule(unique("short"), 1, 1_000)  # longer than a busy machine needs for two exchanges
            batch = Batch("one", ((Ask(rule, 1),),))
            async with asyncio.timeout(60):
                assert isinstance((await store.exchange(batch)).groups[0], tuple)
                refused = (await store.exchange(batch)).groups[0]
                assert isinstance(refused, Refusal) and 0 < refused.wait_ms <= 1_001
                await asyncio.sleep(refused.wait_ms / 1000)
                while isinstance((await store.exchange(batch)).groups[0], Refusal):
                    pass

    asyncio.run(main())


def test_a_redis_that_is_down_is_said_to_be_down() -> None:
    async def main() -> None:
        async with open_redis("redis://127.0.0.1:1/0") as client:
            with pytest.raises(LimitStoreDown):
                await RedisLimits(client).exchange(Batch("one", ((Ask(Rule("a", 1, 1_000), 1),),)))

    asyncio.run(main())


def test_a_database_that_is_down_is_said_to_be_down() -> None:
    async def main() -> None:
        async with Store("postgresql+psycopg://nobody@127.0.0.1:1/none", ["gateway.limits.tables"]) as database:
            with pytest.raises(LimitStoreDown):
                await SqlLimits(database).exchange(Batch("one", ((Ask(Rule("a", 1, 1_000), 1),),)))

    asyncio.run(main())
