"""Where clients get tokens: RFC 9728's document about this resource, and the challenge of a 401 that leads there."""

from __future__ import annotations

import re

import msgspec

from api.routing import Request, Response
from gateway.errors import NotFound

WELL_KNOWN = "/.well-known/oauth-protected-resource"
_MCP = frozenset({"/mcp", "/mcp/"})
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")


async def protected_resource(request: Request) -> Response:
    """Name the issuers whose tokens are accepted; 404 where none is."""
    tokens = request.gateway.holder.current.keyring.tokens
    if tokens is None:
        raise NotFound("This gateway accepts API keys alone: security.yaml names no issuer of tokens.")
    resource = _base(request) + request.scope["path"].removeprefix(WELL_KNOWN)
    body = {
        "resource": resource,
        "authorization_servers": tokens.issuers,
        "bearer_methods_supported": ["header"],
        "resource_name": request.gateway.settings.project_name,
    }
    return Response(msgspec.json.encode(body), headers=((b"cache-control", b"no-store"),))


def challenge(request: Request) -> bytes:
    """Return the ``WWW-Authenticate`` of a 401; an MCP client is told where it may get a token."""
    if request.scope["path"] not in _MCP or request.gateway.holder.current.keyring.tokens is None:
        return b"Bearer"
    given = 'error="invalid_token", ' if "authorization" in request.headers else ""
    return f'Bearer {given}resource_metadata="{_base(request)}{WELL_KNOWN}/mcp"'.encode()


def _base(request: Request) -> str:
    """Return the gateway's address as the client knows it."""
    public = request.gateway.settings.public_url
    if public is not None:
        return public.rstrip("/")
    host = request.headers.get("host", "")
    return f"{request.scope['scheme']}://{host if _HOST.fullmatch(host) else 'localhost'}"
