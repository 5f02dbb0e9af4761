"""The one place that turns an exception into HTTP: OpenAI's error object, its status, its headers."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from api.routing import Headers, Response
from gateway.errors import GatewayError, MethodNotAllowed, Unauthenticated

_INTERNAL = GatewayError(
    "The gateway failed in a way it did not expect. The request id in x-request-id finds the cause in its log."
)


def public(error: BaseException) -> GatewayError:
    """Return what a caller may know of ``error``: itself if the gateway can explain it, else a plain 500."""
    return error if isinstance(error, GatewayError) else _INTERNAL


def error_object(error: GatewayError) -> dict[str, Any]:
    """Return ``{"error": {message, type, param, code}}``.

    What an upstream said to a relayed call stays as it was, so far as the official schema allows: its four fields are
    text or absent, and what the upstream left out is ours.
    """
    shown: dict[str, Any] = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    if error.is_relayed and error.upstream_error is not None:
        for name, value in error.upstream_error.items():
            if name not in shown:
                shown[name] = value
            elif value is not None:
                shown[name] = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return {"error": shown}


def routed_headers(upstream: str, attempts: int, hedged: bool = False) -> Headers:
    """Return the headers that say which upstream served a model call (or failed last), and at which try."""
    headers = (b"x-gateway-upstream", upstream.encode()), (b"x-gateway-attempts", str(attempts).encode())
    return (*headers, (b"x-gateway-hedged", b"true")) if hedged else headers


def error_response(error: GatewayError, *, challenge: bytes = b"Bearer") -> Response:
    """Return the whole answer for an error that comes before the first byte of a stream.

    ``challenge`` is what a caller who is not known is told about how to become so.
    """
    headers: list[tuple[bytes, bytes]] = []
    if isinstance(error, Unauthenticated):
        headers.append((b"www-authenticate", challenge))
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allow).encode()))
    if error.routed is not None:
        headers += routed_headers(*error.routed)
    headers.extend(error.headers)
    if error.is_relayed:
        headers.extend(error.upstream_headers)
    result: Headers = tuple(headers)
    return Response(msgspec.json.encode(error_object(error)), error.status, headers=result)
