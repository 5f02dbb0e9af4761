"""Uploads on their way out: as fast as the upstream reads, a refusal heard at once, gone when the client fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from gateway.errors import InvalidRequest, UpstreamMalformed, UpstreamRejected, UpstreamUnreachable
from gateway.upstreams.client import HttpUpstream
from gateway.upstreams.config import Limits
from gateway.upstreams.relaying import ByteRequest
from tests.support.scripted_upstream import Answer, ScriptedUpstream
from tests.support.upstream_calls import connected

PIECE = b"x" * 65536
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Source:
    """A body that counts what was taken of it."""

    def __init__(self, pieces: int, error: Exception | None = None) -> None:
        self.left, self.taken, self.closed = pieces, 0, False
        self.error = error

    async def body(self) -> AsyncGenerator[bytes, None]:
        """Yield the pieces, then fail if asked to."""
        try:
            while self.left:
                self.left -= 1
                self.taken += 1
                yield PIECE
                await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def send(upstream: HttpUpstream, source: Source, length: int | None = None) -> bytes:
    request = ByteRequest("POST", "/files", source.body(), "multipart/form-data; boundary=b", length=length)
    return b"".join([piece async for piece in upstream.relay(request)])


def against(serve: Serve, check: Callable[[HttpUpstream], Awaitable[None]]) -> None:
    async def main() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await serve(reader, writer)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            async with connected(f"http://127.0.0.1:{port}/v1") as upstream:
                await check(upstream)
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()
            await asyncio.sleep(0)

    asyncio.run(main())


@pytest.mark.parametrize("length", [None, 10 * len(PIECE)])
def test_pieces_arrive_as_one_body(length: int | None) -> None:
    with ScriptedUpstream() as server:
        server.enqueue(Answer(body=b'{"id":"thanks"}'))

        async def main() -> None:
            async with connected(server.base_url) as upstream:
                source = Source(10)
                assert await send(upstream, source, length) == b'{"id":"thanks"}'
                assert source.closed

        asyncio.run(main())
        (request,) = server.requests
    assert request.body == PIECE * 10
    assert ("content-length" in request.headers) == (length is not None)
    assert request.headers["content-type"] == "multipart/form-data; boundary=b"


def test_an_upstream_that_does_not_read_stops_the_source() -> None:
    source, stopped = Source(2_000), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await stopped.wait()
        while b"0\r\n\r\n" not in await reader.read(1 << 20):
            pass
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def check(upstream: HttpUpstream) -> None:
        sending = asyncio.create_task(send(upstream, source))
        before = -1
        while source.taken != before or not before:
            before = source.taken
            for _ in range(200):
                await asyncio.sleep(0)
        assert source.taken < 500, "the body is held in memory instead of slowing its source down"
        stopped.set()
        assert await sending == b"ok"
        assert source.taken == 2_000

    against(serve, check)


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_refusal_is_heard_before_the_body_is_sent(hangs_up: bool) -> None:
    source = Source(1_000_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error": {"message": "too big for me"}}'
        writer.write(b"HTTP/1.1 413 No\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        while not hangs_up and await reader.read(1 << 20):
            pass
        writer.close()  # what was not read makes it a reset

    async def check(upstream: HttpUpstream) -> None:
        with pytest.raises(UpstreamRejected, match="too big for me") as refused:
            await send(upstream, source)
        assert refused.value.status == 413
        assert source.closed
        assert source.left

    against(serve, check)


def test_a_body_that_fails_ends_the_request() -> None:
    source, ended = Source(3, InvalidRequest("a second model")), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        assert not data.endswith(b"0\r\n\r\n")
        ended.set()
        writer.close()

    async def check(upstream: HttpUpstream) -> None:
        with pytest.raises(InvalidRequest, match="a second model"):
            await send(upstream, source)
        async with asyncio.timeout(5):
            await ended.wait()

    against(serve, check)


def test_an_upstream_that_hangs_up_is_named() -> None:
    source = Source(1_000_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    async def check(upstream: HttpUpstream) -> None:
        with pytest.raises(UpstreamUnreachable, match="'up' closed the connection"):
            await send(upstream, source)
        assert source.closed

    against(serve, check)


def test_an_answer_has_a_limit() -> None:
    with ScriptedUpstream() as server:
        server.enqueue(Answer(body=b"x" * 5_000))

        async def main() -> None:
            async with connected(server.base_url, limits=Limits(relay_bytes=4_096)) as upstream:
                pieces = upstream.relay(ByteRequest("GET", "/files/f/content"))
                with pytest.raises(UpstreamMalformed, match=r"limits\.relay_bytes"):
                    b"".join([piece async for piece in pieces])

        asyncio.run(main())
