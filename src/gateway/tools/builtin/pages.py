"""Pages of the web, read for research: guarded at every step, capped, never more than text."""

from __future__ import annotations

import asyncio
import codecs
import re
from urllib.parse import urljoin, urlsplit

import httpcore2
from msgspec import Struct

from gateway.errors import ToolDenied
from gateway.tools.builtin.readable import Readable, readable
from gateway.tools.config import NetworkAccess
from gateway.tools.network import open_pool

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_TEXTS = frozenset({"text/html", "application/xhtml+xml", "text/plain"})
_HEADERS = [
    ("accept", "text/html, application/xhtml+xml, text/plain;q=0.9"),
    ("accept-encoding", "identity"),
    ("user-agent", "AgentGateway (research)"),
]
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([A-Za-z0-9_-]{2,40})""", re.IGNORECASE)
_CHARSET_WITHIN = 1_024
_OF_PAGES = re.compile(
    r"ascii|utf-8|utf-16(-[bl]e)?|iso8859-\d+|cp\d+|koi8-[rtu]|shift_jisx?\d*|euc_(jp|kr)|gbk|gb2312|gb18030|big5(hkscs)?"
)
"""Encodings, by Python's names, that pages have; among its others are some that take quadratic time, or are none."""


class PageFailed(Exception):
    """A page that cannot be read; the text says why, without an address inside."""


class Page(Struct, frozen=True, kw_only=True):
    """A page as it was found; ``is_cut``: there was more of it."""

    url: str
    title: str
    text: str
    is_cut: bool


class PageReader:
    """Reads pages for one entry."""

    def __init__(self, access: NetworkAccess, *, most_bytes: int, max_connections: int) -> None:
        """Raise `ConfigError` for a wrong ``access``."""
        self._pool = open_pool(access, max_connections=max_connections)
        self._most = most_bytes

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def read(self, url: str, *, seconds: float) -> Page:
        """Return a page, or raise `PageFailed`. Where it redirects to is judged as its own address was."""
        try:
            async with asyncio.timeout(seconds):
                for _ in range(1 + _MOST_REDIRECTS):
                    found = await self._once(checked(url))
                    if isinstance(found, Page):
                        return found
                    url = found
        except TimeoutError as error:
            raise PageFailed(f"The page was not there within {seconds:.0f} s.") from error
        except ToolDenied as error:
            raise PageFailed("The page's address lies inside a private network, where research may not go.") from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise PageFailed("The page's server cannot be reached, or ended the connection.") from error
        raise PageFailed(f"The page redirects more than {_MOST_REDIRECTS} times.")

    async def _once(self, url: str) -> Page | str:
        """Return the page, or where it redirects to."""
        async with self._pool.stream(
            "GET", url, headers=_HEADERS, extensions={"timeout": {"connect": 10.0, "pool": 10.0}}
        ) as response:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and "location" in headers:
                return _led_to(url, headers["location"])
            if response.status != 200:
                raise PageFailed(f"The page's server answered with HTTP {response.status}.")
            media, _, parameters = headers.get("content-type", "text/html").partition(";")
            if media.strip().lower() not in _TEXTS:
                raise PageFailed(f"The page is no text: {media.strip()[:60]}.")
            if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                raise PageFailed("The page's server compressed its answer, which was not asked for.")
            body, is_cut = bytearray(), False
            async for part in response.aiter_stream():
                body += part[: self._most - len(body)]
                if len(body) == self._most:
                    is_cut = True
                    break
        text = _decoded(bytes(body), parameters)
        if media.strip().lower() == "text/plain":
            said = Readable(title="", text=text)
        else:
            said = await asyncio.to_thread(readable, text)
        return Page(url=url, title=said.title, text=said.text, is_cut=is_cut)


def _led_to(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise PageFailed("The page redirects to what is no address.") from error


def checked(url: str) -> str:
    """Return an address that may be asked, without its fragment; `PageFailed` for another."""
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        is_right = is_right and (parts.port is None or parts.port > 0)
    except ValueError:
        is_right = False
    if not is_right:
        raise PageFailed("This is no address of a page (http:// or https://, without a user).")
    host = parts.netloc if parts.netloc.isascii() else _international(parts.netloc)
    path = "".join(c if 32 < ord(c) < 127 else _percent(c) for c in parts.path or "/")
    query = "".join(c if 32 < ord(c) < 127 else _percent(c) for c in parts.query)
    return f"{parts.scheme}://{host}{path}" + (f"?{query}" if query else "")


def _international(host: str) -> str:
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise PageFailed("This is no address of a page: its host is no name.") from error


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "replace"))


def _decoded(body: bytes, parameters: str) -> str:
    """Return a page as text, in the encoding that its server or its head names."""
    named = re.search(r"charset\s*=\s*\"?([A-Za-z0-9_-]{2,40})", parameters, re.IGNORECASE)
    in_head = _CHARSET.search(body[:_CHARSET_WITHIN])
    name = named[1] if named else in_head[1].decode() if in_head else "utf-8"
    try:
        encoding = codecs.lookup(name).name
    except LookupError:
        encoding = "utf-8"
    return body.decode(encoding if _OF_PAGES.fullmatch(encoding) else "utf-8", "replace")
