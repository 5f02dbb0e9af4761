"""The connections to one upstream: opened with TLS or without, kept alive between requests, closed when retired.

Proxies from the environment are used where an upstream says so.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from gateway.deadlines import Deadlines
from gateway.errors import UpstreamTimeout, UpstreamUnreachable
from gateway.upstreams.config import Limits, Timeouts
from gateway.upstreams.http1 import Connection, ConnectionClosedEarly, Exchange
from gateway.upstreams.proxy import Proxy, ProxyUnreachable, open_connection

P = TypeVar("P", bound=asyncio.Protocol)

MAX_IDLE_CONNECTIONS = 128
KEEP_ALIVE_S = 30.0
STALE_S = 1.0  # no server closes a connection that was idle for less because it was idle: that one failed

_ON_DEMAND = " within {:g} s. If it loads models on demand, raise timeouts.first_byte_s of this upstream."
_NO_EVENT = "sent no first event" + _ON_DEMAND
NO_ANSWER = "sent no answer" + _ON_DEMAND


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an upstream listens. ``tls`` None means plain TCP. ``name`` is the upstream's, for messages.

    ``proxy`` stands in between; None means that there is none.
    """

    name: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    proxy: Proxy | None = None


class Transport:
    """The connections to one origin, of one event loop.

    A call from another loop (an author's own ``asyncio.run`` in a thread) gets a connection of its own, which is
    closed after the call. A retired transport still serves, without keeping connections.
    """

    def __init__(self, origin: Origin, timeouts: Timeouts, limits: Limits) -> None:
        self.origin = origin
        self._timeouts = timeouts
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._idle: deque[Connection] = deque()
        self._active: set[Exchange] = set()
        self._deadlines = Deadlines[Exchange](self._loop)
        self._retired = False
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def idle_connections(self) -> int:
        """How many connections wait for a request."""
        return len(self._idle)

    @property
    def active_exchanges(self) -> int:
        """How many answers are being read."""
        return len(self._active)

    async def send(
        self, head: bytes, body: bytes, *, streamed: bool = False, timeouts: Timeouts | None = None
    ) -> Exchange:
        """Send one request and return when the head of its answer is there; the caller closes the exchange.

        Raises `UpstreamUnreachable`, `UpstreamTimeout`, `UpstreamMalformed` or `UpstreamIncomplete`.
        """
        return await self.call(head, body, timeouts, _NO_EVENT if streamed else NO_ANSWER, whole=False)

    async def call(
        self, head: bytes, body: bytes, timeouts: Timeouts | None = None, phase: str = NO_ANSWER, *, whole: bool = True
    ) -> Exchange:
        """Send one request; return with the whole body of a 2xx answer, for `Exchange.body`, else as `send`."""
        loop, timeouts = asyncio.get_running_loop(), timeouts or self._timeouts
        now = loop.time()
        total_at = now + timeouts.total_s
        connection = self._take() if loop is self._loop else None
        stale = connection is not None and now - connection.idle_since >= STALE_S
        while True:
            if connection is None:
                connection = await self._connect(loop, timeouts.connect_s)
            exchange = Exchange(connection, timeouts, self._limits, total_at)
            self._active.add(exchange)
            try:
                exchange.expect(timeouts.first_byte_s, phase)
                connection.begin(exchange, head, body)
                await (exchange.whole() if whole else exchange.head())
                return exchange
            except ConnectionClosedEarly as error:
                exchange.close()
                if not stale:
                    raise self._closed_early() from error
                # The other side closed the idle connection while the request was on its way and read nothing of it
                # that it would answer: the one case in which a request is sent twice without asking a retry budget.
                connection, stale = None, False
            except BaseException:
                exchange.close()
                raise

    def _closed_early(self) -> UpstreamUnreachable:
        return UpstreamUnreachable(
            f"The upstream '{self.origin.name}' closed the connection without an answer. See whether it is healthy."
        )

    async def upload(self, head: bytes, body: AsyncGenerator[bytes, None], *, chunked: bool) -> Exchange:
        """Send a request whose body comes piece by piece, on a connection of its own; return at the answer's head.

        A body that fails ends the request and is raised. An upstream that answers before it has read everything is
        heard at once. Raises as `send` does.
        """
        loop, timeouts = asyncio.get_running_loop(), self._timeouts
        total_at = loop.time() + timeouts.total_s
        connection = await self._connect(loop, timeouts.connect_s)
        exchange = Exchange(connection, timeouts, self._limits, total_at)
        self._active.add(exchange)
        sending: asyncio.Task[None] | None = None
        answering: asyncio.Task[None] | None = None
        try:
            exchange.expect(timeouts.total_s, "did not take the request in time. Raise timeouts.total_s of it.")
            connection.begin(exchange, head, b"")
            sending = asyncio.create_task(_send_body(connection, exchange, body, chunked))
            answering = asyncio.create_task(exchange.head())
            await asyncio.wait((sending, answering), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                seconds = timeouts.first_byte_s
                exchange.expect(seconds, "sent no answer within {:g} s. Raise timeouts.first_byte_s of this upstream.")
            await answering
            if not sending.done():
                # It has said what it thinks of the request; what was not sent yet spoils the connection.
                exchange.reusable = False
            return exchange
        except BaseException as error:
            exchange.close()
            if isinstance(error, ConnectionClosedEarly):
                raise self._closed_early() from error
            raise
        finally:
            for task in (sending, answering):
                if task is not None and not task.done():
                    task.cancel()
            await asyncio.gather(*(task for task in (sending, answering) if task), return_exceptions=True)
            await body.aclose()

    def retire(self) -> None:
        """Close idle connections and keep no more; answers that are being read go on."""
        self._retired = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        while self._idle:
            self._idle.pop().abort()

    def abort(self) -> None:
        """Retire, and close what is still being read."""
        self.retire()
        for exchange in tuple(self._active):
            loop = exchange.connection.loop
            if loop is self._loop:
                self._end(exchange)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(self._end, exchange)

    def _end(self, exchange: Exchange) -> None:
        exchange.fail(
            UpstreamUnreachable(f"The gateway closed its connections to the upstream '{self.origin.name}'."),
            at_once=True,
        )
        exchange.connection.abort()

    async def _connect(self, loop: asyncio.AbstractEventLoop, seconds: float) -> Connection:
        deadlines = self._deadlines if loop is self._loop else Deadlines[Exchange](loop)
        return await self._open(loop, seconds, lambda: Connection(self.origin.name, self, loop, deadlines))

    async def _open(self, loop: asyncio.AbstractEventLoop, seconds: float, protocol: Callable[[], P]) -> P:
        """Return a connected protocol."""
        origin = self.origin
        try:
            async with asyncio.timeout(seconds):
                return await open_connection(
                    loop,
                    origin.host,
                    origin.port,
                    tls=origin.tls,
                    proxy=origin.proxy,
                    name=origin.name,
                    protocol=protocol,
                )
        except TimeoutError as error:
            raise self._unconnected(seconds) from error
        except ssl.SSLCertVerificationError as error:
            raise UpstreamUnreachable(
                f"The TLS certificate of the upstream '{origin.name}' was not accepted ({error.verify_message}). Name "
                "its authority in ca_file of this upstream."
            ) from error
        except ssl.SSLError as error:
            raise UpstreamUnreachable(
                f"No TLS connection to the upstream '{origin.name}' ({error.reason or 'handshake failed'}). See "
                "whether its base_url should start with http:// instead."
            ) from error
        except ProxyUnreachable as error:
            raise UpstreamUnreachable(
                f"The proxy of the upstream '{origin.name}' cannot be reached. Start it, or correct proxy of this "
                "upstream in upstreams.yaml."
            ) from error
        except (OSError, UnicodeError) as error:
            raise UpstreamUnreachable(
                f"The upstream '{origin.name}' cannot be reached. Start it, or correct its base_url in upstreams.yaml."
            ) from error

    def _unconnected(self, seconds: float) -> UpstreamTimeout:
        return UpstreamTimeout(
            f"The upstream '{self.origin.name}' did not accept a connection within {seconds:g} s. See whether it is up "
            "and reachable from the gateway."
        )

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and self._loop.time() - connection.idle_since < KEEP_ALIVE_S:
                return connection
            connection.abort()
        return None

    # Called by connections.

    def keeps(self, connection: Connection) -> bool:
        """Whether a connection would be kept for another request."""
        return not self._retired and connection.loop is self._loop and len(self._idle) < MAX_IDLE_CONNECTIONS

    def give_back(self, connection: Connection, exchange: Exchange) -> None:
        """Keep a connection for the next request."""
        self._active.discard(exchange)
        if not self.keeps(connection):
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(KEEP_ALIVE_S, self._sweep)

    def forget(self, exchange: Exchange) -> None:
        """An exchange ended without a connection to keep."""
        self._active.discard(exchange)

    def discard(self, connection: Connection) -> None:
        """A connection closed while it was idle."""
        if connection.loop is self._loop and self._idle:
            with suppress(ValueError):
                self._idle.remove(connection)

    def _sweep(self) -> None:
        self._sweeper = None
        oldest = self._loop.time() - KEEP_ALIVE_S
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.popleft().abort()
        if self._idle:
            delay = max(self._idle[0].idle_since - oldest, 0.1)
            self._sweeper = self._loop.call_later(delay, self._sweep)


async def _send_body(
    connection: Connection, exchange: Exchange, body: AsyncGenerator[bytes, None], chunked: bool
) -> None:
    async for piece in body:
        if piece:
            await connection.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if exchange.closed or not connection.is_open:
            return
    if chunked:
        await connection.write(b"0\r\n\r\n")


def open_tls(*, verify: bool, ca_file: str | None, http2: bool = False) -> ssl.SSLContext:
    """Return a client context; raises ``OSError`` or ``ssl.SSLError`` for a bad ``ca_file``."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
