"""Meter: puts the cost to what a model call used, and counts it."""

from __future__ import annotations

from gateway.events import Usage
from gateway.observability.metrics import Metrics
from gateway.observability.traces import current_span
from gateway.usage.ledger import Ledger, LedgerRun
from gateway.usage.measures import NOTHING_MEASURED, Measured
from gateway.usage.prices import MOST_COST, PICO, PriceTable

OPERATIONS = {"/chat/completions": "chat", "/completions": "text_completion", "/embeddings": "embeddings"}


class Meter:
    """Prices every model call once, when it has ended, and enters it. A reload of the prices makes a new one."""

    def __init__(
        self, prices: PriceTable | None = None, metrics: Metrics | None = None, ledger: Ledger | None = None
    ) -> None:
        self._prices = PriceTable() if prices is None else prices
        self._metrics = metrics
        self._ledger = ledger

    def charge(
        self,
        usage: Usage,
        run: LedgerRun,
        *,
        upstream: str,
        model: str,
        path: str = "/chat/completions",
        agent: str | None = None,
        measured: Measured = NOTHING_MEASURED,
        byok: bool = False,
    ) -> Usage:
        """Return what one model call of ``run`` used with its cost.

        ``upstream`` and ``model`` are those that answered, ``agent`` whose call it was, if one's, ``measured`` what
        counts where no tokens do, ``byok`` whether the caller brought the key. The upstream's own word on the cost
        counts before the prices; without either, there is none.
        """
        reported = usage.cost is not None
        usage = usage if reported else self.priced(usage, upstream, model, measured)
        if (span := current_span()) is not None:
            span.served(upstream, model)
            span.spent(usage)
        if self._metrics is not None and usage.cost is not None:
            self._metrics.cost(OPERATIONS.get(path, "other"), run.model, upstream, usage.cost / PICO)
        if self._ledger is not None:
            version = None if reported or usage.cost is None else self._prices.version
            self._ledger.charged(
                run, usage, path=path, agent=agent, upstream=upstream, model=model, price_version=version, byok=byok
            )
        return usage

    def most(self, upstream: str, model: str, input_tokens: int, output_tokens: int) -> int:
        """Return what a call may cost at the most, in picodollars; 0 where no price says so."""
        return self._prices.most(upstream, model, input_tokens, output_tokens)

    def most_measured(self, upstream: str, model: str, measured: Measured) -> int:
        """Return what a call may cost that is not counted in tokens, in picodollars; 0 where no price says so."""
        return self._prices.most_measured(upstream, model, measured)

    def priced(self, usage: Usage, upstream: str, model: str, measured: Measured = NOTHING_MEASURED) -> Usage:
        """Return the usage with its cost by the prices, and charge nothing."""
        cost = self._prices.cost(upstream, model, usage, measured)
        if cost is None or not 0 <= cost <= MOST_COST:
            return usage
        return Usage(
            usage.input_tokens,
            usage.output_tokens,
            usage.cached_input_tokens,
            usage.reasoning_tokens,
            usage.requests,
            usage.estimated,
            usage.audio_input_tokens,
            usage.audio_output_tokens,
            cost,
            cache_write_tokens=usage.cache_write_tokens,
        )
