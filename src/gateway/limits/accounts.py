"""Account: one counter as one process sees it, with what the process has leased of it."""

from __future__ import annotations

import time

from msgspec import Struct

from gateway.limits.port import Ask, Change, Grant, Renewal
from gateway.limits.rules import Counted, Measure

_LEASE_SHARE = 0.9
"""A lease is given up before it ends at the store, by this share of its time."""


class Standing(Struct, frozen=True):
    """How far a caller is from one of its limits, as the answer's headers say."""

    measure: Measure
    limit: int
    remaining: int
    reset_ms: int

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers, as OpenAI spells them."""
        limit, remaining, reset = _HEADERS[self.measure]
        return (limit, b"%d" % self.limit), (remaining, b"%d" % self.remaining), (reset, duration(self.reset_ms))


_HEADERS: dict[Measure, tuple[bytes, bytes, bytes]] = {
    "requests": (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests"),
    "tokens": (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens"),
}


def duration(milliseconds: int) -> bytes:
    """Return a time as OpenAI's headers have it: ``850ms``, ``12.5s``, ``6m0s``."""
    if milliseconds < 1_000:
        return b"%dms" % max(milliseconds, 0)
    if milliseconds < 60_000:
        return b"%gs" % (milliseconds / 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return b"%dm%gs" % (minutes, rest / 1000)


class Account:
    """Counts for one limit, from the event loop alone.

    ``held`` is what runs of this process hold of a counter of runs. ``used`` and ``reset_ms`` are as the store said
    when it was asked last.
    """

    __slots__ = ("_available", "_slot", "_until", "counted", "held", "reset_ms", "used")

    def __init__(self, counted: Counted) -> None:
        self.counted = counted
        self.held = 0
        self.used = 0
        self.reset_ms = 0
        self._available = 0
        self._slot = 0
        self._until = 0.0

    @property
    def remaining(self) -> int:
        """What is left, as far as this process knows."""
        return max(self.counted.rule.limit - self.used + self._available, 0)

    def standing(self) -> Standing:
        """Return how far the caller is from this limit, as far as this process knows."""
        return Standing(self.counted.measure, self.counted.rule.limit, self.remaining, self.reset_ms)

    @property
    def leased(self) -> int:
        """What this process has leased and not used."""
        return self._available

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held or leased."""
        return not (self.held or self._available)

    def draw(self, amount: int) -> int | None:
        """Take an amount of what is leased; return its slot, or None where that is not enough."""
        if self._available < (amount or 1) or time.monotonic() >= self._until:
            return None
        self._available -= amount
        return self._slot

    def ask(self, amount: int, *, is_asked: bool = False) -> Ask:
        """Return what to ask the store for: a block, unless the same batch asks for one already."""
        return Ask(self.counted.rule, amount, 0 if is_asked else self.counted.block)

    def granted(self, grant: Grant, amount: int, sent_at: float) -> Change | None:
        """Take note of a grant for ``amount``; return what is to be given back of an earlier lease."""
        self.used, self.reset_ms = grant.used, grant.reset_ms
        if self.counted.measure == "runs":
            self.held += amount
            return None
        if grant.amount <= amount:
            return None
        rest = self.lapse(even_if_valid=True)
        self._available, self._slot = grant.amount - amount, grant.slot
        self._until = sent_at + self.counted.rule.hold_ms * _LEASE_SHARE / 1000
        return rest

    def give(self, amount: int, slot: int) -> Change | None:
        """Give an amount back: to the lease where it still is one, else return the change for the store."""
        if self.counted.measure == "runs":
            self.held -= amount
        elif slot == self._slot and time.monotonic() < self._until:
            self._available += amount
            return None
        return Change(self.counted.rule, -amount, slot)

    def charge(self, amount: int) -> Change | None:
        """Count an amount beyond what was taken before: of the lease, and the rest at the store."""
        if time.monotonic() < self._until:
            part = min(self._available, amount)
            self._available -= part
            amount -= part
        return Change(self.counted.rule, amount) if amount else None

    def lapse(self, *, even_if_valid: bool = False) -> Change | None:
        """End the lease if its time is over; return what is to be given back."""
        if not self._available or not (even_if_valid or time.monotonic() >= self._until):
            return None
        rest, self._available = self._available, 0
        return Change(self.counted.rule, -rest, self._slot)

    def renewal(self) -> Renewal | None:
        """Return what keeps this process's runs counted; None where it has none."""
        return Renewal(self.counted.rule, self.held) if self.held else None
