"""HTTP/1.1 on one socket: an exchange with absolute deadlines, a bounded buffer, and a socket that closes at once.

An `Exchange` is read piece by piece (or whole, or piped) and closed by whoever asked for it. Deadlines close the
socket, whoever is (or is not) reading. Redirects are answers like any other.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Protocol, cast

import httptools

from gateway.deadlines import Deadlines
from gateway.errors import (
    GatewayError,
    UpstreamIncomplete,
    UpstreamMalformed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.upstreams.config import Limits, Timeouts

READ_AHEAD_BYTES = 64 * 1024
"""The socket is not read further while this much of an answer waits for its reader."""

DRAIN_S = 1.0
DRAIN_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024


_SILENT = "sent nothing for {:g} s in the middle of its answer. Raise timeouts.idle_s of it."


def too_large(upstream: str, what: str, limit: int) -> UpstreamMalformed:
    """Return the failure of an answer (``body``, ``stream``, ``event`` …) that is larger than its limit."""
    thing = {"event": "an event", "stream": "a stream"}.get(what, "an answer")
    return UpstreamMalformed(
        f"The upstream '{upstream}' sent {thing} of more than {limit} bytes. Raise limits.{what}_bytes of it if that "
        "is right."
    )


_TRAILERS: Any = deque(maxlen=0)
"""Takes the place of the headers once a head is complete: fields after a body count for nothing."""
_SAID_ONCE = (b"transfer-encoding", b"content-encoding")


def first_values(fields: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return the first value of each header by its lower-case name; of how a body is coded only one may be given."""
    headers = {name.lower(): value for name, value in reversed(fields)}
    if len(headers) < len(fields):
        names = [name.lower() for name, _ in fields]
        headers.update((name, b"given twice") for name in _SAID_ONCE if names.count(name) > 1)
    return headers


class ConnectionClosedEarly(Exception):
    """A kept-alive connection was closed by the other side before one byte of the answer: safe to send again."""


class Exchange:
    """One request and its answer on one connection.

    `head` first, then `read` until it gives ``b""``, then `close` (always; twice is fine). Every failure is a
    `GatewayError`. Bytes that arrived before a cut are given before the error is raised.
    """

    # What an exchange begins with stands in the class: a call makes one, and changes few of them.
    status = 0
    headers: Mapping[bytes, bytes] = MappingProxyType({})
    body: bytes | None = None
    answered = head_complete = complete = reusable = closed = draining = paused = False
    _size = 0
    _error: GatewayError | ConnectionClosedEarly | None = None
    _waiter: asyncio.Future[None] | None = None
    _phase = ""
    _seconds = 0.0
    _timer: asyncio.TimerHandle | None = None
    _take: Callable[[bytes], bool] | None = None
    _enough = _whole = False

    def __init__(self, connection: Connection, timeouts: Timeouts, limits: Limits, total_at: float) -> None:
        self.timeouts, self.limits, self.connection = timeouts, limits, connection
        self._loop = connection.loop
        self._buffer: list[bytes] = []
        self.due = self._total_at = total_at
        self._deadlines = connection.deadlines
        self._deadlines.watch(self)

    def expect(self, seconds: float, phase: str) -> None:
        """Start a deadline: what is waited for must come in ``seconds``.

        ``phase`` ends the sentence of the error, with ``{:g}`` where the seconds stand: a deadline is set for every
        event, and its sentence is hardly ever wanted.
        """
        self._phase, self._seconds = phase, seconds
        until = self._loop.time() + seconds
        if until < self._total_at:
            self.due = until
            self._deadlines.advance(until)
        else:
            self.due = self._total_at

    def renew(self) -> None:
        """Start the deadline of the last `expect` anew."""
        self.due = min(self._loop.time() + self._seconds, self._total_at)

    def relax(self) -> None:
        """End the deadline of `expect`; the total one stays."""
        self.due = self._total_at

    async def head(self) -> None:
        """Return when status and headers are there."""
        while not self.head_complete:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def whole(self) -> None:
        """Return when a 2xx answer is in ``body``, waking up once; for any other, when its head is there."""
        self._whole = True
        while not self.complete and self._error is None and (self._whole or not self.head_complete):
            await self._wait()
        if self._whole:
            if self._error is not None:
                raise self._error
            self.body = b"".join(self._buffer)

    async def pipe(self, take: Callable[[bytes], bool]) -> None:
        """Hand every piece to ``take`` as it arrives, in the turn of the loop in which it arrives.

        Returns at the end of the answer, or once ``take`` has returned False: it has had enough. What it raises ends
        the exchange, and is raised here.
        """
        if self._size and not take(await self.read()):
            return
        self._take = take
        while not (self._enough or self.complete or self._error is not None):
            await self._wait()
        if self._error is not None:
            raise self._error

    def hold(self) -> None:
        """Read no further for now: whoever takes the answer is slow, and the upstream is not to blame for it."""
        self.relax()
        if not self.paused:
            self.paused = True
            self.connection.pause()

    def release(self) -> None:
        """Read on."""
        if self.paused and not self.closed:
            self.paused = False
            self.connection.resume()

    async def read(self) -> bytes:
        """Return the bytes that have arrived, waiting for at least one; ``b""`` is the proper end of the answer."""
        while True:
            if self._size:
                data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
                self._buffer.clear()
                self._size = 0
                if self.paused:
                    self.paused = False
                    self.connection.resume()
                return data
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()

    def close(self, *, drain: bool = False) -> None:
        """Give the connection back when the answer is complete; otherwise close the socket now.

        ``drain`` waits in the background, briefly, for the last bytes of an answer whose reader has all it needs.
        """
        if self.closed:
            return
        self.closed = True
        self._take = None
        self._deadlines.forget(self)
        if drain and not self.complete and self._error is None and not self.paused and self.connection.is_kept:
            self.draining = True
            self._size = 0
            self._buffer.clear()
            self._timer = self._loop.call_later(DRAIN_S, self.connection.abort)
            return
        self.connection.settle(self)

    # The rest is called by the connection.

    def received_head(self, status: int, reusable: bool) -> None:
        """Note status and headers."""
        self.status = status
        self.reusable = reusable
        self.head_complete = True
        if not self._whole:
            self._wake()
        elif not 200 <= status < 300:
            self._whole = False
            self._wake()
        else:
            announced = self.headers.get(b"content-length", b"")
            if announced.isdigit() and int(announced) > self.limits.body_bytes:
                self._refuse_body()

    def progressed(self) -> None:
        """Note that something came, and was not the end: of a whole answer the next piece is waited for from now."""
        if self._whole and self.head_complete and self._error is None:
            self.expect(self.timeouts.idle_s, _SILENT)

    def received(self, data: bytes) -> None:
        """Keep bytes of the body for the reader, or hand them on; stop the socket when the reader is slow."""
        if self._error is not None:
            return
        if self._take is not None:
            try:
                if not self._take(data):
                    self._take, self._enough = None, True
                    self._wake()
            except GatewayError as error:
                self.fail(error)
                self.connection.abort()
            return
        self._size += len(data)
        if self._whole:
            self._buffer.append(data)
            if self._size > self.limits.body_bytes:
                self._refuse_body()
            return
        if self.draining:
            if self._size > DRAIN_BYTES:
                self.connection.abort()
            return
        self._buffer.append(data)
        if self._size >= READ_AHEAD_BYTES and not self.paused:
            self.paused = True
            self.connection.pause()
        self._wake()

    def finished(self) -> None:
        """Note the proper end of the answer."""
        if self._error is not None:
            return
        self.complete = True
        self._wake()
        if self.draining:
            if self._timer is not None:
                self._timer.cancel()
            self.connection.settle(self)

    def _refuse_body(self) -> None:
        self.fail(too_large(self.connection.name, "body", self.limits.body_bytes), at_once=True)
        self.connection.abort()

    def fail(self, error: GatewayError | ConnectionClosedEarly, *, at_once: bool = False) -> None:
        """End the exchange; ``at_once`` throws away what the reader has not taken."""
        if self.complete or self._error is not None:
            return
        self._error = error
        self.reusable = False
        if at_once:
            self._buffer.clear()
            self._size = 0
        self._deadlines.forget(self)
        self._wake()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def expire(self) -> None:
        """End the exchange: what was waited for did not come in time."""
        name = self.connection.name
        if self._loop.time() >= self._total_at:
            error = UpstreamTimeout(
                f"The upstream '{name}' did not finish its answer within {self.timeouts.total_s:g} s. Ask for less, or "
                "raise timeouts.total_s of this upstream."
            )
        else:
            error = UpstreamTimeout(f"The upstream '{name}' {self._phase.format(self._seconds)}")
        self.fail(error, at_once=True)
        self.connection.abort()


class Owner(Protocol):
    """Whoever keeps connections between exchanges."""

    def keeps(self, connection: Connection) -> bool:
        """Whether a connection would be kept for another request."""
        ...

    def give_back(self, connection: Connection, exchange: Exchange) -> None:
        """Take a connection that can carry another request."""
        ...

    def forget(self, exchange: Exchange) -> None:
        """Note an exchange that ended without a connection to keep."""
        ...

    def discard(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        ...


class Connection(asyncio.Protocol):
    """One socket to the upstream ``name``; carries one exchange at a time."""

    def __init__(
        self, name: str, owner: Owner, loop: asyncio.AbstractEventLoop, deadlines: Deadlines[Exchange]
    ) -> None:
        self.name = name
        self.loop = loop
        self.deadlines = deadlines
        self.idle_since = 0.0
        self._owner = owner
        self._exchange: Exchange | None = None
        self._socket: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._length: bytes | None = None
        self._interim = False
        self._progress = False
        self._unproductive = self._read = 0
        self._fields: Any = []
        self._pieces: list[bytes] = []
        self._lost = False
        self._full: asyncio.Future[None] | None = None

    def begin(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Send a request; the answer goes to ``exchange``."""
        assert self._socket is not None
        self._exchange = exchange
        self._unproductive = 0
        if len(body) < 32 * 1024:
            self._socket.write(head + body)
        else:
            self._socket.writelines((head, body))

    async def write(self, data: bytes) -> None:
        """Send a piece of a body, waiting while the other side takes no more; does nothing once the socket is gone."""
        if self._lost or self._socket is None or self._socket.is_closing():
            return
        self._socket.write(data)
        if self._full is not None:
            await asyncio.shield(self._full)

    def settle(self, exchange: Exchange) -> None:
        """End an exchange: back to the pool if its answer is complete and the socket good, else close."""
        self._exchange = None
        idle = exchange.complete and exchange.reusable and not self._lost
        if idle and self._socket is not None and self._socket.get_write_buffer_size() == 0:
            if exchange.paused:
                self.resume()
            self._owner.give_back(self, exchange)
            return
        self._owner.forget(exchange)
        self.abort()

    def abort(self) -> None:
        """Close the socket without waiting for anything."""
        self._lost = True
        if self._socket is not None:
            self._socket.abort()

    def pause(self) -> None:
        """Stop reading the socket."""
        if self._socket is not None and not self._socket.is_closing():
            self._socket.pause_reading()

    def resume(self) -> None:
        """Read the socket again."""
        if self._socket is not None and not self._socket.is_closing():
            self._socket.resume_reading()

    @property
    def is_kept(self) -> bool:
        """Whether it would serve another request after this one."""
        return self._owner.keeps(self)

    @property
    def is_open(self) -> bool:
        """Whether another request may be sent."""
        return not self._lost and self._socket is not None and not self._socket.is_closing()

    # asyncio.Protocol

    def pause_writing(self) -> None:
        """Note that the other side takes no more for now."""
        if self._full is None:
            self._full = self.loop.create_future()

    def resume_writing(self) -> None:
        """Let a writer go on."""
        full, self._full = self._full, None
        if full is not None and not full.done():
            full.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket."""
        self._socket = cast(asyncio.Transport, transport)
        if self._lost:
            self._socket.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        exchange = self._exchange
        if exchange is None or exchange.complete:
            # Bytes nobody asked for: whatever they are, this connection cannot be trusted with another request.
            if exchange is not None:
                exchange.reusable = False
            else:
                self._owner.discard(self)
                self.abort()
            return
        exchange.answered = True
        self._progress = False
        self._read = len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._hand_on(exchange)
            self._refuse(exchange, f"sent an answer that is not valid HTTP/1.1 ({type(error).__name__})")
            return
        if self._pieces:
            self._hand_on(exchange)
        if not self._progress:
            self._unproductive += len(data)
            if self._unproductive > exchange.limits.head_bytes:
                self._refuse_head(exchange)
        else:
            self._unproductive = 0
        if not exchange.complete:
            exchange.progressed()

    def eof_received(self) -> bool:
        """Let the socket close."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the exchange what the end of the connection means for it."""
        if exc is not None and self._exchange is not None and not self._lost:
            self._read_last_words(self._exchange)
        self._lost = True
        self.resume_writing()
        self._owner.discard(self)
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.head_complete:
            if exc is None and self._length is None:
                exchange.reusable = False
                exchange.finished()
            else:
                exchange.fail(
                    UpstreamIncomplete(
                        f"The upstream '{self.name}' closed the connection in the middle of its answer. "
                        "Send the request again."
                    )
                )
        elif exchange.answered:
            exchange.fail(UpstreamUnreachable(f"The upstream '{self.name}' closed the connection while answering."))
        else:
            exchange.fail(ConnectionClosedEarly())
        if exchange.draining:
            self.settle(exchange)

    def _read_last_words(self, exchange: Exchange) -> None:
        """Read what had arrived when writing failed: a server that refuses a large body answers, and hangs up."""
        assert self._socket is not None, "it was connected"
        opened = self._socket.get_extra_info("socket")
        if exchange.head_complete or opened is None or self._socket.get_extra_info("ssl_object") is not None:
            return
        with suppress(OSError), socket.socket(fileno=os.dup(opened.fileno())) as rest:
            rest.setblocking(False)
            while not exchange.complete and (data := rest.recv(_READ_BYTES)):
                self.data_received(data)

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Note that an answer begins."""
        exchange = self._exchange
        if exchange is not None and exchange.complete:
            exchange.reusable = False
        self._length = None
        self._fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Judge how the body is framed."""
        fields, self._fields = self._fields, _TRAILERS
        exchange = self._exchange
        if exchange is None or exchange.head_complete:
            return
        limit = exchange.limits.head_bytes
        if self._unproductive + self._read > limit and sum(len(n) + len(v) + 4 for n, v in fields) > limit:
            self._refuse_head(exchange)
            return
        status = self._parser.get_status_code()
        if status < 200:
            # 100 Continue and 103 Early Hints come before the answer and say nothing about it.
            self._interim = True
            return
        exchange.headers = headers = first_values(fields)
        coding = headers.get(b"transfer-encoding")
        if coding is not None and coding.strip().lower() != b"chunked":
            self._refuse(exchange, "sent an answer in a transfer encoding other than chunked")
            return
        self._length = coding or headers.get(b"content-length")
        if status == 204 or status == 304:
            self._length = b"0"
        if b"content-encoding" in headers and headers[b"content-encoding"].strip().lower() not in (b"identity", b""):
            self._refuse(exchange, "sent a compressed answer, although only uncompressed ones are accepted")
            return
        self._progress = True
        exchange.received_head(status, self._length is not None and bool(self._parser.should_keep_alive()))

    def on_body(self, data: bytes) -> None:
        """Keep body bytes until all of this read is parsed: a read may hold many small chunks."""
        self._progress = True
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        """Note the end of an answer."""
        if self._interim:
            self._interim = False
            return
        exchange = self._exchange
        if exchange is not None and exchange.head_complete and not exchange.complete:
            self._progress = True
            self._hand_on(exchange)
            exchange.finished()

    def _hand_on(self, exchange: Exchange) -> None:
        pieces = self._pieces
        if not pieces:
            return
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if not exchange.complete:
            exchange.received(data)

    def _refuse_head(self, exchange: Exchange) -> None:
        limit = exchange.limits.head_bytes
        self._refuse(
            exchange, f"sent headers of more than {limit} bytes. Raise limits.head_bytes of it if that is right"
        )

    def _refuse(self, exchange: Exchange, what: str) -> None:
        if exchange.complete:
            # Rubbish after a complete answer spoils the connection, not the answer.
            exchange.reusable = False
            return
        exchange.fail(UpstreamMalformed(f"The upstream '{self.name}' {what}."))
        self.abort()
