"""The port of the counters: what is asked of a store in one exchange, and what it answers.

A counter either counts what was taken in a sliding window (``window_ms`` > 0) or what is held at one time (0). Amounts
are whole numbers: requests, tokens, runs, nanodollars; below 2**53, as Redis counts in doubles. Times are milliseconds
by the store's own clock, so that replicas need not agree on theirs.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

SCARCE = 8
"""A block is granted while this many of them are left; less than that, and only what is needed is."""


class LimitStoreDown(Exception):
    """The store did not answer; nothing is known of what it counted."""


class Rule(Struct, frozen=True):
    """One limit. ``key`` names the counter; the rest may change from one exchange to the next.

    What was taken counts until ``slot_ms + window_ms + hold_ms`` after the start of its slot: an amount is booked with
    the slot in which it was taken, and may be used up to ``hold_ms`` later. Of what is held, ``hold_ms`` is how long a
    holder may be silent before its share is free again.
    """

    key: str
    limit: int
    window_ms: int
    slot_ms: int = 1
    hold_ms: int = 0

    @property
    def lifetime_ms(self) -> int:
        """How long after the start of its slot an amount counts."""
        return self.slot_ms + self.window_ms + self.hold_ms


class Ask(Struct, frozen=True):
    """Wants ``amount`` of a counter, or ``block`` where plenty is left. An amount of 0 asks whether anything is."""

    rule: Rule
    amount: int
    block: int = 0


class Change(Struct, frozen=True):
    """Changes a counter in any case: below 0 gives back what was taken in ``slot``, above 0 counts beyond the limit."""

    rule: Rule
    amount: int
    slot: int = 0


class Renewal(Struct, frozen=True):
    """Says that the holder is alive and holds ``amount`` of a counter."""

    rule: Rule
    amount: int


class Batch(Struct, frozen=True):
    """One exchange: changes, then renewals, then groups in their order. Of a group all is granted, or nothing."""

    holder: str
    groups: tuple[tuple[Ask, ...], ...] = ()
    changes: tuple[Change, ...] = ()
    renewals: tuple[Renewal, ...] = ()

    def rules(self) -> dict[str, Rule]:
        """Return every rule of the batch by its key."""
        found = {ask.rule.key: ask.rule for group in self.groups for ask in group}
        found.update((change.rule.key, change.rule) for change in self.changes)
        found.update((renewal.rule.key, renewal.rule) for renewal in self.renewals)
        return found


class Grant(Struct, frozen=True):
    """``amount`` was taken in ``slot``; ``used`` counts now, and the oldest of it is free in ``reset_ms``."""

    amount: int
    slot: int
    used: int
    reset_ms: int


class Refusal(Struct, frozen=True):
    """The ask number ``index`` of a group does not fit before ``wait_ms`` have passed (below 0: never)."""

    index: int
    used: int
    wait_ms: int


class Answer(Struct, frozen=True):
    """What became of each group, and what counts after each change; both in order."""

    groups: tuple[tuple[Grant, ...] | Refusal, ...]
    totals: tuple[int, ...] = ()


class LimitStore(Protocol):
    """Counters that any number of processes may share."""

    @property
    def name(self) -> str:
        """What logs and metrics call it."""
        ...

    async def exchange(self, batch: Batch) -> Answer:
        """Apply a batch, atomically. Raises `LimitStoreDown`."""
        ...
