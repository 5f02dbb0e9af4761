"""One process of a test: spends a budget with many calls at a time over a shared store, and prints what it spent."""

from __future__ import annotations

import asyncio
import json
import random
import sys

from gateway.errors import BudgetExhausted
from gateway.events import Usage
from gateway.limits.limiter import Limiter
from gateway.limits.port import LimitStore
from gateway.limits.redis import RedisLimits
from gateway.limits.reservation import Estimate
from gateway.limits.sql import SqlLimits
from gateway.observability.metrics import Metrics
from gateway.principal import Allowance, Limits, Principal
from gateway.store.redis import open_redis
from gateway.store.store import Store

PICO_IN_NANO = 1_000
CONCURRENT = 200


async def spend(store: LimitStore, name: str, budget_usd: float, worst: int) -> tuple[int, int]:
    """Call until the budget is refused everywhere; return what was spent (nanodollars) and in how many calls."""
    allowance = Allowance(key=Limits(cost_per_day_usd=budget_usd))
    principal = Principal(id=name, key_id=name, allow=("*",), allowance=allowance)
    chance, spent, calls = random.Random(), 0, 0

    async def caller(limiter: Limiter) -> None:
        nonlocal spent, calls
        refused = 0
        while refused < 3:
            try:
                reservation = await limiter.admit(principal, estimate=Estimate(0, worst))
            except BudgetExhausted:
                refused += 1
                await asyncio.sleep(0.05)
                continue
            await asyncio.sleep(chance.random() * 0.02)
            if chance.random() < 0.8:
                used = chance.randint(worst // 4, worst)
                spent, calls = spent + used, calls + 1
                reservation.settle(Usage(requests=1, cost=used * PICO_IN_NANO))
            reservation.end()  # a fifth of the calls fail, and cost nothing

    async with Limiter(store, Metrics()) as limiter:
        await asyncio.gather(*(caller(limiter) for _ in range(CONCURRENT)))
    return spent, calls


async def main(kind: str, url: str, name: str, budget_usd: float, worst: int) -> None:
    """Open the store, say so, start at a word from outside, and print the outcome."""
    if kind == "redis":
        async with open_redis(url) as client:
            await client.ping()
            await _wait_for_start()
            outcome = await spend(RedisLimits(client), name, budget_usd, worst)
    else:
        async with Store(url, ["gateway.limits.tables"]) as store:
            await store.open()
            await _wait_for_start()
            outcome = await spend(SqlLimits(store), name, budget_usd, worst)
    print(json.dumps(outcome), flush=True)


async def _wait_for_start() -> None:
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])))
