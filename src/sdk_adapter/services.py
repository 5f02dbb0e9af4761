"""What the adapter is given by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.config import Settings
from gateway.observability.metrics import Metrics
from gateway.usage.meter import Meter

if TYPE_CHECKING:
    from gateway.routing.targets import ModelTable


@dataclass(frozen=True, slots=True)
class AdapterServices:
    """``upstreams`` and ``meter`` return the table and the meter that a run starting now shall use."""

    upstreams: Callable[[], ModelTable]
    metrics: Metrics
    settings: Settings
    meter: Callable[[], Meter] = Meter
