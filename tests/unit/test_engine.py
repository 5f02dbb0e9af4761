"""Every run ends, is recorded once, and stops its executor when its caller stops."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec.structs import replace

from gateway.chat import decode_body, decode_chat
from gateway.errors import GatewayError, RunTimedOut, ShuttingDown, UpstreamError
from gateway.events import RunEvent, RunFinished, TextDelta, Usage
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.run import Run
from gateway.runs.engine import RunEngine

BODY = b'{"model":"default/x","messages":[{"role":"user","content":"hi"}]}'
RUN = Run(
    id=uuid.UUID(int=7),
    request_id="req-1",
    principal=Principal("p", "k", ("*",)),
    model="default/x",
    request=decode_chat(BODY, decode_body(BODY)),
    streamed=True,
    created=1700000000,
    deadline_s=5,
)


class Scripted:
    """An executor that yields what it is told, then does what it is told."""

    def __init__(self, events: list[RunEvent], then: Callable[[], object] | None = None) -> None:
        self.events = events
        self.then = then
        self.closed = asyncio.Event()

    async def execute(self, run: Run) -> AsyncIterator[RunEvent]:
        try:
            for event in self.events:
                yield event
            if self.then is not None:
                result = self.then()
                if asyncio.iscoroutine(result):
                    await result
        finally:
            self.closed.set()


async def drive(executor: Scripted, run: Run = RUN) -> tuple[list[RunEvent], RunEngine, BaseException | None]:
    engine, seen = RunEngine(Metrics()), list[RunEvent]()

    async def sink(event: RunEvent) -> None:
        seen.append(event)

    try:
        await engine.execute(run, executor, sink)
    except Exception as error:
        return seen, engine, error
    return seen, engine, None


def test_events_arrive_in_order_and_success_leaves_no_error() -> None:
    events: list[RunEvent] = [TextDelta("a"), TextDelta("b"), RunFinished("stop", Usage(1, 2, requests=1))]
    seen, engine, error = asyncio.run(drive(Scripted(events)))
    assert (seen, error) == (events, None)
    assert engine.recent_errors.list_errors() == ()


def test_a_failure_comes_out_unchanged_and_is_recorded() -> None:
    def fail() -> None:
        raise UpstreamError("the upstream said no")

    seen, engine, error = asyncio.run(drive(Scripted([TextDelta("a")], fail)))
    assert seen == [TextDelta("a")]
    assert isinstance(error, UpstreamError)
    record = engine.recent_errors.list_errors()[0]
    assert (record.message, record.request_id, record.agent_id) == ("the upstream said no", "req-1", "default/x")
    assert record.details["code"] == "upstream_error"


def test_an_unexpected_failure_is_recorded_without_its_text() -> None:
    def fail() -> None:
        raise ValueError("canary-text")

    _, engine, error = asyncio.run(drive(Scripted([], fail)))
    assert isinstance(error, ValueError)
    assert "canary-text" not in repr(engine.recent_errors.list_errors())


def test_a_run_past_its_deadline_is_stopped_and_closed() -> None:
    async def main() -> None:
        executor = Scripted([TextDelta("a")], lambda: asyncio.Event().wait())
        _, engine, error = await drive(executor, replace(RUN, deadline_s=0.02))
        assert isinstance(error, RunTimedOut)
        assert (error.status, error.should_retry) == (504, False)
        assert executor.closed.is_set()
        assert engine.recent_errors.list_errors()[0].details["code"] == "run_timeout"

    asyncio.run(main())


def test_a_time_out_of_the_authors_own_is_not_mistaken_for_the_deadline() -> None:
    def fail() -> None:
        raise TimeoutError

    _, _, error = asyncio.run(drive(Scripted([], fail)))
    assert isinstance(error, TimeoutError)
    assert not isinstance(error, GatewayError)


def test_cancelling_the_caller_closes_the_executor_first() -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def hang() -> None:
            entered.set()
            await asyncio.Event().wait()

        executor = Scripted([], hang)
        task = asyncio.create_task(drive(executor))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert executor.closed.is_set()

    asyncio.run(main())


def test_draining_tells_the_runs_that_do_not_end_in_time() -> None:
    async def main() -> tuple[BaseException, BaseException, bool]:
        engine, never = RunEngine(Metrics()), Scripted([TextDelta("a")], lambda: asyncio.Event().wait())
        begun = asyncio.Event()

        async def sink(event: RunEvent) -> None:
            begun.set()

        live = asyncio.ensure_future(engine.execute(RUN, never, sink))
        await begun.wait()
        engine.drain(0.05)
        late = asyncio.ensure_future(engine.execute(RUN, Scripted([], lambda: asyncio.Event().wait()), sink))
        first, second = await asyncio.gather(live, late, return_exceptions=True)
        assert isinstance(first, BaseException) and isinstance(second, BaseException)
        return first, second, never.closed.is_set()

    live, late, closed = asyncio.run(main())
    assert isinstance(live, ShuttingDown) and isinstance(late, ShuttingDown) and closed
    assert (live.status, live.type, live.code) == (503, "service_unavailable_error", "shutting_down")
    assert live.retry_after_s is not None


def test_a_run_that_ends_while_the_gateway_drains_is_not_cut() -> None:
    async def main() -> list[RunEvent]:
        engine, seen, go = RunEngine(Metrics()), list[RunEvent](), asyncio.Event()

        async def sink(event: RunEvent) -> None:
            seen.append(event)
            if not go.is_set():
                engine.drain(30)
                go.set()

        await engine.execute(RUN, Scripted([TextDelta("a"), RunFinished("stop", None)]), sink)
        return seen

    assert asyncio.run(main()) == [TextDelta("a"), RunFinished("stop", None)]
