"""`/auth/config` and `/api/v1/auth/whoami`: how one shows who one is here, and who one is."""

from __future__ import annotations

import msgspec

from api.routing import Request, Response

_NOT_STORED = ((b"cache-control", b"no-store"),)


async def auth_config(request: Request) -> Response:
    """Say how callers are told apart; the same for everybody, with or without a key."""
    body = {"type": "api_key", "headers": ["authorization: Bearer", "x-api-key"]}
    return Response(msgspec.json.encode(body), headers=_NOT_STORED)


async def whoami(request: Request) -> Response:
    """Say who the key belongs to and what it may."""
    caller = request.caller
    body = {
        "id": caller.id,
        "type": "api_key",
        "is_admin": caller.is_admin,
        "groups": [caller.namespace],
        "scopes": sorted(caller.scopes),
        "key_id": caller.key_id,
    }
    return Response(msgspec.json.encode(body), headers=_NOT_STORED)
