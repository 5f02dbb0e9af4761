"""LoopWatch: how late the event loop is, and who holds it up.

A thread asks the loop for a sign of life four times a second. Where none comes in time, it looks at what the loop's
thread is doing and says so in the log: an agent's tool that computes or sleeps in an ``async def`` stalls everybody.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from gateway.observability.logs import LogContext, log_event
from gateway.observability.metrics import Metrics

BLOCKED_S = 0.5
_EVERY_S = 0.25
_log = logging.getLogger("gateway.loop")


@contextmanager
def watch_loop(metrics: Metrics) -> Iterator[None]:
    """Watch the running loop, which runs in this thread, inside ``with``."""
    watch = _LoopWatch(asyncio.get_running_loop(), threading.get_ident(), metrics)
    watch.start()
    try:
        yield
    finally:
        watch.stopping.set()


class _LoopWatch(threading.Thread):
    def __init__(self, loop: asyncio.AbstractEventLoop, thread_id: int, metrics: Metrics) -> None:
        super().__init__(name="loop-watch", daemon=True)
        self.stopping = threading.Event()
        self._loop, self._thread_id, self._metrics = loop, thread_id, metrics
        self._alive = threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(_EVERY_S):
            self._alive.clear()
            asked = time.perf_counter()
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._answer, asked)
                if not self._alive.wait(BLOCKED_S) and not self.stopping.is_set():
                    self._tell()
                    while not self._alive.wait(1) and not self.stopping.is_set():
                        pass

    def _answer(self, asked: float) -> None:
        self._metrics.loop_lag(time.perf_counter() - asked)
        self._alive.set()
        self._metrics.settle()

    def _tell(self) -> None:
        frame = sys._current_frames().get(self._thread_id)
        if frame is not None and not self._alive.is_set():
            found = _culprit(frame)
            who = f"the tool '{found['tool_name']}'" if found["tool_name"] else f"{found['function']}()"
            log_event(
                _log,
                "loop.blocked",
                level=logging.WARNING,
                message=f"Nothing else is served while {who} blocks the event loop: a plain 'def' runs beside it",
                after_s=BLOCKED_S,
                **found,
            )


def _culprit(innermost: FrameType) -> dict[str, Any]:
    """Return what runs, and for which request as far as the frames of the task say so."""
    frame: FrameType | None = innermost
    code = _authors(innermost)
    found: dict[str, Any] = {
        "module_path": code.f_code.co_filename,
        "line": code.f_lineno,
        "function": code.f_code.co_name,
        "agent_id": None,
        "tool_name": None,
        "caused_by": None,
    }
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if isinstance(value, LogContext):
                found.update(agent_id=value.agent_id, tool_name=value.tool_name, caused_by=value.request_id)
                return found
        frame = frame.f_back
    return found


def _authors(innermost: FrameType) -> FrameType:
    """Return the innermost frame that is neither a library's nor the gateway's own; else the innermost of all."""
    frame: FrameType | None = innermost
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if "/lib/python" not in frame.f_code.co_filename and name.partition(".")[0] not in _OURS:
            return frame
        frame = frame.f_back
    return innermost


_OURS = frozenset({"api", "gateway", "gateway_cli", "sdk_adapter", "asyncio", "uvloop"})
