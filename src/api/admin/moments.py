"""Moments as the admin routes write them."""

from __future__ import annotations

from gateway.security.moments import in_utc


def iso(moment: float) -> str:
    """Return epoch seconds as ISO 8601 in UTC, to the millisecond."""
    return in_utc(moment).isoformat(timespec="milliseconds").replace("+00:00", "Z")
