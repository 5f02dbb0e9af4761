"""Upstream: one server with models as the rest of the gateway calls it; every failure is a `GatewayError`."""

from __future__ import annotations

import asyncio
import copy
import importlib
import logging
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from gateway.chat import CHAT_PATH
from gateway.chunks import Chunk
from gateway.errors import (
    AgentMisconfigured,
    ConfigError,
    GatewayError,
    LentKeyMissing,
    UpstreamAuthFailed,
    UpstreamMalformed,
    UpstreamRejected,
)
from gateway.observability.logs import log_event
from gateway.observability.traces import current_span
from gateway.upstreams.byte_answers import ByteAnswer, byte_answer
from gateway.upstreams.config import HEADER_NAME, HEADER_VALUE, OWN_HEADERS, Api, UpstreamConfig
from gateway.upstreams.failures import failure_of_status, retry_after_s
from gateway.upstreams.http1 import Exchange, too_large
from gateway.upstreams.judging import Judge, judge_for
from gateway.upstreams.keys import UpstreamKey, UpstreamKeys
from gateway.upstreams.model_list import read_model_list
from gateway.upstreams.presets import PRESETS, Preset
from gateway.upstreams.proxy import Proxy, proxy_secrets
from gateway.upstreams.relaying import ByteRequest, OnHead
from gateway.upstreams.sse import EventParser, EventTooLarge
from gateway.upstreams.status import UpstreamStatus
from gateway.upstreams.transport import Origin, Transport, open_tls

_LOG = logging.getLogger(__name__)
_DONE = b"[DONE]"
_ERROR_BODY_BYTES = 64 * 1024


class UpstreamMetrics(Protocol):
    """The part of `gateway.observability.metrics.Metrics` that upstream calls feed."""

    def upstream_request(self, upstream: str, status: int | str, seconds: float) -> None:
        """Record one request; ``status`` is HTTP's, or the word of a failure without one."""
        ...

    def credential_used(self, operation: str) -> None:
        """Count a key that a caller ``lent``."""
        ...


Take = Callable[[list[bytes]], bool | None]
"""Takes events; returns True for more, False to get no more until a `release`, None when it has had enough."""


class EventSource(Protocol):
    """The answer to a streamed request."""

    async def read(self) -> list[bytes]:
        """Return the payloads of the next events (at least one); an empty list is the end of the stream."""
        ...

    async def pipe(self, take: Take) -> None:
        """Hand the payloads of all further events to ``take``, those that arrived together at once, up to the end."""
        ...

    def release(self) -> None:
        """Go on after ``take`` returned False."""
        ...

    def close(self, *, drain: bool = False) -> None:
        """Release the source; ``drain`` when nothing more is wanted of a stream that said it is done."""
        ...


class Upstream(ABC):
    """A server with models. Safe to share between requests.

    ``post`` and ``stream`` know what a finished answer is on ``/chat/completions`` and ``/responses``, and raise for
    one that is cut, empty or malformed. ``request_id`` travels as ``x-request-id``.
    """

    def __init__(self, config: UpstreamConfig, metrics: UpstreamMetrics | None = None) -> None:
        self.config = config
        self.name = config.name
        self.api: Api = config.api or "chat"
        self.base_url = config.base_url or ""
        self.status = UpstreamStatus()
        self._metrics = metrics
        secrets = (*keys_of(config), *config.headers.values(), *proxy_secrets(config.proxy))
        self._secrets = tuple(s for s in secrets if len(s) >= 8)
        self._lent_in: str | None = None

    @property
    def is_lent(self) -> bool:
        """Whether calls are made with a key of the caller's own; see `for_caller`."""
        return self._lent_in is not None

    def for_caller(self, sent: Mapping[str, str]) -> Upstream:
        """Return the upstream as one caller uses it: with the key it lent, where one is taken.

        ``sent`` are the caller's headers of credentials, by lower-case name. Raises `LentKeyMissing`.
        """
        return self

    async def post(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> bytes:
        """Send one JSON request and return the JSON answer."""
        started = time.perf_counter()
        status: int | str = "cancelled"
        try:
            answer = await self._post(path, body, request_id, headers, on_head)
            judge_for(path, self.name, self._secrets, self._lent_in).body(answer)
            status = 200
            return answer
        except GatewayError as error:
            status = self.failed(path, error, started)
            raise
        finally:
            self.record(status, started)

    async def stream(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the payload of each event as it comes; ``[DONE]`` is consumed. Closing it closes the socket at once."""
        stream = await self.start(path, body, request_id=request_id, headers=headers, on_head=on_head)
        async with stream:
            chunks = stream.first
            while chunks:
                for chunk in chunks:
                    yield chunk.data
                chunks = await stream.read()

    async def start(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> UpstreamStream:
        """Send one streamed request and return with its first events; ``async with`` what is returned."""
        stream = UpstreamStream(self, path, judge_for(path, self.name, self._secrets, self._lent_in))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(stream)
            stream.source = await self._open(path, body, request_id, headers, on_head)
            stream.first = await stream.read()
            stack.pop_all()
        return stream

    async def relay(
        self, request: ByteRequest, *, request_id: str | None = None, on_head: OnHead | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer of a relayed request as it comes; what the upstream refuses is raised as elsewhere."""
        started = time.perf_counter()
        status: int | str = "cancelled"
        answer: ByteAnswer | None = None

        def begin(code: int, headers: Mapping[bytes, bytes]) -> None:
            nonlocal answer
            kind = headers.get(b"content-type", b"")
            answer = byte_answer(request.path, code, kind, self.name, self._secrets, self._lent_in)
            if on_head is not None:
                on_head(code, headers)

        try:
            async with aclosing(self._relay(request, request_id, begin)) as pieces:
                async for piece in pieces:
                    assert answer is not None, "the head came first"
                    if piece := answer.feed(piece):
                        yield piece
            if answer is not None and (rest := answer.end()):
                yield rest
            status = 200
        except GatewayError as error:
            if error.domain == "upstream" or isinstance(error, UpstreamRejected):
                status = self.failed(request.path.partition("?")[0], error, started)
            raise
        finally:
            self.record(status, started)

    async def chat(
        self, body: bytes, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Return a finished chat completion."""
        return await self.post(CHAT_PATH, body, request_id=request_id, headers=headers)

    def chat_stream(
        self, body: bytes, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield chat completion chunks up to the finished end."""
        return self.stream(CHAT_PATH, body, request_id=request_id, headers=headers)

    def has_hosted_tool(self, kind: str) -> bool:
        """Whether agents of this upstream may use a hosted tool, by its Responses type (``web_search``, ``mcp`` …)."""
        if self.api != "responses":
            return False
        if self.config.hosted_tools is None:
            return self.config.provider == "openai"
        kind = _HOSTED_TOOL_NAMES.get(kind, kind)
        return any(_HOSTED_TOOL_NAMES.get(known, known) == kind for known in self.config.hosted_tools)

    async def check(self) -> UpstreamStatus:
        """Probe the server and note what came of it; never raises for what the server does."""
        try:
            await self.probe()
        except GatewayError as error:
            self.status.failed(error.message)
        else:
            self.status.succeeded()
        return self.status

    @abstractmethod
    async def probe(self) -> None:
        """Ask the server's ``health_path`` with the key; return if it answers well, else raise a `GatewayError`."""

    @abstractmethod
    async def fetch_models(self) -> tuple[str, ...]:
        """Return the names in the server's own model list; raise a `GatewayError` where it gives none."""

    @abstractmethod
    def retire(self) -> None:
        """Serve on for those who still hold this upstream, but keep nothing open between their calls."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close every connection now; answers that are being read end in an error."""

    @abstractmethod
    async def _post(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> bytes:
        """Return the raw answer of a successful request."""

    @abstractmethod
    async def _open(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> EventSource:
        """Return the events of a successful request."""

    @abstractmethod
    def _relay(
        self, request: ByteRequest, request_id: str | None, on_head: OnHead | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer of a successful request."""

    def failed(self, path: str, error: GatewayError, started: float) -> str:
        """Log a failed call; return the word for it in metrics."""
        log_event(
            _LOG,
            "upstream.request.failed",
            level=logging.WARNING,
            message=f"The upstream '{self.name}' failed: {type(error).__name__}",
            upstream=self.name,
            host=urlsplit(self.base_url).hostname,
            path=path,
            error=type(error).__name__,
            status=error.status,
            code=error.code,
            quote=error.words or None,
            cause=type(error.__cause__).__name__ if error.__cause__ is not None else None,
            duration_ms=round((time.perf_counter() - started) * 1000, 1),
        )
        word = type(error).code if isinstance(type(error).code, str) else None
        return (word or f"rejected_{error.status}").removeprefix("upstream_")

    def record(self, status: int | str, started: float) -> None:
        """Count one call that ended."""
        if self._metrics is not None:
            self._metrics.upstream_request(self.name, status, time.perf_counter() - started)


class UpstreamStream:
    """One streamed answer, judged event by event; leaving ``async with`` closes its socket and records the call.

    ``first`` are the events that came first, empty where the answer ended without any.
    """

    __slots__ = ("_error", "_judge", "_path", "_started", "_upstream", "finished", "first", "source")

    def __init__(self, upstream: Upstream, path: str, judge: Judge) -> None:
        self.first: list[Chunk] = []
        self.finished = False
        self.source: EventSource | None = None
        self._upstream, self._path, self._judge = upstream, path, judge
        self._started = time.perf_counter()
        self._error: GatewayError | None = None

    async def __aenter__(self) -> UpstreamStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: int | str = "cancelled"
        if isinstance(error, GatewayError):
            self.finished = False
            status = self._upstream.failed(self._path, error, self._started)
        elif error is None and self.finished:
            status = 200
        if self.source is not None:
            self.source.close(drain=self.finished)
        self._upstream.record(status, self._started)

    async def read(self) -> list[Chunk]:
        """Return the next events; an empty list is the proper end."""
        while not self.finished:
            if self._error is not None:
                raise self._error
            assert self.source is not None, "the stream has begun"
            events = await self.source.read()
            if not events:
                self.finished = True
            elif chunks := self._judged(events):
                return chunks
        self._judge.end()
        return []

    async def pipe(self, take: Callable[[list[Chunk]], bool | None]) -> None:
        """Hand all further events to ``take`` as `EventSource.pipe` does; return at the proper end."""

        def judged(events: list[bytes]) -> bool | None:
            chunks = self._judged(events)
            more = take(chunks) if chunks else True
            if self._error is not None:
                raise self._error
            return None if self.finished else more

        if self._error is not None:
            raise self._error
        if not self.finished:
            assert self.source is not None, "the stream has begun"
            await self.source.pipe(judged)
            self.finished = True
        self._judge.end()

    def release(self) -> None:
        """Go on after ``take`` returned False."""
        if self.source is not None:
            self.source.release()

    def _judged(self, events: list[bytes]) -> list[Chunk]:
        """Return the good events up to the end; what is wrong is raised once they are out."""
        chunks: list[Chunk] = []
        for data in events:
            if data == _DONE:
                self.finished = True
                break
            try:
                chunks.append(self._judge.event(data))
            except GatewayError as error:
                if not chunks:
                    raise
                self._error = error
                break
        return chunks


class HttpUpstream(Upstream):
    """An OpenAI-compatible server, over HTTP/1.1 or HTTP/2. Create it inside the event loop that will use it."""

    def __init__(self, config: UpstreamConfig, metrics: UpstreamMetrics | None = None) -> None:
        super().__init__(config, metrics)
        parts = urlsplit(self.base_url)
        host = parts.hostname or ""
        tls = _tls_of(config) if parts.scheme == "https" else None
        port = parts.port or (443 if tls is not None else 80)
        proxy = Proxy.from_url(config.proxy, lambda: _tls_of(config)) if config.proxy is not None else None
        self._transport = _open_transport(Origin(config.name, host, port, tls, proxy), config)
        self._prefix = parts.path.rstrip("/")
        self._query = parts.query
        self._preset = PRESETS.get(config.provider, _NO_PRESET)
        self._keys = UpstreamKeys(config.name, keys_of(config))
        self._headers = _headers_of(config, self._preset, parts.netloc)
        if proxy is not None and tls is None:
            # A proxy for plain http takes whole addresses, and hears its password with each request.
            self._prefix = f"http://{parts.netloc}{self._prefix}"
            if proxy.credentials is not None:
                self._headers["proxy-authorization"] = proxy.credentials
        self._common = _header_block(self._headers)
        self._own = frozenset(name.lower() for name in config.headers)

    def for_caller(self, sent: Mapping[str, str]) -> Upstream:
        """See `Upstream.for_caller`."""
        header = self.config.lent_key_header
        if header is None:
            return self
        key = sent.get(header)
        if key is not None:
            if self._metrics is not None:
                self._metrics.credential_used("lent")
            return self._with_lent(key)
        if self.config.allow_server_credentials == "never":
            raise LentKeyMissing(
                f"The upstream '{self.name}' works with its callers' own keys: send yours in the header '{header}'."
            )
        return self

    def _with_lent(self, key: str) -> HttpUpstream:
        """Return a copy that shares connections and health; this key stands in it for those of the gateway."""
        lent = copy.copy(self)
        lent._lent_in = self.config.lent_key_header
        lent._keys = UpstreamKeys(self.name, (key,))
        lent._secrets = (*self._secrets, key)
        places = {self._preset.key_header, self._preset.list_key_header}
        if not places.isdisjoint(self._own):
            lent._headers = {name: value for name, value in self._headers.items() if name not in places}
            lent._common = _header_block(lent._headers)
            lent._own = self._own - places
        return lent

    async def probe(self) -> None:
        """See `Upstream.probe`."""
        try:
            answer = await self._get(self.config.health_path)
        except UpstreamAuthFailed:
            if self.config.lent_key_header is None or self._keys.values:
                raise
            return  # it answers; the keys are its callers'
        if not answer.lstrip().startswith((b"{", b"[")):
            raise UpstreamMalformed(f"The upstream '{self.name}' does not answer {self.config.health_path} with JSON.")

    async def fetch_models(self) -> tuple[str, ...]:
        """See `Upstream.fetch_models`."""
        return read_model_list(self.name, await self._get("/models"))

    def retire(self) -> None:
        """See `Upstream.retire`."""
        self._transport.retire()

    async def aclose(self) -> None:
        """See `Upstream.aclose`."""
        self._transport.abort()
        await asyncio.sleep(0)  # sockets close in the next turn of the loop

    async def _get(self, path: str) -> bytes:
        """Return a small JSON answer within the time of a health check."""
        seconds = self.config.health_timeout_s
        timeouts = msgspec.structs.replace(
            self.config.timeouts,
            connect_s=min(seconds, self.config.timeouts.connect_s),
            first_byte_s=seconds,
            total_s=seconds,
        )
        key = self._keys.take()
        head = self._head("GET", path, "application/json", key)
        exchange = await self._transport.send(head + b"\r\n", b"", timeouts=timeouts)
        try:
            return await self._read_answer(exchange, b"", key)
        finally:
            exchange.close()

    async def _post(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> bytes:
        key = self._keys.take()
        head = self._json_head(path, body, "application/json", key, request_id, headers)
        exchange = await self._transport.call(head, body)
        try:
            answer = exchange.body
            if answer is None:
                answer = await self._read_answer(exchange, body, key)
            if on_head is not None:
                on_head(exchange.status, exchange.headers)
            return answer
        finally:
            exchange.close()

    async def _relay(
        self, request: ByteRequest, request_id: str | None, on_head: OnHead | None
    ) -> AsyncGenerator[bytes, None]:
        key = self._keys.take()
        head = self._head(request.method, request.path, request.accept, key, request_id)
        if request.content_type is not None:
            head += b"content-type: %b\r\n" % request.content_type.encode("ascii")
        body = request.body
        if isinstance(body, bytes):
            length = b"content-length: %d\r\n" % len(body) if body or request.method in ("POST", "PUT") else b""
            exchange = await self._transport.send(head + length + b"\r\n", body)
        elif request.length is not None:
            head += b"content-length: %d\r\n\r\n" % request.length
            exchange = await self._transport.upload(head, body, chunked=False)
        else:
            exchange = await self._transport.upload(head + b"transfer-encoding: chunked\r\n\r\n", body, chunked=True)
        try:
            if not 200 <= exchange.status < 300:
                await self._read_answer(exchange, body if isinstance(body, bytes) else b"", key)
            if on_head is not None:
                on_head(exchange.status, exchange.headers)
            idle_s, size = exchange.timeouts.idle_s, 0
            while True:
                exchange.expect(
                    idle_s, "sent nothing for {:g} s in the middle of its answer. Raise timeouts.idle_s of it."
                )
                piece = await exchange.read()
                if not piece:
                    return
                size += len(piece)
                if size > exchange.limits.relay_bytes:
                    raise too_large(self.name, "relay", exchange.limits.relay_bytes)
                # A client that reads slowly must not look like a silent upstream: the total deadline still holds.
                exchange.relax()
                yield piece
        finally:
            exchange.close()

    async def _open(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> EventSource:
        key = self._keys.take()
        head = self._json_head(path, body, "text/event-stream", key, request_id, headers)
        exchange = await self._transport.send(head, body, streamed=True)
        try:
            kind = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if exchange.status == 200 and kind not in (b"application/json", b"text/html"):
                if on_head is not None:
                    on_head(exchange.status, exchange.headers)
                return _HttpEvents(self.name, exchange)
            answer = await self._read_answer(exchange, body, key)
            if kind == b"application/json":
                # Some servers answer a streamed request with 200 and a plain error object.
                judge_for("", self.name, self._secrets, self._lent_in).body(answer)
            shown = kind.decode("latin-1")[:64]
            raise UpstreamMalformed(
                f"The upstream '{self.name}' answered a streamed request with {shown} instead of an event stream. See "
                "whether its base_url is right."
            )
        except BaseException:
            exchange.close()
            raise

    async def _read_answer(self, exchange: Exchange, asked: bytes, key: UpstreamKey | None) -> bytes:
        """Return the body of a 2xx answer; raise what any other status means."""
        good = 200 <= exchange.status < 300
        if not good:
            self._keys.answered(key, exchange.status, retry_after_s(exchange.headers))
        limit = exchange.limits.body_bytes if good else _ERROR_BODY_BYTES
        announced = exchange.headers.get(b"content-length", b"")
        body = bytearray()
        try:
            if announced.isdigit() and int(announced) > limit:
                raise too_large(self.name, "body", limit)
            idle_s = exchange.timeouts.idle_s
            while piece := await exchange.read():
                body += piece
                if len(body) > limit:
                    raise too_large(self.name, "body", limit)
                exchange.expect(
                    idle_s, "sent nothing for {:g} s in the middle of its answer. Raise timeouts.idle_s of it."
                )
        except GatewayError:
            if good:
                raise
            # The status has already said that it failed: a body that is cut or too long does not change that.
        if good:
            return bytes(body)
        raise failure_of_status(
            self.name,
            exchange.status,
            exchange.headers,
            bytes(body),
            asked=asked,
            secrets=self._secrets,
            lent_in=self._lent_in,
        )

    def _json_head(
        self,
        path: str,
        body: bytes,
        accept: str,
        key: UpstreamKey | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> bytes:
        head = self._head("POST", path, accept, key, request_id, headers)
        return b"%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (head, len(body))

    def _head(
        self,
        method: str,
        path: str,
        accept: str,
        key: UpstreamKey | None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Return request line and headers up to those of the body."""
        common, given = self._common, dict[str, str]()
        if headers:
            given = {name.lower(): value for name, value in headers.items() if name.lower() not in OWN_HEADERS}
            common = _header_block({**self._headers, **given})
        if key is not None:
            name = (self._preset.list_key_header if method == "GET" else None) or self._preset.key_header
            if name not in given and name not in self._own:
                shown = f"Bearer {key.value}" if name == "authorization" else key.value
                common += f"{name}: {shown}\r\n".encode("ascii")
        if request_id is not None and request_id.isascii() and request_id.isprintable():
            common += b"x-request-id: %b\r\n" % request_id.encode("ascii")
        if request_id is not None and (span := current_span()) is not None:
            common += b"traceparent: %b\r\n" % span.traceparent.encode("ascii")
        return f"{method} {self._target(path)} HTTP/1.1\r\naccept: {accept}\r\n".encode("ascii") + common

    def _target(self, path: str) -> str:
        if not self._query:
            return self._prefix + path
        return f"{self._prefix}{path}{'&' if '?' in path else '?'}{self._query}"


class _HttpEvents:
    """The events of one exchange."""

    def __init__(self, upstream: str, exchange: Exchange) -> None:
        self._upstream = upstream
        self._exchange = exchange
        self._parser = EventParser(exchange.limits.event_bytes)
        self._read_bytes = 0
        self._any = False

    async def read(self) -> list[bytes]:
        if self._any:
            self._expect()
        while True:
            piece = await self._exchange.read()
            if not piece:
                self._ended()
                return []
            events = self._parsed(piece)
            if events:
                self._exchange.relax()
                return events

    async def pipe(self, take: Take) -> None:
        exchange = self._exchange

        def received(piece: bytes) -> bool:
            events = self._parsed(piece)
            if not events:
                return True
            more = take(events)
            if more:
                exchange.renew()
            elif more is False:
                exchange.hold()
            return more is not None

        self._expect()
        await exchange.pipe(received)
        self._ended()

    def release(self) -> None:
        self._exchange.release()
        self._expect()

    def close(self, *, drain: bool = False) -> None:
        self._exchange.close(drain=drain)

    def _parsed(self, piece: bytes) -> list[bytes]:
        limits = self._exchange.limits
        self._read_bytes += len(piece)
        if self._read_bytes > limits.stream_bytes:
            raise too_large(self._upstream, "stream", limits.stream_bytes)
        try:
            events = self._parser.feed(piece)
        except EventTooLarge as error:
            raise too_large(self._upstream, "event", limits.event_bytes) from error
        if events:
            self._any = True
        return events

    def _expect(self) -> None:
        seconds = self._exchange.timeouts.idle_s
        self._exchange.expect(seconds, "sent no event for {:g} s. Raise timeouts.idle_s of it if it needs longer.")

    def _ended(self) -> None:
        if not self._any and self._parser.strange:
            raise UpstreamMalformed(
                f"The upstream '{self._upstream}' sent something that is not an event stream. See whether its base_url "
                "is right."
            )


_HOSTED_TOOL_NAMES = {
    "hosted_mcp": "mcp",
    "web_search_preview": "web_search",
    "computer": "computer_use_preview",
    "computer_use": "computer_use_preview",
}
"""Spellings of the Agents SDK and of older API versions."""


def _open_transport(origin: Origin, config: UpstreamConfig) -> Transport:
    plain = Transport(origin, config.timeouts, config.limits)
    if not config.http2:
        return plain
    # HPACK and the state machine of HTTP/2 take 3 MB: only where they are used.
    http2 = importlib.import_module("gateway.upstreams.http2")
    offered = replace(origin, tls=_tls_of(config, http2=True))
    transport: Transport = http2.Http2Transport(offered, plain, config.timeouts, config.limits)
    return transport


def _tls_of(config: UpstreamConfig, *, http2: bool = False) -> ssl.SSLContext:
    try:
        return open_tls(verify=config.verify_tls, ca_file=config.ca_file, http2=http2)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"upstreams.yaml: upstream '{config.name}': ca_file cannot be read as PEM certificates."
        ) from error


def keys_of(config: UpstreamConfig) -> tuple[str, ...]:
    """Return every key of an upstream."""
    return config.api_keys or ((config.api_key,) if config.api_key else ())


_NO_PRESET = Preset()


def _headers_of(config: UpstreamConfig, preset: Preset, netloc: str) -> dict[str, str]:
    headers = {"host": netloc, "user-agent": "agent-gateway", "accept-encoding": "identity", **preset.headers}
    headers.update({name.lower(): value for name, value in config.headers.items()})
    return headers


def _header_block(headers: Mapping[str, str]) -> bytes:
    for name, value in headers.items():
        if not HEADER_NAME.match(name) or not HEADER_VALUE.match(value):
            raise AgentMisconfigured(f"The header {name[:64]!r} has characters that a header cannot carry.")
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode("ascii")
