"""What kind of failure an upstream's error is, for whoever decides about another try."""

from __future__ import annotations

from typing import Literal

from gateway.errors import (
    GatewayError,
    UpstreamAuthFailed,
    UpstreamError,
    UpstreamIncomplete,
    UpstreamMalformed,
    UpstreamModelNotFound,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)

Kind = Literal[
    "connect",
    "timeout",
    "rate_limit",
    "server_error",
    "malformed",
    "incomplete",
    "refused",
    "context_length",
    "content_policy",
]

RETRIED = frozenset({"connect", "timeout", "rate_limit", "server_error", "malformed", "incomplete"})
"""Kinds for which asking the same target again may help; for ``refused``, only another target can."""

ELSEWHERE = RETRIED | {"refused"}
"""Kinds for which asking another target may help."""

_POLICY_CODES = frozenset({"content_filter", "content_policy_violation", "responsible_ai_policy_violation"})


def kind_of(error: GatewayError) -> Kind | None:
    """Return the kind of a failed call, or None where every upstream would answer alike: the request is at fault."""
    match error:
        case UpstreamRejected():
            if error.code in ("context_length_exceeded", "string_above_max_length"):
                return "context_length"
            return "content_policy" if error.code in _POLICY_CODES else None
        case UpstreamRateLimited():
            return "rate_limit"
        case UpstreamUnreachable():
            return "connect"
        case UpstreamTimeout():
            return "timeout"
        case UpstreamMalformed():
            return "malformed"
        case UpstreamIncomplete():
            return "incomplete"
        case UpstreamAuthFailed() | UpstreamModelNotFound():
            return "refused"
        case UpstreamError():
            return "refused" if error.should_retry is False else "server_error"
        case _:
            return None
