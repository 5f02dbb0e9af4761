"""The HTTP/1.1 client on a real socket: framing, kept connections, back-pressure, deadlines, cancellation, TLS."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway import errors
from gateway.upstreams import transport
from gateway.upstreams.client import HttpUpstream
from gateway.upstreams.config import Limits, Timeouts
from tests.support.certificates import certificate
from tests.support.scripted_answers import LAST, STREAM_HEAD, Answer, chunk, frame, sse, status
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.upstream_calls import (
    QUICK,
    UpstreamCalls,
    chat_request,
    collect,
    connected,
    each_loop,
    text_of,
    until,
)


@pytest.fixture
def scripted() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as upstream:
        yield upstream


def test_first_events_are_not_held_back(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        gate = scripted.gate()
        scripted.enqueue(Answer(text="one two three", gate=gate))
        async with connected(scripted.base_url) as upstream:
            stream = upstream.chat_stream(chat_request(stream=True))
            first = [json.loads(await anext(stream)), json.loads(await anext(stream))]
            assert text_of(first) == "one"
            gate.open()
            rest = await collect(stream)
            assert text_of(rest) == " two three"

    each_loop(main)


def test_body_without_length_ends_with_the_connection(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
            events = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\r\n\r\n'
            scripted.enqueue(Answer(steps=lambda streamed: [head, events, "close"]))
            assert text_of(await collect(upstream.chat_stream(chat_request(stream=True)))) == "x"

    each_loop(main)


def test_interim_answers_and_trailers_are_read_over(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
            end = sse(chunk({"content": "x"}, "stop"), b"[DONE]")
            scripted.enqueue(
                Answer(steps=lambda streamed: [interim, STREAM_HEAD, *end, b"0\r\nx-sum: 1\r\n\r\n"]),
                Answer(text="again"),
            )
            assert text_of(await collect(upstream.chat_stream(chat_request(stream=True)))) == "x"
            await until(lambda: upstream._transport.idle_connections == 1)
            await upstream.chat(chat_request())
        assert scripted.connections == 1

    asyncio.run(main())


def test_slow_reader_stops_the_socket(scripted: ScriptedUpstream) -> None:
    """A stalled client costs a bounded buffer: the upstream is not read on behalf of somebody who does not read."""

    def flood(streamed: bool) -> Iterator[bytes]:
        yield STREAM_HEAD
        payload = sse(chunk({"content": "x" * 10_000}))[0]
        for _ in itertools.count():
            yield payload

    async def main() -> None:
        async with connected(scripted.base_url, limits=Limits(stream_bytes=1 << 40)) as upstream:
            scripted.enqueue(Answer(steps=flood))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            exchange = next(iter(upstream._transport._active))
            await until(lambda: exchange.paused)
            sent = -1
            while sent != scripted.requests[0].sent_bytes:  # until the socket's own buffers are full
                sent = scripted.requests[0].sent_bytes
                await asyncio.sleep(0.1)
            assert exchange._size < 1024 * 1024
            for _ in range(500):
                await anext(stream)
            await stream.aclose()
        scripted.wait_closed(1)

    asyncio.run(main())


def test_total_deadline_closes_the_socket_of_a_stalled_reader(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url, timeouts=Timeouts(total_s=0.4)) as upstream:
            scripted.enqueue(Answer(text="one two three", gate=scripted.gate()))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            await asyncio.to_thread(scripted.wait_closed, 1)  # nobody reads: the timer acts by itself
            with pytest.raises(errors.UpstreamTimeout, match=r"within 0\.4 s"):
                await collect(stream)

    asyncio.run(main())


def test_slow_reader_is_not_an_idle_upstream(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url, timeouts=Timeouts(idle_s=1)) as upstream:
            first, second = scripted.gate(), scripted.gate()
            a, b, c = (sse(chunk({"content": text})) for text in "abc")
            end = [*c, *sse(chunk({}, "stop"), b"[DONE]"), LAST]
            scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *a, first.event, *b, second.event, *end]))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            first.open()
            await anext(stream)
            await asyncio.sleep(1.5)  # longer than idle_s; what is being waited for is this reader
            second.open()
            assert text_of(await collect(stream)) == "c"

    asyncio.run(main())


@pytest.mark.parametrize("after", [0, 2])
def test_comments_do_not_count_as_events(scripted: ScriptedUpstream, after: int) -> None:
    def steps(streamed: bool) -> Iterator[Any]:
        yield STREAM_HEAD
        yield from sse(*[chunk({"content": "x"})] * after)
        for _ in itertools.count():
            yield frame(b": still here\n\n")
            yield 0.01

    async def main() -> None:
        async with connected(scripted.base_url, timeouts=Timeouts(first_byte_s=0.3, idle_s=0.3)) as upstream:
            scripted.enqueue(Answer(steps=steps))
            started = time.monotonic()
            with pytest.raises(errors.UpstreamTimeout, match="sent no event" if after else "no first event"):
                await collect(upstream.chat_stream(chat_request(stream=True)))
            assert time.monotonic() - started > 0.25

    asyncio.run(main())


@pytest.mark.parametrize("where", ["hang_before_headers", "hang_after_headers", "hang_part_way"])
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_cancelling_closes_the_socket(scripted: ScriptedUpstream, where: str, streamed: bool) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            scripted.enqueue(fault(where))
            seen = len(scripted.requests)
            call: Awaitable[Any] = (
                collect(upstream.chat_stream(chat_request(stream=True))) if streamed else upstream.chat(chat_request())
            )
            task = asyncio.ensure_future(call)
            await asyncio.to_thread(scripted.wait_for_request, seen + 1)
            await asyncio.sleep(0)
            left = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            closed_at = await asyncio.to_thread(scripted.wait_closed, seen + 1)
            assert closed_at - left < 20, "long before any deadline"

    each_loop(main)


def test_closing_the_stream_closes_the_socket(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        metrics = UpstreamCalls()
        async with connected(scripted.base_url, metrics=metrics) as upstream:
            scripted.enqueue(Answer(text="one two three", gate=scripted.gate()))
            seen = len(scripted.requests)
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            left = time.monotonic()
            await stream.aclose()
            closed_at = await asyncio.to_thread(scripted.wait_closed, seen + 1)
            assert closed_at - left < 20, "long before any deadline"
            assert metrics.seen == [("up", "cancelled")]

    each_loop(main)


def test_cancelling_while_connecting_ends_at_once() -> None:
    """The server accepts, and never finishes the TLS handshake."""

    async def main() -> None:
        came: asyncio.Queue[bytes] = asyncio.Queue()
        gone: asyncio.Queue[bytes] = asyncio.Queue()

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.put_nowait(await reader.read(4096))
            try:
                while await reader.read(4096):
                    pass
            finally:
                writer.close()
                gone.put_nowait(b"")

        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        base_url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with connected(base_url) as upstream:
            task = asyncio.ensure_future(upstream.chat(chat_request()))
            assert await came.get()  # the client's half of the handshake
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(gone.get(), 30)
        async with connected(base_url, timeouts=QUICK) as upstream:
            with pytest.raises(errors.UpstreamTimeout, match="did not accept"):
                await upstream.chat(chat_request())
            await asyncio.wait_for(gone.get(), 30)
        server.close()
        await server.wait_closed()

    each_loop(main)


def test_connections_are_kept_and_reused(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            for _ in range(10):
                await upstream.chat(chat_request())
                await collect(upstream.chat_stream(chat_request(stream=True)))
                await until(lambda: upstream._transport.idle_connections == 1)
            scripted.enqueue(status(500))
            with pytest.raises(errors.UpstreamError):
                await upstream.chat(chat_request())
            await upstream.chat(chat_request())

    asyncio.run(main())
    assert scripted.connections == 1
    assert {request.connection for request in scripted.requests} == {1}


def test_connection_that_was_just_used_and_is_closed_has_failed(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            await upstream.chat(chat_request())
            scripted.enqueue(Answer(steps=lambda streamed: ["close"]))
            with pytest.raises(errors.UpstreamUnreachable):
                await upstream.chat(chat_request())

    asyncio.run(main())
    assert len(scripted.requests) == 2


def test_kept_connection_that_was_closed_is_replaced_once(
    scripted: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALE_S", 0.0)

    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            await upstream.chat(chat_request())
            scripted.close_idle()
            await upstream.chat(chat_request())  # noticed before, or during, sending
            scripted.enqueue(Answer(steps=lambda streamed: ["close"]), Answer(text="second try"))
            assert b"second try" in await upstream.chat(chat_request())
            scripted.enqueue(Answer(steps=lambda streamed: ["close"]), Answer(steps=lambda streamed: ["close"]))
            with pytest.raises(errors.UpstreamUnreachable):
                await upstream.chat(chat_request())

    asyncio.run(main())
    assert len(scripted.requests) == 6


def test_answer_that_began_is_never_asked_for_again(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            await upstream.chat(chat_request())
            scripted.enqueue(Answer(steps=lambda streamed: [b"HTTP/1.1 2", "close"]))
            with pytest.raises(errors.UpstreamUnreachable):
                await upstream.chat(chat_request())

    asyncio.run(main())
    assert len(scripted.requests) == 2


def test_bytes_after_the_answer_spoil_the_connection_only(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            good = json.dumps({"choices": [{"index": 0, "message": {}, "finish_reason": "stop"}]}).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(good)
            for garbage in (b"garbage", head + good):
                scripted.enqueue(Answer(steps=lambda streamed, garbage=garbage: [head + good + garbage, "hang"]))
                assert await upstream.chat(chat_request()) == good
                assert upstream._transport.idle_connections == 0
            assert b"scripted" in await upstream.chat(chat_request())

    asyncio.run(main())


def test_bytes_before_the_answer_is_taken_spoil_the_connection_too(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            gate = scripted.gate()
            end = sse(chunk({"content": "x"}, "stop"), b"[DONE]")
            scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *end, LAST, gate.event, b"garbage", "hang"]))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            exchange = next(iter(upstream._transport._active))
            await until(lambda: exchange.complete and exchange.reusable)
            gate.open()
            await until(lambda: not exchange.reusable)
            assert await collect(stream) == []
            assert upstream._transport.idle_connections == 0

    asyncio.run(main())


def test_connection_is_kept_when_the_end_comes_after_done(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            gate = scripted.gate()
            end = sse(chunk({"content": "x"}, "stop"), b"[DONE]")
            scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *end, gate.event, LAST]))
            assert text_of(await collect(upstream.chat_stream(chat_request(stream=True)))) == "x"
            assert upstream._transport.idle_connections == 0
            gate.open()
            await until(lambda: upstream._transport.idle_connections == 1)
            await upstream.chat(chat_request())
        assert scripted.connections == 1

    asyncio.run(main())


def test_answer_before_the_request_is_read_spoils_the_connection() -> None:
    async def refuse_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n{}")
        await left.wait()
        writer.close()
        await writer.wait_closed()

    left = asyncio.Event()

    async def main() -> None:
        async with await asyncio.start_server(refuse_early, "127.0.0.1", 0, limit=1024) as server:
            async with connected(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as upstream:
                with pytest.raises(errors.UpstreamRejected):
                    await upstream.chat(chat_request("x" * 20_000_000))
                assert upstream._transport.idle_connections == 0
            left.set()

    asyncio.run(main())


def test_transfer_encoding_other_than_chunked_is_refused(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            for coding in ("gzip", "gzip, chunked", "chunked\r\ntransfer-encoding: chunked"):
                head = f"HTTP/1.1 200 OK\r\ntransfer-encoding: {coding}\r\n\r\n".encode()
                scripted.enqueue(Answer(steps=lambda streamed, head=head: [head, "hang"]))
                with pytest.raises(errors.UpstreamMalformed, match="transfer encoding"):
                    await upstream.chat(chat_request())

    asyncio.run(main())


def test_stream_that_stays_open_after_done_is_closed(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            end = sse(chunk({"content": "x"}, "stop"), b"[DONE]")
            scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *end, "hang"]))
            started = time.monotonic()
            assert text_of(await collect(upstream.chat_stream(chat_request(stream=True)))) == "x"
            assert time.monotonic() - started < 20  # the reader does not wait for the end of the connection
            await asyncio.to_thread(scripted.wait_closed, 1)

    asyncio.run(main())


def test_two_hundred_streams_at_once(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            gates = [scripted.gate() for _ in range(200)]
            scripted.enqueue(*[Answer(text=f"answer {i} end", gate=gate) for i, gate in enumerate(gates)])
            tasks = [asyncio.ensure_future(collect(upstream.chat_stream(chat_request(stream=True)))) for _ in gates]
            await asyncio.to_thread(scripted.wait_for_request, 200)
            assert upstream._transport.active_exchanges == 200
            for gate in gates:
                gate.open()
            texts = {text_of(chunks) for chunks in await asyncio.gather(*tasks)}
            assert texts == {f"answer {i} end" for i in range(200)}
            assert upstream._transport.active_exchanges == 0
            await until(lambda: upstream._transport.idle_connections == 128)

    asyncio.run(main())


def test_call_from_another_loop_gets_its_own_connection(scripted: ScriptedUpstream) -> None:
    """An author's sync tool may run a loop of its own in a thread, which is gone when the call is done."""
    end = sse(chunk({"content": "x"}, "stop"), b"[DONE]")

    async def once(upstream: HttpUpstream) -> None:
        assert text_of(await collect(upstream.chat_stream(chat_request(stream=True)))) == "x"

    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            await upstream.chat(chat_request())
            scripted.enqueue(Answer(steps=lambda streamed: [STREAM_HEAD, *end, "hang"]))
            await asyncio.to_thread(lambda: asyncio.run(once(upstream)))
            await asyncio.to_thread(scripted.wait_closed, 2)
            await upstream.chat(chat_request())
            assert upstream._transport.idle_connections == 1

    asyncio.run(main())
    assert [r.connection for r in scripted.requests] == [1, 2, 1]


def test_retired_upstream_serves_on_without_keeping_connections(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            await upstream.chat(chat_request())
            gate = scripted.gate()
            scripted.enqueue(Answer(text="one two", gate=gate))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            upstream.retire()
            gate.open()
            assert text_of(await collect(stream)) == "one two"
            await asyncio.to_thread(scripted.wait_closed, 2)
            await upstream.chat(chat_request())
            assert upstream._transport.idle_connections == 0

    asyncio.run(main())


def test_aclose_ends_open_streams_with_an_error(scripted: ScriptedUpstream) -> None:
    async def main() -> None:
        async with connected(scripted.base_url) as upstream:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
            scripted.enqueue(Answer(steps=lambda streamed: [head, b'data: {"choices":[]}\n\n', "hang"]))
            stream = upstream.chat_stream(chat_request(stream=True))
            await anext(stream)
            await upstream.aclose()
            with pytest.raises(errors.UpstreamUnreachable, match="closed its connections"):
                await anext(stream)

    each_loop(main)


def test_tls(tmp_path: Path) -> None:
    ca_file, server = certificate(tmp_path)

    async def main(base_url: str) -> None:
        async with connected(base_url, ca_file=str(ca_file)) as upstream:
            await upstream.chat(chat_request())
            assert text_of(await collect(upstream.chat_stream(chat_request(stream=True)))) == "You said: Hi"
        async with connected(base_url, verify_tls=False) as upstream:
            await upstream.chat(chat_request())
        async with connected(base_url) as upstream:
            with pytest.raises(errors.UpstreamUnreachable, match="certificate"):
                await upstream.chat(chat_request())
        async with connected(base_url.replace("https", "http")) as upstream:
            with pytest.raises(errors.UpstreamError):
                await upstream.chat(chat_request())

    with ScriptedUpstream(tls=server) as scripted:
        each_loop(lambda: main(scripted.base_url))
    with pytest.raises(errors.ConfigError, match="ca_file"):
        asyncio.run(_post_once("https://127.0.0.1:9/v1", ca_file=str(tmp_path / "none.pem")))


def test_tls_to_a_server_without_it() -> None:
    async def answer_in_clear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(answer_in_clear, "127.0.0.1", 0)
        async with server:
            with pytest.raises(errors.UpstreamUnreachable, match="http://"):
                await _post_once(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")

    each_loop(main)


async def _post_once(base_url: str, **options: Any) -> None:
    async with connected(base_url, **options) as upstream:
        await upstream.chat(chat_request())
