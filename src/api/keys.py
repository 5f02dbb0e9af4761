"""/security/keys: list API keys, and make, rotate and revoke those of the store; a secret is answered once."""

from __future__ import annotations

from typing import Any

import msgspec

from api.dependencies import read_body
from api.routing import Request, Response
from gateway.chat import decode_body
from gateway.errors import Conflict, InvalidRequest
from gateway.security.keybook import GRACE_S, MadeKey
from gateway.security.keys import KnownKey
from gateway.security.moments import end_of, shown
from gateway.security.stored import StoredKey, read_options

_HEADERS = ((b"cache-control", b"no-store"),)


async def list_keys(request: Request) -> Response:
    """List every key: those of the file and the environment as they are, those of the store with their history."""
    gateway = request.gateway
    await gateway.keys.refresh()
    data: list[dict[str, Any]] = [
        _known(key) for key in gateway.holder.current.keyring.list_keys() if not key.is_stored
    ]
    data += [_stored(key) for key in gateway.keys.keys or ()]
    data.sort(key=lambda key: str(key["id"]))
    return _json({"object": "list", "data": data})


async def create_key(request: Request) -> Response:
    """Make a key."""
    fields = await _fields(request)
    key_id = fields.pop("id", None)
    if not isinstance(key_id, str):
        raise InvalidRequest("'id' is missing: the name that the key has in logs and lists.", param="id")
    expires_at = _moment(fields.pop("expires_at", None))
    options = read_options(fields)
    _refuse_foreign(request, key_id, "There is a key with this id in security.yaml or the environment; take another.")
    made = await request.gateway.keys.create(key_id, options, expires_at=expires_at, created_by=request.caller.key_id)
    request.gateway.metrics.credential_used("key_created")
    return _json(_made(made), 201)


async def rotate_key(request: Request) -> Response:
    """Give a key a new secret; the old one works for ``grace_s`` seconds more."""
    fields = await _fields(request)
    grace_s = fields.pop("grace_s", GRACE_S)
    if isinstance(grace_s, bool) or not isinstance(grace_s, int | float):
        raise InvalidRequest("'grace_s' takes a number of seconds.", param="grace_s")
    if fields:
        raise InvalidRequest(f"'{next(iter(fields))[:64]}' is no field of a rotation; there is grace_s.")
    key_id = _own(request)
    made = await request.gateway.keys.rotate(key_id, grace_s=grace_s, by=request.caller.key_id)
    request.gateway.metrics.credential_used("key_rotated")
    return _json(_made(made))


async def revoke_key(request: Request) -> Response:
    """End a key; its open streams end within a second, in every process."""
    key_id = _own(request)
    revoked = await request.gateway.keys.revoke(key_id, by=request.caller.key_id)
    request.gateway.metrics.credential_used("key_revoked")
    return _json(_stored(revoked))


def _own(request: Request) -> str:
    key_id = request.path_params["key_id"]
    _refuse_foreign(request, key_id, "This key stands in security.yaml or the environment; change it there.")
    return key_id


def _refuse_foreign(request: Request, key_id: str, why: str) -> None:
    known = request.gateway.holder.current.keyring.list_keys()
    if any(key.principal.key_id == key_id and not key.is_stored for key in known):
        raise Conflict(why, param="id")


async def _fields(request: Request) -> dict[str, Any]:
    body = await read_body(request)
    return {str(name): msgspec.json.decode(raw) for name, raw in decode_body(body).items()} if body.strip() else {}


def _moment(value: object) -> float | None:
    """Read a day (its last second counts) or a moment; UTC where no zone is named."""
    if value is None:
        return None
    try:
        return end_of(value)
    except ValueError as error:
        raise InvalidRequest("Write 2030-12-31 or 2030-12-31T12:00:00Z.", param="expires_at") from error


def _made(made: MadeKey) -> dict[str, Any]:
    return {**_stored(made.key), "key": made.secret}


def _known(key: KnownKey) -> dict[str, Any]:
    principal = key.principal
    return {
        "id": principal.key_id,
        "object": "api_key",
        "source": "configuration",
        "scopes": sorted(principal.scopes),
        "allow_agents": [*principal.allow, *principal.allow_by_namespace],
        "allow_tools": list(principal.allow_tools),
        "namespace": principal.namespace,
        "profile": principal.profile,
        "expires_at": shown(key.expires_at),
    }


def _stored(key: StoredKey) -> dict[str, Any]:
    options = key.options
    return {
        "id": key.id,
        "object": "api_key",
        "source": "store",
        "description": options.description,
        "scopes": sorted(options.scopes),
        "allow_agents": options.allow_agents,
        "allow_tools": options.allow_tools,
        "namespace": options.namespace,
        "profile": options.profile,
        "limits": options.limits,
        "end_user_limits": options.end_user_limits,
        "created_at": shown(key.created_at),
        "created_by": key.created_by,
        "expires_at": shown(key.expires_at),
        "revoked_at": shown(key.revoked_at),
        "previous_key_until": shown(key.previous_until) if key.previous_digest is not None else None,
    }


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, headers=_HEADERS)
