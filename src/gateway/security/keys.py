"""Keyring: from what a request shows to the Principal behind it, by the digest of its key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from msgspec import Struct

from gateway.config import Settings
from gateway.errors import ConfigError, StoreUnavailable, Unauthenticated
from gateway.observability.logs import log_event
from gateway.principal import Principal, Scope
from gateway.security.config import (
    FILE,
    ApiKey,
    SecurityConfig,
    SecurityDefaults,
    allowance,
    expiry,
    limits_of,
    load_security,
)
from gateway.security.stored import PLAIN, StoredKey, stored_digest

if TYPE_CHECKING:  # it imports PyJWT
    from gateway.security.tokens import TokenVerifier

DEV_KEY = "dev-secret"
"""The shipped key. Everybody knows it: honoured in development, for callers on this machine, and nowhere else."""

_DAY_S = 86_400
_EVERY_SCOPE: frozenset[Scope] = frozenset({"chat", "admin", "metrics"})
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HOW = "'gateway keys create NAME --yaml' makes one and prints the lines for security.yaml."

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


class KnownKey(Struct, frozen=True):
    """A key as its operator sees it: whose it is, and until when (epoch seconds; None: for ever)."""

    principal: Principal
    expires_at: float | None
    is_stored: bool = False


@dataclass(frozen=True, slots=True)
class _Credential:
    principal: Principal
    digest: str
    expires_at: float | None = None
    local_only: bool = False
    is_stored: bool = False

    def marked(self) -> _Credential:
        """Return it with a principal that says by which secret it came."""
        return replace(self, principal=replace(self.principal, digest=self.digest))


@dataclass(frozen=True, slots=True)
class Keyring:
    """Every key of one configuration, by digest; holds no key itself.

    ``keyless`` is set in development when no key at all is configured: then callers on this machine need none.
    ``pepper`` is what the store's digests are made with. ``is_complete`` is False while the store has not been read:
    a key that is unknown then may be one of its. ``tokens`` verifies what issuers sign; None where there are none.
    """

    credentials: Mapping[str, _Credential]
    keyless: bool
    defaults: SecurityDefaults
    pepper: str | None = None
    is_complete: bool = True
    tokens: TokenVerifier | None = None

    @classmethod
    def load(
        cls, settings: Settings, drop_in_key: str | None = None, stored: Sequence[StoredKey] | None = ()
    ) -> Keyring:
        """Read `security.yaml` and the environment's keys; ``drop_in_key`` is what clients made by drop-ins show.

        ``stored`` are the keys made at run time, None as long as nobody knows them. Raises `ConfigError` for a wrong
        file, and in production when no key is left that a caller could use.
        """
        return cls.build(load_security(settings), settings, drop_in_key, stored)

    @classmethod
    def build(
        cls,
        config: SecurityConfig,
        settings: Settings,
        drop_in_key: str | None = None,
        stored: Sequence[StoredKey] | None = (),
        *,
        must_be_usable: bool = True,
        tokens: TokenVerifier | None = None,
    ) -> Keyring:
        """Make the keyring of a configuration; see `load`.

        Without ``must_be_usable`` a keyring that lets nobody in is one, too: a revocation always counts. ``tokens`` is
        for the issuers of the configuration.
        """
        per_minute = settings.rate_limit_per_minute
        found = [_credential(key, config.default, per_minute) for key in config.api_keys]
        default = allowance(config.default, namespace="default", requests_per_minute=per_minute)
        if settings.api_key is not None:
            found.append(_Credential(replace(_admin("env"), allowance=default), digest(settings.api_key)))
        is_made = stored is None or any(key.revoked_at is None for key in stored)
        keyless = settings.is_development and not found and not is_made and not config.jwt
        if keyless:
            found.append(_Credential(replace(_admin("dev"), allowance=default), digest(DEV_KEY)))
        if settings.metrics_token is not None:
            scraper = Principal(id="metrics-token", key_id="metrics-token", allow=(), scopes=frozenset({"metrics"}))
            found.append(_Credential(scraper, digest(settings.metrics_token)))
        credentials: dict[str, _Credential] = {}
        taken: set[str] = set()
        for credential in found:
            _add(credentials, taken, credential, settings, warns=must_be_usable)
        _add_stored(credentials, stored or (), config.default, per_minute)
        if must_be_usable:
            if stored is not None and not config.jwt:
                _require_usable(credentials, settings)
            _warn(config, credentials, keyless)
        if drop_in_key is not None:
            shown = digest(drop_in_key)
            credentials[shown] = _Credential(_DROP_IN, shown, local_only=True)
        return cls(credentials, keyless, config.default, settings.key_pepper, stored is not None, tokens)

    @property
    def hide_foreign_models(self) -> bool:
        """Whether a model outside a key's reach answers 404 instead of 403."""
        return self.defaults.hide_foreign_models

    def list_keys(self) -> list[KnownKey]:
        """Return every key that callers may have, by id; not the one that drop-ins are given."""
        known = {
            found.principal.key_id: KnownKey(found.principal, found.expires_at, found.is_stored)
            for found in reversed(list(self.credentials.values()))  # a rotated key's newer secret comes first
        }
        return sorted(
            (key for key in known.values() if not key.principal.is_drop_in), key=lambda key: key.principal.key_id
        )

    def honoured(self) -> Callable[[Principal], bool]:
        """Return what says whether a caller who was let in still is.

        By it, streams of revoked and expired keys end, of secrets that a rotation ended, and of tokens that expired.
        """
        now = time.time()
        digests = {
            found.digest for found in self.credentials.values() if found.expires_at is None or found.expires_at > now
        }
        keyless, tokens = self.keyless, self.tokens

        def is_honoured(caller: Principal) -> bool:
            if caller.issuer is not None:
                return tokens is not None and tokens.honours(caller, now)
            return caller.digest in digests or caller.is_drop_in or (keyless and caller is _KEYLESS)

        return is_honoured

    def authenticate(self, caller: Caller) -> Principal:
        """Return the principal behind a request, or raise `Unauthenticated`."""
        key = _shown_key(caller)
        if key is None:
            if self.keyless and _is_local(caller):
                return _KEYLESS
            raise Unauthenticated(_no_key_message(keyless=self.keyless))
        given = key.encode("latin-1", "replace")  # the bytes that came: headers are latin-1
        shown = hashlib.sha256(given).hexdigest()
        credential = self.credentials.get(shown)
        if credential is None and self.tokens is not None and key.count(".") == 2:  # the shape of a token
            return self.tokens.authenticate(key, shown, caller.peer)
        if credential is None and self.pepper is not None:
            peppered = stored_digest(given, self.pepper)
            credential = self.credentials.get(peppered)
            shown = peppered if credential is not None else shown
        if credential is None and not self.is_complete:
            raise StoreUnavailable(
                "The gateway has not been able to read its keys yet; send the request again in a moment.",
                retry_after_s=1,
            )
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
    return Principal(id=key_id, key_id=key_id, allow=("*",), allow_tools=("*",), scopes=_EVERY_SCOPE)


_KEYLESS = _admin("development")
_DROP_IN = Principal(id="drop-in", key_id="drop-in", allow=(), is_drop_in=True)


def _principal(key: ApiKey, defaults: SecurityDefaults, requests_per_minute: int | None) -> Principal:
    return Principal(
        id=key.id,
        key_id=key.id,
        allow=_patterns(key, defaults),
        allow_by_namespace=_namespace_patterns(key, defaults),
        allow_tools=tuple(defaults.allow_tools if key.allow_tools is None else key.allow_tools),
        scopes=frozenset(key.scopes),
        namespace=key.namespace,
        profile=key.profile,
        allowance=allowance(
            defaults,
            namespace=key.namespace,
            limits=limits_of(key.limits, key.rate_limit, f"the key '{key.id}'"),
            end_user_limits=key.end_user_limits,
            requests_per_minute=requests_per_minute,
        ),
    )


def _credential(key: ApiKey, defaults: SecurityDefaults, requests_per_minute: int | None) -> _Credential:
    principal = _principal(key, defaults, requests_per_minute)
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


def _patterns(key: ApiKey, defaults: SecurityDefaults) -> tuple[str, ...]:
    """A key's own list, else the default one, else everything."""
    patterns = key.allow_agents if key.allow_agents is not None else defaults.allow_agents
    return tuple(dict.fromkeys(patterns)) if patterns is not None else ("*",)


def _namespace_patterns(key: ApiKey, defaults: SecurityDefaults) -> tuple[str, ...]:
    """What each namespace gives to everybody without a list of its own; a key's own list stands alone."""
    if key.allow_agents is not None:
        return ()
    patterns = []
    for namespace, given in defaults.namespace_defaults.items():
        for pattern in given.allow_agents:
            own = pattern if "/" in pattern else f"{namespace}/{pattern}"
            if not own.startswith(f"{namespace}/"):
                raise ConfigError(
                    f"{FILE}: namespace_defaults.{namespace}.allow_agents holds {pattern!r}, which reaches into "
                    f"another namespace. Write '{namespace}/…', or move the pattern to default.allow_agents."
                )
            patterns.append(own)
    return tuple(dict.fromkeys(patterns))


def _add(
    credentials: dict[str, _Credential], taken: set[str], credential: _Credential, settings: Settings, *, warns: bool
) -> None:
    key_id = credential.principal.key_id
    if credential.digest == _DEV_DIGEST:
        if not settings.is_development:
            if warns:
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
    if key_id in taken:
        raise ConfigError(f"{FILE}: the key id '{key_id}' is taken by a key of the environment; choose another.")
    credentials[credential.digest] = credential.marked()
    taken.add(key_id)


def _add_stored(
    credentials: dict[str, _Credential],
    stored: Sequence[StoredKey],
    defaults: SecurityDefaults,
    requests_per_minute: int | None,
) -> None:
    """Add the keys made at run time. A file that takes the id of one wins: the file is what its owner sees."""
    taken = {credential.principal.key_id for credential in credentials.values()}
    now = time.time()
    for key in stored:
        digests = key.digests(now)
        if digests and key.id in taken:
            log_event(
                _log,
                "api_key.shadowed",
                level=logging.WARNING,
                message=f"The stored key '{key.id}' is not honoured: {FILE} or the environment has one of that id.",
                key_id=key.id,
            )
            continue
        options = key.options
        principal = _principal(
            ApiKey(
                id=key.id,
                allow_agents=options.allow_agents,
                allow_tools=options.allow_tools,
                scopes=options.scopes,
                profile=options.profile,
                namespace=options.namespace,
                limits=options.limits,
                end_user_limits=options.end_user_limits,
            ),
            defaults,
            requests_per_minute,
        )
        for kept, until in digests:
            found = kept.removeprefix(f"{PLAIN}:")
            credentials[found] = _Credential(principal, found, until, is_stored=True).marked()


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
        if credential.expires_at is not None and not credential.is_stored:
            _remind(credential.principal.key_id, credential.expires_at, now)
    if keyless:
        log_event(
            _log,
            "security.keyless.enabled",
            level=logging.WARNING,
            message=f"No API key is configured: callers on this machine need none, others are refused. {_HOW}",
        )


class ExpiryReminder:
    """Says once a day of every key that it expires within a week; what the start has said already is ``said``."""

    def __init__(self, said: Keyring) -> None:
        now = time.time()
        self._said = {key.principal.key_id: now for key in said.list_keys() if not key.is_stored}

    def remind(self, keyring: Keyring) -> None:
        """Say what has not been said for a day."""
        now = time.time()
        for key in keyring.list_keys():
            key_id = key.principal.key_id
            if key.expires_at is None or key.expires_at <= now or now - self._said.get(key_id, 0.0) < _DAY_S:
                continue
            if _remind(key_id, key.expires_at, now):
                self._said[key_id] = now


def _remind(key_id: str, expires_at: float, now: float) -> bool:
    days = (expires_at - now) / 86_400
    if days > 7:
        return False
    log_event(
        _log,
        "api_key.expiring",
        level=logging.WARNING,
        message=f"The key '{key_id}' " + (f"expires in {days:.1f} days." if days > 0 else "has expired."),
        key_id=key_id,
        days_left=round(days, 2),
    )
    return True


def _shown_key(caller: Caller) -> str | None:
    given = caller.authorization
    if caller.x_api_key is None and given is not None and given.startswith("Bearer "):  # nearly everybody
        return given[7:].strip() or None
    bearer = _bearer(given)
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
    return caller.origin is None or _is_local_host(_netloc(caller.origin))


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # no address at all
        return ""


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
