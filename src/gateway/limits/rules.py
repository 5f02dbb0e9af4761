"""From what an allowance says to the counters it means."""

from __future__ import annotations

import hashlib
from decimal import ROUND_CEILING, Decimal
from typing import Literal

from msgspec import Struct

from gateway.limits.port import Rule
from gateway.principal import Limits

Scope = Literal["key", "namespace", "end_user"]
Measure = Literal["requests", "tokens", "runs", "cost"]

NANO = 10**9
"""Nanodollars in a dollar: what money is counted in. A cost is rounded up to the next."""

EXACT_UP_TO = 600
"""A limit up to this is counted one by one by every process; a larger one is leased in blocks."""

MINUTE_MS = 60_000
DAY_MS = 86_400_000
_HOLDER_MS = 30_000
_BLOCKS = 100
_MONEY_BLOCKS = 1_000


class Counted(Struct, frozen=True):
    """One limit of one scope. ``block`` is what a process leases at a time where plenty is left; 0: nothing."""

    scope: Scope
    measure: Measure
    rule: Rule
    block: int = 0


def counted(scope: Scope, name: str, limits: Limits | None) -> tuple[Counted, ...]:
    """Return the limits of one scope; ``name`` tells its counters from those of others."""
    if limits is None:
        return ()
    found = []
    if limits.requests_per_minute is not None:
        found.append(_per_minute(scope, name, "requests", limits.requests_per_minute))
    if limits.tokens_per_minute is not None:
        found.append(_per_minute(scope, name, "tokens", limits.tokens_per_minute))
    if limits.concurrent_runs is not None:
        rule = Rule(f"{scope}/{name}/runs", limits.concurrent_runs, 0, 1, _HOLDER_MS)
        found.append(Counted(scope, "runs", rule))
    if limits.cost_per_day_usd is not None:
        most = nanodollars_of(limits.cost_per_day_usd)
        rule = Rule(f"{scope}/{name}/cost", most, DAY_MS, 300_000, 30_000)
        found.append(Counted(scope, "cost", rule, most // _MONEY_BLOCKS))
    return tuple(found)


def end_user_name(key_id: str, end_user: str) -> str:
    """Return what an end user of a key is called among the counters: who it is stays out of the store."""
    return f"{key_id}/{hashlib.sha256(end_user.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def nanodollars_of(usd: float) -> int:
    """Return an amount in nanodollars."""
    return int((Decimal(repr(usd)) * NANO).to_integral_value(ROUND_CEILING))


def nanodollars_of_pico(picodollars: int) -> int:
    """Return a cost in nanodollars, rounded up."""
    return -(-picodollars // 1_000)


def _per_minute(scope: Scope, name: str, measure: Measure, limit: int) -> Counted:
    key = f"{scope}/{name}/{measure}"
    if limit <= EXACT_UP_TO:
        return Counted(scope, measure, Rule(key, limit, MINUTE_MS))
    return Counted(scope, measure, Rule(key, limit, MINUTE_MS, 500, 500), limit // _BLOCKS)
