"""When a key ends: what people write, as epoch seconds, and the other way round."""

from __future__ import annotations

from datetime import UTC, date, datetime, time

_LAST = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
"""The last moment that has a date: what is later, as a day's last microsecond rounded up to the next, is this one."""


def end_of(value: object) -> float:
    """Return when a day or a moment is over; a day's last second counts, and it is UTC where no zone is named.

    Takes a text, a `date` or a `datetime`; raises `ValueError` for what is none.
    """
    if isinstance(value, str):
        value = datetime.fromisoformat(value) if len(value) > 10 else date.fromisoformat(value)
    if isinstance(value, datetime):
        value = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    elif isinstance(value, date):
        value = datetime.combine(value, time.max, UTC)
    else:
        raise ValueError(f"{value!r} is no date")
    return min(value.timestamp(), _LAST)


def shown(moment: float | None) -> str | None:
    """Return epoch seconds as ISO 8601 in UTC, to the second; None, a key without an end, stays None."""
    return None if moment is None else in_utc(moment).isoformat(timespec="seconds")


def in_utc(moment: float) -> datetime:
    """Return epoch seconds as a moment in UTC."""
    return datetime.fromtimestamp(min(moment, _LAST), UTC)
