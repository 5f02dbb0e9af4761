"""POST /security/refresh, /security/preview and the overrides: who reaches what, as an operator asks and changes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

from fastapi import Body
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.requests import Request
from starlette.responses import Response

from api import shared
from api.admin.moments import iso
from api.admin.refreshing import refresh
from gateway.admission import find_target
from gateway.errors import NotFound
from gateway.principal import Principal
from gateway.security.acl import Override, Source
from gateway.security.keys import KnownKey
from gateway.security.overrides import LONGEST_S

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway


class KeyRecord(BaseModel):
    """What one key reaches; never the key or its digest."""

    key_id: str
    allow_agents: list[str] = Field(description="Patterns over namespace/name, those of namespaces included.")
    rate_limit_per_minute: int | None
    expires_at: str | None = Field(description="UTC, ISO 8601.")


class PreviewRequest(BaseModel):
    """What to decide without doing it."""

    model_config = ConfigDict(extra="forbid")

    agent: str = Field(min_length=1, max_length=256, description="A model's name, as a client would send it.")
    key_id: str | None = Field(None, description="Whose right is asked about; the asking key's where left out.")


class OverrideRequest(BaseModel):
    """A grant for a while."""

    model_config = ConfigDict(extra="forbid")

    agent: str = Field(description="A pattern over namespace/name.")
    ttl_seconds: StrictInt = Field(ge=1, le=LONGEST_S)
    reason: str = Field(description="Stands in the log.")
    key_id: str | None = Field(None, description="The only key it holds for; every key where left out.")


class OverrideRecord(BaseModel):
    """One override in force."""

    id: str
    agent: str
    pattern: str
    key_id: str | None
    expires_at: str = Field(description="UTC, ISO 8601.")
    reason: str
    granted_by: str | None


class PreviewRecord(BaseModel):
    """The decision, what it rests on, and the canonical id it was made for."""

    agent: str
    key_id: str
    allowed: bool
    source: Source
    pattern: str | None
    override: OverrideRecord | None


async def refresh_security(request: Request, response: Response) -> list[KeyRecord]:
    """Read `security.yaml` and the stored keys again; a wrong file changes nothing and is answered with the reason."""
    gateway = _gateway(request)
    await refresh(gateway, "security", response)
    return [_key(known) for known in gateway.holder.current.keyring.list_keys()]


async def preview(request: Request, asked: Annotated[PreviewRequest, Body()]) -> PreviewRecord:
    """Say whether a key reaches a model, and by which override, namespace default or pattern."""
    snapshot = _gateway(request).holder.current
    principal = _principal(request, asked.key_id)
    model_id, _ = find_target(asked.agent, principal, snapshot)
    decision = snapshot.access.decide(principal, model_id)
    return PreviewRecord(
        agent=model_id,
        key_id=principal.key_id,
        allowed=decision.allowed,
        source=decision.source,
        pattern=decision.pattern,
        override=_override(decision.override) if decision.override is not None else None,
    )


async def list_overrides(request: Request) -> list[OverrideRecord]:
    """List the overrides in force."""
    return [_override(known) for known in _gateway(request).overrides.list_overrides()]


async def make_override(request: Request, asked: Annotated[OverrideRequest, Body()]) -> OverrideRecord:
    """Let every key, or one, reach what matches a pattern, for at most a day; logged with its reason."""
    gateway = _gateway(request)
    if asked.key_id is not None:
        _principal(request, asked.key_id)
    override = gateway.overrides.make(
        asked.agent, asked.ttl_seconds, asked.reason, key_id=asked.key_id, granted_by=_asking(request).key_id
    )
    await shared.apply_override(gateway, override)
    return _override(override)


async def revoke_override(request: Request, override_id: str) -> OverrideRecord:
    """End an override before its time."""
    return _override(await shared.revoke_override(_gateway(request), override_id))


def _gateway(request: Request) -> Gateway:
    return cast("Gateway", request.state.gateway)


def _asking(request: Request) -> Principal:
    return cast("Principal", request.state.principal)


def _principal(request: Request, key_id: str | None) -> Principal:
    asking = _asking(request)
    if key_id is None or key_id == asking.key_id:
        return asking
    known = _gateway(request).holder.current.keyring.list_keys()
    found = next((key.principal for key in known if key.principal.key_id == key_id), None)
    if found is None:
        raise NotFound(f"There is no key with the id '{key_id[:64]}'. POST /security/refresh lists them.")
    return found


def _key(known: KnownKey) -> KeyRecord:
    principal = known.principal
    allowance = principal.allowance
    return KeyRecord(
        key_id=principal.key_id,
        allow_agents=[*principal.allow, *principal.allow_by_namespace],
        rate_limit_per_minute=allowance.key.requests_per_minute if allowance and allowance.key else None,
        expires_at=iso(known.expires_at) if known.expires_at is not None else None,
    )


def _override(override: Override) -> OverrideRecord:
    return OverrideRecord(
        id=override.id,
        agent=override.agent,
        pattern=override.agent,
        key_id=override.key_id,
        expires_at=iso(override.expires_at),
        reason=override.reason,
        granted_by=override.granted_by,
    )
