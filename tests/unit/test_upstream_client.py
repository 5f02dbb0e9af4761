"""Upstream calls over a real socket: the whole fault list, the mapping of failures, bounded memory."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from gateway import errors
from gateway.upstreams.client import HttpUpstream
from gateway.upstreams.config import Limits, Timeouts
from tests.support.expected_failures import EXPECTED
from tests.support.scripted_answers import STREAM_HEAD, Answer, Call, sse, status
from tests.support.scripted_faults import FAULTS, fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.upstream_calls import (
    QUICK,
    UPSTREAM_KEY,
    UpstreamCalls,
    chat_request,
    collect,
    connected,
    each_loop,
    text_of,
)

MB = 1024 * 1024


@pytest.fixture
def scripted() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as upstream:
        yield upstream


# What works


def test_plain_and_streamed_answers(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        metrics = UpstreamCalls()
        async with connected(scripted.base_url, metrics=metrics) as upstream:
            scripted.enqueue(Answer(text="Hello there."), Answer(text="Hello there."))
            whole = json.loads(await upstream.chat(chat_request(), request_id="req-1"))
            chunks = await collect(upstream.chat_stream(chat_request(stream=True)))
        assert whole["choices"][0]["message"]["content"] == text_of(chunks) == "Hello there."
        assert metrics.seen == [("up", 200), ("up", 200)]

    each_loop(main)
    first, second = scripted.requests[:2]
    assert first.path == "/v1/chat/completions"
    assert first.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert first.headers["accept-encoding"] == "identity"
    assert first.headers["x-request-id"] == "req-1"
    assert second.headers["accept"] == "text/event-stream"
    assert first.connection == second.connection


def test_every_surface_of_the_scripted_upstream(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"city": {}}}}}
            calls = json.loads(await upstream.chat(chat_request('{"city": "Paris"}', tools=[tool])))
            assert calls["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":"Paris"}'
            embedded = json.loads(await upstream.post("/embeddings", b'{"model":"e","input":"x"}'))
            assert embedded["data"][0]["embedding"] == [0.25, -0.5]
            body = b'{"model":"scripted","input":"Hi"}'
            assert json.loads(await upstream.post("/responses", body))["status"] == "completed"
            events = await collect(upstream.stream("/responses", b'{"model":"scripted","input":"Hi","stream":true}'))
            assert [e["type"] for e in events][-1] == "response.completed"
            await upstream.probe()

    asyncio.run(main())


def test_parallel_calls_reasoning_refusal_and_other_ends_pass(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            for answer in (
                Answer(calls=[Call("a", {"x": 1}), Call("b")]),
                Answer(reasoning="hm hm", text="so"),
                Answer(refusal="no"),
                Answer(text="cut off", finish_reason="length"),
                Answer(text="", finish_reason="content_filter", usage=None),
                Answer(text="late", done=False),
            ):
                scripted.enqueue(answer, answer)
                whole = json.loads(await upstream.chat(chat_request()))["choices"][0]
                chunks = await collect(upstream.chat_stream(chat_request(stream=True)))
                ends = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]]
                assert ends == [whole["finish_reason"]]

    asyncio.run(main())


# What goes wrong


def test_every_fault_has_an_expectation() -> None:
    assert EXPECTED.keys() == FAULTS.keys()


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("name", EXPECTED)
def test_fault_is_an_error_in_time_and_in_little_memory(scripted: ScriptedUpstream, name: str, streamed: bool) -> None:
    # Endless answers are cut by size here, long before the deadline that cuts slow ones.
    slow = name in ("drip", "comments_only") or name.startswith("hang")
    timeouts = QUICK if slow else Timeouts(total_s=60, idle_s=60)

    async def main() -> tuple[BaseException, float]:
        async with connected(scripted.base_url, timeouts=timeouts) as upstream:
            scripted.enqueue(fault(name))
            started = time.monotonic()
            with pytest.raises(errors.GatewayError) as caught:
                await _ask(upstream, streamed)
            took = time.monotonic() - started
            assert upstream._transport.active_exchanges == 0
            # Other requests are unharmed.
            scripted.enqueue(Answer(text="fine"))
            assert b"fine" in await upstream.chat(chat_request())
            return caught.value, took

    error, took = asyncio.run(main())
    if name == "gzip_bomb":
        assert "compressed" in str(error)
    assert type(error) is EXPECTED[name][streamed], error
    assert took < 30, "cut by its size, long before its deadline"
    assert UPSTREAM_KEY not in str(error)
    assert "127.0.0.1" not in str(error)
    assert "'up'" in str(error) or name.startswith("error_object")
    if "hang" not in name and name not in ("error_object", "error_object_at_once", "error_object_json", "redirect"):
        scripted.wait_closed(1)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("name", ["huge_event", "endless_line", "endless_comment", "endless_headers", "gzip_bomb"])
def test_memory_stays_bounded(scripted: ScriptedUpstream, name: str, streamed: bool) -> None:
    async def main() -> int:
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(fault(name))
            tracemalloc.start()
            try:
                with pytest.raises(errors.UpstreamMalformed):
                    await _ask(upstream, streamed)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak = asyncio.run(main())
    assert peak < (20 if streamed else 40) * MB
    scripted.wait_closed(1)
    assert scripted.requests[0].sent_bytes < 32 * MB


@pytest.mark.parametrize(
    ("answer", "kind", "code", "shown"),
    [
        (status(400, error={"message": "Bad temperature", "param": "temperature", "code": "bad"}),
         errors.UpstreamRejected, "bad", "Bad temperature"),
        (status(400, error={"message": "This model's maximum context length is 4096 tokens.", "code": 400}),
         errors.UpstreamRejected, "context_length_exceeded", "4096"),
        (status(413, error="too big"), errors.UpstreamRejected, None, "gave no reason"),
        (status(422, error={"message": f"odd {UPSTREAM_KEY}"}), errors.UpstreamRejected, None, r"odd \*\*\*"),
        (status(401), errors.UpstreamAuthFailed, "upstream_auth_error", "gateway's own key"),
        (status(403), errors.UpstreamAuthFailed, "upstream_auth_error", "gateway's own key"),
        (status(404), errors.UpstreamModelNotFound, "upstream_model_not_found", "model 'scripted'"),
        (status(408), errors.UpstreamTimeout, "upstream_timeout", "gave up"),
        (status(409), errors.UpstreamError, "upstream_error", "409"),
        (status(402), errors.UpstreamError, "upstream_error", "402"),
        (status(429, retry_after="7"), errors.UpstreamRateLimited, "rate_limit_exceeded", "limits the rate"),
        (status(429, error={"message": "Pay", "code": "insufficient_quota"}),
         errors.UpstreamRateLimited, "insufficient_quota", "no quota"),
        (status(500), errors.UpstreamError, "upstream_error", "500"),
        (status(502, error="<html>"), errors.UpstreamError, "upstream_error", "502"),
        (status(503, retry_after="3"), errors.UpstreamUnavailable, "upstream_unavailable", "overloaded"),
        (status(504), errors.UpstreamError, "upstream_error", "504"),
        (status(307), errors.UpstreamError, "upstream_error", "redirect"),
        (status(204), errors.UpstreamMalformed, "upstream_malformed", "."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_status_is_mapped(
    scripted: ScriptedUpstream,
    answer: Answer,
    kind: type[errors.GatewayError],
    code: str | None,
    shown: str,
    streamed: bool,
) -> None:
    async def main() -> errors.GatewayError:
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(answer)
            with pytest.raises(errors.GatewayError, match=shown) as caught:
                await _ask(upstream, streamed)
            return caught.value

    error = asyncio.run(main())
    assert type(error) is kind
    assert error.code == code
    assert UPSTREAM_KEY not in error.message
    if kind is errors.UpstreamRejected:
        assert error.status == answer.status
    if isinstance(error, errors.UpstreamRateLimited) and code == "rate_limit_exceeded":
        assert error.retry_after_s == 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1", 1.0), ("0.5", 0.5), ("86400", 86400.0), ("86401", None), ("-1", None), ("0", None), ("soon", None),
     ("nan", None), ("1e3", None), ("9" * 400, None), ("Wed, 21 Oct 2015 07:28:00 GMT", None), ("Foo, 99 Bar", None)],
)  # fmt: skip
def test_only_sane_waits_are_passed_on(scripted: ScriptedUpstream, value: str, seconds: float | None) -> None:
    async def main() -> errors.GatewayError:
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(status(429, retry_after=value))
            with pytest.raises(errors.UpstreamRateLimited) as caught:
                await upstream.chat(chat_request())
            return caught.value

    assert asyncio.run(main()).retry_after_s == seconds


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        ({"message": "slow down", "code": 429}, errors.UpstreamRateLimited, "rate_limit_exceeded"),
        ({"message": "long", "code": "context_length_exceeded"}, errors.UpstreamRejected, "context_length_exceeded"),
        ({"message": "busy", "code": "503"}, errors.UpstreamUnavailable, "upstream_unavailable"),
        ("just text", errors.UpstreamError, "upstream_error"),
        (True, errors.UpstreamError, "upstream_error"),
        (b'{"error": {"message": "no", "x": 1e999}}', errors.UpstreamError, "upstream_error"),
    ],
)
def test_error_object_with_status_200_is_mapped(
    scripted: ScriptedUpstream, error: Any, kind: type[errors.GatewayError], code: str
) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            body = error if isinstance(error, bytes) else {"error": error}
            stream = [STREAM_HEAD, *sse(body), b"0\r\n\r\n"]
            scripted.enqueue(Answer(body=body), Answer(steps=lambda streamed: stream))
            for streamed in (False, True):
                with pytest.raises(errors.GatewayError) as caught:
                    await _ask(upstream, streamed)
                assert (type(caught.value), caught.value.code) == (kind, code)

    asyncio.run(main())


def test_responses_stream_must_end_well(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        body = b'{"model":"scripted","input":"Hi","stream":true}'
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(Answer(text="x", finish_reason=None))
            with pytest.raises(errors.UpstreamIncomplete):
                await collect(upstream.stream("/responses", body))
            for event, kind in (
                ({"type": "error", "message": "no", "code": "rate_limit_exceeded"}, errors.UpstreamRateLimited),
                ({"type": "response.failed", "response": {"error": {"message": "no"}}}, errors.UpstreamError),
                ({"type": "response.failed", "response": {}}, errors.UpstreamError),
            ):
                stream = [STREAM_HEAD, *sse(event), b"0\r\n\r\n"]
                scripted.enqueue(Answer(steps=lambda streamed, stream=stream: stream))
                with pytest.raises(kind):
                    await collect(upstream.stream("/responses?x=1", body))

    asyncio.run(main())


def test_limits_are_settings(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        huge = b"HTTP/1.1 200 OK\r\ncontent-length: 64000000\r\n\r\n"
        limits = Limits(event_bytes=1024, body_bytes=1024, stream_bytes=4096, head_bytes=1024)
        async with connected(scripted.base_url, limits=limits) as upstream:
            for streamed, answer, name in (
                (False, Answer(text="x" * 1024), "body_bytes"),
                (False, Answer(steps=lambda streamed: [huge, "hang"]), "body_bytes"),
                (True, Answer(text="x" * 1024), "event_bytes"),
                (True, Answer(text="x " * 100), "stream_bytes"),
                (True, Answer(body={}, headers={"x-filler": "x" * 2000}), "headers of more"),
            ):
                scripted.enqueue(answer)
                with pytest.raises(errors.UpstreamMalformed, match=name):
                    await _ask(upstream, streamed)

    asyncio.run(main())


def test_nothing_listens() -> None:
    async def main() -> None:
        metrics = UpstreamCalls()
        async with connected("http://127.0.0.1:9/v1", metrics=metrics) as upstream:
            with pytest.raises(errors.UpstreamUnreachable, match="Start it"):
                await upstream.chat(chat_request())
        async with connected("http://no-such-host.invalid/v1") as upstream:
            with pytest.raises(errors.UpstreamError):
                await upstream.chat(chat_request())
        assert metrics.seen == [("up", "unreachable")]

    each_loop(main)


def test_failures_are_logged_without_secrets(scripted: ScriptedUpstream, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(status(401))
            with pytest.raises(errors.UpstreamAuthFailed):
                await upstream.chat(chat_request("a private prompt"))

    asyncio.run(main())
    (record,) = [r for r in caplog.records if r.name.startswith("gateway.upstreams")]
    assert record.levelname == "WARNING"
    assert UPSTREAM_KEY not in str(record.__dict__)
    assert "a private prompt" not in str(record.__dict__)


# Who leaves, and what stays open


def test_headers_that_cannot_be_sent_are_refused(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url, headers={"x-team": "blue"}) as upstream:
            await upstream.post(
                "/chat/completions",
                chat_request(),
                headers={"X-Team": "red", "Content-Length": "1"},
                request_id="a\r\nb: c",
            )
            with pytest.raises(errors.AgentMisconfigured):
                await upstream.chat(chat_request(), headers={"x-bad": "a\r\nx-injected: 1"})

    asyncio.run(main())
    (seen,) = scripted.requests
    assert seen.headers["x-team"] == "red"
    assert "x-request-id" not in seen.headers


def test_base_url_may_carry_a_query(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(f"{scripted.base_url}/?api-version=1") as upstream:
            await upstream.chat(chat_request())
            await upstream.post("/chat/completions?a=b", chat_request())

    asyncio.run(main())
    assert [r.path for r in scripted.requests] == [
        "/v1/chat/completions?api-version=1",
        "/v1/chat/completions?a=b&api-version=1",
    ]


def test_scripted_upstream_can_be_told_over_http(scripted: ScriptedUpstream) -> None:
    """For gateways that run in another process."""

    async def main() -> None:
        async with (
            connected(scripted.base_url.removesuffix("/v1")) as control,
            connected(scripted.base_url) as upstream,
        ):
            await control.post("/__enqueue", b'{"text": "told", "calls": []}')
            await control.post("/__enqueue", b'{"fault": "html"}')
            assert b"told" in await upstream.chat(chat_request())
            with pytest.raises(errors.UpstreamMalformed):
                await upstream.chat(chat_request())
            with pytest.raises(errors.UpstreamError):
                await upstream.chat(b'{"model": "fault:redirect"}')
            scripted.script("always", Answer(text="the same"))
            for _ in range(2):
                assert b"the same" in await upstream.chat(b'{"model": "always"}')
            seen = json.loads(await control.post("/__requests", b"{}"))
            assert [r["json"].get("model") for r in seen["requests"]] == [
                "scripted", "scripted", "fault:redirect", "always", "always",
            ]  # fmt: skip

    asyncio.run(main())


async def _ask(upstream: HttpUpstream, streamed: bool) -> None:
    if streamed:
        await collect(upstream.chat_stream(chat_request(stream=True)))
    else:
        await upstream.chat(chat_request())
