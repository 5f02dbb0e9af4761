"""Deadlines: many absolute times, one timer of the event loop.

A timer for each run and each phase of an upstream call would cost more than the work it guards, and hardly one of them
ever fires. Here one timer waits for the earliest time known; whoever is done before is simply not found by it.
"""

from __future__ import annotations

import asyncio
from typing import Generic, Protocol, TypeVar


class Watched(Protocol):
    """Something that must not outlast a time; ``due`` is on the clock of the event loop and may change."""

    due: float

    def expire(self) -> None:
        """Is called once ``due`` has passed; by then it is no longer watched."""
        ...


W = TypeVar("W", bound=Watched)


class Deadlines(Generic[W]):
    """The watched things of one event loop."""

    __slots__ = ("_at", "_loop", "_timer", "watched")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.watched: set[W] = set()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._at = float("inf")

    def now(self) -> float:
        """Return the present time on the clock of ``due``."""
        return self._loop.time()

    def watch(self, item: W) -> None:
        """Call `Watched.expire` when ``item.due`` has passed, unless it is forgotten before."""
        self.watched.add(item)
        if item.due < self._at:
            self._arm(item.due)

    def forget(self, item: W) -> None:
        """Watch no longer; for what is not watched, do nothing."""
        self.watched.discard(item)

    def advance(self, due: float) -> None:
        """Note that a watched thing is now due earlier than it was; a later time needs no word."""
        if due < self._at:
            self._arm(due)

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer, self._at = None, float("inf")
        now = self._loop.time()
        late = [item for item in self.watched if item.due <= now]
        self.watched.difference_update(late)
        for item in late:
            item.expire()
        if self.watched:
            self.advance(min(item.due for item in self.watched))
