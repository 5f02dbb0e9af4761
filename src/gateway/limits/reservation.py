"""Reservation: what one run holds of its caller's limits, from admission to its end.

Worst cases are reserved before a model call, and replaced by what was used after it; what nobody settled is given back
when the run ends, however it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from gateway.errors import RateLimited
from gateway.events import Usage
from gateway.limits.accounts import Account, Standing
from gateway.limits.rules import Measure, nanodollars_of_pico

OF_CALLS: tuple[Measure, ...] = ("tokens", "cost")
"""What model calls use; the rest is a run's."""


class Estimate(Struct, frozen=True):
    """The most that a model call may use: tokens read and written, and their cost in nanodollars (0: no price).

    ``is_promised``: the request itself limits what is written. Where it does not, a default stands in, and a limit
    below it does not refuse what may well be short.
    """

    tokens: int = 0
    nanodollars: int = 0
    is_promised: bool = True


NOTHING = Estimate()
"""Asks only whether anything is left."""


class Part(Struct, frozen=True):
    """An amount that was taken of one account."""

    account: Account
    amount: int
    slot: int


class Ledger(Protocol):
    """The part of the limiter that a run needs."""

    async def take(self, wants: Sequence[tuple[Account, int]], key_id: str) -> list[Part]:
        """Take all of it, or nothing; raises `RateLimited`, `BudgetExhausted` or `ServiceUnavailable`."""
        ...

    def give_back(self, parts: Sequence[Part]) -> None:
        """Give back what was taken and not used."""
        ...

    def settle(self, part: Part, used: int) -> None:
        """Replace what was reserved by what was used."""
        ...

    def charge(self, account: Account, used: int) -> None:
        """Count what was used without a reservation."""
        ...

    def spent(self, account: Account, nanodollars: int) -> None:
        """Take note of what was really spent."""
        ...


class CallHold:
    """What one model call has reserved; `settle` or `release` it once, from the event loop of the limiter."""

    __slots__ = ("_accounts", "_is_open", "_ledger", "_parts")

    def __init__(self, ledger: Ledger, accounts: Sequence[Account], parts: Sequence[Part]) -> None:
        self._ledger = ledger
        self._accounts = accounts
        self._parts = {part.account.counted.rule.key: part for part in parts}
        self._is_open = True

    def settle(self, usage: Usage) -> None:
        """Replace the worst case by what was used."""
        if not self._is_open:
            return
        self._is_open = False
        cost = nanodollars_of_pico(usage.cost or 0)
        for account in self._accounts:
            is_money = account.counted.measure == "cost"
            used = cost if is_money else usage.total_tokens
            part = self._parts.get(account.counted.rule.key)
            if part is not None:
                self._ledger.settle(part, used)
            else:
                self._ledger.charge(account, used)
            if is_money:
                self._ledger.spent(account, cost)

    def release(self) -> None:
        """Give back everything; nothing happens after `settle`."""
        if self._is_open:
            self._is_open = False
            self._ledger.give_back(list(self._parts.values()))


class Reservation:
    """What a run holds: ``held`` while it is under way, ``used`` for its first model call.

    ``accounts`` are those that model calls use. ``standings`` are as they were when it was admitted.
    """

    __slots__ = ("_accounts", "_calls", "_held", "_key_id", "_ledger", "standings")

    def __init__(
        self,
        ledger: Ledger,
        key_id: str,
        accounts: Sequence[Account],
        held: Sequence[Part],
        used: Sequence[Part],
        standings: tuple[Standing, ...],
    ) -> None:
        self._ledger, self._key_id, self._accounts = ledger, key_id, accounts
        self._held = held
        self._calls = [CallHold(ledger, accounts, used)] if accounts else []
        self.standings = standings

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The ``x-ratelimit-…`` headers of the answer."""
        headers: tuple[tuple[bytes, bytes], ...] = ()
        for standing in self.standings:
            headers += standing.headers()
        return headers

    async def reserve_call(self, estimate: Estimate, *, patience_s: float = 0.0) -> CallHold:
        """Reserve for one more model call; waits up to ``patience_s`` for tokens to come free.

        Raises `RateLimited`, `BudgetExhausted` or `ServiceUnavailable`; none of them is worth a retry, because the
        run may have acted by now.
        """
        ends_at = time.monotonic() + patience_s
        wants = [(account, _amount(account, estimate)) for account in self._accounts]
        while True:
            try:
                parts = await self._ledger.take(wants, self._key_id)
                break
            except RateLimited as error:
                wait_s = error.retry_after_s
                if wait_s is None or time.monotonic() + wait_s >= ends_at:
                    raise
            await asyncio.sleep(wait_s)
        call = CallHold(self._ledger, self._accounts, parts)
        self._calls.append(call)
        return call

    def settle(self, usage: Usage) -> None:
        """Replace the worst case that was reserved at admission by what the run's one model call used."""
        if self._calls:
            self._calls[0].settle(usage)

    def end(self) -> None:
        """Give back what is still held; call it however the run ended."""
        if self._held:
            held, self._held = self._held, ()
            self._ledger.give_back(held)
        for call in self._calls:
            call.release()


def wants_of(accounts: Sequence[Account], estimate: Estimate) -> list[tuple[Account, int]]:
    """Return what a run needs of each account to be admitted."""
    return [
        (account, 1 if account.counted.measure in ("requests", "runs") else _amount(account, estimate))
        for account in accounts
    ]


def _amount(account: Account, estimate: Estimate) -> int:
    amount = estimate.nanodollars if account.counted.measure == "cost" else estimate.tokens
    return amount if estimate.is_promised else min(amount, account.counted.rule.limit)
