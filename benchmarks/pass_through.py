"""What a relayed call, a streamed chunk and a long prompt cost, against nginx, other gateways, and no gateway."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lab
from sides import Side, every_side

CHUNKS = 200
LONGEST_S = 180
"""No further round is begun after this, however slow the machine."""


@dataclass(frozen=True)
class Case:
    """One kind of call; CPU is divided by calls times ``units``."""

    model: str
    connections: int
    calls: int
    units: int = 1
    prompt: str = "What is the weather in Paris?"


CASES = {
    "one": Case("mock", 1, 2_000),
    "call": Case("mock", 16, 6_000),
    "many": Case("mock", 64, 6_400),
    "chunk": Case(f"mock-t{CHUNKS}-d5", 16, 48, CHUNKS + 1),
    "long": Case("mock", 4, 400, prompt="word " * 84_000),
}


def pass_through(quick: bool) -> dict[str, Any]:
    """Every side in turn, round by round; medians over the rounds."""
    scale, rounds = (0.25, 1) if quick else (1.0, 5)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with lab.mock() as mock, every_side(mock) as sides:
        for side in sides:
            with side.turn():
                for case in CASES.values():
                    _measured(side, case, 0.1)  # imports on demand, connections, just-in-time compilers
        started = time.monotonic()
        done = 0
        while done < rounds and (not done or time.monotonic() - started < LONGEST_S):
            done += 1
            for name, case in CASES.items():
                for side in sides:
                    with side.turn():
                        found.setdefault(side.name, {}).setdefault(name, []).append(_measured(side, case, scale))
        rss = {side.name: lab.rss_mb(side.pid) for side in sides if side.pid is not None}
    middle = {
        side: {
            f"{case}.{key}": lab.median([row[key] for row in rows]) for case, rows in cases.items() for key in rows[0]
        }
        for side, cases in found.items()
    }
    figures = {side.name: _figures(side, middle[side.name], middle["direct"]) for side in sides}
    for name, megabytes in rss.items():
        figures[name]["RSS, MB"] = megabytes
    return {"sides": figures} | _ratios(figures) | {"rounds": done}


def _figures(side: Side, own: dict[str, float], direct: dict[str, float]) -> dict[str, float]:
    figures = {"requests/s, 64 at once": own["many.per_s"], "p99, 1 at once, µs": own["one.p99"]}
    if side.pid is not None:
        figures |= {
            "CPU per call, 16 at once, µs": own["call.cpu_us"],
            "CPU per streamed chunk, µs": own["chunk.cpu_us"],
            "CPU, 420 kB prompt, µs": own["long.cpu_us"],
            "added p50, 1 at once, µs": own["one.p50"] - direct["one.p50"],
            "added first token, 16 streams, µs": own["chunk.ttft"] - direct["chunk.ttft"],
            "added delay per chunk, p50, µs": own["chunk.delay_p50"] - direct["chunk.delay_p50"],
            "added delay per chunk, p99, µs": own["chunk.delay_p99"] - direct["chunk.delay_p99"],
            "first answer after start, s": side.first_answer_s,
        }
    return figures


def _ratios(figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    ours, ratios = figures["gateway"], {}
    call, chunk, p50, rps = (
        "CPU per call, 16 at once, µs",
        "CPU per streamed chunk, µs",
        "added p50, 1 at once, µs",
        "requests/s, 64 at once",
    )
    if "nginx" in figures:
        ratios |= {f"{key} ÷ nginx": ours[key] / figures["nginx"][key] for key in (call, chunk, p50)}
    for peer in ("litellm", "portkey"):
        if peer in figures:
            ratios[f"CPU per call: {peer} ÷ ours"] = figures[peer][call] / ours[call]
            ratios[f"requests/s: ours ÷ {peer}"] = ours[rps] / figures[peer][rps]
    return ratios


def _measured(side: Side, case: Case, scale: float) -> dict[str, float]:
    calls = max(case.connections, round(case.calls * side.pace * scale))
    if case.units > 1:
        calls = max(case.connections, round(case.calls * min(side.pace, 1) * scale))
    body = lab.chat(side.prefix + case.model, stream=case.units > 1)
    body["messages"][0]["content"] = case.prompt
    before = lab.cpu_s(side.pid) if side.pid is not None else 0.0
    result = lab.load(
        side.port,
        connections=case.connections,
        requests=calls,
        body=body,
        headers=side.headers,
        chunks=CHUNKS if case.units > 1 else None,
    )
    used = lab.cpu_s(side.pid) - before if side.pid is not None else 0.0
    row = {
        "cpu_us": used * 1e6 / (calls * case.units),
        "per_s": result["rps"],
        "p50": result["lat"]["p50"],
        "p99": result["lat"]["p99"],
    }
    if case.units > 1:
        leg = result["down_leg"]
        row |= {"ttft": result["ttft"]["p50"], "delay_p50": leg["p50"], "delay_p99": leg["p99"]}
    return row
