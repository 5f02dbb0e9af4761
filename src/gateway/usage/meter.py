"""Meter: puts the cost to what a model call used, and counts it."""

from __future__ import annotations

from gateway.events import Usage
from gateway.observability.metrics import Metrics
from gateway.usage.prices import PICO, PriceTable

_OPERATIONS = {"/chat/completions": "chat", "/completions": "text_completion", "/embeddings": "embeddings"}


class Meter:
    """Prices every model call once, when it has ended. A reload of the prices makes a new one."""

    def __init__(self, prices: PriceTable | None = None, metrics: Metrics | None = None) -> None:
        self._prices = PriceTable() if prices is None else prices
        self._metrics = metrics

    def charge(
        self, usage: Usage, *, run_model: str, upstream: str, model: str, path: str = "/chat/completions"
    ) -> Usage:
        """Return what one model call used with its cost.

        ``upstream`` and ``model`` are those that answered, ``run_model`` what the client asked for. The upstream's own
        word on the cost counts before the prices; without either, there is none.
        """
        cost = usage.cost
        if cost is None:
            cost = self._prices.cost(upstream, model, usage)
            if cost is None or cost < 0:
                return usage
            usage = Usage(
                usage.input_tokens,
                usage.output_tokens,
                usage.cached_input_tokens,
                usage.reasoning_tokens,
                usage.requests,
                usage.estimated,
                usage.audio_input_tokens,
                usage.audio_output_tokens,
                cost,
            )
        if self._metrics is not None:
            self._metrics.cost(_OPERATIONS.get(path, "other"), run_model, upstream, cost / PICO)
        return usage
