"""Metrics: what the gateway counts and times, as JSON for people and as Prometheus text for machines.

Label values are bounded: route templates, configured names, canonical model ids; past a family's limit a new value of
an open label becomes ``other``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from gateway.observability.exposition import expose
from gateway.observability.families import (
    LONGEST_LABEL,
    OTHER,
    Count,
    CounterFamily,
    Distribution,
    Family,
    GaugeFamily,
    HistogramFamily,
    Spread,
)

_REQUEST_MS = (25, 50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 30_000, 60_000, 120_000, 300_000, 600_000)
_TOOL_MS = (5, 25, 100, 400, 1_600, 6_400, 30_000, 120_000, 600_000)
_SECONDS = (0.025, 0.1, 0.4, 1.6, 6.4, 30, 120, 600)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30, 60)
_TOKENS = (16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
_RELOAD_MS = (10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OK = 200
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
_MOST_MODELS = 10_000
_STATUSES = ("ready", "stale", "error")

F = TypeVar("F", bound=Family[Any])


class Metrics:
    """Every counter of one process, used from the event loop.

    ``model`` of a run is shown as `show_models_as` was told: a name that exists, never one that a client made up.
    """

    def __init__(self) -> None:
        self._label: Callable[[str], str | None] | None = None
        self._shown_as: dict[str, str] = {}
        self._run_children: dict[tuple[str, bool, str], tuple[Count, Count, Distribution]] = {}
        self._token_children: dict[str, tuple[Distribution, Distribution]] = {}
        self._first_token_children: dict[str, Distribution] = {}
        self._upstream_children: dict[tuple[str, int | str], tuple[Count, Distribution, Distribution]] = {}
        self._http_children: dict[tuple[str, str, int], tuple[Count, Distribution]] = {}
        self.families: list[Family[Any]] = []
        self._snapshot = _Snapshot()
        self._define_ours()
        self._define_genai()

    def show_models_as(self, label: Callable[[str], str | None]) -> None:
        """Count runs under what ``label`` makes of their models; None is shown as ``other``."""
        self._label = label
        self._forget()

    def forget_models(self) -> None:
        """Ask for the labels of models anew: which models exist has changed."""
        self._forget()

    def run_started(self, model: str) -> None:
        """Count a run as in flight; every call is followed by one of `run_finished`."""
        self._under_way.value += 1

    def run_finished(self, model: str, streaming: bool, outcome: str, seconds: float) -> None:
        """Record a run that ended. ``outcome`` is ``success``, ``failure`` or ``cancelled``."""
        milliseconds = seconds * 1000
        bound = self._run_children.get((model, streaming, outcome)) or self._bind_run(model, streaming, outcome)
        requests, runs, duration = bound
        requests.value += 1
        runs.value += 1
        duration.observe(seconds)
        self._under_way.value -= 1
        self._run_ms.observe(milliseconds)
        (self._snapshot.streamed if streaming else self._snapshot.whole).observe(milliseconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Record the time from admission to the first event of a run."""
        (self._first_token_children.get(model) or self._bind_first_token(model)).observe(seconds)

    def tokens(self, model: str, input_tokens: int, output_tokens: int) -> None:
        """Record what a run used, summed over its model calls."""
        read, written = self._token_children.get(model) or self._bind_tokens(model)
        read.observe(input_tokens)
        written.observe(output_tokens)

    def cost(self, operation: str, model: str, upstream: str, usd: float) -> None:
        """Record what one model call of a run for ``model`` cost; ``upstream`` answered it."""
        self._genai_cost.child(operation, self._shown(model), upstream).inc(usd)

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
        count, times, spans = self._upstream_children.get((upstream, status)) or self._bind_upstream(upstream, status)
        count.value += 1
        times.observe(seconds * 1000)
        spans.observe(seconds)

    def routing_attempt(self, upstream: str, outcome: str) -> None:
        """Record one try at an upstream; ``outcome`` is ``success``, ``cancelled`` or the kind of the failure."""
        self._routing_attempts.child(upstream, outcome).inc()

    def routing_retry_suppressed(self, upstream: str) -> None:
        """Count a further try that the retry budget did not allow."""
        self._routing_suppressed.child(upstream).inc()

    def routing_hedge(self, upstream: str, outcome: str) -> None:
        """Count a hedge by the upstream that was asked too: ``won``, ``lost``, ``failed`` or ``cancelled``."""
        self._routing_hedges.child(upstream, outcome).inc()

    def routing_breaker(self, upstream: str, model: str, state: int) -> None:
        """Set the state of a breaker: 0 closed, 1 half-open, 2 open."""
        self._routing_breaker.child(upstream, model).set(state)

    def cache_request(self, model: str, result: str) -> None:
        """Count a request for a model that has a cache: ``hit``, ``joined`` (another's call), ``miss``, ``bypass``."""
        self._cache_requests.child(self._shown(model), result).inc()

    def cache_error(self, backend: str) -> None:
        """Count a command to a cache that failed; the request went on without."""
        self._cache_errors.child(backend).inc()

    def cache_memory(self, entries: int, size: int) -> None:
        """Set what the cache keeps in this process: answers, and their bytes."""
        self._cache_entries.child().set(entries)
        self._cache_bytes.child().set(size)

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

    def http_request(self, route: str, method: str, status: int, milliseconds: float) -> None:
        """Record one HTTP answer by its route template; a client that left before one has status 0, shown as 499."""
        count, times = self._http_children.get((route, method, status)) or self._bind_http(route, method, status)
        count.value += 1
        times.observe(milliseconds)

    def loop_lag(self, seconds: float) -> None:
        """Record how late the event loop came to something that was due."""
        self._loop_lag.child().observe(seconds)

    def error(self, domain: str, code: str) -> None:
        """Count an error shown to a caller, by the domain at fault and its code."""
        self._errors.child(domain, code).inc()

    def authenticated(self, method: str, outcome: str) -> None:
        """Count how a caller showed who it is (``key``, ``token``, ``none``) and what came of it.

        ``outcome`` is ``accepted``, ``refused``, ``missing`` (nothing was shown), ``throttled`` or ``unavailable``.
        """
        self._auth_events.child(method, outcome).value += 1

    def access_decided(self, kind: str, allowed: bool) -> None:
        """Count a decision on what a caller may reach: ``model``, ``upstream``, ``tool``, or a route's ``scope``."""
        self._access[kind, allowed].value += 1

    def credential_used(self, operation: str, count: int = 1) -> None:
        """Count what became of credentials.

        Those that callers lend are ``received``, ``refused`` (they name an address), ``lent`` to a tool or an upstream,
        or ``missing`` when a tool needs one; keys of the gateway are ``key_created``, ``key_rotated``, ``key_revoked``.
        """
        self._credentials.child(operation).inc(count)

    def limit_rejected(self, limit: str, scope: str) -> None:
        """Count a refusal by a limit (``requests``, ``tokens``, ``runs``, ``cost``) of a scope; or of its ``store``."""
        self._limit_rejections.child(limit, scope).inc()

    def limit_unchecked(self, store: str) -> None:
        """Count what passed a speed limit because the store of the limits did not answer."""
        self._limit_unchecked.child(store).inc()

    def limit_store_failed(self, store: str) -> None:
        """Count a question that the store of the limits did not answer."""
        self._limit_store_errors.child(store).inc()

    def limit_leases(self, count: int) -> None:
        """Set how many blocks of limits this process has leased and not used up."""
        self._limit_leases.child().set(count)

    def budget_alert(self, outcome: str) -> None:
        """Count a budget alert; ``outcome`` is ``delivered``, ``retried`` or ``failed``."""
        self._budget_alerts.child(outcome).inc()

    def usage_rows(self, outcome: str, count: int) -> None:
        """Count rows of the usage ledger; ``outcome`` is ``written`` or ``dropped``."""
        self._usage_rows.child(outcome).inc(count)

    def workers(self, serving: int, wanted: int) -> None:
        """Show how many processes serve, and how many there shall be."""
        self._workers.child("serving").set(float(serving))
        self._workers.child("wanted").set(float(wanted))

    def worker_restarted(self, reason: str) -> None:
        """Count a worker that ended and is replaced."""
        self._worker_restarts.child(reason).inc()

    def trace_spans(self, outcome: str, count: int) -> None:
        """Count spans of traces: ``sent``, ``failed`` (the collector did not take them), ``dropped`` (too many)."""
        self._trace_spans.child(outcome).inc(count)

    def settle(self) -> None:
        """Put what was observed into buckets; until then each observation takes a little memory."""
        for family in self.families:
            if isinstance(family, HistogramFamily):
                family.settle()
        self._snapshot.settle()

    def snapshot(self) -> dict[str, Any]:
        """Return the totals since the start as plain JSON values (`GET /metrics`)."""
        return self._snapshot.as_json()

    def export_summary(self) -> dict[str, Any]:
        """Return what `snapshot` is made of, for `absorb_summary` of another process's metrics."""
        return self._snapshot.export()

    def absorb_summary(self, summary: Mapping[str, Any]) -> None:
        """Add what another process has exported."""
        self._snapshot.absorb(summary)

    def render(self, *, openmetrics: bool = False) -> AsyncIterator[bytes]:
        """Return the exposition in pieces; see `expose`."""
        return expose(self.families, openmetrics=openmetrics)

    def _shown(self, model: str) -> str:
        shown = self._shown_as.get(model)
        if shown is None:
            if len(self._shown_as) >= _MOST_MODELS:
                self._forget()
            shown = self._shown_as[model] = model if self._label is None else self._label(model) or OTHER
        return shown

    def _forget(self) -> None:
        self._shown_as.clear()
        self._run_children.clear()
        self._token_children.clear()
        self._first_token_children.clear()

    # What a call counts with, found once for all calls that are alike.

    def _bind_run(self, model: str, streaming: bool, outcome: str) -> tuple[Count, Count, Distribution]:
        shown = self._shown(model)
        bound = (
            self._requests.child("true" if streaming else "false"),
            self._runs.child(shown, outcome),
            self._genai_duration.child("chat", shown),
        )
        self._run_children[model, streaming, outcome] = bound
        return bound

    def _bind_tokens(self, model: str) -> tuple[Distribution, Distribution]:
        shown = self._shown(model)
        child = self._genai_tokens.child
        bound = self._token_children[model] = child("chat", shown, "input"), child("chat", shown, "output")
        return bound

    def _bind_first_token(self, model: str) -> Distribution:
        bound = self._first_token_children[model] = self._genai_first_token.child("chat", self._shown(model))
        return bound

    def _bind_upstream(self, upstream: str, status: int | str) -> tuple[Count, Distribution, Distribution]:
        calls = self._genai_calls.child(upstream, "" if status == _OK else str(status))
        bound = self._upstream.child(upstream, str(status)), self._upstream_ms.child(upstream), calls
        self._upstream_children[upstream, status] = bound
        return bound

    def _bind_http(self, route: str, method: str, status: int) -> tuple[Count, Distribution]:
        shown = method if method in METHODS else OTHER
        bound = self._http.child(route, shown, str(status or 499)), self._http_ms.child(route)
        if shown is method:  # a method that a client makes up is looked up each time
            self._http_children[route, method, status] = bound
        return bound

    def _define_ours(self) -> None:
        self._requests = self._counter("requests", "Runs that ended.", "streaming")
        self._run_ms = self._histogram("request_latency_ms", "Duration of a run, ms.", _REQUEST_MS).child()
        self._runs = self._counter("runs", "Runs that ended, by model and outcome.", "model", "outcome")
        self._under_way = self._gauge("in_flight_requests", "Runs under way.").child()
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
            "routing_retries_suppressed", "Further tries that the retry budget did not allow.", "upstream"
        )
        self._routing_hedges = self._counter(
            "routing_hedges", "Second requests beside a slow one, by how they ended.", "upstream", "outcome"
        )
        self._routing_breaker = self._gauge(
            "routing_breaker_state", "Breaker: 0 closed, 1 half-open, 2 open.", "upstream", "model", is_common=True
        )
        self._cache_requests = self._counter(
            "cache_requests", "Requests for models that have a cache, by what it did.", "model", "result"
        )
        self._cache_errors = self._counter("cache_errors", "Commands to a cache that failed.", "backend")
        self._cache_entries = self._gauge("cache_entries", "Answers kept in this process.")
        self._cache_bytes = self._gauge("cache_bytes", "Bytes of the answers kept in this process.")
        self._dropins = self._counter("dropin_failures", "Drop-ins that did not load.", "kind")
        self._agents = self._gauge("agents", "Agents in the registry.", "status", is_common=True)
        self._reload_ms = self._histogram(
            "agents_refresh_duration_ms", "Duration of a refresh of the registry, ms.", _RELOAD_MS, "outcome"
        )
        self._http = self._counter("http_requests", "HTTP answers.", "route", "method", "status")
        self._http_ms = self._histogram(
            "http_request_latency_ms", "Duration of an HTTP request, ms.", _REQUEST_MS, "route"
        )
        self._auth_events = self._counter(
            "auth_events", "Callers at the door, by what they showed and what came of it.", "method", "outcome"
        )
        decisions = self._counter("access_decisions", "Decisions on what callers may reach.", "kind", "decision")
        self._access = {
            (kind, allowed): decisions.child(kind, "allow" if allowed else "deny")
            for kind in ("scope", "model", "upstream", "tool")
            for allowed in (True, False)
        }
        self._credentials = self._counter(
            "credential_operations", "Credentials that callers lend, and keys made at run time.", "operation"
        )
        self._limit_rejections = self._counter("limit_rejections", "Refusals by limits.", "limit", "scope")
        self._limit_unchecked = self._counter(
            "limit_unchecked", "Runs that passed a speed limit while its store was down.", "store"
        )
        self._limit_store_errors = self._counter(
            "limit_store_errors", "Questions that the store of the limits did not answer.", "store"
        )
        self._limit_leases = self._gauge("limit_leases", "Blocks of limits that are leased and not used up.")
        self._budget_alerts = self._counter("budget_alerts", "Budget alerts.", "outcome")
        self._usage_rows = self._counter("usage_rows", "Rows of the usage ledger, by what became of them.", "outcome")
        self._loop_lag = self._histogram("event_loop_lag_seconds", "How late the event loop is, s.", _LAG_S)
        self._workers = self._gauge("workers", "Processes of this gateway, serving and wanted.", "state")
        self._worker_restarts = self._counter("worker_restarts", "Workers that ended and were replaced.", "reason")
        self._trace_spans = self._counter("trace_spans", "Spans of traces, by what became of them.", "outcome")
        self._errors = self._counter("errors", "Errors shown to callers, by domain at fault.", "domain", "code")

    def _define_genai(self) -> None:
        labels = ("operation_name", "request_model")
        self._genai_tokens = self._histogram(
            "gen_ai_client_token_usage", "Tokens of a run.", _TOKENS, *labels, "token_type", prefix=""
        )
        self._genai_cost = self._keep(
            CounterFamily("gen_ai_client_cost", "Cost of model calls, USD.", (*labels, "provider_name"))
        )
        self._genai_calls = self._histogram(
            "gen_ai_client_operation_duration",
            "Duration of a request to an upstream, s.",
            _SECONDS,
            "provider_name",
            "error_type",
            prefix="",
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

    def _gauge(self, name: str, doc: str, *labels: str, is_common: bool = False) -> GaugeFamily:
        return self._keep(GaugeFamily(f"agent_gateway_{name}", doc, labels, is_common=is_common))

    def _histogram(
        self, name: str, doc: str, buckets: tuple[float, ...], *labels: str, prefix: str = "agent_gateway_"
    ) -> HistogramFamily:
        return self._keep(HistogramFamily(f"{prefix}{name}", doc, labels, buckets))

    def _keep(self, family: F) -> F:
        self.families.append(family)
        return family


class _Snapshot:
    """The running totals behind `GET /metrics` as JSON."""

    def __init__(self) -> None:
        self.whole, self.streamed = Spread(), Spread()
        self.invocations = self.failures = 0
        self.tool_ms = 0.0
        self.tools: dict[tuple[str, str], _ToolTotals] = {}
        self.dropin_failures: dict[str, int] = {}

    def settle(self) -> None:
        self.whole.settle()
        self.streamed.settle()

    def runs(self) -> Spread:
        self.settle()
        runs = Spread()
        for some in (self.whole, self.streamed):
            runs.add(some.count, some.total, some.least, some.greatest)
        return runs

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

    def export(self) -> dict[str, Any]:
        runs = self.runs()
        return {
            "numbers": [runs.count, self.streamed.count, runs.total, self.invocations, self.failures, self.tool_ms],
            "max_ms": runs.greatest,
            "min_ms": runs.least,
            "tools": [
                [*key, totals.provider, totals.count, totals.failures, totals.milliseconds]
                for key, totals in self.tools.items()
            ],
            "dropin_failures": dict(self.dropin_failures),
        }

    def absorb(self, other: Mapping[str, Any]) -> None:
        requests, streaming, total_ms, invocations, failures, tool_ms = other["numbers"]
        self.streamed.count += streaming
        self.whole.add(requests - streaming, total_ms, other["min_ms"], other["max_ms"])
        self.invocations += invocations
        self.failures += failures
        self.tool_ms += tool_ms
        for tool, source, provider, count, failed, milliseconds in other["tools"]:
            totals = self.tools.setdefault((tool, source), _ToolTotals(provider))
            totals.count += count
            totals.failures += failed
            totals.milliseconds += milliseconds
        for kind, count in other["dropin_failures"].items():
            self.dropin_failures[kind] = self.dropin_failures.get(kind, 0) + count

    def as_json(self) -> dict[str, Any]:
        breakdown: dict[str, dict[str, Any]] = {}
        for (tool, source), totals in self.tools.items():
            breakdown.setdefault(tool, {})[source] = {
                "provider": totals.provider,
                "count": totals.count,
                "failures": totals.failures,
                "latency_ms": _mean(totals.milliseconds, totals.count),
            }
        runs = self.runs()
        return {
            "total_requests": runs.count,
            "streaming_requests": self.streamed.count,
            "average_latency_ms": _mean(runs.total, runs.count),
            "max_latency_ms": round(runs.greatest, 3),
            "min_latency_ms": round(runs.least or 0.0, 3),
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


def _mean(total: float, count: int) -> float:
    return round(total / count, 3) if count else 0.0
