"""Upstreams behind a proxy and over HTTP/2: the same promises as straight over HTTP/1.1, whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway import errors
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.upstreams.config import Limits, Timeouts, UpstreamConfig, load_upstreams
from gateway.upstreams.relaying import ByteRequest
from tests.support.certificates import certificate
from tests.support.expected_failures import EXPECTED, WIRE_ONLY
from tests.support.forward_proxy import ForwardProxy
from tests.support.http2_bridge import Http2Bridge
from tests.support.scripted_answers import STREAM_HEAD, Answer, chunk, frame, sse
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.upstream_calls import (
    UPSTREAM_KEY,
    UpstreamCalls,
    chat_request,
    collect,
    connected,
    each_loop,
    text_of,
)
from tests.support.waiting import in_time

MB = 1024 * 1024
USER = "someone:pr%40xy-canary"
"""As in an address; the password is ``pr@xy-canary``."""


BRIEF = Timeouts(connect_s=2, first_byte_s=0.8, idle_s=0.5, total_s=1.2)


class Way:
    """A way out to a scripted upstream. ``options`` are those of an upstream's configuration."""

    def __init__(self, scripted: ScriptedUpstream, base_url: str, **options: Any) -> None:
        self.scripted, self.base_url, self.options = scripted, base_url, options
        self.proxy: ForwardProxy | None = None
        self.bridge: Http2Bridge | None = None


Ways = Callable[..., Way]


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Ways]:
    ca_file, tls = certificate(tmp_path)
    with ExitStack() as stack:

        def build(kind: str, *, proxy: dict[str, Any] | None = None, **rules: Any) -> Way:
            behind_proxy = kind in ("proxy", "tunnel", "tls-proxy", "http2-tunnel")
            secure = kind in ("tunnel", "tls-proxy", "http1.1-only")
            scripted = stack.enter_context(ScriptedUpstream(tls=tls if secure else None))
            made = Way(scripted, scripted.base_url, ca_file=str(ca_file))
            if kind.startswith("http2"):
                made.bridge = stack.enter_context(Http2Bridge(scripted.port, certificate(tmp_path)[1], **rules))
                made.base_url = made.bridge.base_url
                made.options |= {"http2": True, "verify_tls": False}
            if kind == "http1.1-only":
                made.options["http2"] = True
            if behind_proxy:
                more = {"tls": tls} if kind == "tls-proxy" else {}
                made.proxy = stack.enter_context(
                    ForwardProxy(**{"credentials": "someone:pr@xy-canary"} | more | (proxy or {}))
                )
                made.options["proxy"] = made.proxy.url(USER)
            return made

        yield build


async def ask(upstream: Any, streamed: bool) -> str:
    if streamed:
        return text_of(await collect(upstream.chat_stream(chat_request(stream=True))))
    return str(json.loads(await upstream.chat(chat_request()))["choices"][0]["message"]["content"])


KINDS = ("proxy", "tunnel", "tls-proxy", "http2", "http2-tunnel", "http1.1-only")


@pytest.mark.parametrize("kind", KINDS)
def test_plain_and_streamed_answers_on_a_kept_connection(way: Ways, kind: str) -> None:
    there = way(kind)

    async def main() -> None:
        metrics = UpstreamCalls()
        async with connected(there.base_url, metrics=metrics, **there.options) as upstream:
            for _ in range(2):
                assert await ask(upstream, False) == await ask(upstream, True) == "You said: Hi"
            await upstream.probe()
            assert upstream._transport.active_exchanges == 0
        assert [status for _, status in metrics.seen] == [200] * 4

    each_loop(main)
    request = there.scripted.requests[0]
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert request.headers["accept-encoding"] == "identity"
    assert not [name for name in request.headers if name.startswith("proxy")]
    if there.bridge is not None:
        assert there.bridge.connections == 2  # one for each loop
    elif there.proxy is not None:
        assert 2 <= there.proxy.connections <= 4  # a call may begin before the last stream has quite ended
    if there.proxy is not None:
        line = there.proxy.requests[0]
        if kind == "proxy":
            assert line == f"POST {there.base_url}/chat/completions HTTP/1.1"
        else:
            port = (there.bridge or there.scripted).port
            assert line == f"CONNECT 127.0.0.1:{port} HTTP/1.1"
            assert "authorization" not in there.proxy.heads[0]


@pytest.mark.parametrize(
    ("kind", "streamed", "name"),
    [("proxy", True, name) for name in EXPECTED]
    + [("http2", streamed, name) for streamed in (False, True) for name in EXPECTED if name not in WIRE_ONLY],
)
def test_fault_is_the_same_error_as_straight(way: Ways, kind: str, name: str, streamed: bool) -> None:
    there = way(kind)  # behind a tunnel stands the same client of the same bytes
    slow = name in ("drip", "comments_only") or name.startswith("hang")
    timeouts = BRIEF if slow else Timeouts(total_s=60, idle_s=60)

    async def main() -> tuple[errors.GatewayError, float]:
        async with connected(there.base_url, timeouts=timeouts, **there.options) as upstream:
            there.scripted.enqueue(fault(name))
            started = time.monotonic()
            with pytest.raises(errors.GatewayError) as caught:
                await ask(upstream, streamed)
            took = time.monotonic() - started
            assert upstream._transport.active_exchanges == 0
            there.scripted.enqueue(Answer(text="fine"))
            assert await ask(upstream, False) == "fine"
            return caught.value, took

    error, took = asyncio.run(main())
    assert type(error) is EXPECTED[name][streamed], error
    assert took < 30, "cut by its size, long before its deadline"
    assert "127.0.0.1" not in str(error) and "canary" not in str(error)
    if name in ("huge_event", "endless_line", "endless_comment"):
        there.scripted.wait_closed(1)
        assert there.scripted.requests[0].sent_bytes < 32 * MB


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("kind", ["proxy", "tunnel", "http2", "http2-tunnel"])
def test_a_call_that_is_cancelled_ends_at_the_upstream_within_a_second(way: Ways, kind: str, streamed: bool) -> None:
    there = way(kind)

    async def main() -> float:
        async with connected(there.base_url, **there.options) as upstream:
            there.scripted.enqueue(fault("hang_part_way" if streamed else "hang_before_headers"))
            there.scripted.requests.clear()
            calling = asyncio.create_task(ask(upstream, streamed))
            await asyncio.to_thread(there.scripted.wait_for_request, 1)
            await asyncio.sleep(0.05)
            calling.cancel()
            left = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await calling
            closed = await asyncio.to_thread(there.scripted.wait_closed, 1)
            assert upstream._transport.active_exchanges == 0
            return closed - left

    in_time(lambda: asyncio.run(main()), 1)


# Proxies


@pytest.mark.parametrize(
    ("kind", "proxy", "error", "words"),
    [
        ("proxy", {"credentials": "someone:else"}, errors.UpstreamAuthFailed, "proxy .* refused the user name"),
        ("tunnel", {"credentials": "someone:else"}, errors.UpstreamUnreachable, "refused the user name"),
        ("tunnel", {"refuse": 403}, errors.UpstreamUnreachable, r"refused the connection \(403\)"),
        ("tunnel", {"says": b"SSH-2.0\r\n"}, errors.UpstreamUnreachable, "not valid HTTP/1.1"),
        ("tunnel", {"says": b""}, errors.UpstreamUnreachable, "closed the connection"),
        ("tunnel", {"says": b"HTTP/1.1 200 OK\r\nx: " + b"x" * 20_000}, errors.UpstreamUnreachable, "too long"),
        ("tunnel", {"hangs": True}, errors.UpstreamTimeout, "did not accept a connection within"),
    ],
)
def test_a_proxy_that_refuses_is_told_apart(
    way: Ways, kind: str, proxy: dict[str, Any], error: type[Exception], words: str
) -> None:
    there = way(kind, proxy=proxy)

    async def main() -> None:
        timeouts = Timeouts(connect_s=0.5)
        async with connected(there.base_url, timeouts=timeouts, **there.options) as upstream:
            with pytest.raises(error, match=words) as caught:
                await ask(upstream, False)
            assert "canary" not in str(caught.value) and "127.0.0.1" not in str(caught.value)

    each_loop(main)
    assert not there.scripted.requests


def test_a_proxy_that_is_down(way: Ways) -> None:
    async def main() -> None:
        for base_url in ("http://127.0.0.1:9/v1", "https://127.0.0.1:9/v1"):
            async with connected(base_url, proxy="http://127.0.0.1:9") as upstream:
                with pytest.raises(errors.UpstreamUnreachable, match="proxy of the upstream 'up' cannot be reached"):
                    await ask(upstream, False)

    each_loop(main)


@pytest.mark.parametrize("kind", ["proxy", "tunnel", "http1.1-only"])
def test_uploads_take_the_same_way(way: Ways, kind: str) -> None:
    there = way(kind)

    async def pieces() -> Any:
        for _ in range(4):
            yield b"x" * 1000

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            body = pieces()
            there.scripted.enqueue(Answer(body={"id": "file"}))
            request = ByteRequest("POST", "/files", body, "multipart/form-data; boundary=x")
            got = b"".join([piece async for piece in upstream.relay(request)])
            assert json.loads(got) == {"id": "file"}

    asyncio.run(main())
    assert there.scripted.requests[-1].body == b"x" * 4000


# HTTP/2


def test_many_calls_share_one_socket(way: Ways) -> None:
    there = way("http2")

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            there.scripted.script("scripted", Answer(text="slow", first_delay_s=0.2))
            answers = await asyncio.gather(*(ask(upstream, number % 2 == 0) for number in range(40)))
            assert set(answers) == {"slow"}

    asyncio.run(main())
    assert there.bridge is not None
    assert there.bridge.connections == 1
    assert there.bridge.most_open > 20


def test_a_cancelled_stream_is_reset_and_the_others_go_on(way: Ways) -> None:
    there = way("http2")

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            gate = there.scripted.gate()
            there.scripted.enqueue(Answer(text="one two", gate=gate), fault("hang_part_way"))
            staying, leaving = (upstream.chat_stream(chat_request(stream=True)) for _ in range(2))
            await anext(staying)
            await anext(leaving)
            await leaving.aclose()
            await asyncio.to_thread(there.scripted.wait_closed, 2)
            # Looked at now: a stream that was read whole may be reset, too, where its end is long in coming.
            assert there.bridge is not None and len(there.bridge.resets) == 1
            gate.open()
            assert text_of(await collect(staying)) == "one two"

    asyncio.run(main())
    assert there.bridge is not None
    assert there.bridge.connections == 1


def test_a_slow_reader_stops_its_own_stream_alone(way: Ways) -> None:
    there = way("http2")

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            words = sse(chunk({"content": "x" * 60_000})) * 500
            there.scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *words, *sse(b"[DONE]"), frame(b"")]))
            slow = upstream.chat_stream(chat_request(stream=True))
            await anext(slow)
            request = there.scripted.requests[0]
            before = -1
            while request.sent_bytes != before:  # until every buffer on the way is full
                before = request.sent_bytes
                await asyncio.sleep(0.25)
            assert before < 20 * MB
            assert await ask(upstream, False) == "You said: Hi"
            with pytest.raises(errors.UpstreamIncomplete):  # no finish_reason; but every byte came
                await collect(slow)
            assert request.sent_bytes > 28 * MB

    asyncio.run(main())


def test_a_large_request_passes_the_servers_windows(way: Ways) -> None:
    there = way("http2")

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            calls = [upstream.chat(chat_request("y" * MB)) for _ in range(2)]
            assert len(await asyncio.gather(*calls)) == 2

    asyncio.run(main())
    assert {len(request.body) > MB for request in there.scripted.requests} == {True}


@pytest.mark.parametrize(
    ("rules", "calls", "connections"),
    [
        ({"refuse": 1}, 2, 1),
        ({"vanish": 1}, 2, 2),
        ({"goaway_after": 1}, 2, 2),
    ],
)
def test_what_the_server_did_not_look_at_is_sent_again(
    way: Ways, rules: dict[str, int], calls: int, connections: int
) -> None:
    there = way("http2")
    assert there.bridge is not None

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            assert await ask(upstream, False) == "You said: Hi"
            there.bridge.rules.update(rules | ({"goaway_after": 2} if "goaway_after" in rules else {}))
            for _ in range(calls):
                assert await ask(upstream, False) == "You said: Hi"

    asyncio.run(main())
    assert there.bridge.connections == connections
    assert len(there.scripted.requests) == calls + 1


def test_a_server_that_takes_few_streams_gets_more_sockets(way: Ways) -> None:
    there = way("http2", max_streams=2)

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            await ask(upstream, False)
            there.scripted.script("scripted", Answer(text="slow", first_delay_s=0.2))
            assert set(await asyncio.gather(*(ask(upstream, False) for _ in range(6)))) == {"slow"}

    asyncio.run(main())
    assert there.bridge is not None
    assert there.bridge.connections == 3


def test_what_is_not_http2_or_too_large_is_refused(way: Ways) -> None:
    junk = way("http2", junk=b"HTTP/1.1 400 Bad Request\r\n" * 1000)
    large = way("http2")

    async def main() -> None:
        async with connected(junk.base_url, **junk.options) as upstream:
            with pytest.raises(errors.UpstreamMalformed, match="HTTP/2"):
                await ask(upstream, False)
        async with connected(large.base_url, limits=Limits(head_bytes=2048), **large.options) as upstream:
            large.scripted.enqueue(Answer(text="x", headers={"x-filler": "x" * 4000}))
            with pytest.raises(errors.UpstreamMalformed, match="HTTP/2"):
                await ask(upstream, False)
            assert await ask(upstream, False) == "You said: Hi"

    asyncio.run(main())


def test_a_retired_upstream_keeps_no_socket_and_still_serves(way: Ways) -> None:
    there = way("http2")

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            gate = there.scripted.gate()
            there.scripted.enqueue(Answer(text="one two", gate=gate))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            upstream.retire()
            assert await ask(upstream, False) == "You said: Hi"
            gate.open()
            assert text_of(await collect(stream)) == "one two"
            assert not upstream._transport._sessions or not upstream._transport._sessions[0].has_room

    asyncio.run(main())
    assert there.bridge is not None
    assert there.bridge.connections == 2


def test_closing_ends_streams_with_an_error(way: Ways) -> None:
    there = way("http2")

    async def main() -> None:
        async with connected(there.base_url, **there.options) as upstream:
            there.scripted.enqueue(fault("hang_part_way"))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            await upstream.aclose()
            with pytest.raises(errors.UpstreamUnreachable, match="closed its connections"):
                await collect(stream)

    each_loop(main)


# Configuration


def load(tmp_path: Path, text: str, **env: str) -> UpstreamConfig:
    path = tmp_path / "upstreams.yaml"
    path.write_text("upstreams:\n  - {name: up, base_url: 'https://host.example/v1', " + text + "}", encoding="utf-8")
    return load_upstreams(Settings(upstream_config=path), env).upstreams[0]


def test_a_proxy_is_written_out_or_taken_from_the_environment(tmp_path: Path) -> None:
    found = load(tmp_path, "proxy: 'http://u:${PW}@gate:3128'", PW="canary-1234")
    assert found.proxy == "http://u:canary-1234@gate:3128"
    assert "canary" not in repr(found)
    env = {"HTTPS_PROXY": "gate:1", "NO_PROXY": "other.example"}
    assert load(tmp_path, "proxy_env: true", **env).proxy == "http://gate:1"
    assert load(tmp_path, "proxy_env: true", **env | {"NO_PROXY": ".example"}).proxy is None
    assert load(tmp_path, "proxy_env: true").proxy is None
    assert load(tmp_path, "http2: true", **env).proxy is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("proxy: 'socks5://gate:1'", "SOCKS"),
        ("proxy: gate", "proxy: is not the address"),
        ("proxy: 'http://gate:99999'", "proxy: is not the address"),
        ("proxy: 'http://${GONE}@gate'", "GONE"),
        ("proxy: 'http://gate', proxy_env: true", "one of proxy and proxy_env"),
        ("http2: true, base_url: 'http://host/v1'", "http2 needs"),
    ],
)
def test_a_wrong_proxy_is_refused(tmp_path: Path, text: str, words: str) -> None:
    if "base_url" in text:
        path = tmp_path / "upstreams.yaml"
        path.write_text("upstreams: [{name: up, " + text + "}]", encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            load_upstreams(Settings(upstream_config=path), {})
        return
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, text)


def test_a_password_in_the_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(tmp_path, "proxy: 'http://u:canary-1234@gate:3128'")
    assert [record.event for record in caplog.records] == ["upstream.config.literal_key"]
    assert "canary" not in caplog.text
