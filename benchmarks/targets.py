"""The targets, and how the figures stand to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Figures = Mapping[str, Any]
Missing = Mapping[str, str]


@dataclass(frozen=True)
class Target:
    """One row: ``key`` is a figure of ``measure`` (``side/figure`` for that of one side), held against ``limit``."""

    number: int
    what: str
    measure: str
    key: str
    limit: float
    unit: str = "×"
    sense: Literal["≤", "≥"] = "≤"


def _agent(number: int, what: str, case: str, cpu: float, p50: float | None = None) -> Iterator[Target]:
    for connections in (1, 16):
        name = f"{case}, {connections} at once"
        yield Target(number, f"{what}, {connections} at once: CPU", "agent_call", f"{name}: CPU ratio", cpu)
        if p50 is not None:
            yield Target(number, f"{what}, {connections} at once: p50", "agent_call", f"{name}: p50 ratio", p50)


_CALL = "CPU per call, 16 at once, µs"
TARGETS = (
    Target(1, "pass-through CPU per call, 16 connections, ÷ nginx", "pass_through", f"{_CALL} ÷ nginx", 6),
    Target(1, "the same: LiteLLM ÷ ours", "pass_through", "CPU per call: litellm ÷ ours", 75, sense="≥"),
    Target(1, "the same: Portkey ÷ ours", "pass_through", "CPU per call: portkey ÷ ours", 10, sense="≥"),
    Target(2, "added p50, 1 connection, ÷ nginx", "pass_through", "added p50, 1 at once, µs ÷ nginx", 2),
    Target(3, "p99, 1 connection", "pass_through", "gateway/p99, 1 at once, µs", 500, "µs"),
    Target(4, "requests/s, 64 connections ÷ LiteLLM", "pass_through", "requests/s: ours ÷ litellm", 90, sense="≥"),
    Target(4, "the same ÷ Portkey", "pass_through", "requests/s: ours ÷ portkey", 10, sense="≥"),
    Target(5, "CPU per paced chunk ÷ nginx", "pass_through", "CPU per streamed chunk, µs ÷ nginx", 2.7),
    Target(6, "added first token, 16 streams", "pass_through", "gateway/added first token, 16 streams, µs", 600, "µs"),
    Target(7, "added delay per chunk, p50", "pass_through", "gateway/added delay per chunk, p50, µs", 100, "µs"),
    Target(7, "added delay per chunk, p99", "pass_through", "gateway/added delay per chunk, p99, µs", 500, "µs"),
    *_agent(8, "agent over HTTP ÷ Runner.run, one turn", "one turn", 0.60, 0.70),
    *_agent(8, "the same, two turns", "two turns", 0.58, 0.70),
    *_agent(9, "the same, own client, one turn", "one turn, own client", 1.15),
    *_agent(9, "the same, own client, two turns", "two turns, own client", 1.07),
    *_agent(10, "streamed agent chunk ÷ stock", "streamed, 200 chunks", 0.40),
    Target(11, "CPU per call: 10,000 keys and models ÷ 10", "growth", "ratio", 1.3),
    Target(12, "start to the first pass-through answer", "startup", "raw model, s", 0.5, "s"),
    Target(12, "start to the first agent answer", "startup", "first agent answer, s", 2, "s"),
    Target(13, "RSS without agents", "memory", "without_agents_mb", 60, "MB"),
    Target(13, "RSS with agents", "memory", "with_20_agents_mb", 160, "MB"),
    Target(13, "growth of RSS over 20,000 calls", "memory", "growth_mb", 3, "MB"),
    Target(14, "loop blocked by a scrape of 1,000 label sets", "scrape", "loop blocked by a scrape, ms", 5, "ms"),
    Target(15, "CPU of a call with a 420 kB prompt", "pass_through", "gateway/CPU, 420 kB prompt, µs", 800, "µs"),
    Target(16, "memory of an idle stream, of 1,000", "idle_streams", "relayed: KB each", 60, "KB"),
)  # fmt: skip


def table(found: Mapping[str, Figures], missing: Missing) -> list[str]:
    """Return the rows as a Markdown table; a target that was not measured says why."""
    rows = ["| # | measure | target | measured | of the target | |", "|---|---|---|---|---|---|"]
    for target in TARGETS:
        wanted = f"{target.sense} {target.limit:g} {target.unit}"
        value = _value(found.get(target.measure, {}), target.key)
        if value is None:
            reason = missing.get(target.measure, "not measured in this run")
            rows.append(f"| {target.number} | {target.what} | {wanted} | – | – | {reason} |")
            continue
        share = value / target.limit if target.sense == "≤" else target.limit / value
        verdict = "met" if share <= 1 else "**missed**"
        shown = f"{value:.3g}" if abs(value) < 1_000 else f"{value:.0f}"
        rows.append(f"| {target.number} | {target.what} | {wanted} | {shown} {target.unit} | {share:.2f} | {verdict} |")
    return rows


def _value(figures: Figures, key: str) -> float | None:
    side, slash, name = key.partition("/")
    if slash and side in figures.get("sides", {}):
        figures, key = figures["sides"][side], name
    value = figures.get(key)
    return None if value is None else float(value)
