"""Question: what is asked of the ledger, and its answer in sums."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from gateway.usage.prices import usd

GROUP_NAMES = ("key", "model", "agent", "upstream", "end_user", "namespace", "day")
"""What usage can be grouped by."""

TOKEN_NAMES = (
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
)
"""The kinds of tokens that are counted; cached and audio ones are among the input's or output's, too."""

_DAY_S = 86_400


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: sums of the time from ``from_ms`` up to, not including, ``to_ms``; one for each ``group_by``.

    ``only`` maps names of `GROUP_NAMES` to the one value that counts.
    """

    from_ms: int
    to_ms: int
    group_by: tuple[str, ...] = ()
    only: dict[str, str] = {}
    limit: int = 100
    offset: int = 0


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """The sums of one group. ``cost`` is in picodollars, over the calls whose cost is known.

    ``byok_calls`` were made with keys that callers brought, and ``byok_cost`` is theirs of the cost.

    ``last_ms`` is when it was last used, in epoch milliseconds; None where nothing was.
    """

    group: dict[str, Any]
    requests: int
    failures: int
    cached: int
    model_calls: int
    calls_without_cost: int
    estimated_calls: int
    byok_calls: int
    cost: int
    byok_cost: int
    tokens: dict[str, int]
    last_ms: int | None

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it; a day is a date, the cost exact dollars."""
        group = dict(self.group)
        if "day" in group:
            group["day"] = datetime.fromtimestamp(group["day"] * _DAY_S, UTC).date().isoformat()
        return {
            **group,
            "requests": self.requests,
            "failures": self.failures,
            "cached": self.cached,
            "model_calls": self.model_calls,
            **self.tokens,
            "estimated_calls": self.estimated_calls,
            "cost_usd": usd(self.cost),
            "calls_without_cost": self.calls_without_cost,
            "byok_calls": self.byok_calls,
            "byok_cost_usd": usd(self.byok_cost),
            "avg_tokens_per_request": self._average(),
            "last_used_at": None if self.last_ms is None else iso(self.last_ms),
        }

    def _average(self) -> float | None:
        """Return input and output tokens per request; None where there are calls of agents alone, as of an upstream."""
        tokens = self.tokens["input_tokens"] + self.tokens["output_tokens"]
        return round(tokens / self.requests, 1) if self.requests else None


def iso(moment_ms: int) -> str:
    """Return epoch milliseconds as ISO 8601 in UTC."""
    return datetime.fromtimestamp(moment_ms / 1000, UTC).isoformat(timespec="milliseconds")


class Totals(msgspec.Struct, frozen=True):
    """One page of groups, in the order of their names."""

    groups: list[Total]
    has_more: bool
