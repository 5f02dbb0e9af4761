"""Metrics: what the gateway counts and times, as JSON for people and as Prometheus text for machines.

Label values are bounded: route templates, configured names, canonical model ids; past a family's limit a new value of
an open label becomes ``other``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from gateway.observability.families import (
    LONGEST_LABEL,
    OTHER,
    CounterFamily,
    Family,
    GaugeFamily,
    HistogramFamily,
)

_REQUEST_MS = (25, 50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 30_000, 60_000, 120_000, 300_000, 600_000)
_TOOL_MS = (5, 25, 100, 400, 1_600, 6_400, 30_000, 120_000, 600_000)
_SECONDS = (0.025, 0.1, 0.4, 1.6, 6.4, 30, 120, 600)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30, 60)
_TOKENS = (16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
_RELOAD_MS = (10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000)

_SAMPLES_PER_SLICE = 250
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STATUSES = ("ready", "stale", "error")

F = TypeVar("F", bound=Family[Any])


class Metrics:
    """Every counter of one process, in a registry of its own; used from the event loop.

    ``model`` is always a canonical id of the registry or of an upstream's model list, never what a client typed.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.families: list[Family[Any]] = []
        self._snapshot = _Snapshot()
        self._define_ours()
        self._define_genai()

    def run_started(self, model: str) -> None:
        """Count a run as in flight; every call is followed by one of `run_finished`."""
        self._in_flight.child().inc()

    def run_finished(self, model: str, streaming: bool, outcome: str, seconds: float) -> None:
        """Record a run that ended. ``outcome`` is ``success``, ``failure`` or ``cancelled``."""
        milliseconds = seconds * 1000
        self._in_flight.child().dec()
        self._requests.child("true" if streaming else "false").inc()
        self._request_ms.child().observe(milliseconds)
        self._runs.child(model, outcome).inc()
        self._genai_duration.child("chat", model).observe(seconds)
        self._snapshot.request(streaming, milliseconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time from admission to the first event of a run."""
        self._genai_first_token.child("chat", model).observe(seconds)

    def tokens(self, model: str, input_tokens: int, output_tokens: int) -> None:
        """Record what a run used, summed over its model calls."""
        self._genai_tokens.child("chat", model, "input").observe(input_tokens)
        self._genai_tokens.child("chat", model, "output").observe(output_tokens)

    def cost(self, operation: str, model: str, upstream: str, usd: float) -> None:
        """Record what one model call of a run for ``model`` cost; ``upstream`` answered it."""
        self._genai_cost.child(operation, model, upstream).inc(usd)

    def tool_invoked(self, tool: str, provider: str, source: str, status: str, seconds: float) -> None:
        """Record one call of a tool.

        ``provider`` is the kind that ran it (``function``, ``mcp``, ``agent`` …), ``source`` who asked for it (``sdk``:
        an agent), ``status`` ``success``, ``error`` or ``timeout``.
        """
        milliseconds = seconds * 1000
        self._tools.child(tool, provider, status, source).inc()
        self._tool_ms.child(tool, provider, source).observe(milliseconds)
        self._snapshot.tool(tool, provider, source, status, milliseconds)

    def upstream_request(self, upstream: str, status: int | str, seconds: float) -> None:
        """Record one request to an upstream by its configured name; ``status`` is HTTP's, or a word (``timeout`` …)."""
        self._upstream.child(upstream, str(status)).inc()
        self._upstream_ms.child(upstream).observe(seconds * 1000)

    def routing_attempt(self, upstream: str, outcome: str) -> None:
        """Record one try at an upstream; ``outcome`` is ``success``, ``cancelled`` or the kind of the failure."""
        self._routing_attempts.child(upstream, outcome).inc()

    def routing_retry_suppressed(self, upstream: str) -> None:
        """Count a retry that the retry budget did not allow."""
        self._routing_suppressed.child(upstream).inc()

    def routing_breaker(self, upstream: str, model: str, state: int) -> None:
        """Set the state of a breaker: 0 closed, 1 half-open, 2 open."""
        self._routing_breaker.child(upstream, model).set(state)

    def dropin_failure(self, kind: str) -> None:
        """Count a drop-in that did not load, by the kind of its diagnostic."""
        self._dropins.child(kind).inc()
        self._snapshot.dropin_failures[kind] = self._snapshot.dropin_failures.get(kind, 0) + 1

    def agents(self, counts: Mapping[str, int]) -> None:
        """Set how many agents are ready, stale and in error."""
        for status in _STATUSES:
            self._agents.child(status).set(counts.get(status, 0))

    def agents_refreshed(self, outcome: str, seconds: float) -> None:
        """Record one refresh of the registry; ``outcome`` is ``changed``, ``unchanged`` or ``failed``."""
        self._reload_ms.child(outcome).observe(seconds * 1000)

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Record one HTTP answer by its route template; a client that left before one has status 0, shown as 499."""
        method = method if method in _METHODS else OTHER
        self._http.child(route, method, str(status or 499)).inc()
        self._http_ms.child(route).observe(seconds * 1000)

    def error(self, domain: str, code: str) -> None:
        """Count an error shown to a caller, by the domain at fault and its code."""
        self._errors.child(domain, code).inc()

    def snapshot(self) -> dict[str, Any]:
        """Return the totals since the start as plain JSON values (`GET /metrics`)."""
        return self._snapshot.as_json()

    async def render(self, *, openmetrics: bool = False) -> tuple[bytes, str]:
        """Return the exposition and its content type.

        Written in slices with a turn of the event loop between them: in one piece, a thousand label sets would hold
        up every stream of the process for a tenth of a second.
        """
        write: Callable[[Any], bytes] = generate_openmetrics if openmetrics else generate_latest
        parts: list[bytes] = []
        for family in self.families:
            for metric in family.collect():
                for index, piece in enumerate(_slices(metric)):
                    text = write(piece)
                    parts.append(_without_comments(text) if index else text.removesuffix(b"# EOF\n"))
                    await asyncio.sleep(0)
        if openmetrics:
            parts.append(b"# EOF\n")
        return b"".join(parts), CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_PLAIN_0_0_4

    def _define_ours(self) -> None:
        self._requests = self._counter("requests", "Runs that ended.", "streaming")
        self._request_ms = self._histogram("request_latency_ms", "Duration of a run, ms.", _REQUEST_MS)
        self._runs = self._counter("runs", "Runs that ended, by model and outcome.", "model", "outcome")
        self._in_flight = self._gauge("in_flight_requests", "Runs under way.")
        self._tools = self._counter(
            "tool_invocations", "Calls of tools in the gateway.", "tool", "provider", "status", "source"
        )
        self._tool_ms = self._histogram(
            "tool_latency_ms", "Duration of a tool call, ms.", _TOOL_MS, "tool", "provider", "source"
        )
        self._upstream = self._counter("upstream_requests", "Requests to upstreams.", "upstream", "status")
        self._upstream_ms = self._histogram(
            "upstream_latency_ms", "Duration of a request to an upstream, ms.", _REQUEST_MS, "upstream"
        )
        self._routing_attempts = self._counter(
            "routing_attempts", "Tries of model calls, by how they ended.", "upstream", "outcome"
        )
        self._routing_suppressed = self._counter(
            "routing_retries_suppressed", "Retries that the retry budget did not allow.", "upstream"
        )
        self._routing_breaker = self._gauge(
            "routing_breaker_state", "Breaker: 0 closed, 1 half-open, 2 open.", "upstream", "model"
        )
        self._dropins = self._counter("dropin_failures", "Drop-ins that did not load.", "kind")
        self._agents = self._gauge("agents", "Agents in the registry.", "status")
        self._reload_ms = self._histogram(
            "agents_refresh_duration_ms", "Duration of a refresh of the registry, ms.", _RELOAD_MS, "outcome"
        )
        self._http = self._counter("http_requests", "HTTP answers.", "route", "method", "status")
        self._http_ms = self._histogram(
            "http_request_latency_ms", "Duration of an HTTP request, ms.", _REQUEST_MS, "route"
        )
        self._errors = self._counter("errors", "Errors shown to callers, by domain at fault.", "domain", "code")

    def _define_genai(self) -> None:
        labels = ("operation_name", "request_model")
        self._genai_tokens = self._histogram(
            "gen_ai_client_token_usage", "Tokens of a run.", _TOKENS, *labels, "token_type", prefix=""
        )
        self._genai_cost = self._keep(
            CounterFamily("gen_ai_client_cost", "Cost of model calls, USD.", (*labels, "provider_name"))
        )
        self._genai_duration = self._histogram(
            "gen_ai_server_request_duration", "Duration of a run, s.", _SECONDS, *labels, prefix=""
        )
        self._genai_first_token = self._histogram(
            "gen_ai_server_time_to_first_token",
            "Time to the first event of a run, s.",
            _FIRST_TOKEN_S,
            *labels,
            prefix="",
        )

    def _counter(self, name: str, doc: str, *labels: str) -> CounterFamily:
        return self._keep(CounterFamily(f"agent_gateway_{name}", doc, labels))

    def _gauge(self, name: str, doc: str, *labels: str) -> GaugeFamily:
        return self._keep(GaugeFamily(f"agent_gateway_{name}", doc, labels))

    def _histogram(
        self, name: str, doc: str, buckets: tuple[float, ...], *labels: str, prefix: str = "agent_gateway_"
    ) -> HistogramFamily:
        return self._keep(HistogramFamily(f"{prefix}{name}", doc, labels, buckets))

    def _keep(self, family: F) -> F:
        self.registry.register(family)
        self.families.append(family)
        return family


class _Snapshot:
    """The running totals behind `GET /metrics` as JSON."""

    def __init__(self) -> None:
        self.requests = self.streaming = 0
        self.total_ms = self.max_ms = 0.0
        self.min_ms: float | None = None
        self.invocations = self.failures = 0
        self.tool_ms = 0.0
        self.tools: dict[tuple[str, str], _ToolTotals] = {}
        self.dropin_failures: dict[str, int] = {}

    def request(self, streaming: bool, milliseconds: float) -> None:
        self.requests += 1
        self.streaming += streaming
        self.total_ms += milliseconds
        self.max_ms = max(self.max_ms, milliseconds)
        self.min_ms = milliseconds if self.min_ms is None else min(self.min_ms, milliseconds)

    def tool(self, tool: str, provider: str, source: str, status: str, milliseconds: float) -> None:
        failed = status != "success"
        self.invocations += 1
        self.failures += failed
        self.tool_ms += milliseconds
        key = (tool[:LONGEST_LABEL], source[:LONGEST_LABEL])
        if key not in self.tools and len(self.tools) >= 1_000:
            key = (OTHER, OTHER)
        totals = self.tools.setdefault(key, _ToolTotals(provider))
        totals.count += 1
        totals.failures += failed
        totals.milliseconds += milliseconds

    def as_json(self) -> dict[str, Any]:
        breakdown: dict[str, dict[str, Any]] = {}
        for (tool, source), totals in self.tools.items():
            breakdown.setdefault(tool, {})[source] = {
                "provider": totals.provider,
                "count": totals.count,
                "failures": totals.failures,
                "latency_ms": _mean(totals.milliseconds, totals.count),
            }
        return {
            "total_requests": self.requests,
            "streaming_requests": self.streaming,
            "average_latency_ms": _mean(self.total_ms, self.requests),
            "max_latency_ms": round(self.max_ms, 3),
            "min_latency_ms": round(self.min_ms or 0.0, 3),
            "tool_invocations": self.invocations,
            "tool_failures": self.failures,
            "average_tool_latency_ms": _mean(self.tool_ms, self.invocations),
            "tool_breakdown": breakdown,
            "dropin_failures": dict(self.dropin_failures),
        }


class _ToolTotals:
    __slots__ = ("count", "failures", "milliseconds", "provider")

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.count = self.failures = 0
        self.milliseconds = 0.0


class _Piece:
    """As much of a registry as the exposition writers ask for: one slice of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


def _slices(metric: Metric) -> Iterable[Any]:
    samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    for start in range(0, max(len(samples), 1), _SAMPLES_PER_SLICE):
        piece = Metric(metric.name, metric.documentation, metric.type, metric.unit)
        piece.samples = samples[start : start + _SAMPLES_PER_SLICE]
        yield _Piece(piece)


def _without_comments(text: bytes) -> bytes:
    return b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(b"#"))


def _mean(total: float, count: int) -> float:
    return round(total / count, 3) if count else 0.0
