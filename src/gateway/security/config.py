"""The shape of `security.yaml`: defaults, and API keys by digest."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time
from typing import Any, Literal

import msgspec

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.principal import Profile, Scope

FILE = "security.yaml"


class RateLimit(msgspec.Struct, frozen=True):
    """Requests a key may send in a minute. Read, not yet enforced: loading says so."""

    per_minute: int | None = None


class NamespaceDefaults(msgspec.Struct, frozen=True):
    """What holds for the agents of one namespace.

    ``allow_agents`` (patterns of names, or of ``namespace/name``) adds to what a key without a list of its own reaches.
    """

    allow_agents: list[str] = []
    dropin_module_allowlist: list[str] = []
    dropin_module_denylist: list[str] = []


class SecurityDefaults(msgspec.Struct, frozen=True):
    """What holds where a key, or a namespace, says nothing. ``allow_agents`` omitted means every model."""

    allow_agents: list[str] | None = None
    hide_foreign_models: bool = False
    rate_limit: RateLimit | None = None
    local_tools_allowlist: list[str] = []
    dropin_module_allowlist: list[str] = []
    dropin_module_denylist: list[str] = []
    namespace_defaults: dict[str, NamespaceDefaults] = {}


class ApiKey(msgspec.Struct, frozen=True):
    """One key: ``hashed_key`` is the sha256 of it in hex; ``key``, the key itself, is accepted and warned about.

    ``allow_agents`` omitted inherits the defaults; an empty list reaches no model. ``expires_at`` is a date (its last
    second counts) or a moment, UTC where it names no zone.
    """

    id: str
    key: str | None = None
    hashed_key: str | None = None
    description: str | None = None
    allow_agents: list[str] | None = None
    scopes: tuple[Scope, ...] = ("chat",)
    profile: Profile = "openai"
    namespace: str = "default"
    rate_limit: RateLimit | None = None
    expires_at: Any = None


class SecurityConfig(msgspec.Struct, frozen=True):
    """The whole file."""

    version: Literal[1] = 1
    default: SecurityDefaults = SecurityDefaults()
    api_keys: list[ApiKey] = []


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
    return config


def expiry(key: ApiKey) -> float | None:
    """Return the moment the key stops working, in epoch seconds. Raises `ConfigError` for what is no date."""
    value = key.expires_at
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value) if len(value) > 10 else date.fromisoformat(value)
        except ValueError:
            value = None
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime.combine(value, time.max, UTC).timestamp()
    raise ConfigError(
        f"{FILE}: expires_at of the key '{key.id}' is {key.expires_at!r}; write 2030-12-31 or 2030-12-31T12:00:00Z."
    )


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
            f"{FILE}: hashed_key of '{key.id}' is not a sha256 in hex (64 digits). 'gateway keys new {key.id}' makes "
            "a key and prints the lines for this file."
        )
    if key.key is not None and (not key.key.strip() or key.key.startswith("${")):
        raise ConfigError(
            f"{FILE}: 'key' of '{key.id}' is empty or a placeholder, and placeholders are not replaced in this file. "
            "Write its sha256 as 'hashed_key', or give one key by the environment as GATEWAY_API_KEY."
        )
    expiry(key)
