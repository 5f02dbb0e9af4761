"""Moments as the admin routes write them."""

from __future__ import annotations

from datetime import UTC, datetime


def iso(moment: float) -> str:
    """Return epoch seconds as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
