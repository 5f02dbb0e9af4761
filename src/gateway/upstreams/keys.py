"""The keys of one upstream: used in turn, and put aside for a while when the upstream refuses or limits one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.observability.logs import log_event

REFUSED_S = 300.0
"""Seconds a key that got 401 or 403 is put aside."""

LIMITED_S = 10.0
"""Seconds a key that got 429 is put aside where the upstream does not say how long."""

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class UpstreamKey:
    """One key. ``number`` counts from 0 in the order of the configuration; only the number is ever logged."""

    number: int
    value: str
    aside_until: float = 0.0

    def __repr__(self) -> str:
        return f"UpstreamKey(number={self.number})"


class UpstreamKeys:
    """Hands out keys round-robin. When every key is put aside, the one that is back soonest serves all the same."""

    def __init__(self, upstream: str, values: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._upstream = upstream
        self._keys = [UpstreamKey(number, value) for number, value in enumerate(values)]
        self._next = 0
        self._clock = clock

    @property
    def values(self) -> tuple[str, ...]:
        """Every key, for masking."""
        return tuple(key.value for key in self._keys)

    def take(self) -> UpstreamKey | None:
        """Return the key for the next request; None for an upstream without keys."""
        count = len(self._keys)
        if count < 2:
            return self._keys[0] if self._keys else None
        now = self._clock()
        for step in range(count):
            key = self._keys[(self._next + step) % count]
            if key.aside_until <= now:
                self._next = (key.number + 1) % count
                return key
        return min(self._keys, key=lambda key: key.aside_until)

    def answered(self, key: UpstreamKey | None, status: int, retry_after_s: float | None) -> None:
        """Note what the upstream said to a request with ``key``."""
        if key is None or len(self._keys) < 2:
            return
        if status in (401, 403):
            self._put_aside(key, status, REFUSED_S)
        elif status == 429:
            self._put_aside(key, status, retry_after_s or LIMITED_S)

    def _put_aside(self, key: UpstreamKey, status: int, seconds: float) -> None:
        key.aside_until = self._clock() + seconds
        log_event(
            _LOG,
            "upstream.key.aside",
            level=logging.WARNING,
            message=f"Key {key.number} of the upstream '{self._upstream}' is put aside for {seconds:g} s ({status}).",
            upstream=self._upstream,
            key_number=key.number,
            status=status,
            seconds=round(seconds, 1),
        )
