"""Calls of MCP clients that are under way, so that a notification that cancels one finds it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

CallId = tuple[str, str, str | int]
"""The caller's key, the client's session (a name it was given, nothing is kept under it), and its request."""


class McpCalls:
    """Owns nothing: it knows the tasks of calls while they run."""

    def __init__(self) -> None:
        self._running: dict[CallId, asyncio.Task[object]] = {}

    @contextmanager
    def running(self, call_id: CallId, task: asyncio.Task[object]) -> Iterator[None]:
        """Make a call known while the block runs; of two by one name, the later one."""
        self._running[call_id] = task
        try:
            yield
        finally:
            if self._running.get(call_id) is task:
                del self._running[call_id]

    def cancel(self, call_id: CallId) -> None:
        """End a call, if it is still under way."""
        task = self._running.get(call_id)
        if task is not None:
            task.cancel()
