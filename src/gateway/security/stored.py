"""API keys made at run time, as values: what the store keeps of them, never the key itself."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from gateway.config import Settings
from gateway.errors import ConfigError, InvalidRequest
from gateway.principal import Limits, Profile, Scope

KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
PLAIN, PEPPERED = "sha256", "hmac-sha256"

_SHORTEST_PEPPER = 16
_Pattern = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")]
_Patterns = Annotated[list[_Pattern], Meta(max_length=1_000)]


class KeyOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a key may: the fields of `security.yaml` with the same meaning. Omitted lists and limits are inherited."""

    description: Annotated[str, Meta(max_length=500)] | None = None
    allow_agents: _Patterns | None = None
    allow_tools: _Patterns | None = None
    scopes: tuple[Scope, ...] = ("chat",)
    profile: Profile = "openai"
    namespace: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "default"
    limits: Limits | None = None
    end_user_limits: Limits | None = None


class StoredKey(Struct, frozen=True, kw_only=True):
    """One key. Times are epoch seconds; ``digest`` is ``scheme:hex``, ``previous_digest`` that before a rotation."""

    id: str
    digest: str
    options: KeyOptions = KeyOptions()
    created_at: float
    created_by: str
    expires_at: float | None = None
    revoked_at: float | None = None
    previous_digest: str | None = None
    previous_until: float | None = None

    def digests(self, now: float) -> list[tuple[str, float | None]]:
        """Return the digests that let the key in now, each with the moment it ends."""
        if self.revoked_at is not None:
            return []
        found: list[tuple[str, float | None]] = [(self.digest, self.expires_at)]
        if self.previous_digest is not None and self.previous_until is not None and self.previous_until > now:
            until = self.previous_until if self.expires_at is None else min(self.previous_until, self.expires_at)
            found.append((self.previous_digest, until))
        return found


def new_secret() -> str:
    """Return a fresh key."""
    return f"sk-gw-{secrets.token_urlsafe(32)}"


def stored_digest(key: bytes, pepper: str | None) -> str:
    """Return what the store keeps of a key: its HMAC-SHA256 with the server's pepper where there is one."""
    if pepper is None:
        return f"{PLAIN}:{hashlib.sha256(key).hexdigest()}"
    return f"{PEPPERED}:{hmac.digest(pepper.encode(), key, 'sha256').hex()}"


def check_pepper(settings: Settings) -> None:
    """Raise `ConfigError` for a pepper that could be guessed."""
    if settings.key_pepper is not None and len(settings.key_pepper) < _SHORTEST_PEPPER:
        raise ConfigError(
            f"GATEWAY_KEY_PEPPER has fewer than {_SHORTEST_PEPPER} characters; `openssl rand -base64 32` makes a good "
            "one."
        )


def check_new_key(key_id: str, expires_at: float | None) -> None:
    """Raise `InvalidRequest` for an id that names no key well, and for an expiry that is over."""
    if not KEY_ID.fullmatch(key_id):
        raise InvalidRequest(
            "A key's id is 1 to 64 letters, digits and . _ @ -, and begins with a letter or digit.", param="id"
        )
    if expires_at is not None and expires_at <= time.time():
        raise InvalidRequest("The key would have expired already; name a later time.", param="expires_at")


def read_options(fields: dict[str, object]) -> KeyOptions:
    """Return the options of a request or a command line; raise `InvalidRequest` naming the field."""
    try:
        return msgspec.convert(fields, KeyOptions)
    except msgspec.ValidationError as error:
        message, _, at = str(error).partition(" - at `$")
        name = at.rstrip("`").lstrip(".") or None
        text = f"{name}: {message}" if name else message
        raise InvalidRequest(f"{text.replace('`', chr(39))}.", param=name) from error
