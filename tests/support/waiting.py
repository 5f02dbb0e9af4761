"""Wait for a condition, bounded: the only way tests wait for another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], *, timeout_s: float = 10.0, every_s: float = 0.02, what: str = "") -> T:
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
