"""The limiter: who goes on, what is reserved, settled and given back, what happens without the store."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BudgetExhausted, GatewayError, RateLimited, ServiceUnavailable
from gateway.events import Usage
from gateway.limits.accounts import duration
from gateway.limits.limiter import Limiter
from gateway.limits.memory import MemoryLimits
from gateway.limits.port import Answer, Batch, LimitStore, LimitStoreDown
from gateway.limits.reservation import NOTHING, Estimate, Reservation
from gateway.observability.metrics import Metrics
from gateway.principal import Allowance, Limits, Principal
from gateway.usage.prices import PICO
from tests.unit.test_limit_stores import Hands, opened


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main

    asyncio.run(bounded())


def principal(
    key: Limits | None = None, *, namespace: Limits | None = None, end_user: Limits | None = None, id: str = "alice"
) -> Principal:
    allowance = Allowance(key=key, namespace=namespace, end_user=end_user)
    return Principal(id=id, key_id=id, allow=("*",), namespace="sales", allowance=allowance)


def dollars(amount: float, tokens: int = 10) -> Usage:
    return Usage(input_tokens=tokens, requests=1, cost=round(amount * PICO))


def usd(amount: float) -> Estimate:
    return Estimate(0, round(amount * 1e9))


class Broken:
    """A store that can be switched off."""

    name = "broken"

    def __init__(self) -> None:
        self.inner = MemoryLimits()
        self.is_down = False
        self.exchanges = 0

    async def exchange(self, batch: Batch) -> Answer:
        self.exchanges += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise LimitStoreDown("switched off")
        return self.inner.apply(batch)


class Shared(Broken):
    """Counters that several limiters share, as those of several processes would."""


async def refused(coming: Coroutine[Any, Any, Reservation], kind: type[GatewayError]) -> GatewayError:
    with pytest.raises(kind) as caught:
        await coming
    return caught.value


@pytest.mark.parametrize("store", [MemoryLimits, Shared])
def test_exactly_as_many_requests_as_the_limit_says(store: type[LimitStore]) -> None:
    async def main() -> None:
        async with Limiter(store(), Metrics()) as limiter:
            alice = principal(Limits(requests_per_minute=25))
            coming = (limiter.admit(alice, estimate=NOTHING) for _ in range(60))
            came = await asyncio.gather(*coming, return_exceptions=True)
            assert sum(isinstance(one, Reservation) for one in came) == 25
            error = next(one for one in came if isinstance(one, RateLimited))
            assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
            assert error.retry_after_s is not None and 55 < error.retry_after_s <= 60.1
            assert "the key 'alice' may send 25 a minute" in error.message
            shown = dict(error.headers)
            assert shown[b"x-ratelimit-limit-requests"] == b"25"
            assert shown[b"x-ratelimit-remaining-requests"] == b"0"
            other = principal(Limits(requests_per_minute=25), id="bob")
            assert isinstance(await limiter.admit(other, estimate=NOTHING), Reservation)

    run(main())


def test_the_window_slides() -> None:
    async def main() -> None:
        clock = Hands()
        async with Limiter(MemoryLimits(clock), Metrics()) as limiter:
            alice = principal(Limits(requests_per_minute=2))
            await limiter.admit(alice, estimate=NOTHING)
            clock.now += 30_000
            await limiter.admit(alice, estimate=NOTHING)
            clock.now += 30_001
            await limiter.admit(alice, estimate=NOTHING)
            error = await refused(limiter.admit(alice, estimate=NOTHING), RateLimited)
            assert error.retry_after_s == pytest.approx(30.0, abs=0.01)

    run(main())


def test_a_limit_that_is_raised_keeps_what_was_counted() -> None:
    async def main() -> None:
        async with Limiter(MemoryLimits(), Metrics()) as limiter:
            for _ in range(3):
                await limiter.admit(principal(Limits(requests_per_minute=3)), estimate=NOTHING)
            more = principal(Limits(requests_per_minute=5))
            for _ in range(2):
                await limiter.admit(more, estimate=NOTHING)
            await refused(limiter.admit(more, estimate=NOTHING), RateLimited)
            await refused(limiter.admit(principal(Limits(requests_per_minute=4)), estimate=NOTHING), RateLimited)

    run(main())


def test_scopes_are_counted_apart_and_the_tightest_refuses() -> None:
    async def main() -> None:
        async with Limiter(MemoryLimits(), Metrics()) as limiter:
            limits = {"namespace": Limits(requests_per_minute=5), "end_user": Limits(requests_per_minute=2)}
            alice, bob = (principal(Limits(requests_per_minute=4), id=name, **limits) for name in ("alice", "bob"))
            for _ in range(2):
                await limiter.admit(alice, end_user="u1", estimate=NOTHING)
            error = await refused(limiter.admit(alice, end_user="u1", estimate=NOTHING), RateLimited)
            assert "each end user" in error.message
            for user in ("u2", None):
                reservation = await limiter.admit(alice, end_user=user, estimate=NOTHING)
            assert dict(reservation.headers)[b"x-ratelimit-remaining-requests"] == b"0"
            error = await refused(limiter.admit(alice, end_user="u3", estimate=NOTHING), RateLimited)
            assert "the key 'alice'" in error.message
            await limiter.admit(bob, end_user="u1", estimate=NOTHING)
            error = await refused(limiter.admit(bob, end_user="u2", estimate=NOTHING), RateLimited)
            assert "all keys in the namespace" in error.message

    run(main())


@pytest.mark.parametrize("store", [MemoryLimits, Shared])
def test_runs_at_one_time(store: type[LimitStore]) -> None:
    async def main() -> None:
        async with Limiter(store(), Metrics()) as limiter:
            alice = principal(Limits(concurrent_runs=2))
            first, _ = [await limiter.admit(alice, estimate=NOTHING) for _ in range(2)]
            error = await refused(limiter.admit(alice, estimate=NOTHING), RateLimited)
            assert (error.type, error.retry_after_s) == ("rate_limit_error", 1.0)
            first.end()
            first.end()
            await limiter.admit(alice, estimate=NOTHING)
            await refused(limiter.admit(alice, estimate=NOTHING), RateLimited)

    run(main())


@pytest.mark.parametrize("store", [MemoryLimits, Shared])
def test_a_budget_is_reserved_then_settled_or_given_back(store: type[LimitStore]) -> None:
    async def main() -> None:
        async with Limiter(store(), Metrics()) as limiter:
            alice = principal(Limits(cost_per_day_usd=1.0))
            first = await limiter.admit(alice, estimate=usd(0.6))
            error = await refused(limiter.admit(alice, estimate=usd(0.6)), BudgetExhausted)
            assert (error.status, error.type, error.code) == (429, "insufficient_quota", "insufficient_quota")
            assert error.should_retry is False
            first.settle(dollars(0.1))
            first.end()
            second = await limiter.admit(alice, estimate=usd(0.6))
            second.end()  # cancelled: nothing was used
            third = await limiter.admit(alice, estimate=usd(0.6))
            third.settle(dollars(0.95))  # more than the worst case
            third.end()
            error = await refused(limiter.admit(alice, estimate=NOTHING), BudgetExhausted)
            assert "1 USD in 24 hours" in error.message

    run(main())


def test_a_default_worst_case_larger_than_the_limit_does_not_refuse_a_promised_one_does() -> None:
    async def main() -> None:
        async with Limiter(MemoryLimits(), Metrics()) as limiter:
            alice = principal(Limits(tokens_per_minute=1_000))
            error = await refused(limiter.admit(alice, estimate=Estimate(4_096)), RateLimited)
            assert error.type == "tokens" and error.should_retry is False
            first = await limiter.admit(alice, estimate=Estimate(4_096, is_promised=False))
            await refused(limiter.admit(alice, estimate=Estimate(1)), RateLimited)
            first.settle(Usage(input_tokens=10, output_tokens=20, requests=1))
            await limiter.admit(alice, estimate=Estimate(970))
            await refused(limiter.admit(alice, estimate=Estimate(1)), RateLimited)

    run(main())


def test_calls_inside_a_run_charge_its_caller_and_what_is_open_ends_with_it() -> None:
    async def main() -> None:
        async with Limiter(MemoryLimits(), Metrics()) as limiter:
            alice = principal(Limits(cost_per_day_usd=1.0, requests_per_minute=10))
            reservation = await limiter.admit(alice, estimate=NOTHING)
            for _ in range(3):
                call = await reservation.reserve_call(usd(0.5))
                call.settle(dollars(0.2))
                call.release()
            with pytest.raises(BudgetExhausted):
                await reservation.reserve_call(usd(0.5))
            await reservation.reserve_call(usd(0.4))
            reservation.end()
            assert dict(reservation.headers)[b"x-ratelimit-remaining-requests"] == b"9"
            await limiter.admit(alice, estimate=usd(0.4))

    run(main())


def test_a_call_inside_a_run_waits_for_tokens() -> None:
    async def main() -> None:
        clock = Hands()
        async with Limiter(MemoryLimits(clock), Metrics()) as limiter:
            reservation = await limiter.admit(principal(Limits(tokens_per_minute=100)), estimate=NOTHING)
            await reservation.reserve_call(Estimate(80))
            with pytest.raises(RateLimited):
                await reservation.reserve_call(Estimate(80), patience_s=30)
            clock.now += 59_990
            waiting = asyncio.create_task(reservation.reserve_call(Estimate(80), patience_s=30))
            await asyncio.sleep(0)
            assert not waiting.done()
            clock.now += 100
            await waiting

    run(main())


def test_a_large_limit_is_leased_and_never_passed() -> None:
    async def main() -> None:
        store = Shared()
        async with Limiter(store, Metrics()) as one, Limiter(store, Metrics()) as two:
            alice, allowed = principal(Limits(requests_per_minute=2_000)), 0
            for _ in range(1_100):
                for limiter in (one, two):
                    try:
                        await limiter.admit(alice, estimate=NOTHING)
                        allowed += 1
                    except RateLimited:
                        pass
            assert 1_980 <= allowed <= 2_000, "within one block, and never above"
            assert store.exchanges < 700, "most permits were leased"

    run(main())


def test_a_lease_that_was_not_used_comes_back() -> None:
    async def main() -> None:
        store = Shared()
        async with Limiter(store, Metrics()) as one, Limiter(store, Metrics()) as two:
            alice = principal(Limits(cost_per_day_usd=1.0))
            (await one.admit(alice, estimate=usd(0.0001))).settle(dollars(0.0001))
            assert one.leases() == 1
            await refused(two.admit(alice, estimate=usd(0.9995)), BudgetExhausted)
            await one.__aexit__(None, None, None)
            await two.admit(alice, estimate=usd(0.9995))

    run(main())


def test_without_the_store_speed_is_open_and_money_is_closed() -> None:
    async def main() -> None:
        store, metrics = Broken(), Metrics()
        async with Limiter(store, metrics) as limiter:
            fast = principal(Limits(requests_per_minute=1), id="fast")
            rich = principal(Limits(cost_per_day_usd=1), id="rich")
            store.is_down = True
            for _ in range(3):
                (await limiter.admit(fast, estimate=NOTHING)).end()
            error = await refused(limiter.admit(rich, estimate=usd(0.1)), ServiceUnavailable)
            assert (error.status, error.code, error.retry_after_s) == (503, "limits_unavailable", 1.0)
            assert store.exchanges == 1, "nobody waits for a store that is known to be down"
            store.is_down = False
            limiter._down_until = 0
            await limiter.admit(fast, estimate=NOTHING)
            await refused(limiter.admit(fast, estimate=NOTHING), RateLimited)
            await limiter.admit(rich, estimate=usd(0.9))
            await refused(limiter.admit(rich, estimate=usd(0.9)), BudgetExhausted)

    run(main())


def test_a_store_that_nobody_asks_is_not_said_to_be_back(caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        events = [str(record.__dict__.get("event")) for record in caplog.records]
        return [event for event in events if event.startswith("limit.store.")]

    async def main() -> None:
        store = Broken()
        async with Limiter(store, Metrics()) as limiter:
            store.is_down = True
            fast = principal(Limits(requests_per_minute=1))
            (await limiter.admit(fast, estimate=NOTHING)).end()
            assert store.exchanges == 1
            limiter._changes.clear()
            await limiter._exchange(())
            assert store.exchanges == 1 and said() == ["limit.store.unreachable"], "it had nothing to ask"
            store.is_down = False
            limiter._down_until = 0
            (await limiter.admit(fast, estimate=NOTHING)).end()
            assert said() == ["limit.store.unreachable", "limit.store.reachable"]

    with caplog.at_level("INFO"):
        run(main())
    record = next(r for r in caplog.records if r.__dict__.get("event") == "limit.store.unreachable")
    assert record.__dict__["fields"]["reason"] == "switched off"


def test_whoever_leaves_while_the_store_is_asked_holds_nothing() -> None:
    async def main() -> None:
        async with Limiter(Shared(), Metrics()) as limiter:
            alice = principal(Limits(concurrent_runs=1))
            for _ in range(5):
                task = asyncio.create_task(limiter.admit(alice, estimate=NOTHING))
                for _ in range(2):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait((task,))
            (await limiter.admit(alice, estimate=NOTHING)).end()

    run(main())


def test_end_users_are_not_named_in_the_store() -> None:
    async def main() -> None:
        store = Shared()
        async with Limiter(store, Metrics()) as limiter:
            alice = principal(end_user=Limits(requests_per_minute=5))
            await limiter.admit(alice, end_user="eve@example.com", estimate=NOTHING)
        assert not [key for key in store.inner._book.counters if "eve" in key]

    run(main())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20_000), st.integers(1, 60), st.integers(0, 80), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_no_minute_holds_more_than_its_limit(story: list[tuple[int, int, int, bool]]) -> None:
    """Against the plainest model: a list of what was admitted when, and what was used of it."""

    async def main() -> None:
        clock = Hands()
        admitted: list[tuple[int, int]] = []
        async with Limiter(MemoryLimits(clock), Metrics()) as limiter:
            alice = principal(Limits(tokens_per_minute=100, requests_per_minute=7))
            for wait, tokens, used, is_cancelled in story:
                clock.now += wait
                recent = [amount for at, amount in admitted if at + 60_001 > clock.now]
                fits = sum(recent) + tokens <= 100 and len(recent) < 7
                try:
                    reservation = await limiter.admit(alice, estimate=Estimate(tokens))
                except RateLimited:
                    assert not fits
                    continue
                assert fits
                if not is_cancelled:
                    reservation.settle(Usage(input_tokens=min(used, tokens), requests=1))
                reservation.end()
                admitted.append((clock.now, 0 if is_cancelled else min(used, tokens)))

    run(main())


@pytest.mark.parametrize("kind", ["redis", "sqlite", "postgresql"])
def test_over_a_real_store_a_budget_holds_between_limiters(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            opened(kind, tmp_path) as store,
            Limiter(store, Metrics()) as one,
            Limiter(store, Metrics()) as two,
        ):
            spent = 0.0

            alice = principal(Limits(cost_per_day_usd=0.5), id=uuid.uuid4().hex[:16])

            async def spend(limiter: Limiter) -> float:
                try:
                    reservation = await limiter.admit(alice, estimate=usd(0.01))
                except BudgetExhausted:
                    return 0.0
                reservation.settle(dollars(0.008))
                reservation.end()
                return 0.008

            for _ in range(4):
                spent += sum(await asyncio.gather(*(spend(limiter) for limiter in (one, two) for _ in range(20))))
            assert 0.48 <= spent <= 0.5

    run(main())


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, b"0ms"), (850, b"850ms"), (12_500, b"12.5s"), (60_000, b"1m0s"), (61_001, b"1m1.001s")],
)
def test_durations_are_spelled_as_openai_does(milliseconds: int, text: bytes) -> None:
    assert duration(milliseconds) == text


@pytest.mark.parametrize("store", [MemoryLimits, Shared])
def test_one_process_uses_a_large_limit_to_its_last_permit(store: type[LimitStore]) -> None:
    async def main() -> None:
        async with Limiter(store(), Metrics()) as limiter:
            alice = principal(Limits(requests_per_minute=1_234, tokens_per_minute=10_000))
            for _ in range(1_234):
                await limiter.admit(alice, estimate=Estimate(3))
            await refused(limiter.admit(alice, estimate=Estimate(3)), RateLimited)
            bob = principal(Limits(tokens_per_minute=10_000), id="bob")
            await limiter.admit(bob, estimate=NOTHING)
            await limiter.admit(bob, estimate=Estimate(9_990))
            await limiter.admit(bob, estimate=Estimate(10))
            await refused(limiter.admit(bob, estimate=Estimate(1)), RateLimited)

    run(main())


def test_what_was_used_without_a_reservation_counts_all_the_same() -> None:
    async def main() -> None:
        async with Limiter(MemoryLimits(), Metrics()) as limiter:
            alice = principal(Limits(tokens_per_minute=100, cost_per_day_usd=1.0))
            first = await limiter.admit(alice, estimate=NOTHING)
            first.settle(dollars(0.2, tokens=150))
            await refused(limiter.admit(alice, estimate=NOTHING), RateLimited)
            rich = principal(Limits(cost_per_day_usd=1.0), id="rich")
            first = await limiter.admit(rich, estimate=NOTHING)
            first.settle(dollars(1.5))
            await refused(limiter.admit(rich, estimate=NOTHING), BudgetExhausted)

    run(main())
