"""The queue of a streamed run behaves as `asyncio.Queue` does, and weighs a tenth."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from agents import Agent, RunConfig
from agents.testing import ScriptedModel, assistant_message

from sdk_adapter.queues import LeanQueue
from sdk_adapter.runner import GatewayRunner

Queue = asyncio.Queue[int] | LeanQueue[int]
both = pytest.mark.parametrize("make", [asyncio.Queue, LeanQueue])


@both
def test_items_come_out_in_order_however_they_went_in(make: Any) -> None:
    async def run() -> list[int]:
        queue: Queue = make()
        seen: list[int] = []

        async def read() -> None:
            while (item := await queue.get()) >= 0:
                seen.append(item)

        reader = asyncio.create_task(read())
        for item in range(3_000):
            queue.put_nowait(item)
            if item % 700 == 0:
                await asyncio.sleep(0)
        queue.put_nowait(-1)
        await reader
        assert queue.empty()
        with pytest.raises(asyncio.QueueEmpty):
            queue.get_nowait()
        return seen

    assert asyncio.run(run()) == list(range(3_000))


@both
def test_an_item_is_not_lost_with_the_reader_that_it_woke(make: Any) -> None:
    async def run() -> tuple[int, bool]:
        queue: Queue = make()
        first, second = asyncio.create_task(queue.get()), asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.put_nowait(1)
        first.cancel()
        return await second, first.cancelled()

    assert asyncio.run(run()) == (1, True)


@both
def test_a_reader_that_stops_waiting_takes_nothing(make: Any) -> None:
    async def run() -> int:
        queue: Queue = make()
        first = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait((first,))
        queue.put_nowait(1)
        return await queue.get()

    assert asyncio.run(run()) == 1


@both
def test_join_waits_for_the_last_item_to_be_dealt_with(make: Any) -> None:
    async def run() -> None:
        queue: Queue = make()
        await queue.join()
        queue.put_nowait(1)
        queue.put_nowait(2)
        joined = asyncio.create_task(queue.join())
        for _ in range(2):
            await asyncio.sleep(0)
            assert not joined.done()
            await queue.get()
            queue.task_done()
        await joined
        with pytest.raises(ValueError, match="too many"):
            queue.task_done()

    asyncio.run(run())


def test_a_streamed_run_has_lean_queues_and_no_other() -> None:
    async def run() -> tuple[list[str], str]:
        agent = Agent(name="a", model=ScriptedModel([[assistant_message("hello")]]))
        runner = GatewayRunner(lambda: pytest.fail("no upstream is needed"))
        result = runner.run_streamed(agent, "hi", run_config=RunConfig(tracing_disabled=True))
        async for _ in result.stream_events():
            pass
        kinds = [type(value).__name__ for value in vars(result).values() if "Queue" in type(value).__name__]
        return kinds, result.final_output

    assert asyncio.run(run()) == (["LeanQueue", "LeanQueue"], "hello")


def test_an_empty_queue_is_small() -> None:
    queue: LeanQueue[int] = LeanQueue()
    parts = [queue, *(getattr(queue, name) for name in queue.__slots__)]
    assert sum(map(sys.getsizeof, parts)) < 500
