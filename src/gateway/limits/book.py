"""Book: the counting itself, on plain values; the in-process store keeps one, the SQL store reads one per exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.limits.port import SCARCE, Answer, Ask, Batch, Change, Grant, Refusal, Rule

_ASK_AGAIN_MS = 1_000
"""When something that is held will be free, nobody knows."""


class Window:
    """What was taken, by the start of its slot; the oldest first."""

    __slots__ = ("slots", "total")

    def __init__(self, slots: Mapping[int, int] | None = None) -> None:
        self.slots: dict[int, int] = dict(slots or {})
        self.total = sum(self.slots.values())

    def expire(self, rule: Rule, now: int) -> None:
        """Forget what no longer counts."""
        slots, before = self.slots, now - rule.lifetime_ms
        while slots:
            first = next(iter(slots))
            if first > before:
                return
            self.total -= slots.pop(first)

    def add(self, rule: Rule, now: int, amount: int, holder: str) -> int:
        """Count an amount; return the slot it stands in."""
        slots = self.slots
        slot = now - now % rule.slot_ms
        if slots and (last := next(reversed(slots))) > slot:
            slot = last  # the clock went back
        if amount:
            slots[slot] = slots.get(slot, 0) + amount
            self.total += amount
        return slot

    def give_back(self, slot: int, amount: int, holder: str) -> None:
        """Take an amount out of its slot again, if that still counts."""
        there = self.slots.get(slot, 0)
        given = min(there, amount)
        if given:
            self.total -= given
            if given == there:
                del self.slots[slot]
            else:
                self.slots[slot] = there - given

    def reset_ms(self, rule: Rule, now: int) -> int:
        """Return how long the oldest amount still counts."""
        return next(iter(self.slots)) + rule.lifetime_ms - now if self.slots else 0

    def wait_ms(self, rule: Rule, now: int, amount: int) -> int:
        """Return when ``amount`` will fit, if nobody takes more; below 0 if it never does."""
        if amount > rule.limit:
            return -1
        missing = self.total + amount - rule.limit
        for slot, taken in self.slots.items():
            missing -= taken
            if missing <= 0:
                return slot + rule.lifetime_ms - now
        return 0

    def state(self) -> Any:
        """Return what `counter_of` makes the counter of again."""
        return {"slots": list(self.slots.items())}


class Gauge:
    """What is held, by holder, and until when each is believed."""

    __slots__ = ("holders", "total")

    def __init__(self, holders: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.holders: dict[str, tuple[int, int]] = dict(holders or {})
        self.total = sum(amount for amount, _ in self.holders.values())

    def expire(self, rule: Rule, now: int) -> None:
        """Forget holders that have been silent for too long."""
        for holder in [name for name, (_, until) in self.holders.items() if until <= now]:
            self.total -= self.holders.pop(holder)[0]

    def add(self, rule: Rule, now: int, amount: int, holder: str) -> int:
        """Hold more."""
        held, _ = self.holders.get(holder, (0, 0))
        self.set(rule, now, held + amount, holder)
        return 0

    def set(self, rule: Rule, now: int, amount: int, holder: str) -> None:
        """Hold exactly ``amount``."""
        self.total += amount - self.holders.pop(holder, (0, 0))[0]
        if amount:
            self.holders[holder] = (amount, now + rule.hold_ms)

    def give_back(self, slot: int, amount: int, holder: str) -> None:
        """Hold less."""
        held, until = self.holders.pop(holder, (0, 0))
        left = max(held - amount, 0)
        self.total += left - held
        if left:
            self.holders[holder] = (left, until)

    def reset_ms(self, rule: Rule, now: int) -> int:
        """See `Window.reset_ms`; of what is held, nobody knows."""
        return 0

    def wait_ms(self, rule: Rule, now: int, amount: int) -> int:
        """See `Window.wait_ms`."""
        return -1 if amount > rule.limit else _ASK_AGAIN_MS

    def state(self) -> Any:
        """See `Window.state`."""
        return {"holders": {holder: list(held) for holder, held in self.holders.items()}}


Counter = Window | Gauge


def counter_of(rule: Rule, state: Any = None) -> Counter:
    """Return the counter of a rule, new or from its `state`."""
    state = state or {}
    if rule.window_ms:
        return Window(dict(state.get("slots", ())))
    return Gauge({holder: (amount, until) for holder, (amount, until) in state.get("holders", {}).items()})


class Book:
    """Counters by key."""

    def __init__(self) -> None:
        self.counters: dict[str, Counter] = {}

    def apply(self, batch: Batch, now: int) -> Answer:
        """Apply a batch at the moment ``now`` (ms)."""
        totals = [self.change(change, now, batch.holder) for change in batch.changes]
        for renewal in batch.renewals:
            counter = self._counter(renewal.rule, now)
            if isinstance(counter, Gauge):
                counter.set(renewal.rule, now, renewal.amount, batch.holder)
        groups = tuple(self.take(group, now, batch.holder) for group in batch.groups)
        return Answer(groups, tuple(totals))

    def change(self, change: Change, now: int, holder: str) -> int:
        """Change a counter in any case; return what counts now."""
        counter = self._counter(change.rule, now)
        if change.amount < 0:
            counter.give_back(change.slot, -change.amount, holder)
        else:
            counter.add(change.rule, now, change.amount, holder)
        return counter.total

    def take(self, group: tuple[Ask, ...], now: int, holder: str) -> tuple[Grant, ...] | Refusal:
        """Take all that a group asks for, or nothing; the first ask that does not fit is the reason."""
        counters = []
        for index, ask in enumerate(group):
            counter = self._counter(ask.rule, now)
            wanted = ask.amount or 1
            if counter.total + wanted > ask.rule.limit:
                return Refusal(index, counter.total, counter.wait_ms(ask.rule, now, wanted))
            counters.append(counter)
        grants = []
        for ask, counter in zip(group, counters, strict=True):
            plenty = ask.block > ask.amount and ask.rule.limit - counter.total >= SCARCE * ask.block
            amount = ask.block if plenty else ask.amount
            slot = counter.add(ask.rule, now, amount, holder)
            grants.append(Grant(amount, slot, counter.total, counter.reset_ms(ask.rule, now)))
        return tuple(grants)

    def sweep(self, rules: Mapping[str, Rule], now: int) -> None:
        """Forget the counters that count nothing any more; ``rules`` are those they were last used with."""
        for key in list(self.counters):
            counter = self.counters[key]
            counter.expire(rules[key], now)
            if not counter.total:
                del self.counters[key]

    def _counter(self, rule: Rule, now: int) -> Counter:
        counter = self.counters.get(rule.key)
        if counter is None:
            counter = self.counters[rule.key] = counter_of(rule)
        counter.expire(rule, now)
        return counter
