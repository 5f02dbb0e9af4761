"""EndpointStats: how often and how fast each route template has answered, for `GET /api/health/endpoints`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

_MOST_ROUTES = 500
_RECENT = 100
_TOP = 20


class RouteTimes(msgspec.Struct):
    """One route since the start; times in milliseconds, to the last byte of the answer.

    ``waits``: its time is that of a model, so that it is judged by its errors alone.
    """

    waits: bool = False
    count: int = 0
    errors: int = 0
    total_ms: float = 0.0
    min_ms: float = 0.0
    max_ms: float = 0.0
    last_at: float = 0.0
    statuses: dict[str, int] = {}
    recent_ms: list[float] = []

    def add(self, status: int, milliseconds: list[float]) -> None:
        """Add answers of one status; a client that left before one has status 0, shown as 499."""
        least = min(milliseconds)
        self.min_ms = min(self.min_ms, least) if self.count else least
        self.max_ms = max(self.max_ms, *milliseconds)
        self.count += len(milliseconds)
        self.total_ms += sum(milliseconds)
        self.last_at = time.time()
        shown = str(status or 499)
        self.statuses[shown] = self.statuses.get(shown, 0) + len(milliseconds)
        if status >= 500:
            self.errors += len(milliseconds)
        self.recent_ms = [*self.recent_ms, *milliseconds][-_RECENT:]


class EndpointStats:
    """Counts the answers of one process; past 500 routes a new one is not counted.

    An answer is only kept, and counted when enough wait or somebody asks.
    """

    def __init__(self) -> None:
        self._routes: dict[str, RouteTimes] = {}
        self._waiting: dict[tuple[str, int], list[float]] = {}

    def record(self, route: str, status: int, milliseconds: float, *, waits: bool = False) -> None:
        """Note one answer; a client that left before one has status 0."""
        waiting = self._waiting.get((route, status))
        if waiting is None:
            if route not in self._routes:
                if len(self._routes) >= _MOST_ROUTES:
                    return
                self._routes[route] = RouteTimes(waits)
            waiting = self._waiting[route, status] = []
        waiting.append(milliseconds)
        if len(waiting) >= _RECENT:
            self._count()

    def export(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        self._count()
        exported: dict[str, Any] = msgspec.to_builtins(self._routes)
        return exported

    def _count(self) -> None:
        for (route, status), waiting in self._waiting.items():
            if waiting:
                self._routes[route].add(status, waiting)
                waiting.clear()


def summarise(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the endpoint answers, from the exports of all processes: a summary and the busiest routes."""
    merged: dict[str, RouteTimes] = {}
    for part in parts:
        for route, exported in part.items():
            _add(merged.setdefault(route, RouteTimes(exported["waits"], min_ms=exported["min_ms"])), exported)
    shown = [_shown(route, times) for route, times in merged.items()]
    shown.sort(key=lambda row: -int(row["count"]))
    requests = sum(times.count for times in merged.values())
    errors = sum(times.errors for times in merged.values())
    states = [row["status"] for row in shown]
    worst = next((state for state in ("unhealthy", "degraded") if state in states), "healthy")
    return {
        "summary": {
            "status": worst,
            "endpoints": len(shown),
            "requests": requests,
            "errors": errors,
            "error_rate": round(errors / requests, 4) if requests else 0.0,
            **{state: states.count(state) for state in ("healthy", "degraded", "unhealthy")},
        },
        "endpoints": shown[:_TOP],
    }


def _add(times: RouteTimes, other: Mapping[str, Any]) -> None:
    times.count += other["count"]
    times.errors += other["errors"]
    times.total_ms += other["total_ms"]
    times.min_ms = min(times.min_ms, other["min_ms"])
    times.max_ms = max(times.max_ms, other["max_ms"], other["min_ms"])
    times.last_at = max(times.last_at, other["last_at"])
    for status, count in other["statuses"].items():
        times.statuses[status] = times.statuses.get(status, 0) + count
    times.recent_ms = [*times.recent_ms, *other["recent_ms"]][-_RECENT:]


def _shown(route: str, times: RouteTimes) -> dict[str, Any]:
    rate, mean = times.errors / times.count, times.total_ms / times.count
    recent = sum(times.recent_ms) / len(times.recent_ms)
    slow = 0.0 if times.waits else mean
    state = "unhealthy" if rate > 0.10 or slow > 1_000 else "degraded" if rate > 0.05 or slow > 500 else "healthy"
    return {
        "endpoint": route,
        "status": state,
        "count": times.count,
        "errors": times.errors,
        "error_rate": round(rate, 4),
        "average_ms": round(mean, 3),
        "recent_average_ms": round(recent, 3),
        "min_ms": round(times.min_ms, 3),
        "max_ms": round(times.max_ms, 3),
        "last_called_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(times.last_at)),
        "status_codes": dict(sorted(times.statuses.items())),
    }
