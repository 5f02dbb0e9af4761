"""A queue for one streamed run, at a tenth of the memory of `asyncio.Queue`.

The SDK gives each streamed run two queues, which are nearly always empty: 8 KB of empty deques for each open stream.
"""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar

from agents import RunResultStreaming

T = TypeVar("T")

_READ_TOGETHER = 512


class LeanQueue(Generic[T]):
    """What the SDK uses of `asyncio.Queue`; it has no bound."""

    __slots__ = ("_drained", "_head", "_items", "_readers", "_unfinished")

    def __init__(self) -> None:
        self._items: list[T] = []
        self._head = 0
        """Where the first item is that was not read; those before it go away together."""
        self._unfinished = 0
        self._readers: list[asyncio.Future[None]] = []
        self._drained: list[asyncio.Future[None]] = []

    def empty(self) -> bool:
        """Return whether nothing waits to be read."""
        return not self._items

    def put_nowait(self, item: T) -> None:
        """Append an item, and wake a reader."""
        self._items.append(item)
        self._unfinished += 1
        self._wake_a_reader()

    async def get(self) -> T:
        """Wait for an item and take it."""
        while not self._items:
            reader = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            try:
                await reader
            except asyncio.CancelledError:
                if reader in self._readers:
                    self._readers.remove(reader)
                elif self._items:
                    self._wake_a_reader()  # it was woken, and does not come
                raise
        return self.get_nowait()

    def get_nowait(self) -> T:
        """Take an item; raise `asyncio.QueueEmpty` where there is none."""
        if not self._items:
            raise asyncio.QueueEmpty
        item = self._items[self._head]
        self._head += 1
        if self._head == len(self._items) or self._head == _READ_TOGETHER:
            del self._items[: self._head]
            self._head = 0
        return item

    def task_done(self) -> None:
        """Note that an item was dealt with; raise `ValueError` for one too many."""
        if not self._unfinished:
            raise ValueError("task_done() called too many times")
        self._unfinished -= 1
        if not self._unfinished and self._drained:
            _wake(self._drained)

    async def join(self) -> None:
        """Wait until every item was dealt with."""
        while self._unfinished:
            drained = asyncio.get_running_loop().create_future()
            self._drained.append(drained)
            await drained

    def _wake_a_reader(self) -> None:
        if self._readers:
            _wake([self._readers.pop(0)])


def lighten(result: RunResultStreaming) -> RunResultStreaming:
    """Give a streamed run that has not begun its queues."""
    run: Any = result
    run._event_queue, run._input_guardrail_queue = LeanQueue(), LeanQueue()
    return result


def _wake(waiting: list[asyncio.Future[None]]) -> None:
    for one in waiting:
        if not one.done():
            one.set_result(None)
    waiting.clear()
