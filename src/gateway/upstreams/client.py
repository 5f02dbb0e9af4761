"""Upstream: one server with models as the rest of the gateway calls it; every failure is a `GatewayError`."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from gateway.chat import CHAT_PATH
from gateway.errors import AgentMisconfigured, ConfigError, GatewayError, UpstreamMalformed, UpstreamRejected
from gateway.observability.logs import log_event
from gateway.upstreams.config import HEADER_NAME, HEADER_VALUE, OWN_HEADERS, Api, UpstreamConfig
from gateway.upstreams.failures import failure_of_status, retry_after_s
from gateway.upstreams.http1 import Exchange
from gateway.upstreams.judging import judge_for
from gateway.upstreams.keys import UpstreamKey, UpstreamKeys
from gateway.upstreams.model_list import read_model_list
from gateway.upstreams.presets import PRESETS, Preset
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


class EventSource(Protocol):
    """The answer to a streamed request."""

    async def read(self) -> list[bytes]:
        """Return the payloads of the next events (at least one); an empty list is the end of the stream."""
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
        self._secrets = tuple(s for s in (*keys_of(config), *config.headers.values()) if len(s) >= 8)

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
            judge_for(path, self.name, self._secrets).body(answer)
            status = 200
            return answer
        except GatewayError as error:
            status = self._failed(path, error, started)
            raise
        finally:
            self._record(status, started)

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
        started = time.perf_counter()
        status: int | str = "cancelled"
        source: EventSource | None = None
        finished = False
        try:
            judge = judge_for(path, self.name, self._secrets)
            source = await self._open(path, body, request_id, headers, on_head)
            while not finished:
                events = await source.read()
                finished = not events
                for data in events:
                    if data == _DONE:
                        finished = True
                        break
                    judge.event(data)
                    yield data
            judge.end()
            status = 200
        except GatewayError as error:
            finished = False
            status = self._failed(path, error, started)
            raise
        finally:
            if source is not None:
                source.close(drain=finished)
            self._record(status, started)

    async def relay(
        self, request: ByteRequest, *, request_id: str | None = None, on_head: OnHead | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer of a relayed request as it comes; what the upstream refuses is raised as elsewhere."""
        started = time.perf_counter()
        status: int | str = "cancelled"
        try:
            async with aclosing(self._relay(request, request_id, on_head)) as pieces:
                async for piece in pieces:
                    yield piece
            status = 200
        except GatewayError as error:
            if error.domain == "upstream" or isinstance(error, UpstreamRejected):
                status = self._failed(request.path.partition("?")[0], error, started)
            raise
        finally:
            self._record(status, started)

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

    def _failed(self, path: str, error: GatewayError, started: float) -> str:
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
            cause=type(error.__cause__).__name__ if error.__cause__ is not None else None,
            duration_ms=round((time.perf_counter() - started) * 1000, 1),
        )
        word = type(error).code if isinstance(type(error).code, str) else None
        return (word or f"rejected_{error.status}").removeprefix("upstream_")

    def _record(self, status: int | str, started: float) -> None:
        if self._metrics is not None:
            self._metrics.upstream_request(self.name, status, time.perf_counter() - started)


class HttpUpstream(Upstream):
    """An OpenAI-compatible server over HTTP/1.1. Create it inside the event loop that will use it."""

    def __init__(self, config: UpstreamConfig, metrics: UpstreamMetrics | None = None) -> None:
        super().__init__(config, metrics)
        parts = urlsplit(self.base_url)
        host = parts.hostname or ""
        tls = _tls_of(config) if parts.scheme == "https" else None
        port = parts.port or (443 if tls is not None else 80)
        self._transport = Transport(Origin(config.name, host, port, tls), config.timeouts, config.limits)
        self._prefix = parts.path.rstrip("/")
        self._query = parts.query
        self._preset = PRESETS.get(config.provider, _NO_PRESET)
        self._keys = UpstreamKeys(config.name, keys_of(config))
        self._headers = _headers_of(config, self._preset, parts.netloc)
        self._common = _header_block(self._headers)
        self._own = frozenset(name.lower() for name in config.headers)

    async def probe(self) -> None:
        """See `Upstream.probe`."""
        answer = await self._get(self.config.health_path)
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
        exchange = await self._transport.send(head + b"\r\n", b"", streamed=False, timeouts=timeouts)
        try:
            return await self._read_answer(exchange, b"", key)
        finally:
            exchange.close()

    async def _post(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> bytes:
        key = self._keys.take()
        head = self._json_head(path, body, "application/json", key, request_id, headers)
        exchange = await self._transport.send(head, body, streamed=False)
        try:
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
            exchange = await self._transport.send(head + length + b"\r\n", body, streamed=False)
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
                    raise self._too_large("relay", exchange.limits.relay_bytes)
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
                judge_for("", self.name, self._secrets).body(answer)
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
                raise self._too_large("body", limit)
            idle_s = exchange.timeouts.idle_s
            while piece := await exchange.read():
                body += piece
                if len(body) > limit:
                    raise self._too_large("body", limit)
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
            self.name, exchange.status, exchange.headers, bytes(body), asked=asked, secrets=self._secrets
        )

    def _too_large(self, what: str, limit: int) -> UpstreamMalformed:
        return UpstreamMalformed(
            f"The upstream '{self.name}' sent an answer of more than {limit} bytes. Raise limits.{what}_bytes of it if "
            "that is right."
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
        exchange = self._exchange
        if self._any:
            idle_s = exchange.timeouts.idle_s
            exchange.expect(idle_s, "sent no event for {:g} s. Raise timeouts.idle_s of it if it needs longer.")
        while True:
            piece = await exchange.read()
            if not piece:
                if not self._any and self._parser.strange:
                    raise UpstreamMalformed(
                        f"The upstream '{self._upstream}' sent something that is not an event stream. See whether its "
                        "base_url is right."
                    )
                return []
            self._read_bytes += len(piece)
            if self._read_bytes > exchange.limits.stream_bytes:
                raise self._too_large("stream", exchange.limits.stream_bytes)
            try:
                events = self._parser.feed(piece)
            except EventTooLarge as error:
                raise self._too_large("event", exchange.limits.event_bytes) from error
            if events:
                self._any = True
                exchange.relax()
                return events

    def close(self, *, drain: bool = False) -> None:
        self._exchange.close(drain=drain)

    def _too_large(self, what: str, limit: int) -> UpstreamMalformed:
        thing = "an event" if what == "event" else "a stream"
        return UpstreamMalformed(
            f"The upstream '{self._upstream}' sent {thing} of more than {limit} bytes. Raise limits.{what}_bytes of it "
            "if that is right."
        )


_HOSTED_TOOL_NAMES = {
    "hosted_mcp": "mcp",
    "web_search_preview": "web_search",
    "computer": "computer_use_preview",
    "computer_use": "computer_use_preview",
}
"""Spellings of the Agents SDK and of older API versions."""


def _tls_of(config: UpstreamConfig) -> ssl.SSLContext:
    try:
        return open_tls(verify=config.verify_tls, ca_file=config.ca_file)
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
