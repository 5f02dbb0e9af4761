"""Which models a principal reaches: fnmatch patterns over the canonical ASCII id, decided once per pair."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

from gateway.principal import Principal


def allows(principal: Principal, model_id: str) -> bool:
    """Return whether the principal reaches the model.

    ``model_id`` is the canonical id that is also looked up, never another spelling of it.
    """
    return _match(principal.allow, model_id) is not None


def allows_all(principal: Principal, prefix: str) -> bool:
    """Return whether one pattern of the principal matches every id that begins with ``prefix``."""
    return any(pattern.endswith("*") and fnmatchcase(prefix, pattern) for pattern in principal.allow)


def find_pattern(principal: Principal, model_id: str) -> str | None:
    """Return the pattern that grants the model, or None: what a log or a preview says about a decision."""
    return _match(principal.allow, model_id)


@lru_cache(maxsize=16_384)
def _match(patterns: tuple[str, ...], model_id: str) -> str | None:
    if not model_id.isascii():
        return None
    return next((pattern for pattern in patterns if fnmatchcase(model_id, pattern)), None)
