"""The shape of `security.yaml`: defaults, and API keys by digest."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.principal import Allowance, Limits, Profile, Scope
from gateway.security.issuers import JwtIssuer, check_issuers
from gateway.security.moments import end_of

FILE = "security.yaml"


class RateLimit(msgspec.Struct, frozen=True):
    """Requests a key may send in a minute: another spelling of ``limits: {requests_per_minute: …}``."""

    per_minute: Annotated[int, msgspec.Meta(ge=1)] | None = None


class NamespaceDefaults(msgspec.Struct, frozen=True):
    """What holds for the agents of one namespace.

    ``allow_agents`` (patterns of names, or of ``namespace/name``) adds to what a key without a list of its own reaches.
    """

    allow_agents: list[str] = []
    dropin_module_allowlist: list[str] = []
    dropin_module_denylist: list[str] = []


class SecurityDefaults(msgspec.Struct, frozen=True):
    """What holds where a key, or a namespace, says nothing. ``allow_agents`` omitted means every model.

    ``allow_tools`` are patterns of gateway tools' names: omitted means none, the gateway's tools are denied by default.
    ``limits`` are those of each key without its own, ``end_user_limits`` those of each end user of each such key.
    ``namespace_limits`` hold for all keys of a namespace together.
    """

    allow_agents: list[str] | None = None
    allow_tools: list[str] = []
    hide_foreign_models: bool = False
    rate_limit: RateLimit | None = None
    limits: Limits | None = None
    end_user_limits: Limits | None = None
    namespace_limits: dict[str, Limits] = {}
    local_tools_allowlist: list[str] = []
    dropin_module_allowlist: list[str] = []
    dropin_module_denylist: list[str] = []
    namespace_defaults: dict[str, NamespaceDefaults] = {}


class ApiKey(msgspec.Struct, frozen=True):
    """One key: ``hashed_key`` is the sha256 of it in hex; ``key``, the key itself, is accepted and warned about.

    ``allow_agents`` omitted inherits the defaults; an empty list reaches no model. ``expires_at`` is a date (its last
    second counts) or a moment, UTC where it names no zone. ``limits`` and ``end_user_limits`` stand instead of the
    defaults, whole: ``{}`` is no limit. ``allow_tools``, as ``allow_agents``, omitted inherits the defaults.
    """

    id: str
    key: str | None = None
    hashed_key: str | None = None
    description: str | None = None
    allow_agents: list[str] | None = None
    allow_tools: list[str] | None = None
    scopes: tuple[Scope, ...] = ("chat",)
    profile: Profile = "openai"
    namespace: str = "default"
    rate_limit: RateLimit | None = None
    limits: Limits | None = None
    end_user_limits: Limits | None = None
    expires_at: Any = None


class LimitProfile(msgspec.Struct, frozen=True):
    """Limits with a name, for the tokens of an issuer; what is left out inherits the defaults."""

    limits: Limits | None = None
    end_user_limits: Limits | None = None


class SecurityConfig(msgspec.Struct, frozen=True):
    """The whole file."""

    version: Literal[1] = 1
    default: SecurityDefaults = SecurityDefaults()
    api_keys: list[ApiKey] = []
    jwt: list[JwtIssuer] = []
    limit_profiles: dict[str, LimitProfile] = {}


def load_security(settings: Settings) -> SecurityConfig:
    """Read `security.yaml`; without one, the defaults. Raises `ConfigError` naming the key and what is accepted."""
    path = settings.config_file(FILE)
    config = load_yaml(path, SecurityConfig) if path is not None else SecurityConfig()
    seen: set[str] = set()
    for key in config.api_keys:
        _check(key)
        if key.id in seen:
            raise ConfigError(f"{FILE}: two api_keys have the id '{key.id}'; ids name keys in logs and must differ.")
        seen.add(key.id)
    patterns = [*(config.default.allow_agents or ()), *(p for key in config.api_keys for p in key.allow_agents or ())]
    for pattern in [*patterns, *(p for d in config.default.namespace_defaults.values() for p in d.allow_agents)]:
        if not pattern.isascii() or not pattern:
            raise ConfigError(f"{FILE}: the pattern {pattern!r} in allow_agents can match no model; ids are ASCII.")
    check_issuers(config.jwt, config.limit_profiles, FILE)
    return config


def allowance(
    defaults: SecurityDefaults,
    *,
    namespace: str,
    limits: Limits | None = None,
    end_user_limits: Limits | None = None,
    requests_per_minute: int | None = None,
) -> Allowance | None:
    """Return what a key may use, None for one without limits; ``limits`` and ``end_user_limits`` are its own, if any.

    ``requests_per_minute`` holds where neither the key nor the defaults say anything.
    """
    own = limits or limits_of(defaults.limits, defaults.rate_limit, "default")
    if own is None and requests_per_minute is not None:
        own = Limits(requests_per_minute=requests_per_minute)
    parts = own, defaults.namespace_limits.get(namespace), end_user_limits or defaults.end_user_limits
    key, shared, end_user = (None if part is None or part.is_unlimited else part for part in parts)
    return None if key is shared is end_user is None else Allowance(key=key, namespace=shared, end_user=end_user)


def limits_of(limits: Limits | None, rate_limit: RateLimit | None, where: str) -> Limits | None:
    """Return what the two spellings say together. Raises `ConfigError` where both say how many requests."""
    if rate_limit is None or rate_limit.per_minute is None:
        return limits
    if limits is None:
        return Limits(requests_per_minute=rate_limit.per_minute)
    if limits.requests_per_minute is not None:
        raise ConfigError(
            f"{FILE}: {where} has both limits.requests_per_minute and rate_limit.per_minute; leave one of them."
        )
    return msgspec.structs.replace(limits, requests_per_minute=rate_limit.per_minute)


def expiry(key: ApiKey) -> float | None:
    """Return the moment the key stops working, in epoch seconds. Raises `ConfigError` for what is no date."""
    if key.expires_at is None:
        return None
    try:
        return end_of(key.expires_at)
    except ValueError as error:
        raise ConfigError(
            f"{FILE}: expires_at of the key '{key.id}' is {key.expires_at!r}; write 2030-12-31 or 2030-12-31T12:00:00Z."
        ) from error


def _check(key: ApiKey) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", key.id):
        raise ConfigError(
            f"{FILE}: the key id {key.id!r} is not accepted; use 1 to 64 letters, digits and . _ @ - beginning with a "
            "letter or a digit."
        )
    if (key.key is None) == (key.hashed_key is None):
        raise ConfigError(f"{FILE}: the key '{key.id}' needs exactly one of 'hashed_key' (sha256 in hex) and 'key'.")
    if key.hashed_key is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", key.hashed_key):
        raise ConfigError(
            f"{FILE}: hashed_key of '{key.id}' is not a sha256 in hex (64 digits). "
            f"'gateway keys create {key.id} --yaml' makes a key and prints the lines for this file."
        )
    if key.key is not None and (not key.key.strip() or key.key.startswith("${")):
        raise ConfigError(
            f"{FILE}: 'key' of '{key.id}' is empty or a placeholder, and placeholders are not replaced in this file. "
            "Write its sha256 as 'hashed_key', or give one key by the environment as GATEWAY_API_KEY."
        )
    expiry(key)
