"""GatewayProtocol: a client's connection with limits on everything a client decides: size, pace, number, shape.

What it refuses it refuses in the error shape of every other answer, and closes the connection. A client that sends
the end of its stream (FIN) has left: nothing distinguishes a half-closed connection from a closed one before the
next write, and a run whose client has left must end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from api.connection import HttpConnection
from api.edge import CLOSED
from api.errors import error_response
from api.routing import Receive, Response, Scope, Send
from gateway.config import Settings
from gateway.errors import GatewayError, InvalidRequest, Overloaded, RequestTimedOut
from gateway.observability.logs import bind_request_id, log_event

_LOG = logging.getLogger("api.protocol")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_HOST = re.compile(rb"[A-Za-z0-9._:\[\]-]{1,255}")
_TARGET = re.compile(rb"[!-~]*")
_ALWAYS_SERVED = frozenset({b"/health", b"/healthz", b"/readyz", b"/metrics", b"/metrics/prometheus"})
_READ_BYTES = 256 * 1024
"""As much as comes at once: of that, the part after the last piece of a body is not known."""

_RESERVE = 500
"""Connections above the limit that are taken nevertheless: for those who ask how the process is."""
_LEAST_PROGRESS = 1_024


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may cost; times in seconds, sizes in bytes."""

    head_timeout_s: float = 10.0
    head_bytes: int = 65_536
    headers: int = 100
    keep_alive_s: float = 75.0
    stall_s: float = 60.0
    connections: int = 10_000

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """Return the limits that the settings say."""
        return cls(
            settings.head_timeout_s,
            settings.head_limit_bytes,
            settings.header_limit,
            settings.keep_alive_s,
            settings.client_stall_s,
            settings.max_connections,
        )


class GatewayProtocol(HttpConnection):
    """What `gateway serve` and `gateway dev` speak; ``uvicorn --http api.protocol:GatewayProtocol`` has it too."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits or ConnectionLimits()
        self.timeout_keep_alive = self._limits.keep_alive_s  # type: ignore[assignment]
        self._in_head = False
        self._head_size = 0
        self._is_large = False
        self._is_chunked = False
        self._wrapping = 0
        self._is_extra = False
        self._is_repeated = False
        self._known: tuple[bytes | None, bytes] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._stalled_at = 0
        self._has_resumed = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        above = len(self.connections) - self._limits.connections
        self._is_extra = above > 0
        if above > _RESERVE:
            transport.abort()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self.transport.is_closing():
            return
        self._idle_since = None
        self._is_large = len(data) > self._limits.head_bytes
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse_shape()
            return
        except httptools.HttpParserUpgrade as upgrade:
            if not self._read_on(data[upgrade.args[0] :]):
                return
        if self._in_head:
            self._head_size += len(data)
            if self._head_size > self._limits.head_bytes:
                self._refuse(_too_large(f"is larger than {self._limits.head_bytes:,} bytes"))
                return
            if self._head_timer is None:
                self._expect_head()
        elif self._is_chunked and self._is_all_wrapping(len(data)):
            self._refuse(_too_large(f"ends in more than {self._limits.head_bytes:,} bytes that are no body"))
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()  # empty lines, or the rest of a body whose request has its answer

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every timer, and tell the application."""
        self._forget_head_timer()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the client reads too slowly, and for how long."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Note that the client reads again."""
        self._has_resumed = True
        super().resume_writing()

    # httptools

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self._is_repeated:
            return
        super().on_message_begin()
        self._in_head = True
        self._head_size = 0
        self._is_chunked = False

    def on_headers_complete(self) -> None:
        """Serve the request, unless its head is none that this gateway takes."""
        if self._is_repeated:
            return
        self._in_head = False
        self._forget_head_timer()
        refusal = self._judge()
        if refusal is None:
            super().on_headers_complete()
        else:
            app, self.app = self.app, _Refusal(refusal)
            try:
                super().on_headers_complete()
            finally:
                self.app = app
        if self._is_extra and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        self._wrapping = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Pass the end of the body on; where the answer was quicker, wait for the next request from now."""
        super().on_message_complete()
        exchange = self.cycle
        if exchange is not None and exchange.response_complete and not self.pipeline:
            self._forget_head_timer()
            self._rest()

    def on_response_complete(self) -> None:
        """Go on to the next request, with an eye on a client that does not fetch this answer."""
        if self.transport.get_write_buffer_size():
            self._watch_reader()
        super().on_response_complete()

    def _read_on(self, rest: bytes) -> bool:
        """Parse what follows a head that asks for another protocol; return whether the connection goes on.

        Nothing is upgraded to, but clients ask with ordinary requests (Java's, for HTTP/2, with every POST), and the
        parser has taken the body for the other protocol's: it hears of the length a second time.
        """
        exchange = self.cycle
        assert exchange is not None, "its head is complete"
        framing = [field for field in exchange.scope["headers"] if field[0] in _FRAMING and field[1] != b"0"]
        try:
            if not framing:
                exchange.keep_alive = False
                return True
            exchange.received_nothing()
            self._is_repeated = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join([b"%b: %b\r\n" % field for field in framing]))
            self._is_repeated = False
            self.parser.feed_data(rest)
        except httptools.HttpParserError:
            self._refuse_shape()
            return False
        except httptools.HttpParserUpgrade as upgrade:
            return self._read_on(rest[upgrade.args[0] :])
        return True

    # What is refused

    def _refuse_shape(self) -> None:
        self._refuse(
            InvalidRequest(
                "The request is not well-formed HTTP/1.1. The connection is closed.", code="malformed_request"
            )
        )

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(InvalidRequest(msg, code="malformed_request"))

    def _judge(self) -> GatewayError | None:
        """Return why the head is refused: what two servers in a row could read differently, or what is too much."""
        limits = self._limits
        if len(self.headers) > limits.headers:
            return _too_large(f"has more than {limits.headers} headers")
        if self._is_large and self._weigh() > limits.head_bytes:
            return _too_large(f"is larger than {limits.head_bytes:,} bytes")
        named = dict(self.headers)
        host = named.get(b"host")
        hosts = 0 if host is None else 1 if len(named) == len(self.headers) else self._count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):
            return _malformed(f"It has {hosts or 'no'} Host headers; send exactly one.")
        if b"transfer-encoding" in named:
            codings = {value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"}
            if codings != {b"chunked"} or self.parser.get_http_version() == "1.0":
                return _malformed("Its Transfer-Encoding is not 'chunked', or it is not HTTP/1.1.")
            self._is_chunked, self._wrapping = True, 0
        where = host, self.url
        if where != self._known:  # on a kept connection one request is like the other
            if host is not None and not _HOST.fullmatch(host):
                return _malformed("Its Host is not a host name.")
            if not self.url.startswith(b"/") and self.url != b"*" and not self._names(host):
                return _malformed("Its target is neither a path nor an address of its Host.")
            if not _TARGET.fullmatch(self.url):
                return _malformed("Its target has characters that a target cannot carry.")
            self._known = where
        if self._is_extra and self.url.partition(b"?")[0] not in _ALWAYS_SERVED:
            return Overloaded(
                f"This process serves {limits.connections:,} connections already; try again in a moment.",
                retry_after_s=1,
            )
        return None

    def _is_all_wrapping(self, size: int) -> bool:
        """Whether what came since the last piece of the body, trailers or chunk extensions, is too much."""
        self._wrapping += size
        return self._wrapping > self._limits.head_bytes + _READ_BYTES

    def _count(self, wanted: bytes) -> int:
        return sum(name == wanted for name, _ in self.headers)

    def _names(self, host: bytes | None) -> bool:
        scheme, separator, rest = self.url.partition(b"://")
        named = re.split(rb"[/?#]", rest, maxsplit=1)[0]
        return bool(separator) and scheme.lower() in (b"http", b"https") and named == host

    def _weigh(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _refuse(self, error: GatewayError) -> None:
        """Answer, if no other answer is under way, and hang up."""
        response = _refusal_of(error, self.client)
        served = self._served
        if served is None or served.response_complete or not served.response_started:
            if served is not None and not served.response_complete:
                served.disconnected = True  # this answer takes the place of its own
                served.wake()
                if served.on_gone is not None:
                    served.on_gone()
            self.transport.write(
                b"HTTP/1.1 %d Refused\r\n%b%b\r\n%b"
                % (
                    response.status,
                    self.common_headers(),
                    b"".join([b"%b: %b\r\n" % field for field in response.headers]),
                    response.body,
                )
            )
            if self.transport.get_write_buffer_size():
                self._watch_reader()
        self._forget_head_timer()
        self.transport.close()

    # Deadlines

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self._head_is_late)

    def _forget_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._served is not None and not self._served.response_complete:
            self._expect_head()  # the next request may come slowly while this one is served
        elif self._in_head:
            self._refuse(
                RequestTimedOut(f"The head of the request did not arrive within {self._limits.head_timeout_s:g} s.")
            )
        else:
            self.transport.close()

    def _rest(self) -> None:
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _watch_reader(self) -> None:
        if self._stall_timer is None:
            self._has_resumed = False
            self._stalled_at = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(self._limits.stall_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Cut off a client that has fetched nothing to speak of since the last look."""
        self._stall_timer = None
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            return
        if self._has_resumed or waiting <= self._stalled_at - _LEAST_PROGRESS:
            self._watch_reader()
            return
        client = self.client[0] if self.client else None
        log_event(_LOG, "http.client.stalled", client_ip=client, unread_bytes=waiting)
        self.transport.abort()


class _Refusal:
    """An application that says no, and takes nothing more on its connection."""

    def __init__(self, error: GatewayError) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = _refusal_of(self._error, scope.get("client"))
        await send({"type": "http.response.start", "status": response.status, "headers": list(response.headers)})
        await send({"type": "http.response.body", "body": response.body})


def _refusal_of(error: GatewayError, client: tuple[str, int] | None) -> Response:
    """Return the last answer of a connection, and log it under the id that it carries."""
    response = error_response(error)
    request_id = os.urandom(16).hex()
    with bind_request_id(request_id, request_id):
        log_event(
            _LOG,
            "http.request.refused",
            message=error.message,
            status=response.status,
            client_ip=client[0] if client else None,
        )
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", str(len(response.body)).encode()),
        (b"connection", b"close"),
        (b"x-request-id", request_id.encode()),
        (b"x-correlation-id", request_id.encode()),
        *CLOSED,
        *response.headers,
    )
    return Response(response.body, response.status, headers=headers)


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The head of the request is refused. {why}", code="malformed_request")


def _too_large(what: str) -> InvalidRequest:
    return InvalidRequest(f"The head of the request {what}.", status=431, code="request_head_too_large")
