"""Wait for a condition, bounded: the only way tests wait for another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 60.0
"""Long enough for a machine that is busy with other things; what comes in time costs nothing of it."""


def in_time(work: Callable[[], float], limit_s: float, *, tries: int = 6) -> None:
    """Fail unless ``work`` says once that it took at most ``limit_s``: the machine may be busy in some of its tries."""
    took: list[float] = []
    while not took or min(took) > limit_s:
        assert len(took) < tries, f"not within {limit_s:g} s in {tries} tries: {[round(one, 3) for one in took]}"
        took.append(work())


def wait_for(condition: Callable[[], T], *, timeout_s: float = PATIENCE_S, every_s: float = 0.02, what: str = "") -> T:
    """Return the first truthy value of ``condition``; fail naming ``what`` when ``timeout_s`` have passed.

    An `AssertionError` raised by the condition means "not yet", so that a condition may assert.
    """
    deadline = time.monotonic() + timeout_s
    last: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            last = value
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            name = what or getattr(condition, "__name__", "the condition")
            raise AssertionError(f"still not so after {timeout_s:g} s: {name}; last seen: {last!r}"[:4000])
        time.sleep(every_s)
