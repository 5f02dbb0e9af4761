"""Flights: one call that several runs read, each at its own pace, for as long as anybody wants its answer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from gateway.errors import ShuttingDown
from gateway.events import RelayedBody, RelayedChunk, RelayEnded, RunEvent

_LAST = (RelayedBody, RelayEnded)
_STOPPED = ShuttingDown("The gateway is shutting down; send the request again in a moment.", retry_after_s=1)


class Flight:
    """Events of one call, produced by a task of its own and kept for those who come later.

    Past ``limit_bytes`` nobody can join any more, nothing is kept, and the call waits for its slowest reader. The task
    ends with its last reader, unless the answer is complete: then it may finish what it does with it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._history: list[RunEvent] | None = []
        self._size = 0
        self._readers: list[Reader] = []
        self._drained = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._paid = False
        self.complete = False
        self.ended = False
        self.error: Exception | None = None

    @property
    def is_joinable(self) -> bool:
        """Whether another reader would see every event."""
        return self._history is not None and self.error is None

    def start(self, source: AsyncGenerator[RunEvent, None], ended: Callable[[], None]) -> asyncio.Task[None]:
        """Begin the call; ``ended`` is called when it is over, however it went."""

        def finish(task: asyncio.Task[None]) -> None:
            self._end(_STOPPED if task.cancelled() else None)
            ended()

        self._task = asyncio.create_task(self._fly(source))
        self._task.add_done_callback(finish)
        return self._task

    def join(self) -> Reader:
        """Return a reader of all events; its `events` must be iterated, or closed."""
        assert self._history is not None, "the flight can be joined"
        reader = Reader(self, self._history)
        self._readers.append(reader)
        return reader

    async def _fly(self, source: AsyncGenerator[RunEvent, None]) -> None:
        try:
            async with aclosing(source):
                async for event in source:
                    await self._put(event)
        except Exception as error:  # noqa: BLE001 - whatever it is, every reader raises it
            self._end(error)
        self._end(None)

    async def _put(self, event: RunEvent) -> None:
        size = size_of(event)
        self._size += size
        if self._history is not None:
            self._history.append(event)
            if self._size > self._limit:
                self._history = None
        self.complete = self.complete or isinstance(event, _LAST)
        for reader in self._readers:
            reader.take(event, size)
        while self._history is None and any(reader.behind > self._limit for reader in self._readers):
            self._drained.clear()
            await self._drained.wait()

    def _end(self, error: Exception | None) -> None:
        if self.ended:
            return
        self.ended, self.error = True, error
        for reader in self._readers:
            reader.wake()

    # Called by readers.

    def claims_cost(self, reader: Reader) -> bool:
        """Whether a reader that has the last event is the one whose run the call is charged to."""
        if self._paid or self._readers[0] is not reader:
            return False
        self._paid = True
        return True

    def drained(self) -> None:
        """Note that a reader went on."""
        self._drained.set()

    async def leave(self, reader: Reader) -> None:
        """Note that a reader wants no more; the last one ends the call before this returns."""
        self._readers.remove(reader)
        self._drained.set()
        task = self._task
        if not self._readers and not self.complete and task is not None and not task.done():
            self._history = None
            task.cancel()
            await asyncio.wait((task,))


class Reader:
    """One run's view of a flight."""

    def __init__(self, flight: Flight, history: list[RunEvent]) -> None:
        self._flight = flight
        self._waiting = deque(history)
        self._news = asyncio.Event()
        self.behind = sum(map(size_of, history))

    def claims_cost(self) -> bool:
        """Whether the call is charged to this run; asked once, with the last event in hand."""
        return self._flight.claims_cost(self)

    async def events(self) -> AsyncGenerator[RunEvent, None]:
        """Yield every event; raise what the call raised."""
        flight, waiting = self._flight, self._waiting
        try:
            while True:
                while waiting:
                    event = waiting.popleft()
                    self.behind -= size_of(event)
                    flight.drained()
                    yield event
                    if isinstance(event, _LAST):
                        return
                if flight.ended:
                    if flight.error is not None:
                        raise flight.error
                    return
                self._news.clear()
                await self._news.wait()
        finally:
            await flight.leave(self)

    # Called by the flight.

    def take(self, event: RunEvent, size: int) -> None:
        """Keep an event for the run."""
        self._waiting.append(event)
        self.behind += size
        self._news.set()

    def wake(self) -> None:
        """Tell the run that nothing more comes."""
        self._news.set()


def size_of(event: RunEvent) -> int:
    """Return the bytes of an event's answer."""
    return len(event.data) if isinstance(event, RelayedChunk | RelayedBody) else 0
