"""HttpConnection: a client's connection under uvicorn, with as little as possible between the socket and the product.

uvicorn's own protocol costs as much as everything else in a relayed call: an event, two timers and two writes for each
answer. This one serves the same ASGI interface, and offers a shorter way beside it: the scope's extension
``gateway.client`` is the `ClientExchange`, which calls back when the client leaves, so that no task has to wait for
it, and takes the pieces of a stream without being awaited.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, service_unavailable
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

EXTENSION = "gateway.client"

_IN_HEADERS = bytes([9, *range(32, 127), *range(128, 256)])
_FIELD = b"%b: %b\r\n"
_TRAILERS: Any = deque(maxlen=0)
"""Takes the place of the headers once a head is complete: fields after a body count for nothing."""
_NO_HEADERS: tuple[tuple[bytes, bytes], ...] = ()


class ClientExchange:
    """One request and its answer: ASGI's `receive` and `send`, and what is quicker than they are.

    ``on_gone`` is called once when the client leaves before its answer is complete, ``on_resume`` when a client that
    was `paused` reads again.
    """

    # What an exchange begins with stands in the class: a call makes one, and changes few of them.
    keep_alive = True
    expects_continue = disconnected = response_started = response_complete = False
    task: asyncio.Task[None] | None = None
    on_gone: Callable[[], None] | None = None
    on_resume: Callable[[], None] | None = None
    _body: bytes | bytearray = b""
    _more_body = True
    _unread = _chunked = _partly_read = False
    _waiter: asyncio.Future[None] | None = None
    _head: bytes | None = None
    _left: int | None = 0

    def __init__(self, connection: HttpConnection, scope: dict[str, Any], app: Any) -> None:
        self.scope, self.app, self._connection = scope, app, connection

    # What the product uses.

    @property
    def paused(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self._connection.flow.write_paused

    @property
    def is_receiving(self) -> bool:
        """Whether the client is sending its body: it has not sent all of it, and does not wait for a word first."""
        return self._more_body and not (self.disconnected or self.expects_continue)

    def cut(self) -> None:
        """End an answer that has begun and cannot be completed, so that the client notices; nothing where it is whole.

        Whoever cuts it says why in the log.
        """
        if self.disconnected or self.response_complete or not self.response_started:
            return
        self.disconnected = True
        if self._chunked or self._left is not None:
            self._connection.transport.close()
        else:
            self._connection.reset()  # its end would look like that of a whole answer

    def write(self, data: bytes) -> None:
        """Write a piece of a stream that has begun, without waiting; look at `paused` afterwards."""
        if self.disconnected or self.response_complete:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head is not None:
            data = self._head + data
            self._head = None
        self._connection.transport.write(data)

    def answer(self, status: int, fields: Sequence[tuple[bytes, bytes]], body: bytes, *, last: bool = False) -> bool:
        """Send a whole answer in one write; ``last``: none comes after it on this connection.

        ``fields`` say nothing about length or connection. Returns False, having done nothing, where `send` would wait.
        """
        connection = self._connection
        if connection.flow.write_paused and not self.disconnected:
            return False
        if self.response_started:
            raise RuntimeError("An answer was sent after another one had begun.")
        if self.disconnected:
            return True
        block = _block(fields)
        if last or not self.keep_alive:
            self.keep_alive = False
            block += b"connection: close\r\n"
        if self.scope["method"] == "HEAD":
            body, length = b"", len(body)
        else:
            length = len(body)
        self.response_started = self.response_complete = True
        self.expects_continue = False
        connection.transport.write(
            b"%b%b%bcontent-length: %d\r\n\r\n%b"
            % (STATUS_LINE[status], connection.common_headers(), block, length, body)
        )
        if not self.keep_alive:
            connection.transport.close()
        connection.on_response_complete()
        self.wake()
        return True

    def take_body(self, limit: int) -> bytes | None:
        """Return the body if all of it has arrived, within ``limit``, and nothing was read of it yet.

        Else None: `receive` it.
        """
        body = self._body
        if self._more_body or self.disconnected or self._partly_read or len(body) > limit:
            return None
        self._body, self._unread, self._partly_read = b"", False, True
        return bytes(body)

    async def receive(self) -> dict[str, Any]:
        """Return what has arrived of the body, or that the client left or has its answer."""
        connection = self._connection
        if self.expects_continue:
            self.expects_continue = False
            if not connection.transport.is_closing():
                connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._unread or self.disconnected or self.response_complete):
            if connection.flow.read_paused:
                connection.flow.resume_reading()
            self._waiter = connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self._body, self._unread, self._partly_read = bytes(self._body), b"", False, True
        return {"type": "http.request", "body": body, "more_body": self._more_body}

    async def send(self, message: dict[str, Any]) -> None:
        """Take the next part of the answer, waiting while the client's buffer is full."""
        flow = self._connection.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"'{message['type']}' was sent before 'http.response.start'.")
            self.begin(message["status"], message.get("headers") or _NO_HEADERS)
        elif self.response_complete:
            raise RuntimeError(f"'{message['type']}' was sent after the answer was complete.")
        else:
            self._continue(message)

    # What the connection uses.

    async def run(self) -> None:
        """Serve the request; an application that fails costs this connection alone."""
        connection = self._connection
        try:
            await self.app(self.scope, self.receive, self.send)
        except BaseException as error:
            connection.logger.error("Exception in ASGI application\n", exc_info=error)
            await self._give_up()
        else:
            if not self.response_complete and not self.disconnected:
                connection.logger.error("The application returned without completing its answer.")
                await self._give_up()
        finally:
            self.on_gone = self.on_resume = None
            connection.tasks.discard(self.task)

    def received(self, body: bytes) -> None:
        """Keep a piece of the body; stop reading while much of it waits for the application."""
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body
        self._unread = True
        if len(self._body) > HIGH_WATER_LIMIT:
            self._connection.flow.pause_reading()
        self.wake()

    def received_all(self) -> None:
        """Note the end of the body."""
        self._more_body = False
        self._unread = True
        self.wake()

    def received_nothing(self) -> None:
        """Take the end of the body back, in the turn of the loop in which it was noted."""
        self._more_body, self._unread = True, False

    def wake(self) -> None:
        """Let whoever waits in `receive` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def begin(self, status: int, fields: Sequence[tuple[bytes, bytes]]) -> None:
        """Begin the answer; its head is written with the first bytes of its body."""
        self.response_started = True
        self.expects_continue = False
        block = _block(fields)
        # Every line ends in its own break, and no value holds one: what follows a break is a name.
        lines = b"\r\n" + block.lower()
        at = lines.find(b"\r\ncontent-length: ")
        length = int(lines[at + 18 : lines.index(b"\r\n", at + 18)]) if at >= 0 else None
        chunked = b"\r\ntransfer-encoding: chunked\r\n" in lines
        at = lines.find(b"\r\nconnection: ")
        closing = at >= 0 and b"close" in lines[at + 14 : lines.index(b"\r\n", at + 14)]
        if closing:
            self.keep_alive = False
        elif not self.keep_alive:
            block += b"connection: close\r\n"
        bodiless = status in (204, 304) or self.scope["method"] == "HEAD"
        if length is None and not chunked and not bodiless and self.scope["http_version"] != "1.0":
            chunked = True  # the older version has no chunks: the end of the connection is the end of the answer
            block += b"transfer-encoding: chunked\r\n"
        self._chunked = chunked and not bodiless
        self._left = 0 if bodiless else length
        self._head = b"%b%b%b\r\n" % (STATUS_LINE[status], self._connection.common_headers(), block)

    def _continue(self, message: dict[str, Any]) -> None:
        if message["type"] != "http.response.body":
            raise RuntimeError(f"'{message['type']}' was sent where 'http.response.body' belongs.")
        body = message.get("body", b"")
        last = not message.get("more_body", False)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if last:
                data += b"0\r\n\r\n"
        elif self.scope["method"] == "HEAD":
            data = b""
        else:
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0 or (last and self._left):
                    raise RuntimeError("The answer's body is not as long as its content-length says.")
            data = body
        if self._head is not None:
            data = self._head + data
            self._head = None
        if data:
            self._connection.transport.write(data)
        if last:
            self.response_complete = True
            if not self.keep_alive:
                self._connection.transport.close()
            self._connection.on_response_complete()
            self.wake()

    async def _give_up(self) -> None:
        if self.disconnected or self.response_complete:
            return
        if self.response_started:
            self.cut()
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"21"), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": b"Internal Server Error"})


def _block(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    block = (_FIELD * len(fields)) % tuple(chain.from_iterable(fields))
    # A line break or another control character in a value would let it speak for the gateway.
    if block.translate(None, _IN_HEADERS) != b"\r\n" * len(fields):
        raise RuntimeError("A header of the answer has characters that a header cannot carry.")
    return block


class HttpConnection(HttpToolsProtocol):
    """What ``uvicorn --http api.connection:HttpConnection`` serves with; `gateway dev` does."""

    cycle: ClientExchange | None  # type: ignore[assignment]
    _served: ClientExchange | None = None
    _common: tuple[Any, bytes] = (None, b"")
    _idle_since: float | None = None
    _target: tuple[bytes, str, bytes, bytes] = (b"", "", b"", b"")
    """The last request's, parsed: on a kept connection one is like the other."""

    def common_headers(self) -> bytes:
        """Return the server's own headers, rendered anew when it has made them anew (each second, for the date)."""
        made = self.server_state.default_headers
        if self._common[0] is not made:
            self._common = made, b"".join([b"%b: %b\r\n" % field for field in made])
        return self._common[1]

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._idle_since = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._unsupported_upgrade_warning()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the exchange, and whoever serves it, that the client is gone."""
        for exchange in dict.fromkeys((self._served, self.cycle)):
            if exchange is not None and not exchange.response_complete:
                exchange.disconnected = True
                exchange.wake()
                if exchange.on_gone is not None:
                    exchange.on_gone()
        self.connections.discard(self)
        if self.flow is not None:
            self.flow.resume_writing()
        self._unset_keepalive_if_required()
        if exc is None:
            self.transport.close()
        self.parser = None  # type: ignore[assignment]

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self.flow.resume_writing()
        if self._served is not None and self._served.on_resume is not None:
            self._served.on_resume()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Start serving the request; its body may still be on its way."""
        parser = self.parser
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        if version != "1.1":
            scope["http_version"] = version
        if parser.should_upgrade() and self._should_upgrade():
            return
        if self.url != self._target[0]:
            self._target = self.url, *self._parsed_target()
        _, scope["path"], scope["raw_path"], scope["query_string"] = self._target
        self.headers = _TRAILERS
        app = self.app if self.limit_concurrency is None or not self._is_full() else service_unavailable
        before = self.cycle
        self.cycle = exchange = ClientExchange(self, scope, app)
        scope["extensions"] = {EXTENSION: exchange}
        if dict(scope["headers"]).get(b"expect", b"").lower() == b"100-continue":
            exchange.expects_continue = True
        if version == "1.0" or not parser.should_keep_alive():
            exchange.keep_alive = False
        if before is None or before.response_complete:
            self._begin(exchange)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, app))  # type: ignore[arg-type]

    def _parsed_target(self) -> tuple[str, bytes, bytes]:
        """Return path, raw path and query of the request line."""
        raw_path, _, query = self.url.partition(b"?")
        if not raw_path.startswith(b"/") or b"#" in self.url:
            parsed = httptools.parse_url(self.url)
            raw_path, query = parsed.path or b"", parsed.query or b""
        path = raw_path.decode("ascii")
        path = self.root_path + (unquote(path) if "%" in path else path)
        return path, self.root_path.encode("ascii") + raw_path if self.root_path else raw_path, query

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        exchange = self.cycle
        if exchange is not None and not exchange.response_complete:
            exchange.received(body)

    def on_message_complete(self) -> None:
        """Pass the end of the body on."""
        exchange = self.cycle
        if exchange is not None and not exchange.response_complete:
            exchange.received_all()

    def on_response_complete(self) -> None:
        """Serve the next request that has come already, or wait for one as long as the server allows."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            exchange, _ = self.pipeline.pop()
            self._begin(cast(ClientExchange, exchange))
            return
        # One timer for the whole life of a busy connection: it looks again when it finds that it came too early.
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def reset(self) -> None:
        """Close the connection so that the client notices."""
        opened = self.transport.get_extra_info("socket")
        if opened is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for long enough."""
        self.timeout_keep_alive_task = None
        if self.transport.is_closing() or self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0.001:
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            self.transport.close()

    def _begin(self, exchange: ClientExchange) -> None:
        task = self.loop.create_task(exchange.run())
        exchange.task = task
        self._served = exchange
        self.tasks.add(task)

    def _is_full(self) -> bool:
        limit = self.limit_concurrency
        return limit is not None and (len(self.connections) >= limit or len(self.tasks) >= limit)
