"""Keyring: from what a request shows to the Principal behind it, by the digest of its key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from msgspec import Struct

from gateway.config import Settings
from gateway.errors import ConfigError, Unauthenticated
from gateway.observability.logs import log_event
from gateway.principal import Principal
from gateway.security.config import FILE, ApiKey, SecurityConfig, SecurityDefaults, expiry, load_security

DEV_KEY = "dev-secret"
"""The shipped key. Everybody knows it: honoured in development, for callers on this machine, and nowhere else."""

_SOON_S = 7 * 86_400
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HOW = "'gateway keys new NAME' makes one and prints the lines for security.yaml."

_log = logging.getLogger("gateway.security")


class Caller(Struct, frozen=True):
    """What a request shows of who sent it.

    ``peer`` is the address of the connection, ``forwarded`` whether any forwarding header is present. ``origin`` and
    ``fetch_site`` (``Sec-Fetch-Site``) are what browsers say of the page behind a request.
    """

    authorization: str | None = None
    x_api_key: str | None = None
    host: str | None = None
    peer: str | None = None
    forwarded: bool = False
    origin: str | None = None
    fetch_site: str | None = None


@dataclass(frozen=True, slots=True)
class _Credential:
    principal: Principal
    digest: str
    expires_at: float | None = None
    local_only: bool = False


@dataclass(frozen=True, slots=True)
class Keyring:
    """Every key of one configuration, by digest; holds no key itself.

    ``keyless`` is set in development when no key at all is configured: then callers on this machine need none.
    """

    credentials: Mapping[str, _Credential]
    keyless: bool
    defaults: SecurityDefaults

    @classmethod
    def load(cls, settings: Settings, drop_in_key: str | None = None) -> Keyring:
        """Read `security.yaml` and the environment's keys; ``drop_in_key`` is what clients made by drop-ins show.

        Raises `ConfigError` for a wrong file, and in production when no key is left that a caller could use.
        """
        return cls.build(load_security(settings), settings, drop_in_key)

    @classmethod
    def build(cls, config: SecurityConfig, settings: Settings, drop_in_key: str | None = None) -> Keyring:
        """Make the keyring of a configuration; see `load`."""
        found = [_credential(key, config.default) for key in config.api_keys]
        if settings.api_key is not None:
            found.append(_Credential(_admin("env"), digest(settings.api_key)))
        keyless = settings.is_development and not found
        if keyless:
            found.append(_Credential(_admin("dev"), digest(DEV_KEY)))
        if settings.metrics_token is not None:
            scraper = Principal(id="metrics-token", key_id="metrics-token", allow=(), scopes=frozenset({"metrics"}))
            found.append(_Credential(scraper, digest(settings.metrics_token)))
        credentials: dict[str, _Credential] = {}
        for credential in found:
            _add(credentials, credential, settings)
        _require_usable(credentials, settings)
        _warn(config, credentials, keyless)
        if drop_in_key is not None:
            shown = digest(drop_in_key)
            credentials[shown] = _Credential(_DROP_IN, shown, local_only=True)
        return cls(credentials, keyless, config.default)

    @property
    def hide_foreign_models(self) -> bool:
        """Whether a model outside a key's reach answers 404 instead of 403."""
        return self.defaults.hide_foreign_models

    def authenticate(self, caller: Caller) -> Principal:
        """Return the principal behind a request, or raise `Unauthenticated`."""
        key = _shown_key(caller)
        if key is None:
            if self.keyless and _is_local(caller):
                return _KEYLESS
            raise Unauthenticated(_no_key_message(keyless=self.keyless))
        shown = hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()  # the bytes that came: headers are latin-1
        credential = self.credentials.get(shown)
        if credential is None or not hmac.compare_digest(credential.digest, shown):
            log_event(_log, "api_key.rejected", level=logging.WARNING, digest_prefix=shown[:12], client_ip=caller.peer)
            raise Unauthenticated(
                f"Incorrect API key provided: {_masked(key)}. Send one of the keys in security.yaml, or ask the "
                "gateway's operator for one."
            )
        key_id = credential.principal.key_id
        if credential.expires_at is not None and time.time() >= credential.expires_at:
            log_event(_log, "api_key.expired", level=logging.WARNING, key_id=key_id, client_ip=caller.peer)
            raise Unauthenticated(f"The API key '{key_id}' has expired. Ask the gateway's operator for a new one.")
        if credential.local_only and not _is_local(caller):  # everybody knows it, a page on a rebound name too
            log_event(_log, "api_key.rejected", level=logging.WARNING, key_id=key_id, client_ip=caller.peer)
            raise Unauthenticated(
                "The development key is honoured only from the machine the gateway runs on, addressed as localhost and "
                f"not through a proxy. Use a key of your own: {_HOW}"
            )
        return credential.principal


def digest(key: str) -> str:
    """Return the digest a key is stored by: sha256 of its UTF-8 bytes, in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


_DEV_DIGEST = digest(DEV_KEY)


def _admin(key_id: str) -> Principal:
    return Principal(id=key_id, key_id=key_id, allow=("*",), scopes=frozenset({"chat", "admin", "metrics"}))


_KEYLESS = _admin("development")
_DROP_IN = Principal(id="drop-in", key_id="drop-in", allow=(), is_drop_in=True)


def _credential(key: ApiKey, defaults: SecurityDefaults) -> _Credential:
    principal = Principal(
        id=key.id,
        key_id=key.id,
        allow=tuple(dict.fromkeys(_patterns(key, defaults))),
        scopes=frozenset(key.scopes),
        namespace=key.namespace,
        profile=key.profile,
    )
    if key.key is not None:
        stored = digest(key.key)
        log_event(
            _log,
            "api_key.plaintext",
            level=logging.WARNING,
            message=f"{FILE} holds the key '{key.id}' in clear; replace 'key' by 'hashed_key'.",
            key_id=key.id,
        )
    else:
        assert key.hashed_key is not None, "load_security refuses a key with neither"
        stored = key.hashed_key.lower()
    return _Credential(principal, stored, expiry(key))


def _patterns(key: ApiKey, defaults: SecurityDefaults) -> list[str]:
    """A key's own list stands alone. Without one: the default list, and what each namespace gives to everybody."""
    if key.allow_agents is not None:
        return key.allow_agents
    patterns = list(defaults.allow_agents) if defaults.allow_agents is not None else ["*"]
    for namespace, given in defaults.namespace_defaults.items():
        for pattern in given.allow_agents:
            own = pattern if "/" in pattern else f"{namespace}/{pattern}"
            if not own.startswith(f"{namespace}/"):
                raise ConfigError(
                    f"{FILE}: namespace_defaults.{namespace}.allow_agents holds {pattern!r}, which reaches into "
                    f"another namespace. Write '{namespace}/…', or move the pattern to default.allow_agents."
                )
            patterns.append(own)
    return patterns


def _add(credentials: dict[str, _Credential], credential: _Credential, settings: Settings) -> None:
    key_id = credential.principal.key_id
    if credential.digest == _DEV_DIGEST:
        if not settings.is_development:
            log_event(
                _log,
                "api_key.dev.refused",
                level=logging.WARNING,
                message="The shipped development key is not honoured in production.",
                key_id=key_id,
            )
            return
        credential = _Credential(credential.principal, credential.digest, credential.expires_at, local_only=True)
    twin = credentials.get(credential.digest)
    if twin is not None:
        raise ConfigError(f"The keys '{twin.principal.key_id}' and '{key_id}' are the same key; give each its own.")
    if any(other.principal.key_id == key_id for other in credentials.values()):
        raise ConfigError(f"{FILE}: the key id '{key_id}' is taken by a key of the environment; choose another.")
    credentials[credential.digest] = credential


def _require_usable(credentials: Mapping[str, _Credential], settings: Settings) -> None:
    now = time.time()
    usable = any(
        credential.expires_at is None or credential.expires_at > now
        for credential in credentials.values()
        if credential.principal.scopes != {"metrics"}
    )
    if not usable and not settings.is_development:
        raise ConfigError(
            f"No usable API key is configured, and GATEWAY_ENV is {settings.environment}. {_HOW} Or set "
            "GATEWAY_API_KEY. (The shipped development key and expired keys do not count.)"
        )


def _warn(config: SecurityConfig, credentials: Mapping[str, _Credential], keyless: bool) -> None:
    now = time.time()
    for credential in credentials.values():
        if credential.expires_at is not None and credential.expires_at - now <= _SOON_S:
            days = (credential.expires_at - now) / 86_400
            log_event(
                _log,
                "api_key.expiring",
                level=logging.WARNING,
                message=f"The key '{credential.principal.key_id}' "
                + (f"expires in {days:.1f} days." if days > 0 else "has expired."),
                key_id=credential.principal.key_id,
                days_left=round(days, 2),
            )
    if config.default.rate_limit or any(key.rate_limit for key in config.api_keys):
        log_event(
            _log,
            "security.rate_limit.unenforced",
            level=logging.WARNING,
            message=f"{FILE} sets rate_limit, which this version reads but does not enforce.",
        )
    if keyless:
        log_event(
            _log,
            "security.keyless.enabled",
            level=logging.WARNING,
            message=f"No API key is configured: callers on this machine need none, others are refused. {_HOW}",
        )


def _shown_key(caller: Caller) -> str | None:
    bearer = _bearer(caller.authorization)
    x_api_key = (caller.x_api_key or "").strip() or None
    if bearer is not None and x_api_key is not None and bearer != x_api_key:
        raise Unauthenticated(
            "The Authorization and x-api-key headers hold different keys. Send one of them, or the same key in both."
        )
    return bearer or x_api_key


def _bearer(header: str | None) -> str | None:
    if header is None or not header.strip():
        return None
    scheme, _, key = header.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated(
            "The Authorization header is not of the form 'Bearer YOUR_KEY'. Send it so, or send the key as x-api-key "
            "and leave Authorization out."
        )
    return key.strip() or None


def _no_key_message(*, keyless: bool) -> str:
    text = (
        "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
        "(i.e. Authorization: Bearer YOUR_KEY), or in an x-api-key header."
    )
    if keyless:
        text += (
            " Only a program on this machine that addresses the gateway as localhost, directly and not from a web "
            "page, may call without one."
        )
    return text


def _masked(key: str) -> str:
    shown = key[:5] if len(key) >= 12 and key[:5].isascii() and key[:5].isprintable() else ""
    return f"{shown}***"


def _is_local(caller: Caller) -> bool:
    """Whether a caller is a program of this machine: not a proxy, a rebound name, or a foreign page."""
    if caller.forwarded or caller.peer is None or not _is_loopback(caller.peer):
        return False
    if caller.host is None or not _is_local_host(caller.host):
        return False
    if caller.fetch_site is not None and caller.fetch_site not in ("same-origin", "none"):
        return False
    return caller.origin is None or _is_local_host(urlsplit(caller.origin).netloc)


@lru_cache(maxsize=256)
def _is_local_host(host: str) -> bool:
    name, _, port = host.lower().rpartition(":") if not host.endswith("]") and ":" in host else (host.lower(), "", "")
    return name in _LOCAL_HOSTS and (not port or port.isdigit())


@lru_cache(maxsize=1024)
def _is_loopback(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
