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
            code, is_ours = _place(frame)
            found = _culprit(frame, code)
            log_event(
                _log,
                "loop.blocked",
                level=logging.WARNING,
                message=_words(found, is_ours=is_ours),
                after_s=BLOCKED_S,
                **found,
            )


def _words(found: dict[str, Any], *, is_ours: bool) -> str:
    if found["tool_name"]:
        who = f"the tool '{found['tool_name']}'"
    elif found["function"] == "<module>":
        who = f"the import of {found['module_path']}"
    else:
        who = f"{found['function']}()"
    if is_ours:
        return f"Nothing else is served while the gateway itself is busy with {who}"
    return f"Nothing else is served while {who} blocks the event loop: a plain 'def' runs beside it"


def _culprit(innermost: FrameType, code: FrameType) -> dict[str, Any]:
    """Return what runs at ``code``, and for which request as far as the frames of the task say so."""
    frame: FrameType | None = innermost
    found: dict[str, Any] = {
        "module_path": code.f_code.co_filename,
        "line": code.f_lineno,
        "function": code.f_code.co_qualname,
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


def _place(innermost: FrameType) -> tuple[FrameType, bool]:
    """Return the innermost frame that is an author's, else that of the gateway; and whether it is the gateway's.

    What started Python (``__main__``, frozen modules) is neither.
    """
    frame: FrameType | None = innermost
    ours: FrameType | None = None
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        if name.partition(".")[0] in _OURS:
            ours = ours or frame
        elif "/lib/python" not in file and not file.startswith("<") and name not in _STARTERS:
            return frame, False
        frame = frame.f_back
    return ours or innermost, True


_OURS = frozenset({"api", "gateway", "gateway_cli", "sdk_adapter"})
_STARTERS = frozenset({"__main__", "runpy"})
