"""Which models a principal reaches: fnmatch patterns over the canonical ASCII id.

The first that matches decides: an override, what a namespace gives to every key without a list of its own, the key's
patterns; else no. A match is looked for once per pair of patterns and id.
"""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

from msgspec import Struct

from gateway.principal import Principal

Source = Literal["override", "namespace_default", "api_key", "deny"]


class Override(Struct, frozen=True):
    """A grant on top of every key's own, for a while.

    ``agent`` is a pattern over ``namespace/name``, ``expires_at`` epoch seconds, ``key_id`` the only key it holds for
    (None: every key). ``granted_by`` is the admin key that made it.
    """

    id: str
    agent: str
    expires_at: float
    reason: str
    key_id: str | None = None
    granted_by: str | None = None


class Decision(Struct, frozen=True):
    """Whether a principal reaches a model, and what says so; ``pattern`` is None where nothing does."""

    allowed: bool
    source: Source
    pattern: str | None = None
    override: Override | None = None


_DENY = Decision(False, "deny")


class AccessList(Struct, frozen=True):
    """Who reaches what; frozen, replaced whole when an override comes or goes.

    An override that has expired grants nothing from that second on, whoever still holds the list.
    """

    overrides: tuple[Override, ...] = ()

    def decide(self, principal: Principal, model_id: str) -> Decision:
        """Return the decision on a model and what it rests on.

        ``model_id`` is the canonical id that is also looked up, never another spelling of it.
        """
        override = self._find_override(principal, model_id) if self.overrides else None
        if override is not None:
            return Decision(True, "override", override.agent, override)
        pattern = _match(principal.allow_by_namespace, model_id)
        if pattern is not None:
            return Decision(True, "namespace_default", pattern)
        pattern = _match(principal.allow, model_id)
        return _DENY if pattern is None else Decision(True, "api_key", pattern)

    def allows(self, principal: Principal, model_id: str) -> bool:
        """Return whether the principal reaches the model: `decide`, without the reasons."""
        return (
            _match(principal.allow, model_id) is not None
            or _match(principal.allow_by_namespace, model_id) is not None
            or (bool(self.overrides) and self._find_override(principal, model_id) is not None)
        )

    def allows_all(self, principal: Principal, prefix: str) -> bool:
        """Return whether one pattern of the principal matches every id that begins with ``prefix``."""
        patterns = (
            *principal.allow,
            *principal.allow_by_namespace,
            *(override.agent for override in self._overrides_of(principal)),
        )
        return any(pattern.endswith("*") and fnmatchcase(prefix, pattern) for pattern in patterns)

    def without_expired(self, now: float) -> AccessList:
        """Return the list without the overrides that have expired at ``now`` (epoch seconds)."""
        return AccessList(tuple(override for override in self.overrides if override.expires_at > now))

    def _find_override(self, principal: Principal, model_id: str) -> Override | None:
        return next(
            (override for override in self._overrides_of(principal) if _match((override.agent,), model_id)), None
        )

    def _overrides_of(self, principal: Principal) -> list[Override]:
        if principal.is_drop_in:
            return []
        now = time.time()
        return [
            override
            for override in self.overrides
            if override.expires_at > now and override.key_id in (None, principal.key_id)
        ]


@lru_cache(maxsize=16_384)
def _match(patterns: tuple[str, ...], model_id: str) -> str | None:
    if not model_id.isascii():
        return None
    return next((pattern for pattern in patterns if fnmatchcase(model_id, pattern)), None)
