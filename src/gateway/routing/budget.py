"""RetryBudget: retries as a share of traffic, so that a dead upstream is not beaten harder than before it died."""

from __future__ import annotations

LARGEST = 10.0
"""Tokens that are kept at most: what was earned in a good hour is not spent in one bad second."""


class RetryBudget:
    """A token bucket that requests fill and retries empty.

    Each first try earns ``share`` of a token, each retry costs one. It begins with one, so that the very first request
    may be tried again: over any time, retries ≤ ``share`` × first tries + 1.
    """

    __slots__ = ("_tokens", "share")

    def __init__(self, share: float) -> None:
        self.share = share
        self._tokens = 1.0 if share else 0.0

    def earn(self) -> None:
        """Count a first try."""
        tokens = self._tokens + self.share
        self._tokens = min(LARGEST, tokens)

    def spend(self) -> bool:
        """Return whether one retry is allowed, and count it."""
        if self._tokens < 1.0 - 1e-9:
            return False
        self._tokens -= 1.0
        return True
