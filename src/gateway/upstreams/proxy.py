"""Connections to an upstream, straight or through an HTTP proxy: absolute requests for http, a tunnel for https."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

import httptools

from gateway.errors import UpstreamUnreachable

P = TypeVar("P", bound=asyncio.Protocol)

_HEAD_BYTES = 16 * 1024


class ProxyUnreachable(OSError):
    """No connection to the proxy itself."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where a proxy listens; ``tls`` None means plain TCP. ``credentials`` are the value of ``proxy-authorization``."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    credentials: str | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str, tls: Callable[[], ssl.SSLContext]) -> Proxy:
        """Return the proxy at ``http(s)://[user:password@]host[:port]``; ``tls`` makes the context for https."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        credentials = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            credentials = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
        return cls(parts.hostname or "", parts.port or (443 if secure else 80), tls() if secure else None, credentials)


def proxy_secrets(url: str | None) -> tuple[str, ...]:
    """Return what must not be repeated of a proxy's address."""
    parts = urlsplit(url or "")
    return (unquote(parts.password), parts.password) if parts.password else ()


def proxy_from_environment(scheme: str, host: str, variables: Mapping[str, str]) -> str | None:
    """Return the proxy that ``HTTPS_PROXY``, ``HTTP_PROXY`` or ``ALL_PROXY`` name for a host not in ``NO_PROXY``."""
    found = {name: _variable(name, variables) for name in (f"{scheme}_proxy", "all_proxy", "no_proxy")}
    if _is_excepted(host.lower(), found["no_proxy"] or ""):
        return None
    url = found[f"{scheme}_proxy"] or found["all_proxy"]
    return url if url is None or "://" in url else f"http://{url}"


async def open_connection(
    loop: asyncio.AbstractEventLoop,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None,
    proxy: Proxy | None,
    name: str,
    protocol: Callable[[], P],
) -> P:
    """Return a connected protocol; ``name`` is the upstream's, for messages.

    Raises what sockets and TLS raise, `ProxyUnreachable`, or `UpstreamUnreachable` for a proxy that refuses.
    """
    if proxy is None:
        return (await loop.create_connection(protocol, host, port, **_secured(tls, host)))[1]
    if tls is None:
        return (await _reach(loop, proxy, protocol))[1]
    transport, tunnel = await _reach(loop, proxy, lambda: _Tunnel(name, loop))
    try:
        await tunnel.open(host, port, proxy.credentials)
        connected = protocol()
        secured = await loop.start_tls(transport, connected, tls, server_hostname=host)
        assert secured is not None, "TLS begins on an open socket"
        connected.connection_made(secured)
        return connected
    except BaseException:
        transport.abort()
        raise


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a tunnel, and hears whether it is there."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._name = name
        self._answered: asyncio.Future[None] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._received = 0
        self._transport: asyncio.Transport | None = None

    async def open(self, host: str, port: int, credentials: str | None) -> None:
        """Return when bytes go through to ``host``."""
        assert self._transport is not None, "the proxy is connected"
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        shown = f"proxy-authorization: {credentials}\r\n" if credentials else ""
        self._transport.write(f"CONNECT {where} HTTP/1.1\r\nhost: {where}\r\n{shown}\r\n".encode("ascii"))
        await self._answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Read the head of the proxy's answer; behind a good one, nothing may come before TLS has begun."""
        self._received += len(data)
        if self._received > _HEAD_BYTES:
            self._fail("sent an answer that is too long")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # what the parser calls a tunnel
        except httptools.HttpParserError:
            self._fail("sent an answer that is not valid HTTP/1.1")

    def on_headers_complete(self) -> None:
        """Judge the status."""
        status = self._parser.get_status_code()
        if status == 407:
            self._fail("refused the user name and password (407); set them in proxy of this upstream")
        elif not 200 <= status < 300:
            self._fail(f"refused the connection ({status})")
        elif not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the proxy hung up."""
        self._fail("closed the connection without an answer")

    def _fail(self, what: str) -> None:
        if not self._answered.done():
            self._answered.set_exception(UpstreamUnreachable(f"The proxy of the upstream '{self._name}' {what}."))


async def _reach(loop: asyncio.AbstractEventLoop, proxy: Proxy, protocol: Callable[[], P]) -> tuple[Any, P]:
    try:
        return await loop.create_connection(protocol, proxy.host, proxy.port, **_secured(proxy.tls, proxy.host))
    except OSError as error:  # TLS errors are among them
        raise ProxyUnreachable("the proxy cannot be reached") from error


def _secured(tls: ssl.SSLContext | None, host: str) -> dict[str, Any]:
    return {"ssl": tls, "server_hostname": host} if tls is not None else {}


def _variable(name: str, variables: Mapping[str, str]) -> str | None:
    return variables.get(name) or variables.get(name.upper()) or None


def _is_excepted(host: str, no_proxy: str) -> bool:
    for entry in no_proxy.lower().split(","):
        name = entry.strip().lstrip(".")
        if name == "*" or (name and (host == name or host.endswith("." + name))):
            return True
    return False
