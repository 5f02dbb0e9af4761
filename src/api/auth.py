"""`/auth/config` and `/api/v1/auth/whoami`: how one shows who one is here, and who one is."""

from __future__ import annotations

import msgspec

from api.routing import Request, Response

_NOT_STORED = ((b"cache-control", b"no-store"),)


async def auth_config(request: Request) -> Response:
    """Say how callers are told apart; the same for everybody, with or without a key.

    Where tokens of issuers are accepted (``jwt``), keys are as well.
    """
    tokens = request.gateway.holder.current.keyring.tokens
    body = {
        "type": "api_key" if tokens is None else "jwt",
        "headers": ["authorization: Bearer", "x-api-key"],
        "issuers": () if tokens is None else tokens.issuers,
    }
    return Response(msgspec.json.encode(body), headers=_NOT_STORED)


async def whoami(request: Request) -> Response:
    """Say who the key or token belongs to and what it may."""
    caller = request.caller
    body = {
        "id": caller.id,
        "type": "api_key" if caller.issuer is None else "jwt",
        "is_admin": caller.is_admin,
        "groups": [caller.namespace],
        "scopes": sorted(caller.scopes),
        "key_id": caller.key_id,
        "issuer": caller.issuer,
    }
    return Response(msgspec.json.encode(body), headers=_NOT_STORED)
