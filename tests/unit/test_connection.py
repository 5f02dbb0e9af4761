"""A client's connection: requests in, answers out in one piece, and a word when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from api.connection import EXTENSION, ClientExchange, HttpConnection

Application = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Socket(asyncio.Transport):
    """What the connection writes to."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 50_000), "sockname": ("127.0.0.1", 8000)})
        self.writes: list[bytes] = []
        self.closed = False
        self.has_closed = asyncio.Event()
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True
        self.has_closed.set()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    @property
    def sent(self) -> bytes:
        return b"".join(self.writes)


async def settle() -> None:
    """Let every task that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


def connect(app: Application, **options: Any) -> tuple[HttpConnection, Socket]:
    config = uvicorn.Config(app, lifespan="off", log_config=None, **options)
    config.load()
    state = ServerState()
    state.default_headers = [(b"server", b"gw")]
    connection, socket = HttpConnection(config, state, {}), Socket()
    connection.connection_made(socket)
    # The configuration wraps applications; the tests speak to theirs.
    connection.app = app  # type: ignore[assignment]
    return connection, socket


def exchange_of(scope: dict[str, Any]) -> ClientExchange:
    exchange: ClientExchange = scope["extensions"][EXTENSION]
    return exchange


async def answer(send: Any, body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await answer(send, scope["method"].encode() + b" " + scope["path"].encode() + b" " + body)


def test_an_answer_is_one_write_with_the_servers_headers() -> None:
    async def main() -> Socket:
        connection, socket = connect(echo)
        connection.data_received(b"POST /a%20b?q=1 HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nab")
        await settle()
        assert not socket.writes
        connection.data_received(b"cd")
        await settle()
        return socket

    socket = asyncio.run(main())
    assert socket.writes == [b"HTTP/1.1 200 OK\r\nserver: gw\r\ncontent-length: 14\r\n\r\nPOST /a b abcd"]
    assert not socket.closed


def test_fields_after_a_body_are_no_headers() -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def note(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append(list(scope["headers"]))
        await echo(scope, receive, send)

    async def main() -> Socket:
        connection, socket = connect(note)
        connection.data_received(
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n0\r\nAuthorization: Bearer key\r\n\r\nGET /next HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        await settle()
        return socket

    socket = asyncio.run(main())
    assert seen == [[(b"host", b"x"), (b"transfer-encoding", b"chunked")], [(b"host", b"x")]]
    assert socket.writes[0].endswith(b"POST / ab")


def test_requests_that_come_together_are_answered_in_order() -> None:
    async def main() -> bytes:
        connection, socket = connect(echo)
        connection.data_received(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\n\r\n")
        await settle()
        return socket.sent

    first, second, third = (asyncio.run(main()).index(b"GET /%d " % number) for number in (1, 2, 3))
    assert first < second < third


@pytest.mark.parametrize("head", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"])
def test_a_connection_that_is_not_kept_is_closed_and_says_so(head: bytes) -> None:
    async def main() -> Socket:
        connection, socket = connect(echo)
        connection.data_received(head)
        await settle()
        return socket

    socket = asyncio.run(main())
    assert socket.closed
    assert b"connection: close\r\n" in socket.sent


def test_an_idle_connection_is_closed_and_one_in_use_is_not() -> None:
    async def main() -> None:
        connection, socket = connect(echo, timeout_keep_alive=0.05)
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        connection.timeout_keep_alive_handler()  # too early: it looks again
        assert not socket.closed
        await asyncio.wait_for(socket.has_closed.wait(), 60)

        connection, socket = connect(echo, timeout_keep_alive=0.05)
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        connection.data_received(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n")
        connection.timeout_keep_alive_handler()
        assert not socket.closed

    asyncio.run(main())


@pytest.mark.parametrize("value", [b"a\r\nx-evil: 1", b"a\nb", b"a\x00b", b"\x7f"])
def test_a_header_cannot_speak_for_the_gateway(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await answer(send, b"", (b"x-shown", value))

    async def main() -> Socket:
        connection, socket = connect(app)
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        return socket

    socket = asyncio.run(main())
    assert value not in socket.sent
    assert "characters that a header cannot carry" in caplog.text


def test_a_client_that_leaves_is_told_to_whoever_asked_and_to_whoever_waits() -> None:
    gone: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        exchange_of(scope).on_gone = lambda: gone.append("called")
        assert (await receive())["type"] == "http.request"
        gone.append((await receive())["type"])

    async def main() -> None:
        connection, _ = connect(app)
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        connection.connection_lost(None)
        await settle()

    asyncio.run(main())
    assert gone == ["called", "http.disconnect"]


def test_a_stream_is_written_without_waiting_and_says_when_the_client_is_slow() -> None:
    seen: list[object] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        exchange = exchange_of(scope)
        exchange.on_resume = lambda: seen.append("resumed")
        exchange.begin(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b"one")
        seen.append(exchange.paused)
        scope["connection"].pause_writing()
        seen.append(exchange.paused)
        scope["connection"].resume_writing()
        await send({"type": "http.response.body", "body": b"two"})

    async def main() -> bytes:
        connection, socket = connect(app)
        connection.app_state = {}
        inner = connection.app

        async def with_connection(scope: Any, receive: Any, send: Any) -> None:
            await inner({**scope, "connection": connection}, receive, send)

        connection.app = with_connection
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        return socket.sent

    sent = asyncio.run(main())
    assert seen == [False, True, "resumed"]
    assert sent.endswith(b"transfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


def test_the_whole_body_is_there_at_once_or_not_at_all() -> None:
    bodies: list[bytes | None] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        bodies.append(exchange_of(scope).take_body(1_000))
        await answer(send, b"")

    async def main() -> None:
        connection, _ = connect(app)
        connection.data_received(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nab")
        await settle()
        connection, _ = connect(app)
        connection.data_received(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\na")
        await settle()

    asyncio.run(main())
    assert bodies == [b"ab", None]


def test_a_large_body_that_nobody_reads_is_not_read_from_the_socket() -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def main() -> bool:
        connection, socket = connect(app)
        connection.data_received(b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 70_000)
        await settle()
        for task in list(connection.tasks):
            task.cancel()
        await settle()
        return socket.reading

    assert asyncio.run(main()) is False


@pytest.mark.parametrize("started", [False, True])
def test_an_application_that_fails_costs_its_connection_alone(started: bool) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("canary")

    async def main() -> Socket:
        connection, socket = connect(app)
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        return socket

    socket = asyncio.run(main())
    assert socket.closed
    assert socket.sent.startswith(b"HTTP/1.1 500") != started
    assert b"canary" not in socket.sent


def test_an_answer_that_is_not_as_long_as_it_says_is_cut() -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"abc"})

    async def main() -> Socket:
        connection, socket = connect(app)
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        return socket

    assert asyncio.run(main()).closed


def test_head_has_headers_and_no_body() -> None:
    async def main() -> bytes:
        connection, socket = connect(echo)
        connection.data_received(b"HEAD /x HTTP/1.1\r\n\r\n")
        await settle()
        return socket.sent

    assert asyncio.run(main()) == b"HTTP/1.1 200 OK\r\nserver: gw\r\ncontent-length: 8\r\n\r\n"


def test_the_older_version_gets_no_chunks() -> None:
    async def speak(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        exchange_of(scope).write(b"two ")
        await send({"type": "http.response.body", "body": b"three"})

    async def main() -> Socket:
        connection, socket = connect(speak)
        connection.data_received(b"GET /x HTTP/1.0\r\n\r\n")
        await settle()
        return socket

    socket = asyncio.run(main())
    assert socket.sent == b"HTTP/1.1 200 OK\r\nserver: gw\r\nconnection: close\r\n\r\none two three"
    assert socket.closed


@pytest.mark.parametrize(
    ("request_head", "last", "written"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", False, b"server: gw\r\na: b\r\ncontent-length: 2\r\n\r\nhi"),
        (b"HEAD / HTTP/1.1\r\n\r\n", False, b"server: gw\r\na: b\r\ncontent-length: 2\r\n\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", True, b"server: gw\r\na: b\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"),
        (b"GET / HTTP/1.0\r\n\r\n", False, b"server: gw\r\na: b\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"),
    ],
)
def test_a_whole_answer_without_asgi_is_one_write(request_head: bytes, last: bool, written: bytes) -> None:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        exchange = exchange_of(scope)
        with pytest.raises(RuntimeError, match="characters that a header cannot carry"):
            exchange.answer(200, [(b"a", b"b\r\nc: d")], b"")
        assert exchange.answer(200, [(b"a", b"b")], b"hi", last=last)
        with pytest.raises(RuntimeError, match="after another one had begun"):
            exchange.answer(200, [], b"")

    async def main() -> Socket:
        connection, socket = connect(app)
        connection.data_received(request_head)
        await settle()
        return socket

    socket = asyncio.run(main())
    assert socket.writes == [b"HTTP/1.1 200 OK\r\n" + written]
    assert socket.closed == (b"connection: close" in written)


def test_an_answer_to_a_client_that_reads_slowly_is_left_to_asgi() -> None:
    taken: list[bool] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        taken.append(exchange_of(scope).answer(200, [], b"hi"))
        await answer(send, b"later")

    async def main() -> bytes:
        connection, socket = connect(app)
        connection.pause_writing()
        connection.data_received(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        assert not socket.writes
        connection.resume_writing()
        await settle()
        return socket.sent

    assert asyncio.run(main()).endswith(b"content-length: 5\r\n\r\nlater")
    assert taken == [False]
