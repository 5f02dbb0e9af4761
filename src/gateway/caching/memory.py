"""MemoryStore: answers in this process, bounded in bytes and entries; the least recently used go first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from gateway.caching.config import MemoryLimits
from gateway.caching.entry import Entry


class MemoryStore:
    """Used from the event loop only; every call is immediate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = MemoryLimits()
        self.bytes = 0
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, Entry]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Entry | None:
        """Return an answer that is still good."""
        found = self._kept.get(key)
        if found is None:
            return None
        until, entry = found
        if until <= self._clock():
            self.drop(key)
            return None
        self._kept.move_to_end(key)
        return entry

    def put(self, key: str, entry: Entry, ttl_s: float) -> None:
        """Keep an answer; one that is larger than everything may be is not kept."""
        self.drop(key)
        if entry.size > self.limits.max_bytes:
            return
        self._kept[key] = self._clock() + ttl_s, entry
        self.bytes += entry.size
        self.shrink()

    def drop(self, key: str) -> None:
        """Forget an answer."""
        found = self._kept.pop(key, None)
        if found is not None:
            self.bytes -= found[1].size

    def shrink(self) -> None:
        """Forget what is too much for the limits."""
        while self.bytes > self.limits.max_bytes or len(self._kept) > self.limits.max_entries:
            self.drop(next(iter(self._kept)))
