"""OverrideBook: grants that an admin makes on top of every key's own, each for a while; kept in memory alone."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence

from gateway.errors import InvalidRequest, NotFound
from gateway.observability.logs import log_event
from gateway.security.acl import AccessList, Override

LONGEST_S = 86_399
"""An override lives at most this many seconds: a day less one."""

MOST = 256
"""Overrides at one time; each costs every decision a comparison."""

_log = logging.getLogger("gateway.security")


class OverrideBook:
    """Owns the overrides of a process and publishes the access list that holds them.

    Create it inside the event loop that serves. ``publish`` is called with a new list at every grant, revocation and
    expiry.
    """

    def __init__(self, publish: Callable[[AccessList], None]) -> None:
        self._publish = publish
        self._access = AccessList()
        self._timer: asyncio.TimerHandle | None = None

    def list_overrides(self) -> Sequence[Override]:
        """Return those in force, the one that expires first at the head."""
        return self._access.without_expired(time.time()).overrides

    def make(
        self, agent: str, ttl_s: int, reason: str, *, key_id: str | None = None, granted_by: str | None = None
    ) -> Override:
        """Return a new override, not yet in force; see `apply`.

        Raises `InvalidRequest` for a pattern that can match nothing, a time that is not 1 to 86,399 s, or no reason.
        """
        pattern = agent.strip()
        if not pattern or not pattern.isascii() or len(pattern) > 256:
            raise InvalidRequest(
                "'agent' is a pattern over namespace/name such as 'default/weather*', in at most 256 ASCII characters.",
                param="agent",
            )
        if not 1 <= ttl_s <= LONGEST_S:
            raise InvalidRequest(f"'ttl_seconds' is 1 to {LONGEST_S}.", param="ttl_seconds")
        if not reason.strip() or len(reason) > 500:
            raise InvalidRequest("'reason' says why, in 1 to 500 characters; it stands in the log.", param="reason")
        return Override(
            f"ovr_{secrets.token_hex(12)}", pattern, time.time() + ttl_s, reason.strip(), key_id, granted_by
        )

    def apply(self, override: Override) -> None:
        """Put an override in force; raises `InvalidRequest` when there are too many. Applying it again is harmless."""
        others = tuple(known for known in self.list_overrides() if known.id != override.id)
        if len(others) >= MOST:
            raise InvalidRequest(f"There are {MOST} overrides in force. Revoke some, or change security.yaml.")
        self._replace(AccessList(tuple(sorted((*others, override), key=lambda known: known.expires_at))))
        _log_override("agent.security.override.granted", override)

    def revoke(self, override_id: str) -> Override:
        """End an override now; raise `NotFound` for one that is not in force."""
        found = next((known for known in self.list_overrides() if known.id == override_id), None)
        if found is None:
            raise NotFound(f"No override '{override_id[:64]}' is in force. GET /security/overrides lists them.")
        self._replace(AccessList(tuple(known for known in self.list_overrides() if known.id != override_id)))
        _log_override("agent.security.override.revoked", found)
        return found

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _replace(self, access: AccessList) -> None:
        self._access = access
        self.close()
        if access.overrides:
            wait_s = max(0.0, access.overrides[0].expires_at - time.time())
            self._timer = asyncio.get_running_loop().call_later(wait_s + 0.001, self._expire)
        self._publish(access)

    def _expire(self) -> None:
        kept = self._access.without_expired(time.time())
        for override in self._access.overrides:
            if override not in kept.overrides:
                _log_override("agent.security.override.expired", override)
        self._replace(kept)


def _log_override(event: str, override: Override) -> None:
    log_event(
        _log,
        event,
        level=logging.WARNING,
        override_id=override.id,
        pattern=override.agent,
        key_id=override.key_id,
        granted_by=override.granted_by,
        reason=override.reason,
        expires_at=override.expires_at,
    )
