"""The shape of `jwt` in `security.yaml`: whose tokens let callers in, and what their claims grant."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct

from gateway.errors import ConfigError
from gateway.principal import Profile, Scope

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures with a private and a public key, nothing else: a public key cannot be taken for a shared secret."""

NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]
_Text = Annotated[str, Meta(min_length=1, max_length=512)]


class Claims(Struct, frozen=True):
    """Which claims are read, by name, or by a path with dots (``realm_access.roles``). None: the claim is not read.

    ``scopes``, ``allow_agents`` and ``allow_tools`` are lists, or texts with spaces between the items.
    """

    subject: _Text = "sub"
    scopes: _Text | None = None
    allow_agents: _Text | None = None
    allow_tools: _Text | None = None
    namespace: _Text | None = None
    limits: _Text | None = None


class JwtIssuer(Struct, frozen=True):
    """One issuer of tokens.

    Its keys come from exactly one of ``jwks_url``, ``jwks_file`` and ``public_key_file`` (PEM). ``scopes``,
    ``allow_agents``, ``allow_tools``, ``namespace`` and ``limits`` (a name of ``limit_profiles``) hold for each of its
    tokens; what ``claims`` read is added to lists, and stands instead of the others. Nothing is granted by default.
    ``scope_names`` translates the words of the scopes claim; others are ignored. ``refresh_s`` and ``leeway_s`` are
    seconds.
    """

    name: _Name
    issuer: _Text
    audience: _Text | list[_Text]
    algorithms: Annotated[list[Algorithm], Meta(min_length=1)]
    jwks_url: str | None = None
    jwks_file: str | None = None
    public_key_file: str | None = None
    ca_file: str | None = None
    refresh_s: Annotated[float, Meta(ge=60, le=86_400)] = 3_600
    leeway_s: Annotated[float, Meta(ge=0, le=300)] = 30
    claims: Claims = Claims()
    scope_names: dict[str, Scope] = {}
    scopes: tuple[Scope, ...] = ()
    allow_agents: list[str] = []
    allow_tools: list[str] = []
    namespace: str = "default"
    limits: str | None = None
    profile: Profile = "openai"


def check_issuers(issuers: Collection[JwtIssuer], limit_profiles: Collection[str], file: str) -> None:
    """Raise `ConfigError` for an issuer that could not be used, or whose tokens could do nothing."""
    names, urls = [issuer.name for issuer in issuers], [issuer.issuer for issuer in issuers]
    for kind, values in (("name", names), ("issuer", urls)):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{file}: jwt: two entries have the {kind} '{twice}'; each issuer stands there once.")
    for issuer in issuers:
        where = f"{file}: jwt: {issuer.name}"
        if sum(source is not None for source in (issuer.jwks_url, issuer.jwks_file, issuer.public_key_file)) != 1:
            raise ConfigError(f"{where}: name exactly one of jwks_url, jwks_file and public_key_file.")
        if issuer.jwks_url is not None and not _is_https(issuer.jwks_url):
            raise ConfigError(f"{where}: jwks_url: {issuer.jwks_url!r} is no https address; keys come by TLS alone.")
        if not issuer.audience:
            raise ConfigError(f"{where}: audience is empty; name what tokens for this gateway have as 'aud'.")
        if (issuer.claims.scopes is None) != (not issuer.scope_names):
            raise ConfigError(
                f"{where}: claims.scopes and scope_names belong together: the claim, and which of its words mean "
                "'chat', 'metrics' or 'admin'."
            )
        if not issuer.scopes and not issuer.scope_names:
            raise ConfigError(f"{where}: its tokens could do nothing; write scopes: [chat], or map a claim to scopes.")
        if issuer.claims.limits is not None and not limit_profiles:
            raise ConfigError(f"{where}: claims.limits names a profile, and the file has no limit_profiles.")
        if issuer.limits is not None and issuer.limits not in limit_profiles:
            raise ConfigError(f"{where}: limits: '{issuer.limits}' is none of limit_profiles.")
        if not NAMESPACE.fullmatch(issuer.namespace):
            raise ConfigError(f"{where}: namespace: {issuer.namespace!r} is no namespace.")
        for pattern in (*issuer.allow_agents, *issuer.allow_tools):
            if not pattern.isascii() or not pattern:
                raise ConfigError(f"{where}: the pattern {pattern!r} can match nothing; ids are ASCII.")


def _is_https(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        return False
