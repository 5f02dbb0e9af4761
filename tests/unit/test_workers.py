"""The channel between workers and their supervisor: calls both ways, failures as words, no end that hangs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.errors import ConfigError, GatewayError, RateLimited, StoreUnavailable, UpstreamRejected
from gateway.observability.metrics import Metrics
from gateway.observability.totals import Changes
from gateway.upstreams.table import UnknownUpstream
from gateway.workers.failures import Failure
from gateway.workers.hub import Hub
from gateway.workers.peer import CallFailed, Peer
from gateway.workers.sending import send_metrics
from gateway.workers.workers import WorkerReply, Workers, shared_failure


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Peer, Peer]]:
    ends = [Peer(end) for end in socket.socketpair()]
    for end in ends:
        await end.open()
    tasks = [asyncio.create_task(end.run()) for end in ends]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()
        await asyncio.wait(tasks, timeout=60)


async def workers_of(hub: Hub, count: int) -> tuple[list[Workers], list[Peer], list[asyncio.Task[None]]]:
    """Connect as many workers to a hub; they live until their tasks are cancelled."""
    workers, tops, tasks = [], [], []
    for slot in range(count):
        above, below = (Peer(end) for end in socket.socketpair())
        await above.open()
        await below.open()
        tasks += [asyncio.create_task(above.run()), asyncio.create_task(below.run())]
        hub.prepare(above)
        hub.attach(slot, 100 + slot, above)
        workers.append(Workers(slot, count, below))
        tops.append(above)
    return workers, tops, tasks


async def stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=60)


def test_calls_go_both_ways_and_failures_come_back_as_words() -> None:
    async def double(value: int) -> int:
        return value * 2

    async def refuse(_: object) -> None:
        raise ConfigError("tools.yaml:3: say what to do")

    async def crash(_: object) -> None:
        raise ZeroDivisionError("secret")

    async def work() -> None:
        async with pair() as (left, right):
            left.handle("double", double)
            right.handle("double", double)
            right.handle("refuse", refuse)
            right.handle("crash", crash)
            assert await left.call("double", 2, timeout_s=60) == 4
            assert await right.call("double", 3, timeout_s=60) == 6
            with pytest.raises(CallFailed, match="say what to do") as refused:
                await left.call("refuse", timeout_s=60)
            assert refused.value.failure is not None
            assert type(refused.value.failure.error()) is ConfigError
            with pytest.raises(CallFailed, match="ZeroDivisionError") as caught:
                await left.call("crash", timeout_s=60)
            assert "secret" not in str(caught.value)
            with pytest.raises(CallFailed, match="nothing answers to 'unknown'"):
                await left.call("unknown", timeout_s=60)

    asyncio.run(work())


def test_a_call_ends_when_the_other_side_hangs_or_goes() -> None:
    async def hang(_: object) -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        async with pair() as (left, right):
            right.handle("hang", hang)
            with pytest.raises(CallFailed, match="no answer within"):
                await left.call("hang", timeout_s=0.05)
            waiting = asyncio.create_task(left.call("hang", timeout_s=30))
            await asyncio.sleep(0.01)
            right.close()
            with pytest.raises(CallFailed, match="gone"):
                await asyncio.wait_for(waiting, 60)
            with pytest.raises(CallFailed, match="gone"):
                await left.call("hang", timeout_s=60)

    asyncio.run(work())


def test_everywhere_asks_all_and_names_the_one_that_failed() -> None:
    async def work() -> None:
        hub = Hub()
        workers, tops, tasks = await workers_of(hub, 3)

        def answer(slot: int) -> None:
            async def who(value: str) -> str:
                if slot == 1:
                    raise ConfigError("not here")
                return f"{value}{slot}"

            workers[slot].handle("who", who)

        for slot in range(3):
            answer(slot)
        replies = await workers[2].everywhere("who", "w", timeout_s=60)
        assert [(r.slot, r.pid, r.value, r.error) for r in replies] == [
            (0, 100, "w0", None),
            (1, 101, None, "not here"),
            (2, 102, "w2", None),
        ]
        hub.detach(0, tops[0])
        assert [r.slot for r in await workers[2].everywhere("who", "w", timeout_s=60)] == [1, 2]
        await stop(tasks)

    asyncio.run(work())


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("The database does not answer.", retry_after_s=2),
        ConfigError("tools.yaml:3: say what to do"),
        RateLimited("Slow down.", param="model", retry_after_s=0.5),
        UpstreamRejected("Not so.", code="context_length_exceeded", status=422, should_retry=False),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_what_it_is_between_processes(error: GatewayError) -> None:
    async def refuse(_: object) -> None:
        raise error

    async def work() -> None:
        hub = Hub()
        workers, _, tasks = await workers_of(hub, 2)
        for worker in workers:
            worker.handle("refuse", refuse)
        found = shared_failure(await workers[0].everywhere("refuse", timeout_s=60))
        assert found is not None
        assert type(found) is type(error)
        for name in ("message", "status", "type", "code", "param", "retry_after_s", "should_retry"):
            assert getattr(found, name) == getattr(error, name), name
        await stop(tasks)

    asyncio.run(work())


def test_an_error_of_a_class_from_elsewhere_is_the_nearest_that_all_know() -> None:
    found = Failure.of(UnknownUpstream("There is no upstream 'x'.")).error()
    assert (type(found), found.code) == (ConfigError, "configuration_error")


def test_what_only_some_workers_say_is_no_error_of_all() -> None:
    down, wrong = Failure.of(StoreUnavailable("down")), Failure.of(ConfigError("wrong"))
    did = WorkerReply(0, 1, value="x")
    assert shared_failure([did, WorkerReply(1, 2, error="down", failure=down)]) is None
    assert shared_failure([WorkerReply(0, 1, error="wrong", failure=wrong), WorkerReply(1, 2, error="down")]) is None
    assert shared_failure([]) is None
    crashed = shared_failure([WorkerReply(0, 1, error="it failed (KeyError)"), WorkerReply(1, 2, error="it failed")])
    assert (type(crashed), crashed and crashed.status) == (GatewayError, 500)


def test_a_lone_worker_answers_itself() -> None:
    async def work() -> None:
        alone = Workers()

        async def refuse(_: object) -> None:
            raise ConfigError("wrong")

        alone.handle("refuse", refuse)
        (reply,) = await alone.everywhere("refuse")
        assert (reply.slot, reply.error) == (0, "wrong")
        with pytest.raises(CallFailed):
            await alone.ask_supervisor("metrics.render")

    asyncio.run(work())


def test_any_worker_shows_the_numbers_of_all_as_they_are_now() -> None:
    async def work() -> None:
        hub = Hub()
        workers, _, tasks = await workers_of(hub, 2)
        owned = []
        for worker in workers:
            metrics = Metrics()
            owned.append(metrics)
            tasks.append(asyncio.create_task(send_metrics(worker, Changes(metrics), every_s=60)))
        await asyncio.sleep(0.01)
        for metrics in owned:
            metrics.error("caller", "not_found")
        shown = await workers[0].ask_supervisor("metrics.render", False, timeout_s=60)
        assert b'agent_gateway_errors_total{code="not_found",domain="caller"} 2.0' in shown
        assert (await workers[1].ask_supervisor("metrics.summary", timeout_s=60))["total_requests"] == 0
        await stop(tasks)

    asyncio.run(work())
