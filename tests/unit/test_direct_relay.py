"""The short way of a relay says what the events say, keeps the pace of both sides, and is recorded like any run."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.chat import decode_body, decode_relay
from gateway.errors import GatewayError, RunTimedOut, UpstreamIncomplete, UpstreamTimeout
from gateway.events import RelayedBody, RelayedChunk, RelayedHead, RelayEnded, Routed, RunEvent
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.run import RelayedAnswer, Run
from gateway.runs.engine import RunEngine
from gateway.runs.relay import RelayExecutor
from gateway.upstreams.config import Limits, Timeouts
from gateway.upstreams.table import ModelBinding
from tests.support.scripted_answers import LAST, STREAM_HEAD, Answer, chunk, frame
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.upstream_calls import connected, until


def event(payload: bytes | dict[str, Any]) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


A, B, C = (event(chunk({"content": text})) for text in "abc")
STOP, DONE = event(chunk({}, "stop")), event(b"[DONE]")
USAGE = event({"id": "1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
ERROR = event({"error": {"message": "broken", "type": "server_error"}})


class Client:
    """An outlet that keeps what it is given, and takes no more when told."""

    def __init__(self) -> None:
        self.on_ready: Callable[[], None] | None = None
        self.pushes: list[list[bytes]] = []
        self.takes_more = True
        self.begun: list[tuple[Routed | None, RelayedHead]] = []

    def begin(self, routed: Routed | None, head: RelayedHead) -> None:
        self.begun.append((routed, head))

    def push(self, chunks: list[bytes]) -> bool:
        self.pushes.append(chunks)
        return self.takes_more

    @property
    def chunks(self) -> list[bytes]:
        return list(itertools.chain.from_iterable(self.pushes))

    @property
    def text(self) -> str:
        choices = [choice for data in self.chunks for choice in json.loads(data)["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.fixture
def scripted() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as upstream:
        yield upstream


def run_of(*, stream: bool, usage: bool = False, deadline_s: float = 30) -> Run:
    body = {"model": "up/m", "messages": [], "stream": stream}
    if usage:
        body["stream_options"] = {"include_usage": True}
    fields = decode_body(json.dumps(body).encode())
    request = decode_relay("up/m", fields)
    return Run(
        id=uuid.uuid4(),
        request_id="req-1",
        principal=Principal("p", "k", ("*",)),
        model="up/m",
        request=request,
        streamed=stream,
        created=0,
        deadline_s=deadline_s,
    )


def ignored() -> None:
    return None


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_a_stream_has_the_chunks_and_the_end_of_its_events(
    scripted: ScriptedUpstream, usage: bool, together: bool
) -> None:
    parts = [A, B, C, STOP, USAGE, DONE]
    steps = [STREAM_HEAD, *map(frame, [b"".join(parts)] if together else parts), LAST]

    async def main() -> None:
        run, client = run_of(stream=True, usage=usage), Client()
        async with connected(scripted.base_url) as upstream:
            executor = RelayExecutor(ModelBinding(upstream, "m"))
            scripted.enqueue(Answer(steps=lambda _: steps), Answer(steps=lambda _: steps))
            events: list[RunEvent] = [event async for event in executor.execute(run)]
            ended = await executor.pipe(run, client, ignored)
        assert client.chunks == [event.data for event in events if isinstance(event, RelayedChunk)]
        assert [ended] == [event for event in events if isinstance(event, RelayEnded)]
        assert client.text == "abc"
        assert len(client.begun) == 1

    asyncio.run(main())


def test_events_that_arrive_together_leave_together(scripted: ScriptedUpstream) -> None:
    """Each in a chunk of HTTP of its own, as servers send them: a busy gateway finds several in one read."""
    gate = scripted.gate()
    together = b"".join(map(frame, [B, C, STOP, DONE])) + LAST

    async def main() -> None:
        run, client = run_of(stream=True), Client()
        async with connected(scripted.base_url) as upstream:
            executor = RelayExecutor(ModelBinding(upstream, "m"))
            scripted.enqueue(Answer(steps=lambda _: [STREAM_HEAD, frame(A), gate.event, together]))
            piping = asyncio.ensure_future(executor.pipe(run, client, ignored))
            await until(lambda: bool(client.pushes))
            gate.open()
            await piping
        assert [len(chunks) for chunks in client.pushes] == [1, 3]
        assert client.text == "abc"

    asyncio.run(main())


def test_a_whole_answer_is_that_of_its_events(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        run = run_of(stream=False)
        async with connected(scripted.base_url) as upstream:
            executor = RelayExecutor(ModelBinding(upstream, "m"))
            scripted.enqueue(Answer(text="x"), Answer(text="x"))
            head, body = [event async for event in executor.execute(run)]
            answer = await executor.answer(run)
        assert isinstance(body, RelayedBody)
        assert answer == RelayedAnswer(None, head, answer.body)
        assert (answer.body.finish_reason, answer.body.usage) == (body.finish_reason, body.usage)
        assert json.loads(answer.body.data)["choices"] == json.loads(body.data)["choices"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("ending", "failure"),
    [
        ([frame(B + ERROR)], GatewayError),
        ([frame(B), "close"], UpstreamIncomplete),
        ([frame(B + DONE), LAST], UpstreamIncomplete),
    ],
)
def test_what_came_before_a_failure_is_sent_before_it(
    scripted: ScriptedUpstream, ending: list[Any], failure: type[GatewayError]
) -> None:
    async def main() -> None:
        client, engine = Client(), RunEngine(Metrics())
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(Answer(steps=lambda _: [STREAM_HEAD, frame(A), *ending]))
            with pytest.raises(failure) as caught:
                await engine.pipe(run_of(stream=True), RelayExecutor(ModelBinding(upstream, "m")), client)
        assert client.text == "ab"
        assert caught.value.is_relayed
        assert len(engine.recent_errors.list_errors()) == 1

    asyncio.run(main())


def test_a_slow_client_slows_the_upstream_down_and_nothing_is_lost(scripted: ScriptedUpstream) -> None:
    count, text = 3_000, "x" * 10_000

    def flood(streamed: bool) -> Iterator[Any]:
        yield STREAM_HEAD
        payload = frame(event(chunk({"content": text})))
        for _ in range(count):
            yield payload
        yield from (frame(STOP), frame(DONE), LAST)

    async def main() -> None:
        client = Client()
        async with connected(
            scripted.base_url, limits=Limits(stream_bytes=1 << 40), timeouts=Timeouts(idle_s=1)
        ) as upstream:
            scripted.enqueue(Answer(steps=flood))
            executor = RelayExecutor(ModelBinding(upstream, "m"))
            client.takes_more = False
            piping = asyncio.ensure_future(executor.pipe(run_of(stream=True), client, ignored))
            await until(lambda: bool(client.pushes))
            exchange = next(iter(upstream._transport._active))
            await until(lambda: exchange.paused)
            held = len(client.chunks)
            await asyncio.sleep(1.5)  # longer than the upstream may be silent: it is not to blame
            assert len(client.chunks) == held
            assert held * len(text) < 1024 * 1024
            client.takes_more = True
            assert client.on_ready is not None
            client.on_ready()
            await asyncio.wait_for(piping, 60)
        assert len(client.text) == count * len(text)

    asyncio.run(main())


def test_a_silent_upstream_is_cut_in_the_middle(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        client = Client()
        async with connected(scripted.base_url, timeouts=Timeouts(idle_s=0.2)) as upstream:
            scripted.enqueue(Answer(steps=lambda _: [STREAM_HEAD, frame(A), "hang"]))
            with pytest.raises(UpstreamTimeout, match=r"no event for 0\.2 s"):
                await RelayExecutor(ModelBinding(upstream, "m")).pipe(run_of(stream=True), client, ignored)
        assert client.text == "a"
        scripted.wait_closed(1)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_past_its_deadline_ends_and_so_does_its_call(scripted: ScriptedUpstream, stream: bool) -> None:
    async def main() -> None:
        engine = RunEngine(Metrics())
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(Answer(steps=lambda _: [STREAM_HEAD, frame(A), "hang"] if stream else ["hang"]))
            executor, run = RelayExecutor(ModelBinding(upstream, "m")), run_of(stream=stream, deadline_s=0.2)
            with pytest.raises(RunTimedOut):
                await (engine.pipe(run, executor, Client()) if stream else engine.answer(run, executor))
        await asyncio.to_thread(scripted.wait_closed, 1)
        assert engine.recent_errors.list_errors()[0].details["code"] == "run_timeout"
        assert not engine.deadlines.watched

    asyncio.run(main())


def test_a_finished_stream_gives_its_connection_back(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            executor = RelayExecutor(ModelBinding(upstream, "m"))
            for _ in range(3):
                scripted.enqueue(Answer(steps=lambda _: [STREAM_HEAD, frame(A + STOP + DONE), LAST]))
                await executor.pipe(run_of(stream=True), Client(), ignored)
                await until(lambda: upstream._transport.idle_connections == 1)
        assert {request.connection for request in scripted.requests} == {scripted.requests[0].connection}

    asyncio.run(main())
