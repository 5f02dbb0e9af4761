"""POST /mcp: one message of an MCP client (streamable HTTP, stateless), after the same door as every other request."""

from __future__ import annotations

import asyncio
import importlib
import secrets
from typing import Any
from urllib.parse import urlsplit

import msgspec

from api.dependencies import read_body
from api.routing import Receive, Request, Response, Send
from gateway.errors import PermissionDenied

SESSION = "mcp-session-id"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Envelope(msgspec.Struct):
    """What must be known of a message before `mcp` reads it."""

    method: str = ""
    id: str | int | None = None
    params: dict[str, object] = {}


async def serve_mcp(request: Request) -> Response | None:
    """Serve one message: a list or a call of the caller's tools and agents."""
    _check_origin(request)
    body = await read_body(request)
    envelope = _envelope(body)
    if envelope.method == "notifications/cancelled":
        _cancel(request, envelope)
        return Response(b"", status=202)
    # Late on purpose: `mcp` costs a second and 50 MB, and a gateway without MCP clients needs none of it.
    server = await asyncio.to_thread(importlib.import_module, "api.mcp.server")
    session = secrets.token_hex(16) if envelope.method == "initialize" else None
    await server.serve(request, _replay(body, request.receive), _naming(request, session))
    return None


async def refuse_stream(request: Request) -> Response:
    """Refuse what only servers with sessions have: a stream of their own, and the end of a session."""
    return Response(b"", status=405, headers=((b"allow", b"POST"),))


def session_of(request: Request) -> str:
    """Return the name that the client was given for its requests, so that ids of two clients differ."""
    return request.headers.get(SESSION, "")


def _cancel(request: Request, envelope: Envelope) -> None:
    number = envelope.params.get("requestId")
    if isinstance(number, str | int) and not isinstance(number, bool):
        request.gateway.mcp_calls.cancel((request.caller.key_id, session_of(request), number))


def _check_origin(request: Request) -> None:
    """Refuse web pages that nobody allowed: a name that a page makes point here must not speak for its visitor."""
    origin = request.headers.get("origin")
    settings = request.gateway.settings
    if origin is None or origin in settings.cors_origins or "*" in settings.cors_origins:
        return
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:  # no address at all
        host = ""
    if host not in _LOOPBACK and host not in settings.trusted_hosts:
        raise PermissionDenied(
            "Web pages of this origin may not use /mcp. Whoever runs the gateway can add it to GATEWAY_CORS_ORIGINS."
        )


def _envelope(body: bytes) -> Envelope:
    try:
        return msgspec.json.decode(body, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Envelope()  # whatever is wrong with it, `mcp` says it in the protocol's words


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body again, then what comes."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict[str, Any]:
        return messages.pop() if messages else await receive()

    return again


def _naming(request: Request, session: str | None) -> Send:
    if session is None:
        return request.send

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (SESSION.encode(), session.encode())]}
        await request.send(message)

    return send
