"""What the adapter is given by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.config import Settings
from gateway.observability.metrics import Metrics

if TYPE_CHECKING:
    from gateway.routing.targets import ModelTable


@dataclass(frozen=True, slots=True)
class AdapterServices:
    """``upstreams`` returns the table that a run starting now shall use."""

    upstreams: Callable[[], ModelTable]
    metrics: Metrics
    settings: Settings
