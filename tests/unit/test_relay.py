"""Relay: the judged request goes out, the upstream's answer comes back under the gateway's name."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from msgspec.structs import replace

from api.errors import error_response
from gateway.chat import CHAT_PATH, decode_body, decode_chat, decode_model, decode_relay
from gateway.errors import GatewayError, UpstreamError, UpstreamIncomplete
from gateway.events import RelayedBody, RelayedChunk, RelayedHead, RelayEnded, RunEvent, Usage
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.run import Run
from gateway.runs.relay import RelayExecutor
from gateway.upstreams.table import ModelBinding
from gateway.usage.meter import Meter
from gateway.usage.prices import PriceRow, PriceTable
from tests.support.scripted_answers import LAST, STREAM_HEAD, Answer, Call, chunk, sse, status
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.upstream_calls import UPSTREAM_KEY, connected

USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
COUNTED = Usage(input_tokens=11, output_tokens=7, cached_input_tokens=3, reasoning_tokens=2, requests=1)


@pytest.fixture
def scripted() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as upstream:
        yield upstream


def run_of(body: bytes, path: str = CHAT_PATH) -> Run:
    fields = decode_body(body)
    request = decode_relay(decode_model(fields), fields, path)
    return Run(
        id=uuid.uuid4(),
        request_id="req-1",
        principal=Principal("p", "k", ("*",)),
        model=request.model,
        request=request,
        streamed=request.stream,
        created=0,
        deadline_s=60,
    )


def relay(scripted: ScriptedUpstream, passthrough_keys: tuple[str, ...] = (), **fields: Any) -> list[RunEvent]:
    body = {"model": "up/m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return relay_bytes(scripted, json.dumps(body).encode(), passthrough_keys)


def relay_bytes(scripted: ScriptedUpstream, body: bytes, passthrough_keys: tuple[str, ...] = ()) -> list[RunEvent]:
    async def main() -> list[RunEvent]:
        async with connected(scripted.base_url, passthrough_keys=passthrough_keys) as upstream:
            return [event async for event in RelayExecutor(ModelBinding(upstream, "real-m")).execute(run_of(body))]

    events = asyncio.run(main())
    assert isinstance(events[0], RelayedHead)
    return events[1:]


@pytest.mark.parametrize("streamed", [False, True])
def test_ids_and_limits_of_the_upstream_go_out_under_names_of_their_own(
    scripted: ScriptedUpstream, streamed: bool
) -> None:
    given = {
        "x-request-id": "req_up",
        "x-ratelimit-remaining-tokens": "17",
        "openai-processing-ms": "3",
        "x-upstream-secret": "no",
        "set-cookie": "no",
        "x-ratelimit-odd": "caf\u00e9",
    }
    head = STREAM_HEAD.replace(
        b"\r\n\r\n", "".join(f"\r\n{k}: {v}" for k, v in given.items()).encode("latin-1") + b"\r\n\r\n"
    )
    steps = [head, *sse(chunk({"content": "x"}, "stop")), *sse(b"[DONE]"), LAST]
    scripted.enqueue(Answer(steps=lambda _: steps) if streamed else Answer(text="x", headers=given))

    async def main() -> list[RunEvent]:
        body = json.dumps({"model": "up/m", "messages": [], "stream": streamed}).encode()
        async with connected(scripted.base_url) as upstream:
            events = RelayExecutor(ModelBinding(upstream, "real-m")).execute(run_of(body))
            return [event async for event in events]

    first = asyncio.run(main())[0]
    assert isinstance(first, RelayedHead)
    assert dict(first.headers) == {
        b"x-upstream-request-id": b"req_up",
        b"x-upstream-ratelimit-remaining-tokens": b"17",
        b"x-upstream-processing-ms": b"3",
    }


@pytest.mark.parametrize("code", [400, 413, 422, 429])
def test_an_error_object_stays_as_it_was_but_for_the_types_of_its_fields(scripted: ScriptedUpstream, code: int) -> None:
    said = {"message": f"no, {UPSTREAM_KEY}", "type": "odd_type", "param": "p", "code": 7, "extra": {"a": [1]}}
    scripted.enqueue(Answer(status=code, body={"error": said}, headers={"retry-after": "3", "x-request-id": "req_up"}))
    with pytest.raises(GatewayError) as caught:
        relay(scripted)
    answer = error_response(caught.value)
    assert answer.status == code
    assert json.loads(answer.body) == {"error": said | {"message": "no, ***", "code": "7"}}
    assert dict(answer.headers)[b"x-upstream-request-id"] == b"req_up"
    assert (b"retry-after" in dict(answer.headers)) == (code == 429)


@pytest.mark.parametrize(("code", "expected"), [(401, 502), (403, 502), (404, 502), (500, 502), (503, 503)])
def test_what_is_not_the_clients_fault_is_mapped(scripted: ScriptedUpstream, code: int, expected: int) -> None:
    scripted.enqueue(Answer(status=code, body={"error": {"message": "canary", "type": "canary", "x": 1}}))
    with pytest.raises(GatewayError) as caught:
        relay(scripted)
    answer = error_response(caught.value)
    assert answer.status == expected
    assert "x" not in json.loads(answer.body)["error"]


def chunks_of(events: list[RunEvent]) -> list[Any]:
    return [json.loads(event.data) for event in events if isinstance(event, RelayedChunk)]


def test_plain_answer(scripted: ScriptedUpstream) -> None:
    scripted.enqueue(Answer(text="Hello", usage=USAGE, extra={"x_vendor": {"a": [1]}}))
    (event,) = relay(scripted, top_k=5, chat_template_kwargs={"enable_thinking": False}, stream_options=None)
    assert isinstance(event, RelayedBody)
    assert (event.finish_reason, event.usage) == ("stop", COUNTED)
    answer = json.loads(event.data)
    assert (answer["model"], answer["x_vendor"]) == ("up/m", {"a": [1]})
    assert answer["choices"][0]["message"]["content"] == "Hello"
    sent = scripted.requests[0]
    assert sent.json == {
        "model": "real-m",
        "messages": [{"role": "user", "content": "Hi"}],
        "top_k": 5,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert sent.headers["x-request-id"] == "req-1"


def test_fields_go_out_as_they_came(scripted: ScriptedUpstream) -> None:
    """Numbers keep their digits and text its escapes: nothing is re-modelled."""
    relay_bytes(
        scripted,
        rb'{"m\u006fdel":"up/m","seed":1.0e2,"messages":[ {"content":"\u00e9 \/"} ],"big":12345678901234567890}',
    )
    sent = scripted.requests[0].body
    assert rb'[ {"content":"\u00e9 \/"} ]' in sent
    assert b'"seed":1.0e2' in sent
    assert b"12345678901234567890" in sent
    assert sent.count(b"model") == 1


def test_stream_without_usage_asked(scripted: ScriptedUpstream) -> None:
    scripted.enqueue(Answer(text="one two", reasoning="hm", usage=USAGE))
    events = relay(scripted, stream=True, stream_options={"include_obfuscation": False})
    assert events[-1] == RelayEnded("stop", COUNTED)
    chunks = chunks_of(events)
    assert all("usage" not in c and c["choices"] and c["model"] == "up/m" for c in chunks)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert {"reasoning_content": "hm"} in deltas
    assert "".join(d.get("content") or "" for d in deltas) == "one two"
    sent = scripted.requests[0].json
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_obfuscation": False, "include_usage": True}


def test_stream_with_usage_asked(scripted: ScriptedUpstream) -> None:
    scripted.enqueue(Answer(text="one", usage=USAGE))
    events = relay(scripted, stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(events)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], USAGE)
    assert all(c["usage"] is None for c in chunks[:-1])
    assert events[-1] == RelayEnded("stop", COUNTED)


def test_usage_on_the_last_content_chunk_gets_a_chunk_of_its_own(scripted: ScriptedUpstream) -> None:
    stream = [STREAM_HEAD, *sse(chunk({"content": "x"}), chunk({}, "length", usage=USAGE), b"[DONE]"), LAST]
    scripted.enqueue(Answer(steps=lambda streamed: stream), Answer(steps=lambda streamed: stream))
    events = relay(scripted, stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(events)
    assert [c["usage"] for c in chunks] == [None, None, USAGE]
    assert chunks[-1]["choices"] == []
    assert {c["id"] for c in chunks} == {"chatcmpl-scripted"}
    assert events[-1] == RelayEnded("length", COUNTED)
    assert all("usage" not in c for c in chunks_of(relay(scripted, stream=True)))


def test_foreign_top_level_keys_never_reach_the_client(scripted: ScriptedUpstream) -> None:
    extra = {"event": "x", "type": "response.x", "selected_model_id": "secret", "timings": {"ms": 1}, "error": None}
    scripted.enqueue(Answer(text="a", extra=extra), Answer(text="a", extra=extra))
    foreign = extra.keys() - {"timings"}
    strict = chunks_of(relay(scripted, stream=True))
    assert not any(c.keys() & extra.keys() for c in strict)
    lenient = chunks_of(relay(scripted, ("timings", "error"), stream=True))
    assert all(c["timings"] == {"ms": 1} and not c.keys() & foreign for c in lenient)


def test_frames_that_are_no_chunks_are_dropped(scripted: ScriptedUpstream) -> None:
    stream = [STREAM_HEAD, *sse({"status": "loading"}, chunk({"content": "x"}, "stop"), {}, b"[DONE]"), LAST]
    scripted.enqueue(Answer(steps=lambda streamed: stream))
    assert len(chunks_of(relay(scripted, stream=True, stream_options={"include_usage": True}))) == 1


def test_tool_calls_pass(scripted: ScriptedUpstream) -> None:
    scripted.enqueue(*[Answer(calls=[Call("f", {"a": 1}), Call("g")], usage=None)] * 2)
    (whole,) = relay(scripted)
    assert isinstance(whole, RelayedBody)
    assert whole.finish_reason == "tool_calls"
    assert whole.usage is not None and whole.usage.estimated
    events = relay(scripted, stream=True, stream_options={"include_usage": True})
    assert isinstance(events[-1], RelayEnded) and events[-1].finish_reason == "tool_calls"
    parts = [c["choices"][0]["delta"].get("tool_calls") for c in chunks_of(events)]
    assert {part[0]["index"] for part in parts if part} == {0, 1}


@pytest.mark.parametrize(
    "usage", [{}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}, {"prompt_tokens": 10**18}, [], 7]
)
def test_odd_usage_is_replaced_by_an_estimate(scripted: ScriptedUpstream, usage: Any) -> None:
    scripted.enqueue(Answer(text="x", usage=usage))
    (event,) = relay(scripted)
    assert isinstance(event, RelayedBody)
    assert event.usage is not None and event.usage.estimated


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_estimated_where_the_upstream_gives_none(scripted: ScriptedUpstream, streamed: bool) -> None:
    scripted.enqueue(Answer(text="twelve chars", usage=None))
    event = relay(scripted, stream=streamed)[-1]
    assert isinstance(event, RelayedBody | RelayEnded)
    assert event.usage is not None
    assert (event.usage.estimated, event.usage.output_tokens, event.usage.requests) == (True, 3, 1)
    assert event.usage.input_tokens == len(scripted.requests[-1].body) // 4


def test_a_delta_of_an_odd_shape_passes(scripted: ScriptedUpstream) -> None:
    odd = {**chunk({}), "choices": [{"index": 0, "delta": [], "finish_reason": "length"}]}
    scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *sse(odd, b"[DONE]"), LAST]))
    events = relay(scripted, stream=True)
    assert chunks_of(events)[0]["choices"] == odd["choices"]
    assert isinstance(events[-1], RelayEnded) and events[-1].finish_reason == "length"


def test_an_answer_that_is_cut_is_charged(scripted: ScriptedUpstream) -> None:
    metrics = Metrics()
    meter = Meter(PriceTable([PriceRow(match="*", input=1, output=1)]), metrics)
    scripted.enqueue(fault("no_finish_reason"))

    async def main() -> bytes:
        async with connected(scripted.base_url) as upstream:
            run = run_of(b'{"model":"up/m","messages":[],"stream":true}')
            with pytest.raises(UpstreamIncomplete):
                [event async for event in RelayExecutor(ModelBinding(upstream, "m"), meter=meter).execute(run)]
        return b"".join([piece async for piece in metrics.render()])

    labels = b'{operation_name="chat",provider_name="up",request_model="up/m"} '
    assert b"gen_ai_client_cost_total" + labels in asyncio.run(main())


@pytest.mark.parametrize("streamed", [False, True])
def test_failures_pass_through(scripted: ScriptedUpstream, streamed: bool) -> None:
    scripted.enqueue(status(500), fault("no_finish_reason"))
    with pytest.raises(UpstreamError, match="500"):
        relay(scripted, stream=streamed)
    with pytest.raises(UpstreamIncomplete):
        relay(scripted, stream=streamed)


def test_leaving_closes_the_upstream(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(Answer(text="one two", gate=scripted.gate()))
            run = run_of(b'{"model":"up/m","messages":[],"stream":true}')
            async with aclosing(RelayExecutor(ModelBinding(upstream, "m")).execute(run)) as events:  # type: ignore[type-var]
                await anext(events)
            await asyncio.to_thread(scripted.wait_closed, 1, 1)

    asyncio.run(main())


def test_only_relayed_requests_are_served(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            body = b'{"model":"up/m","messages":[{"role":"user","content":"hi"}]}'
            run = replace(run_of(body), request=decode_chat(body, decode_body(body)))
            with pytest.raises(GatewayError):
                await anext(RelayExecutor(ModelBinding(upstream, "m")).execute(run))

    asyncio.run(main())
