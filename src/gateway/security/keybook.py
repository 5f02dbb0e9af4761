"""KeyBook: the API keys made at run time; kept in the store, served from memory, the same in every process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from gateway.errors import Conflict, GatewayError, InvalidRequest, NotFound
from gateway.observability.logs import log_event
from gateway.security.stored import (
    PEPPERED,
    KeyOptions,
    StoredKey,
    check_new_key,
    new_secret,
    stored_digest,
)
from gateway.store.store import Store

POLL_S = 0.5
"""Seconds between two looks at the store: how late another process may learn of a change."""

GRACE_S = 24 * 3_600.0
LONGEST_GRACE_S = 30 * 24 * 3_600.0

_log = logging.getLogger("gateway.security")


class MadeKey(NamedTuple):
    """A key as it was made: ``secret`` is shown to its maker, this once, and kept nowhere."""

    secret: str
    key: StoredKey


class KeyBook:
    """The stored keys of one process; ``on_change`` is called when they are others than before.

    ``keys`` is None until the store was read for the first time: then nobody can say that a key is unknown.
    """

    def __init__(self, store: Store, pepper: str | None) -> None:
        self._store = store
        self._pepper = pepper
        self.on_change: Callable[[], None] = lambda: None
        self._revision = -1
        self.keys: tuple[StoredKey, ...] | None = None if self._may_exist() else ()
        self.tried = asyncio.Event()
        """Set once the store has been asked, whatever it said."""

    async def refresh(self) -> None:
        """Read the keys if they have changed; raises `StoreUnavailable`, and keeps what is known."""
        if self._revision < 0 and not self._may_exist():
            return
        await self._store.open()
        from gateway.security import key_rows  # noqa: PLC0415 - SQLAlchemy, when there is a store to read

        async with self._store.reading() as connection:
            revision = await key_rows.revision(connection)
            if revision == self._revision:
                return
            keys = await key_rows.load(connection)
        if self._pepper is None and any(key.digest.startswith(PEPPERED) for key in keys if key.revoked_at is None):
            log_event(
                _log,
                "api_key.pepper.missing",
                level=logging.ERROR,
                message="Keys were stored with a pepper and GATEWAY_KEY_PEPPER is not set: they do not work here.",
            )
        self._revision, self.keys = revision, keys
        self.on_change()

    async def run(self, each_time: Callable[[], object]) -> None:
        """Follow the store until cancelled; ``each_time`` is called after every look at it."""
        while True:
            try:
                await self.refresh()
            except GatewayError:
                pass  # the store has said so in the log; what is known is served
            except Exception as error:  # noqa: BLE001 - a background loop: revocations must go on arriving after it
                log_event(_log, "api_key.refresh.failed", level=logging.ERROR, exc_info=error)
            self.tried.set()
            each_time()
            await asyncio.sleep(POLL_S)

    async def create(
        self, key_id: str, options: KeyOptions, *, expires_at: float | None = None, created_by: str
    ) -> MadeKey:
        """Make a key. Raises `InvalidRequest`, `Conflict` for an id that is taken, `StoreUnavailable`."""
        check_new_key(key_id, expires_at)
        secret = new_secret()
        key = StoredKey(
            id=key_id,
            digest=stored_digest(secret.encode(), self._pepper),
            options=options,
            created_at=time.time(),
            created_by=created_by,
            expires_at=expires_at,
        )
        await self._change(key_id, lambda _: key, new=True)
        log_event(_log, "api_key.created", key_id=key_id, by=created_by)
        return MadeKey(secret, key)

    async def rotate(self, key_id: str, *, grace_s: float = GRACE_S, by: str) -> MadeKey:
        """Give a key a new secret; the old one works for ``grace_s`` more.

        Raises `InvalidRequest` for a grace that is none, else as `revoke`.
        """
        if not 0 <= grace_s <= LONGEST_GRACE_S:
            raise InvalidRequest(
                f"The old key may go on for 0 to {LONGEST_GRACE_S / 3_600:.0f} hours; name a grace among them.",
                param="grace_s",
            )
        secret = new_secret()
        digest = stored_digest(secret.encode(), self._pepper)

        def renew(key: StoredKey) -> StoredKey:
            until = time.time() + grace_s
            return msgspec.structs.replace(
                key, digest=digest, previous_digest=key.digest if grace_s > 0 else None, previous_until=until
            )

        key = await self._change(key_id, renew)
        log_event(_log, "api_key.rotated", key_id=key_id, by=by, grace_s=grace_s)
        return MadeKey(secret, key)

    async def revoke(self, key_id: str, *, by: str) -> StoredKey:
        """End a key for ever. Raises `NotFound` for one that is not in the store or is revoked, `StoreUnavailable`."""
        key = await self._change(key_id, lambda key: msgspec.structs.replace(key, revoked_at=time.time()))
        log_event(_log, "api_key.revoked", level=logging.WARNING, key_id=key_id, by=by)
        return key

    async def _change(self, key_id: str, change: Callable[[StoredKey], StoredKey], *, new: bool = False) -> StoredKey:
        await self._store.open()
        from gateway.security import key_rows  # noqa: PLC0415 - SQLAlchemy, when there is a store to write

        async with self._store.transaction() as connection:
            found = await key_rows.find_locked(connection, key_id)
            if new and found is not None:
                raise Conflict(f"There is, or was, a key with the id '{key_id}'; ids are never given twice.")
            if not new and (found is None or found.revoked_at is not None):
                raise NotFound(f"The store has no key with the id '{key_id[:64]}' that is not revoked.")
            key = change(found) if found is not None else change(_NOBODY)
            await key_rows.write(connection, key, new=new)
        await self.refresh()
        return key

    def _may_exist(self) -> bool:
        path = self._store.path
        return self._store.is_shared or (path is not None and path.exists())


_NOBODY = StoredKey(id="", digest="", created_at=0, created_by="")
