"""The HTTP transports, streamable and SSE: `mcp`'s own over a client that caps, times and explains.

`mcp` lets one failed POST end the whole session, and reads a JSON answer of any size. Here a request that fails is
answered with a JSON-RPC error in the server's place, so that the other calls of the session go on, and a body is cut
off at its limit before anything parses it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx2
import msgspec
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

from gateway.errors import ToolDenied
from gateway.tools.config import NetworkAccess
from gateway.tools.mcp.wire import GATEWAY_ERROR, Streams
from gateway.tools.network import open_pool

_CONNECT_S = 5.0
_MOST_CONNECTIONS = 100
_SHORT_S = 5.0
"""Seconds that a notification, an answer or a DELETE may take: `mcp` sends them one after the other."""


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """Where to connect. ``headers`` are the credential; ``network`` says where it may lie (None: anywhere)."""

    url: str
    transport: Literal["http", "sse"] = "http"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    network: NetworkAccess | None = None

    @property
    def identity(self) -> str:
        """What makes it this server and no other; no secret in it."""
        url = httpx2.URL(self.url)
        return "\0".join((self.transport, str(url.copy_with(userinfo=b"", query=None, fragment=None))))

    def with_headers(self, headers: Mapping[str, str]) -> HttpTarget:
        """Return the same server with further headers."""
        return replace(self, headers={**self.headers, **headers})


@asynccontextmanager
async def http_streams(target: HttpTarget, *, message_limit: int) -> AsyncIterator[Streams]:
    """Yield the streams to the server; its messages are at most ``message_limit`` bytes."""
    if target.transport == "sse":

        def client(headers: Any = None, timeout: Any = None, auth: Any = None) -> httpx2.AsyncClient:
            return _client(target, message_limit)

        async with sse_client(target.url, sse_read_timeout=86_400, httpx_client_factory=client) as streams:
            yield streams
    else:
        async with (
            _client(target, message_limit) as http,
            streamable_http_client(target.url, http_client=http, max_sse_event_size=message_limit) as streams,
        ):
            yield streams


def _client(target: HttpTarget, limit: int) -> httpx2.AsyncClient:
    inner = httpx2.AsyncHTTPTransport(
        trust_env=False, limits=httpx2.Limits(max_connections=_MOST_CONNECTIONS, max_keepalive_connections=20)
    )
    if target.network is not None:
        # httpx2 takes no network backend; the pool behind its transport does.
        inner._pool = open_pool(target.network, max_connections=_MOST_CONNECTIONS)
    return httpx2.AsyncClient(
        transport=GuardedTransport(inner, limit),
        headers={**target.headers, "accept-encoding": "identity"},
        timeout=httpx2.Timeout(None, connect=_CONNECT_S),  # every call has its own deadline
        follow_redirects=False,
        trust_env=False,
    )


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Answers a JSON-RPC request whose HTTP request failed, in the server's place; caps bodies that are not streams."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, limit: int) -> None:
        self._inner = inner
        self._limit = limit

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request."""
        if request.method == "GET":
            response = await self._inner.handle_async_request(request)
            if not _is_plain(response):
                await response.aclose()
                return httpx2.Response(502)
            return self._capped(response)
        try:
            if request.method == "POST" and _is_request(request):
                response = await self._inner.handle_async_request(request)
            else:
                async with asyncio.timeout(_SHORT_S):
                    response = await self._inner.handle_async_request(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout):
            return _refusal(request, "not_sent")
        except (httpx2.TransportError, TimeoutError):
            return _refusal(request, "lost")
        except ToolDenied:
            return _refusal(request, "private")
        reason = _reason(request, response)
        if reason is not None:
            await response.aclose()
            return _refusal(request, reason, response.status_code)
        return self._capped(response)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()

    def _capped(self, response: httpx2.Response) -> httpx2.Response:
        if not _is_stream(response):
            response.stream = _Capped(response.stream, self._limit)
        return response


def _is_plain(response: httpx2.Response) -> bool:
    """Whether the body is what it seems: what a compressed one grows to is not known before it is read."""
    return str(response.headers.get("content-encoding", "identity")).lower() == "identity"


def _is_stream(response: httpx2.Response) -> bool:
    return str(response.headers.get("content-type", "")).lower().startswith("text/event-stream")


class _Capped(httpx2.AsyncByteStream):
    """A body that fails past its limit, and in a way that ends its own request alone."""

    def __init__(self, inner: Any, limit: int) -> None:
        self._inner = inner
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._limit
        try:
            async for chunk in self._inner:
                left -= len(chunk)
                if left < 0:
                    raise httpx2.StreamError("too large")
                yield chunk
        except httpx2.TransportError as error:
            raise httpx2.StreamError("lost") from error

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Message(msgspec.Struct):
    id: int | str | None = None
    method: str | None = None


def _is_request(request: httpx2.Request) -> bool:
    message = _message(request)
    return message is not None and message.id is not None and message.method is not None


def _message(request: httpx2.Request) -> _Message | None:
    try:
        return msgspec.json.decode(request.content, type=_Message)
    except (msgspec.DecodeError, httpx2.RequestNotRead):
        return None


def _reason(request: httpx2.Request, response: httpx2.Response) -> str | None:
    """Say why an answer is no answer; None leaves it to `mcp`, which reads JSON-RPC errors of any status."""
    status = response.status_code
    is_json = str(response.headers.get("content-type", "")).lower().startswith("application/json")
    if status in (400, 404) and "mcp-session-id" in request.headers:
        return "session"
    if status in (401, 403, 407):
        return "auth"
    if 300 <= status < 400 and not _stays(request, response):
        return "redirect"
    if status >= 500 and not is_json:
        return "status"
    expects_words = status < 300 and status != 202 and _is_request(request)
    if not _is_plain(response) or (expects_words and not is_json and not _is_stream(response)):
        return "malformed"
    return None


def _stays(request: httpx2.Request, response: httpx2.Response) -> bool:
    """Whether a redirect only writes the same place differently, such as with a slash at its end."""
    there = request.url.join(response.headers.get("location", ""))
    here = request.url
    return response.status_code in (307, 308) and (there.scheme, there.host, there.port) == (
        here.scheme,
        here.host,
        here.port,
    )


def _refusal(request: httpx2.Request, reason: str, status: int | None = None) -> httpx2.Response:
    message = _message(request)
    error = {"code": GATEWAY_ERROR, "message": reason, "data": {"gateway": reason, "status": status}}
    return httpx2.Response(502, json={"jsonrpc": "2.0", "id": message.id if message else None, "error": error})
