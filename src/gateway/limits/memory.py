"""Counters of one process alone: exact, a few microseconds for each call, gone with the process."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.limits.book import Book
from gateway.limits.port import Answer, Ask, Batch, Change, Grant, Refusal, Rule

_SWEEP_AFTER = 4_096
"""Counters, after which those that count nothing are looked for; doubled while they are all in use."""


def monotonic_ms() -> int:
    """Return milliseconds that never go back."""
    return time.monotonic_ns() // 1_000_000


class MemoryLimits:
    """The in-process store (`gateway.limits.port.LimitStore`)."""

    name = "memory"

    def __init__(self, clock: Callable[[], int] = monotonic_ms) -> None:
        self._book = Book()
        self._clock = clock
        self._rules: dict[str, Rule] = {}
        self._sweep_at = _SWEEP_AFTER

    def take(self, group: tuple[Ask, ...], holder: str = "") -> tuple[Grant, ...] | Refusal:
        """Take all that a group asks for, or nothing."""
        for ask in group:
            if self._rules.get(ask.rule.key) is not ask.rule:
                self._remember(ask.rule)
        return self._book.take(group, self._clock(), holder)

    def change(self, change: Change, holder: str = "") -> None:
        """Change a counter in any case."""
        if self._rules.get(change.rule.key) is not change.rule:
            self._remember(change.rule)
        self._book.change(change, self._clock(), holder)

    def apply(self, batch: Batch) -> Answer:
        """Apply a batch."""
        for key, rule in batch.rules().items():
            if self._rules.get(key) is not rule:
                self._remember(rule)
        return self._book.apply(batch, self._clock())

    async def exchange(self, batch: Batch) -> Answer:
        """See `LimitStore.exchange`."""
        return self.apply(batch)

    def _remember(self, rule: Rule) -> None:
        self._rules[rule.key] = rule
        if len(self._rules) > self._sweep_at:
            self._book.sweep(self._rules, self._clock())
            self._rules = {key: self._rules[key] for key in self._book.counters}
            self._rules[rule.key] = rule
            self._sweep_at = max(_SWEEP_AFTER, 2 * len(self._rules))
