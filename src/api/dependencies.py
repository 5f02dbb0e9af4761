"""What handlers ask of a request: its caller, its body within limits, the headers an agent may see."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from itertools import chain

from api.routing import Receive, Request
from api.routing import Scope as AsgiScope
from gateway.errors import BodyTooLarge, InvalidRequest, RequestTimedOut, Unauthenticated
from gateway.ids import RandomIds
from gateway.security.keys import Caller

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_FORWARDED = frozenset({"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via"})


def read_headers(scope: AsgiScope) -> dict[str, str]:
    """Return the request's headers by lower-case name."""
    given = scope["headers"]
    texts = b"\n".join(chain.from_iterable(given)).decode("latin-1").split("\n")
    if len(texts) != 2 * len(given):  # a server that lets line breaks through, or no headers at all
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in given}
    return dict(zip(texts[::2], texts[1::2], strict=True))


def request_id(headers: Mapping[str, str], ids: RandomIds) -> str:
    """Return the caller's well-formed ``x-request-id``, else a new one."""
    given = headers.get("x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else ids.take().hex()


def correlation_id(headers: Mapping[str, str], request_id: str) -> str:
    """Return the caller's well-formed ``x-correlation-id``, else the request's own id."""
    given = headers.get("x-correlation-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else request_id


def caller(scope: AsgiScope, headers: Mapping[str, str]) -> Caller:
    """Return what the request shows of who sent it; raise `Unauthenticated` for two headers of one kind."""
    if len(headers) < len(scope["headers"]) and _is_shown_twice(scope):
        raise Unauthenticated("The request has more than one Authorization or x-api-key header. Send one.")
    client = scope.get("client")
    return Caller(
        authorization=headers.get("authorization"),
        x_api_key=headers.get("x-api-key"),
        host=headers.get("host"),
        peer=client[0] if client else None,
        forwarded=not _FORWARDED.isdisjoint(headers),
        origin=headers.get("origin"),
        fetch_site=headers.get("sec-fetch-site"),
    )


def _is_shown_twice(scope: AsgiScope) -> bool:
    shown = [name for name, _ in scope["headers"] if name in _CREDENTIALS]
    return len(shown) > len(set(shown))


def session_id(headers: Mapping[str, str]) -> str | None:
    """Return the conversation the client names (``x-session-id``, or Open WebUI's chat id), if well-formed."""
    for name in ("x-session-id", "x-openwebui-chat-id"):
        value = headers.get(name)
        if value is not None and _REQUEST_ID.fullmatch(value):
            return value
    return None


def end_user(request: Request) -> str | None:
    """Return whom a request is for by the header that the operator has named for it, if any."""
    name = request.gateway.settings.end_user_header
    return request.headers.get(name) if name else None


def find_body(request: Request) -> bytes | None:
    """Return the body if all of it is there already and nothing is wrong with it; else it is for `read_body`."""
    exchange = request.client.exchange
    if exchange is None or "content-encoding" in request.headers:
        return None
    return exchange.take_body(request.gateway.settings.body_limit_bytes)


async def read_body(request: Request) -> bytes:
    """Read the body; refuse it while reading once it passes the limit or the time.

    Raises `BodyTooLarge`, `RequestTimedOut`, or `InvalidRequest` for a client that left in the middle.
    """
    body = find_body(request)
    if body is not None:
        return body
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise InvalidRequest(f"The request body is compressed (content-encoding: {encoding[:40]}). Send it as it is.")
    limit = request.gateway.settings.body_limit_bytes
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(request.gateway.settings.body_timeout_s):
            return await _read(request.receive, limit)
    except TimeoutError as error:
        raise RequestTimedOut(
            f"The request body did not arrive within {request.gateway.settings.body_timeout_s:g} s."
        ) from error


async def _read(receive: Receive, limit: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        return body
    parts, size = [], 0
    while message["type"] == "http.request":
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
    raise InvalidRequest("The connection closed before the request body was complete.")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body is larger than {limit:,} bytes. Send less, or raise GATEWAY_REQUEST_BODY_LIMIT_BYTES."
    )
