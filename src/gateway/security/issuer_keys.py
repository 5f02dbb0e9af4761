"""The public keys of token issuers: read from files, or fetched in the background; never while somebody waits."""

from __future__ import annotations

import asyncio
import importlib
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from gateway.errors import ConfigError
from gateway.observability.logs import log_event
from gateway.security.issuers import JwtIssuer

LARGEST_DOCUMENT = 512 * 1024
WANTED_S = 60.0
"""Seconds between two looks for a key that nobody knows, however many tokens name one."""

_MOST_KEYS = 100
_SHORTEST_RSA = 2_048
_RETRY_S, _LONGEST_RETRY_S = 5.0, 300.0
_TIMEOUT_S = 10.0
_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

_log = logging.getLogger("gateway.security")

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class _Key(msgspec.Struct, frozen=True):
    """A key, and the signatures it may have made."""

    key: PublicKey
    algorithms: frozenset[str]
    kid: str | None = None


class IssuerKeys:
    """The keys of one issuer. ``version`` changes with them; ``due`` is when they are looked at again (monotonic)."""

    def __init__(self, entry: JwtIssuer, wake: Callable[[], None]) -> None:
        self.entry = entry
        self.version = 0
        self.due = 0.0
        self._wake = wake
        self._keys: tuple[_Key, ...] = ()
        self._raw: bytes | None = None
        self._tried = -WANTED_S
        self._failures = 0

    @property
    def are_known(self) -> bool:
        """Whether the keys have been read at least once."""
        return self._raw is not None

    def find(self, kid: str | None, algorithm: str) -> PublicKey | None:
        """Return the key a token names, if it signs by that algorithm; without a name, the only one that does."""
        if self.entry.public_key_file is not None:
            kid = None  # a file with one key says nothing about its name
        fitting = [key for key in self._keys if algorithm in key.algorithms and kid in (None, key.kid)]
        return fitting[0].key if len(fitting) == 1 else None

    def want(self) -> None:
        """Ask for a look at the source: somebody names a key that is not known."""
        soonest = self._tried + WANTED_S
        if soonest < self.due:
            self.due = soonest
            self._wake()

    def read(self) -> None:
        """Read the keys from the issuer's file, now; raise `ConfigError` where there is none to be had."""
        path = Path(self.entry.jwks_file or self.entry.public_key_file or "")
        try:
            with path.open("rb") as file:
                raw = file.read(LARGEST_DOCUMENT + 1)
        except OSError as error:
            raise ConfigError(f"{self._where()}: the file {path.name} cannot be read ({error.strerror}).") from error
        self._take(raw)

    async def refresh(self) -> None:
        """Look at the source again; where that fails, what is known is kept, and the next look comes soon."""
        self._tried = time.monotonic()
        try:
            if self.entry.jwks_url is None:
                await asyncio.to_thread(self.read)
            else:
                self._take(await self._fetch(self.entry.jwks_url))
        except Exception as error:  # noqa: BLE001 - a background loop: whatever the source does, it is asked again
            self._failures += 1
            self.due = self._tried + min(_RETRY_S * 2 ** min(self._failures - 1, 10), _LONGEST_RETRY_S)
            reason = error.message if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"[:200]
            log_event(
                _log,
                "token.keys.failed",
                level=logging.WARNING,
                issuer=self.entry.name,
                message=f"The keys of the issuer '{self.entry.name}' could not be read: {reason}",
            )
        else:
            self._failures = 0
            self.due = self._tried + self.entry.refresh_s

    async def _fetch(self, url: str) -> bytes:
        # Late on purpose: only issuers with an address need an HTTP client.
        httpx2 = await asyncio.to_thread(importlib.import_module, "httpx2")
        context = await asyncio.to_thread(ssl.create_default_context, cafile=self.entry.ca_file)
        parts: list[bytes] = []
        async with (
            asyncio.timeout(_TIMEOUT_S),
            httpx2.AsyncClient(verify=context, follow_redirects=False, timeout=_TIMEOUT_S) as client,
            client.stream("GET", url, headers={"accept": "application/json", "accept-encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                raise ConfigError(f"{self._where()}: jwks_url answers {answer.status_code}.")
            async for part in answer.aiter_raw():
                parts.append(part)
                if sum(map(len, parts)) > LARGEST_DOCUMENT:
                    break
        return b"".join(parts)

    def _take(self, raw: bytes) -> None:
        if raw == self._raw:
            return
        if len(raw) > LARGEST_DOCUMENT:
            raise ConfigError(f"{self._where()}: its keys are more than {LARGEST_DOCUMENT:,} bytes.")
        keys = self._from_pem(raw) if self.entry.public_key_file is not None else self._from_jwks(raw)
        usable = [key for key in keys if not key.algorithms.isdisjoint(self.entry.algorithms)]
        if not usable:
            raise ConfigError(
                f"{self._where()}: none of its keys verifies {' or '.join(self.entry.algorithms)} (RSA keys have at "
                f"least {_SHORTEST_RSA:,} bits)."
            )
        self._keys, self._raw = tuple(usable), raw
        self.version += 1
        log_event(_log, "token.keys.loaded", issuer=self.entry.name, keys=len(usable))

    def _from_pem(self, raw: bytes) -> list[_Key]:
        try:
            return [_key(load_pem_public_key(raw))]
        except (ValueError, TypeError, jwt.PyJWTError) as error:
            raise ConfigError(
                f"{self._where()}: public_key_file holds no public key in PEM ('-----BEGIN PUBLIC KEY-----') that "
                "verifies tokens."
            ) from error

    def _from_jwks(self, raw: bytes) -> list[_Key]:
        """Return what verifies signatures; other keys of the set, and those that may not be used so, are left out."""
        try:
            found = msgspec.json.decode(raw)["keys"]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError, KeyError) as error:
            raise ConfigError(f'{self._where()}: its keys are no JWK set ({{"keys": [...]}}).') from error
        if not isinstance(found, list) or len(found) > _MOST_KEYS:
            raise ConfigError(f"{self._where()}: its JWK set is no list of at most {_MOST_KEYS} keys.")
        keys: list[_Key] = []
        for item in found:
            key = _from_jwk(item)
            if key is not None:
                keys.append(key)
        return keys

    def _where(self) -> str:
        return f"security.yaml: jwt: {self.entry.name}"


class IssuerBook:
    """Owns the keys of every issuer; those of an entry that a reload did not change stay as they are."""

    def __init__(self) -> None:
        self._known: dict[str, IssuerKeys] = {}
        self._changed = asyncio.Event()

    async def follow(self, entries: Sequence[JwtIssuer]) -> list[IssuerKeys]:
        """Return the keys of every entry. Files are read now (`ConfigError` for a wrong one), addresses by `run`."""
        fresh: dict[str, IssuerKeys] = {}
        for entry in entries:
            known = self._known.get(entry.name)
            keys = known if known is not None and known.entry == entry else IssuerKeys(entry, self._changed.set)
            fresh[entry.name] = keys
            keys.due = 0.0
            if entry.jwks_url is None:
                await asyncio.to_thread(keys.read)
                keys.due = time.monotonic() + entry.refresh_s
        self._known = fresh
        self._changed.set()
        return list(fresh.values())

    async def run(self) -> None:
        """Keep the keys fresh until cancelled."""
        while True:
            self._changed.clear()
            now = time.monotonic()
            await asyncio.gather(*(keys.refresh() for keys in self._known.values() if keys.due <= now))
            due = [keys.due - time.monotonic() for keys in self._known.values()]
            try:
                async with asyncio.timeout(max(0.0, min(due)) if due else None):
                    await self._changed.wait()
            except TimeoutError:
                continue


def _from_jwk(item: Any) -> _Key | None:
    """Return a public key for signatures; None for anything else, a secret above all."""
    if not isinstance(item, Mapping) or item.get("kty") not in ("RSA", "EC", "OKP") or "d" in item:
        return None
    operations = item.get("key_ops", ["verify"])
    if item.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    kid, algorithm = item.get("kid"), item.get("alg")
    try:
        return _key(
            jwt.PyJWK({name: value for name, value in item.items() if name != "alg"}).key,
            kid=kid if isinstance(kid, str) else None,
            only=algorithm if isinstance(algorithm, str) else None,
        )
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None


def _key(key: Any, *, kid: str | None = None, only: str | None = None) -> _Key:
    """Return a key with the signatures it can have made; `ValueError` for one that is weak or of another kind."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _SHORTEST_RSA:
        algorithms = _RSA
    elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        algorithms = frozenset({_CURVES[key.curve.name]})
    elif isinstance(key, ed25519.Ed25519PublicKey):
        algorithms = frozenset({"EdDSA"})
    else:
        raise ValueError("weak, or of a kind that signs no tokens")
    return _Key(key, algorithms if only is None else algorithms & {only}, kid)
