"""Tools that are one HTTP request per call, through the guarded network."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import httpcore2
import msgspec

from gateway.errors import ConfigError, InvalidToolArguments, ToolFailed, ToolResultTooLarge, ToolUnavailable
from gateway.tools.config import HttpTool, NetworkAccess
from gateway.tools.lending import check_caller_headers, lent_headers
from gateway.tools.network import Resolve, open_pool
from gateway.tools.port import ProviderHealth, ProviderKind, ToolContext, ToolResult, ToolSpec
from gateway.tools.secrets import resolve_headers

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)\}")
_SAFE = frozenset({"GET", "HEAD"})
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_BODYLESS = frozenset({"GET", "HEAD", "DELETE"})
_AGAIN = frozenset({429, 502, 503, 504})
_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding", "expect"})
_NEVER_SENT = (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout)
_CONNECTION_ERRORS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_ERROR_CHARS = 2_000


class HttpCall(msgspec.Struct, frozen=True, kw_only=True):
    """One request, made of arguments: what `HttpClient.send` sends."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | None = None


class HttpClient:
    """Sends calls of one entry: guarded, capped, never redirected, tried again only where that changes nothing."""

    def __init__(self, access: NetworkAccess, *, max_connections: int, retries: int, resolve: Resolve | None = None):
        """Raise `ConfigError` for a wrong ``access``."""
        self._pool = open_pool(access, max_connections=max_connections, resolve=resolve)
        self._retries = retries
        self.health = ProviderHealth()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def send(self, call: HttpCall, context: ToolContext, *, idempotent: bool) -> ToolResult:
        """Return the answer as a result; a status of 400 and more is the tool's own error.

        Raises `ToolUnavailable`, `ToolFailed`, `ToolResultTooLarge`, and `ToolDenied` for an address inside.
        """
        if idempotent and call.method not in _SAFE:
            call = msgspec.structs.replace(call, headers={"idempotency-key": context.call_id, **call.headers})
        tries = 1 + (self._retries if idempotent else 0)
        for attempt in range(1, tries + 1):
            try:
                status, headers, body = await self._once(call, context.max_result_bytes)
            except _NEVER_SENT as error:
                self._note(down=True)
                failure: Exception = ToolUnavailable("The tool's server cannot be reached.")
                cause: Exception = error
            except _CONNECTION_ERRORS as error:
                self._note(down=True)
                failure = ToolFailed("The tool's server ended the connection before its answer was complete.")
                cause = error
            else:
                self._note(down=status >= 500)
                if status not in _AGAIN or attempt == tries or not await _paused(attempt, headers, context.deadline):
                    return _result(status, headers, body)
                continue
            if attempt == tries or not await _paused(attempt, {}, context.deadline):
                raise failure from cause
        raise AssertionError("the last try returns or raises")

    async def fetch(self, call: HttpCall, *, limit: int, timeout_s: float) -> tuple[int, bytes]:
        """Return status and body of one request, tried once; `ToolUnavailable` where there is no whole answer."""
        try:
            async with asyncio.timeout(timeout_s):
                status, _, body = await self._once(call, limit)
        except (TimeoutError, *_CONNECTION_ERRORS) as error:
            raise ToolUnavailable("The address cannot be reached.") from error
        return status, body

    async def _once(self, call: HttpCall, limit: int) -> tuple[int, dict[str, str], bytes]:
        headers = {**call.headers, "accept-encoding": "identity"}
        async with self._pool.stream(
            call.method,
            call.url,
            headers=list(headers.items()),
            content=call.body,
            extensions={"timeout": {"connect": 10.0, "pool": 10.0}},
        ) as response:
            found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if 300 <= response.status < 400:
                raise ToolFailed("The tool's server answered with a redirect, and redirects are not followed.")
            encoding = found.get("content-encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise ToolFailed(f"The tool's server compressed its answer ({encoding[:20]}), which was not asked for.")
            declared = found.get("content-length", "")
            if call.method != "HEAD" and declared.isdigit() and int(declared) > limit:
                raise too_large(limit)
            parts, size = [], 0
            async for part in response.aiter_stream():
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                parts.append(part)
            return response.status, found, b"".join(parts)

    def _note(self, *, down: bool) -> None:
        self.health = ProviderHealth(
            status="degraded" if down else "ok",
            detail="The latest request failed." if down else None,
            checked_at=time.time(),
        )


class HttpProvider:
    """One entry of provider ``http``."""

    kind: ProviderKind = "http"

    def __init__(self, config: HttpTool, *, max_connections: int, resolve: Resolve | None = None) -> None:
        """Raise `ConfigError` for an address, header or network that cannot be used."""
        self.entry = config.name
        self._config = config
        self._template = UrlTemplate(config.url, where=f"tools.yaml: {config.name}: url")
        self._headers = checked_headers(config.headers, where=f"tools.yaml: {config.name}")
        check_caller_headers(config.caller_headers, f"tools.yaml: {config.name}")
        self._idempotent = config.method in _IDEMPOTENT if config.idempotent is None else config.idempotent
        self._client = HttpClient(
            config.network, max_connections=max_connections, retries=config.retries, resolve=resolve
        )
        missing = self._template.names - set(config.schema.get("properties", ()))
        if missing:
            raise ConfigError(
                f"tools.yaml: {config.name}: url: '{{{min(missing)}}}' is no property of the schema; add it there."
            )

    async def open(self) -> None:
        """Do nothing: connections are made by calls."""

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the one tool."""
        config = self._config
        return (
            ToolSpec(
                name=config.name,
                entry=config.name,
                provider="http",
                remote_name=config.name,
                description=config.description or "",
                parameters=config.schema,
                idempotent=self._idempotent,
                read_only=config.method in _SAFE,
                address=config.url.partition("?")[0],
                method=config.method,
            ),
        )

    async def refresh(self) -> None:
        """Do nothing: there is nobody to ask."""

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Send the request; see `ToolProvider.call`."""
        url, rest = self._template.fill(arguments)
        body = None
        headers = self._headers | lent_headers(self._config.caller_headers, context, f"The tool '{self.entry}'")
        if self._config.method in _BODYLESS:
            url = with_query(url, rest)
        else:
            body = msgspec.json.encode(rest)
            headers.setdefault("content-type", "application/json")
        call = HttpCall(method=self._config.method, url=url, headers=headers, body=body)
        return await self._client.send(call, context, idempotent=self._idempotent)

    def health(self) -> ProviderHealth:
        """Return how the latest request went."""
        return self._client.health


class UrlTemplate:
    """An address with ``{argument}`` in its path or query: the host is never an argument."""

    def __init__(self, url: str, *, where: str) -> None:
        """Raise `ConfigError` for what is no such address."""
        parts = urlsplit(url)
        try:
            port_is_right = parts.port is None or parts.port > 0
        except ValueError:
            port_is_right = False
        if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
            raise ConfigError(f"{where}: write an address that begins with https:// or http:// and a host.")
        if "@" in parts.netloc:
            raise ConfigError(f"{where}: leave user and password out; send them as a header, by reference.")
        if "{" in parts.netloc:
            raise ConfigError(f"{where}: the host cannot be an argument.")
        if any(ord(c) <= 32 or ord(c) > 126 for c in url):
            raise ConfigError(f"{where}: percent-encode blanks and characters outside ASCII.")
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._path, self._query = parts.path or "/", parts.query
        self.names = set(_PLACE.findall(self._path + "?" + self._query))

    def fill(self, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the address with its arguments in place, and the arguments that were not used."""
        path = _PLACE.sub(lambda match: _segment(match[1], arguments), self._path)
        query = _PLACE.sub(lambda match: quote(as_text(arguments.get(match[1], "")), safe=""), self._query)
        rest = {name: value for name, value in arguments.items() if name not in self.names}
        return f"{self._base}{path}" + (f"?{query}" if query else ""), rest


def with_query(url: str, values: Mapping[str, Any]) -> str:
    """Return an address with further query parameters: a list repeats its name, an object is JSON, null is left out."""
    pairs = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        pairs += [(name, as_text(item)) for item in items if item is not None]
    if not pairs:
        return url
    return f"{url}{'&' if '?' in url else '?'}{urlencode(pairs, quote_via=quote)}"


def as_text(value: Any) -> str:
    """Return a JSON value as the text of a parameter."""
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def checked_headers(headers: Mapping[str, str], *, where: str) -> dict[str, str]:
    """Return an entry's headers with their secrets; `ConfigError` for those that the client itself writes."""
    found = resolve_headers(headers, where=where)
    own = _OWN_HEADERS & set(found)
    if own:
        raise ConfigError(f"{where}: headers: {min(own)}: the gateway writes this header itself; leave it out.")
    return found


def too_large(limit: int) -> ToolResultTooLarge:
    """Return the error for a result that passed its limit."""
    return ToolResultTooLarge(f"The tool's result is larger than {limit:,} bytes. Ask it for less.")


def _segment(name: str, arguments: Mapping[str, Any]) -> str:
    text = as_text(arguments.get(name, ""))
    if text in ("", ".", ".."):
        # A server, or something in front of it, may fold such segments away and serve another path.
        raise InvalidToolArguments(f"arguments.{name}: must not be empty or a step in a path.", param="arguments")
    return quote(text, safe="")


def _result(status: int, headers: Mapping[str, str], body: bytes) -> ToolResult:
    text = body.decode("utf-8", "replace")
    if status >= 400:
        return ToolResult(text=f"HTTP {status}: {text[:_ERROR_CHARS]}".strip(), is_error=True)
    structured = None
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "application/json" or media.endswith("+json"):
        try:
            structured = msgspec.json.decode(body) if body else None
        except (msgspec.DecodeError, RecursionError) as error:
            raise ToolFailed("The tool's server sent something that is not the JSON it says it is.") from error
    return ToolResult(text=text, structured=structured)


async def _paused(attempt: int, headers: Mapping[str, str], deadline: float) -> bool:
    """Wait before the next try; False, at once, where there is no time for it."""
    pause = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
    asked = headers.get("retry-after", "")
    if asked.isdigit():
        pause = max(pause, float(asked[:6]))
    if asyncio.get_running_loop().time() + pause >= deadline:
        return False
    await asyncio.sleep(pause)
    return True
