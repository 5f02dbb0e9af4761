"""HTTP/2 to one upstream: many exchanges on a socket, each with the deadlines, caps and back-pressure of HTTP/1.1.

An `Http2Stream` stands where an exchange expects its connection: closing an exchange resets its stream and nothing
else, a slow reader stops its stream's window, and a deadline ends one call. Uploads, and everything where the server
does not speak HTTP/2, go by HTTP/1.1.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import cast

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from gateway.deadlines import Deadlines
from gateway.errors import GatewayError, UpstreamIncomplete, UpstreamMalformed, UpstreamUnreachable
from gateway.upstreams.config import Limits, Timeouts
from gateway.upstreams.http1 import Connection, ConnectionClosedEarly, Exchange, first_values
from gateway.upstreams.transport import KEEP_ALIVE_S, NO_ANSWER, Origin, Transport

MAX_STREAMS = 100
"""Exchanges on one socket, if the server allows as many; more open another."""

STREAM_WINDOW_BYTES = 256 * 1024
"""What a server may send of one answer ahead of its reader, beyond what the exchange has buffered."""

_SOCKET_WINDOW_BYTES = 2 * MAX_STREAMS * STREAM_WINDOW_BYTES
"""Larger than all streams together, so that slow readers of some never stop the others."""

_CONTROL_BYTES = 1024 * 1024
"""A server that asks for answers (pings) and does not read them is cut off here."""

_FRAME_HEAD_BYTES = 9

_DROPPED = frozenset({b"host", b"connection", b"transfer-encoding"})


class _Connection(H2Connection):
    """h2, but for two things it does to those who share a connection.

    It takes a GOAWAY for the end of everything; servers send it to let the streams that are there end well.
    """

    @property
    def is_overfull(self) -> bool:
        """Whether a frame is longer than any may be: h2 would first wait for all of it."""
        return len(self.incoming_buffer._data) > self.max_inbound_frame_size + _FRAME_HEAD_BYTES

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        frames, events = super()._receive_goaway_frame(frame)
        self.state_machine.state = ConnectionState.CLIENT_OPEN
        return frames, events


class _SpeaksHttp1(Exception):
    """The server chose HTTP/1.1."""


class Http2Transport(Transport):
    """The HTTP/2 connections to one origin; ``fallback`` is the same origin without HTTP/2."""

    def __init__(self, origin: Origin, fallback: Transport, timeouts: Timeouts, limits: Limits) -> None:
        super().__init__(origin, timeouts, limits)
        self._fallback = fallback
        self._speaks_http1 = False
        self._sessions: list[Http2Session] = []
        self._opening: asyncio.Task[None] | None = None

    @property
    def active_exchanges(self) -> int:
        """How many answers are being read."""
        return super().active_exchanges + self._fallback.active_exchanges

    async def call(
        self, head: bytes, body: bytes, timeouts: Timeouts | None = None, phase: str = NO_ANSWER, *, whole: bool = True
    ) -> Exchange:
        """See `Transport.call`."""
        if not self._speaks_http1:
            with suppress(_SpeaksHttp1):
                return await super().call(head, body, timeouts, phase, whole=whole)
        return await self._fallback.call(head, body, timeouts, phase, whole=whole)

    async def upload(self, head: bytes, body: AsyncGenerator[bytes, None], *, chunked: bool) -> Exchange:
        """See `Transport.upload`; by HTTP/1.1, on a connection of its own."""
        return await self._fallback.upload(head, body, chunked=chunked)

    def retire(self) -> None:
        """See `Transport.retire`."""
        super().retire()
        self._fallback.retire()
        for session in self._sessions:
            session.end_when_idle()

    def abort(self) -> None:
        """See `Transport.abort`."""
        super().abort()
        self._fallback.abort()
        for session in tuple(self._sessions):
            session.abort()

    def _take(self) -> Connection | None:
        for session in self._sessions:
            if session.has_room:
                return session.open_stream()
        return None

    async def _connect(self, loop: asyncio.AbstractEventLoop, seconds: float) -> Connection:
        try:
            async with asyncio.timeout(seconds):
                while loop is self._loop and not self._retired:
                    stream = self._take()
                    if stream is not None:
                        return stream
                    if self._opening is None:
                        self._opening = asyncio.create_task(self._grow(loop, seconds))
                        self._opening.add_done_callback(self._opened)
                    await asyncio.shield(self._opening)
        except TimeoutError as error:
            raise self._unconnected(seconds) from error
        session = await self._open_session(loop, seconds)
        stream = session.open_stream()
        session.end_when_idle()
        return stream

    async def _grow(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        session = await self._open_session(loop, seconds)
        self._sessions.append(session)
        session.rest()

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening = None
        if not task.cancelled() and isinstance(task.exception(), _SpeaksHttp1):
            self._speaks_http1 = True

    async def _open_session(self, loop: asyncio.AbstractEventLoop, seconds: float) -> Http2Session:
        deadlines = self._deadlines if loop is self._loop else Deadlines[Exchange](loop)
        session = await self._open(
            loop, seconds, lambda: Http2Session(self.origin.name, self, loop, deadlines, self._limits)
        )
        if not session.speaks_http2:
            session.abort()
            raise _SpeaksHttp1
        try:
            async with asyncio.timeout(seconds):
                await session.ready
        except TimeoutError as error:
            session.abort()
            raise self._unconnected(seconds) from error
        except BaseException:
            session.abort()
            raise
        return session

    # Called by sessions.

    def keeps_sessions(self) -> bool:
        """Whether a session without streams stays open for a while."""
        return not self._retired

    def ended(self, session: Http2Session) -> None:
        """Note that a socket is gone, or takes no more streams."""
        with suppress(ValueError):
            self._sessions.remove(session)


class Http2Session(asyncio.Protocol):
    """One socket to the upstream ``name``."""

    def __init__(
        self,
        name: str,
        owner: Http2Transport,
        loop: asyncio.AbstractEventLoop,
        deadlines: Deadlines[Exchange],
        limits: Limits,
    ) -> None:
        self.name, self.loop, self.deadlines, self.owner = name, loop, deadlines, owner
        self.speaks_http2 = False
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done with the server's settings: from then on it is known how many streams it takes."""
        self._h2 = _Connection(H2Configuration(client_side=True, header_encoding=None))
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.head_bytes,
            },
        )
        self._h2.decoder.max_header_list_size = limits.head_bytes
        self._streams: dict[int, Http2Stream] = {}
        self._opened = 0
        self._socket: asyncio.Transport | None = None
        self._early = b""
        self._is_ending = self._is_lost = self._is_full = False
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """Whether streams that are there may go on."""
        return not self._is_lost and self._socket is not None and not self._socket.is_closing()

    @property
    def has_room(self) -> bool:
        """Whether another stream may begin."""
        most = min(MAX_STREAMS, self._h2.remote_settings.max_concurrent_streams)
        return self.is_open and not self._is_ending and self._opened < most

    def open_stream(self) -> Connection:
        """Return the place of one exchange."""
        self._opened += 1
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        return cast(Connection, Http2Stream(self))  # it has what an exchange and a transport use of a connection

    def end_when_idle(self) -> None:
        """Take no more streams, and close with the last one."""
        self._is_ending = True
        if not self._opened:
            self.abort()

    def abort(self) -> None:
        """Close the socket without waiting for anything."""
        self._is_lost = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._socket is not None:
            self._socket.abort()

    # Called by streams.

    def begin(self, stream: Http2Stream, headers: list[tuple[bytes, bytes]]) -> int | None:
        """Send the head of a request; return the stream's number, None where this socket can carry no more."""
        if not self.is_open:
            return None
        try:
            number = self._h2.get_next_available_stream_id()
            self._h2.send_headers(number, headers, end_stream=not stream.unsent)
        except H2Error:  # the server allows fewer streams by now, or has ended the connection
            self._is_ending = True
            return None
        self._streams[number] = stream
        self.send(stream, number)
        return number

    def send(self, stream: Http2Stream, number: int) -> None:
        """Send as much of a request's body as the server takes now."""
        while stream.unsent and not self._is_full:
            room = min(self._h2.local_flow_control_window(number), self._h2.max_outbound_frame_size)
            if room <= 0:
                break
            piece, stream.unsent = stream.unsent[:room], stream.unsent[room:]
            self._h2.send_data(number, piece, end_stream=not stream.unsent)
            self._flush()
        self._flush()

    def acknowledge(self, number: int, amount: int) -> None:
        """Let the server send as much again."""
        if self.is_open and amount:
            with suppress(H2Error):
                self._h2.acknowledge_received_data(amount, number)
            self._flush()

    def reset(self, number: int) -> None:
        """Tell the server that nobody wants the rest."""
        self._streams.pop(number, None)
        if self.is_open:
            with suppress(H2Error):
                self._h2.reset_stream(number, ErrorCodes.CANCEL)
            self._flush()

    def release(self, number: int | None) -> None:
        """Note that a place is free again."""
        if number is not None:
            self._streams.pop(number, None)
        self._opened -= 1
        self.rest()

    def rest(self) -> None:
        """Close the socket after a while, or now, if no stream is open."""
        if self._opened or not self.is_open:
            return
        if self._is_ending or not self.owner.keeps_sessions():
            self.abort()
        else:
            self._idle_timer = self.loop.call_later(KEEP_ALIVE_S, self.abort)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, if the server agreed to HTTP/2."""
        self._socket = cast(asyncio.Transport, transport)
        agreed = transport.get_extra_info("ssl_object")
        self.speaks_http2 = agreed is not None and agreed.selected_alpn_protocol() == "h2"
        if self._is_lost:
            self._socket.abort()
        elif self.speaks_http2:
            self._h2.initiate_connection()
            self._h2.increment_flow_control_window(_SOCKET_WINDOW_BYTES)
            self._flush()
            early, self._early = self._early, b""
            if early:
                self.data_received(early)

    def data_received(self, data: bytes) -> None:
        """Hand what came to its streams."""
        if self._socket is None:  # behind a tunnel, bytes may come before the word that it stands
            self._early += data
            return
        if not self.speaks_http2 or self._is_lost:
            return
        try:
            events = self._h2.receive_data(data)
        except H2Error as error:
            self._flush()
            self._fail_all(f"sent something that is not valid HTTP/2 ({type(error).__name__})")
            return
        for event in events:
            self._handle(event)
        self._flush()
        if self._h2.is_overfull:
            self._fail_all("sent something that is not valid HTTP/2 (an overlong frame)")
        elif self._socket.get_write_buffer_size() > _CONTROL_BYTES:
            self._fail_all("asks for answers that it does not read")

    def pause_writing(self) -> None:
        """Send no more of any body for now."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Send on."""
        self._is_full = False
        self._send_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every exchange what the end of the socket means for it."""
        self.abort()
        if not self.ready.done():
            self.ready.set_exception(
                UpstreamUnreachable(f"The upstream '{self.name}' closed the connection at once. See whether it is up.")
            )
            self.ready.exception()  # heard, also where nobody waits any more
        self.owner.ended(self)
        for stream in tuple(self._streams.values()):
            stream.lost()

    def _handle(self, event: Event) -> None:
        if isinstance(event, WindowUpdated | RemoteSettingsChanged):
            if isinstance(event, RemoteSettingsChanged) and not self.ready.done():
                self.ready.set_result(None)
            self._send_on()
            return
        if isinstance(event, ConnectionTerminated):
            self._is_ending = True
            self.owner.ended(self)
            last = event.last_stream_id or 0
            for number in [number for number in self._streams if number > last]:
                self._streams.pop(number).refused()
            return
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if stream is None:
            return
        match event:
            case DataReceived(data=data, flow_controlled_length=size):
                stream.received(data or b"", size or 0)
            case ResponseReceived(headers=headers):
                stream.answered(headers or [])
            case StreamEnded():
                stream.finished()
            case StreamReset(error_code=code):
                self._streams.pop(stream.number or 0, None)
                if code == ErrorCodes.REFUSED_STREAM:
                    stream.refused()
                else:
                    stream.cut()

    def _send_on(self) -> None:
        for number, stream in tuple(self._streams.items()):
            if stream.unsent:
                self.send(stream, number)

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and self._socket is not None and not self._is_lost:
            self._socket.write(data)

    def _fail_all(self, what: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(UpstreamMalformed(f"The upstream '{self.name}' {what}."))
        for stream in tuple(self._streams.values()):
            stream.fail(what)
        self.abort()


class Http2Stream:
    """One exchange's part of a session: what `Connection` is to an exchange over HTTP/1.1."""

    def __init__(self, session: Http2Session) -> None:
        self.name, self.loop, self.deadlines = session.name, session.loop, session.deadlines
        self.idle_since = 0.0
        self.number: int | None = None
        self.unsent = b""
        self._session = session
        self._exchange: Exchange | None = None
        self._unread = 0
        self._ended = self._released = False

    @property
    def is_open(self) -> bool:
        """Whether the answer may go on."""
        return self._session.is_open and not self._ended

    @property
    def is_kept(self) -> bool:
        """Whether the end of an answer is worth a short wait: here, it would save a reset."""
        return self._session.is_open

    def begin(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        """Send a request; the answer goes to ``exchange``."""
        self._exchange, self.unsent = exchange, body
        self.number = self._session.begin(self, _headers_of(head))
        if self.number is None:
            self._ended = True
            exchange.fail(ConnectionClosedEarly())

    def pause(self) -> None:
        """Let the server's window run out: `received` counts, and acknowledges nothing."""

    def resume(self) -> None:
        """Open the server's window again."""
        amount, self._unread = self._unread, 0
        if self.number is not None:
            self._session.acknowledge(self.number, amount)

    def settle(self, exchange: Exchange) -> None:
        """End an exchange; a stream that was not ended is reset."""
        if self._released:
            return
        self._released, self._exchange = True, None
        self._reset()
        self._session.release(self.number)
        self._session.owner.forget(exchange)

    def abort(self) -> None:
        """Reset the stream."""
        self._reset()
        exchange = self._exchange
        if exchange is not None and exchange.draining:
            self.settle(exchange)

    # Called by the session.

    def answered(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Take the head of the answer."""
        exchange = self._exchange
        if exchange is None or exchange.head_complete:
            return
        exchange.answered = True
        exchange.headers = first_values(headers)
        given = exchange.headers.get(b":status", b"")
        status = int(given) if given.isdigit() else 0
        compression = exchange.headers.get(b"content-encoding", b"identity").strip().lower()
        if compression not in (b"identity", b""):
            self.fail("sent a compressed answer, although only uncompressed ones are accepted")
            return
        exchange.received_head(status, True)
        exchange.progressed()

    def received(self, data: bytes, size: int) -> None:
        """Take bytes of the body; ``size`` is what they cost of the window."""
        self._unread += size
        exchange = self._exchange
        if exchange is not None and not exchange.complete and data:
            exchange.received(data)
            exchange.progressed()
        if exchange is None or not exchange.paused:
            self.resume()

    def finished(self) -> None:
        """Note the proper end."""
        # A server that ended before it has read everything does not want the rest.
        self._ended = not self.unsent
        if self._exchange is not None:
            self._exchange.finished()

    def refused(self) -> None:
        """Note that the server has not looked at the request: it may be sent again."""
        self._fail(ConnectionClosedEarly())

    def cut(self) -> None:
        """Note that the server gave up this answer."""
        exchange = self._exchange
        if exchange is not None and exchange.head_complete:
            self._fail(
                UpstreamIncomplete(
                    f"The upstream '{self.name}' ended its answer in the middle. Send the request again."
                )
            )
        else:
            self._fail(UpstreamUnreachable(f"The upstream '{self.name}' ended the request without an answer."))

    def lost(self) -> None:
        """Note that the socket is gone."""
        if self._exchange is not None and not self._exchange.answered:
            self.refused()
        else:
            self.cut()

    def fail(self, what: str) -> None:
        """End the exchange: the server broke a rule."""
        self._reset()
        self._fail(UpstreamMalformed(f"The upstream '{self.name}' {what}."))

    def _fail(self, error: GatewayError | ConnectionClosedEarly) -> None:
        self._ended, self.unsent = True, b""
        exchange = self._exchange
        if exchange is not None:
            exchange.fail(error)
            if exchange.draining:
                self.settle(exchange)

    def _reset(self) -> None:
        self.unsent = b""
        if self.number is None:
            return
        amount, self._unread = self._unread, 0
        self._session.acknowledge(self.number, amount)
        if not self._ended:
            self._ended = True
            self._session.reset(self.number)


def _headers_of(head: bytes) -> list[tuple[bytes, bytes]]:
    """Return the head of an HTTP/1.1 request as HTTP/2 has it."""
    first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    method, target, _ = first.split(b" ")
    pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    authority = next((value for name, value in pairs if name == b"host"), b"")
    pseudo = [(b":method", method), (b":authority", authority), (b":scheme", b"https"), (b":path", target)]
    return pseudo + [pair for pair in pairs if pair[0] not in _DROPPED]
