"""RecentErrors: the last few failures of discovery and of runs, kept in memory for `GET /agents/errors`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

CAPACITY = 200


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """One failure. ``occurred_at`` is epoch seconds; ``details`` is for admins and holds no secret."""

    event: str
    message: str
    occurred_at: float = field(default_factory=time.time)
    request_id: str | None = None
    agent_id: str | None = None
    module_path: str | None = None
    error_stage: str | None = None
    details: Mapping[str, str | int | None] = field(default_factory=dict)


class RecentErrors:
    """Holds the last ``capacity`` records; the oldest goes first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records: deque[ErrorRecord] = deque(maxlen=capacity)

    def add(self, record: ErrorRecord) -> None:
        """Keep one record."""
        self._records.append(record)

    def list_errors(self) -> Sequence[ErrorRecord]:
        """Return the records, newest first."""
        return tuple(reversed(self._records))
