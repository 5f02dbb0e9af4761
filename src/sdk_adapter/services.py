"""What the adapter is given by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.config import Settings
from gateway.observability.metrics import Metrics
from gateway.security.acl import AccessList
from gateway.tools.manager import ToolManager
from gateway.usage.meter import Meter

if TYPE_CHECKING:
    from gateway.routing.targets import ModelTable


@dataclass(frozen=True, slots=True)
class AdapterServices:
    """``upstreams``, ``meter``, ``access`` and ``hides_foreign_models`` return what a run that starts now shall use.

    ``tools`` calls the gateway's tools; None where there are none.
    """

    upstreams: Callable[[], ModelTable]
    metrics: Metrics
    settings: Settings
    meter: Callable[[], Meter] = Meter
    access: Callable[[], AccessList] = AccessList
    hides_foreign_models: Callable[[], bool] = lambda: False
    tools: ToolManager | None = None
