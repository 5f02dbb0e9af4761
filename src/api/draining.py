"""SIGTERM and SIGINT: runs that are live get a moment to end, the rest are told; a server alone waits for ever."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def draining(begin: Callable[[], None]) -> Iterator[None]:
    """Call ``begin`` on the running loop when the process is asked to end, then let the server do what it does.

    The server has its handlers in place before it starts an application, and hears of the end of that only when the
    last connection has closed. A signal that nobody handles, or a loop outside the main thread, is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}
    ours: dict[int, Any] = {}
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and handler is not signal.default_int_handler:
            before[number], ours[number] = handler, _before(handler, loop, begin)
            signal.signal(number, ours[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is ours[number]:
                signal.signal(number, handler)


def _before(
    handler: Callable[[int, FrameType | None], Any], loop: asyncio.AbstractEventLoop, begin: Callable[[], None]
) -> Callable[[int, FrameType | None], Any]:
    def handle(number: int, frame: FrameType | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(begin)
        handler(number, frame)

    return handle
