"""The numbers of several processes as one: nothing twice, nothing lost, and a dead one counts on."""

from __future__ import annotations

import asyncio

import msgspec

from gateway.observability.metrics import Metrics
from gateway.observability.totals import Change, Changes, Sum


def send(total: Sum, source: str, changes: Changes) -> int:
    """Move what is new to the sum the way it travels; return how many pieces it took."""
    pieces = [msgspec.msgpack.decode(msgspec.msgpack.encode(change)) for change in changes.take()]
    for piece in pieces:
        total.add(source, msgspec.convert(piece, Change))
    return len(pieces)


def text(metrics: Metrics) -> str:
    async def collect() -> bytes:
        return b"".join([piece async for piece in metrics.render()])

    return asyncio.run(collect()).decode()


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text(metrics).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def run(metrics: Metrics, seconds: float, *, ends: bool = True) -> None:
    metrics.run_started("default/a")
    if ends:
        metrics.run_finished("default/a", True, "success", seconds)


def test_counters_and_histograms_of_two_processes_add_up_and_outlive_one_of_them() -> None:
    first, second, total = Metrics(), Metrics(), Sum()
    ways = {"first": Changes(first), "second": Changes(second)}
    run(first, 0.03)
    run(second, 5.0)
    for name, changes in ways.items():
        send(total, name, changes)
    run(first, 0.03)
    send(total, "first", ways["first"])
    assert send(total, "first", ways["first"]) == 0, "nothing is sent twice"
    total.end("first")
    reborn = Metrics()
    run(reborn, 0.03)
    send(total, "first again", Changes(reborn))
    shown = samples(total.metrics)
    assert shown['agent_gateway_runs_total{model="default/a",outcome="success"}'] == 4
    assert shown['agent_gateway_request_latency_ms_bucket{le="50.0"}'] == 3
    assert shown["agent_gateway_request_latency_ms_count"] == 4
    summary = total.summary()
    assert summary["total_requests"] == 4
    assert (summary["min_latency_ms"], summary["max_latency_ms"]) == (30.0, 5000.0)
    assert total.summary() == summary, "looking changes nothing"


def test_what_a_process_was_doing_ends_with_it() -> None:
    first, second, total = Metrics(), Metrics(), Sum()
    for name, metrics in {"first": first, "second": second}.items():
        run(metrics, 1.0, ends=False)
        metrics.agents({"ready": 3})
        send(total, name, Changes(metrics))
    assert samples(total.metrics)["agent_gateway_in_flight_requests"] == 2
    assert samples(total.metrics)['agent_gateway_agents{status="ready"}'] == 3, "the same agents are not counted twice"
    total.end("first")
    assert samples(total.metrics)["agent_gateway_in_flight_requests"] == 1
    total.end("second")
    assert samples(total.metrics)["agent_gateway_in_flight_requests"] == 0


def test_many_label_sets_travel_in_pieces() -> None:
    metrics, total = Metrics(), Sum()
    for number in range(900):
        metrics.http_request(f"/route/{number}", "GET", 200, 0.001)
    assert send(total, "one", Changes(metrics)) > 1
    assert text(total.metrics) == text(metrics)


def test_tools_and_drop_in_failures_of_the_summary_add_up() -> None:
    first, second, total = Metrics(), Metrics(), Sum()
    for metrics in (first, second):
        metrics.tool_invoked("look", "function", "sdk", "error", 0.1)
        metrics.dropin_failure("import")
    send(total, "first", Changes(first))
    send(total, "second", Changes(second))
    summary = total.summary()
    assert summary["tool_breakdown"]["look"]["sdk"]["count"] == 2
    assert (summary["tool_failures"], summary["dropin_failures"]) == (2, {"import": 2})
