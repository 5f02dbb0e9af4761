"""Tokens that others issue (JWT): verified with their issuer's keys, then known by digest until they expire.

Imported where `security.yaml` names issuers alone: PyJWT and its cryptography take 0.1 s and 10 MB.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jwt
import msgspec

from gateway.errors import ServiceUnavailable, Unauthenticated
from gateway.observability.logs import log_event
from gateway.principal import Allowance, Principal, Scope
from gateway.security.config import SecurityConfig, allowance
from gateway.security.issuer_keys import IssuerKeys
from gateway.security.issuers import NAMESPACE, JwtIssuer

LARGEST_TOKEN = 8_192
_REMEMBERED = 10_000
_MOST_WORDS, _LONGEST_WORD = 1_000, 256
_SUBJECT = re.compile(r"[\x21\x22\x24-\x7e]{1,128}")
_WORD = re.compile(r"[\x21-\x7e]+")
_WHY: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it is not meant for this gateway (aud)"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
    (jwt.InvalidIssuerError, "nobody here knows its issuer"),
    (jwt.MissingRequiredClaimError, "it lacks one of the claims exp, iss and aud"),
)
_FAILURES = (jwt.PyJWTError, ValueError, OverflowError, TypeError, RecursionError)

_log = logging.getLogger("gateway.security")
_jwt = jwt.PyJWT(options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True})


class _Head(msgspec.Struct):
    """What chooses a key."""

    alg: str
    kid: str | None = None


class _Said(msgspec.Struct):
    """What chooses an issuer, before anything is believed."""

    iss: str


class _Refused(Exception):
    """The token is not accepted; the text completes "The token is not accepted: …"."""


class TokenVerifier:
    """Finds the principal behind a token, for one version of `security.yaml`.

    A token that was verified once costs one look-up until it expires. Whenever an issuer's keys change, all are
    verified again.
    """

    def __init__(
        self, config: SecurityConfig, issuers: Iterable[IssuerKeys], *, requests_per_minute: int | None = None
    ) -> None:
        self._config = config
        self._requests_per_minute = requests_per_minute
        self._issuers = {keys.entry.issuer: keys for keys in issuers}
        self._names = {keys.entry.name for keys in self._issuers.values()}
        self._known: OrderedDict[str, Principal] = OrderedDict()
        self._known_by = self._versions()
        self._allowances: dict[tuple[str, str | None], Allowance | None] = {}

    @property
    def issuers(self) -> Sequence[str]:
        """The issuers, as tokens name them."""
        return tuple(self._issuers)

    def honours(self, principal: Principal, now: float) -> bool:
        """Return whether a caller who came with a token may go on at ``now`` (epoch seconds)."""
        return principal.issuer in self._names and principal.expires_at is not None and principal.expires_at > now

    def authenticate(self, token: str, shown: str, peer: str | None) -> Principal:
        """Return the principal of a token whose digest is ``shown``; raise `Unauthenticated`.

        Raises `ServiceUnavailable` while the issuer's keys have never been fetched.
        """
        known = self._known.get(shown)
        if known is not None and self._known_by == self._versions():
            assert known.expires_at is not None, "tokens without an end are not accepted"
            if known.expires_at > time.time():
                return known
            del self._known[shown]
        issuer: JwtIssuer | None = None
        try:
            keys, head = self._parsed(token)
            issuer = keys.entry
            principal = self._principal(issuer, self._verified(token, keys, head))
        except _Refused as refused:
            self._refuse(str(refused), shown, issuer, peer, refused)
        self._remember(shown, principal)
        return principal

    def _parsed(self, token: str) -> tuple[IssuerKeys, _Head]:
        """Return whose token it says it is, and the key it says it was signed with: nothing is believed yet."""
        if len(token) > LARGEST_TOKEN:
            raise _Refused(f"it is longer than {LARGEST_TOKEN:,} characters")
        try:
            first, second, _ = token.split(".")
            head = msgspec.json.decode(_decoded(first), type=_Head)
            said = msgspec.json.decode(_decoded(second), type=_Said)
        except (msgspec.MsgspecError, *_FAILURES) as error:
            raise _Refused("it is malformed") from error
        keys = self._issuers.get(said.iss)
        if keys is None:
            raise _Refused("nobody here knows its issuer")
        if head.alg not in keys.entry.algorithms:
            raise _Refused("its issuer does not sign in that way (alg)")
        return keys, head

    def _verified(self, token: str, keys: IssuerKeys, head: _Head) -> dict[str, Any]:
        if not keys.are_known:
            raise ServiceUnavailable(
                f"The keys of the issuer '{keys.entry.name}' could not be fetched yet; send the request again in a "
                "moment.",
                retry_after_s=2,
            )
        key = keys.find(head.kid, head.alg)
        if key is None:
            keys.want()
            raise _Refused("its issuer has no such key (kid)")
        entry = keys.entry
        try:
            claims: dict[str, Any] = _jwt.decode(
                token,
                key,
                algorithms=[head.alg],
                audience=entry.audience,
                issuer=entry.issuer,
                leeway=entry.leeway_s,
            )
        except _FAILURES as error:
            raise _Refused(next((why for kind, why in _WHY if isinstance(error, kind)), "it is malformed")) from error
        return claims

    def _principal(self, entry: JwtIssuer, claims: Mapping[str, Any]) -> Principal:
        read = entry.claims
        namespace = _text(claims, read.namespace) or entry.namespace
        if not NAMESPACE.fullmatch(namespace):
            raise _Refused(f"its claim '{read.namespace}' is no namespace")
        limits = _text(claims, read.limits) or entry.limits
        if limits is not None and limits not in self._config.limit_profiles:
            raise _Refused(f"its claim '{read.limits}' is none of the limit_profiles of security.yaml")
        scopes: set[Scope] = {*entry.scopes}
        scopes |= {entry.scope_names[word] for word in _words(claims, read.scopes) if word in entry.scope_names}
        key_id = f"{entry.name}:{_subject(claims, read.subject)}"
        return Principal(
            id=key_id,
            key_id=key_id,
            allow=tuple(dict.fromkeys((*entry.allow_agents, *_words(claims, read.allow_agents)))),
            allow_tools=tuple(dict.fromkeys((*entry.allow_tools, *_words(claims, read.allow_tools)))),
            scopes=frozenset(scopes),
            namespace=namespace,
            profile=entry.profile,
            allowance=self._allowance(namespace, limits),
            issuer=entry.name,
            expires_at=float(claims["exp"]) + entry.leeway_s,
        )

    def _allowance(self, namespace: str, limits: str | None) -> Allowance | None:
        """The same object for the same limits: by it, the limiter knows that nothing has changed."""
        at = namespace, limits
        if at not in self._allowances:
            if len(self._allowances) > _REMEMBERED:
                self._allowances.clear()
            profile = self._config.limit_profiles[limits] if limits is not None else None
            self._allowances[at] = allowance(
                self._config.default,
                namespace=namespace,
                limits=profile.limits if profile is not None else None,
                end_user_limits=profile.end_user_limits if profile is not None else None,
                requests_per_minute=self._requests_per_minute,
            )
        return self._allowances[at]

    def _remember(self, shown: str, principal: Principal) -> None:
        versions = self._versions()
        if versions != self._known_by:
            self._known.clear()
            self._known_by = versions
        self._known[shown] = principal
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _versions(self) -> tuple[int, ...]:
        return tuple(keys.version for keys in self._issuers.values())

    def _refuse(self, why: str, shown: str, issuer: JwtIssuer | None, peer: str | None, cause: Exception) -> NoReturn:
        log_event(
            _log,
            "token.rejected",
            level=logging.WARNING,
            issuer=issuer.name if issuer is not None else None,
            reason=why,
            digest_prefix=shown[:12],
            client_ip=peer,
        )
        raise Unauthenticated(
            f"The token is not accepted: {why}. Get a new one from its issuer, or ask the gateway's operator."
        ) from cause


def _decoded(segment: str) -> bytes:
    try:
        return base64.b64decode(segment + "=" * (-len(segment) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("no base64url") from error


def _subject(claims: Mapping[str, Any], path: str) -> str:
    """Return who the token is about, fit for logs; what is long or strange is known by its digest."""
    subject = _text(claims, path)
    if not subject:
        raise _Refused(f"it names nobody (claim '{path}')")
    if _SUBJECT.fullmatch(subject):
        return subject
    return f"#{hashlib.sha256(subject.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _text(claims: Mapping[str, Any], path: str | None) -> str | None:
    value = _claim(claims, path)
    if value is not None and not isinstance(value, str):
        raise _Refused(f"its claim '{path}' is no text")
    return value


def _words(claims: Mapping[str, Any], path: str | None) -> list[str]:
    value = _claim(claims, path)
    words = value.split() if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(words, list)
        or len(words) > _MOST_WORDS
        or not all(isinstance(word, str) and len(word) <= _LONGEST_WORD and _WORD.fullmatch(word) for word in words)
    ):
        raise _Refused(f"its claim '{path}' is no list of words")
    return words


def _claim(claims: Mapping[str, Any], path: str | None) -> Any:
    """Return a claim by its name, else by the path its name spells with dots; None where it is not there."""
    if path is None or path in claims:
        return None if path is None else claims[path]
    found: Any = claims
    for part in path.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found
