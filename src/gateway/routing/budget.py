"""RetryBudget: further tries as a share of traffic, so that a dead upstream is not beaten harder than a live one."""

from __future__ import annotations

LARGEST = 10.0
"""Tokens that are kept at most: what was earned in a good hour is not spent in one bad second."""

HEDGE = 1.25
"""What a hedge costs: when hedges have spent all, a little is left for those whose first target and hedge both fail."""


class RetryBudget:
    """A token bucket that requests fill and retries empty.

    Each first try earns ``share`` of a token; a retry, and another target of doubtful health, cost one, a hedge
    `HEDGE`. It begins with one on loan, so that the very first request may be tried again: over any time, what is spent
    is at most ``share`` × first tries, or 1.
    """

    __slots__ = ("_loan", "_tokens", "share")

    def __init__(self, share: float) -> None:
        self.share = share
        self._tokens = self._loan = 1.0 if share else 0.0

    def earn(self) -> None:
        """Count a first try."""
        if self._loan > 1e-9:
            self._loan -= self.share
            return
        tokens = self._tokens + self.share
        self._tokens = min(LARGEST, tokens)

    def spend(self, tokens: float = 1.0) -> bool:
        """Return whether one more try is allowed, and count it."""
        if self._tokens < tokens - 1e-9:
            return False
        self._tokens -= tokens
        return True

    def owe(self) -> None:
        """Count a try that was allowed for nothing and failed; those to come pay for it."""
        self._tokens = max(self._tokens - 1.0, -LARGEST)
