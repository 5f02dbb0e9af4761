"""What is counted, under which names, and at what cost to the streams of the process."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from api.metrics import negotiate
from gateway.observability.metrics import Metrics
from gateway.observability.recent import ErrorRecord, RecentErrors
from tests.support.waiting import in_time


def used() -> Metrics:
    metrics = Metrics()
    for streaming, seconds, outcome in ((True, 0.1, "success"), (False, 0.3, "failure")):
        metrics.run_started("default/weather")
        metrics.first_token("default/weather", 0.05)
        metrics.run_finished("default/weather", streaming, outcome, seconds)
    metrics.tokens("default/weather", 20, 7)
    metrics.tool_invoked("get_weather", "function", "sdk", "success", 0.01)
    metrics.tool_invoked("get_weather", "function", "sdk", "error", 0.03)
    metrics.tool_invoked("get_weather", "mcp", "gateway", "success", 0.002)
    metrics.upstream_request("demo", 200, 0.2)
    metrics.upstream_request("demo", "timeout", 5)
    metrics.dropin_failure("import")
    metrics.dropin_failure("import")
    metrics.agents({"ready": 3, "error": 1})
    metrics.agents_refreshed("changed", 0.04)
    metrics.http_request("/v1/chat/completions", "POST", 200, 0.1)
    metrics.http_request("/v1/chat/completions", "POST", 0, 0.1)
    metrics.error("caller", "model_not_found")
    return metrics


def rendered(metrics: Metrics, *, openmetrics: bool = False) -> bytes:
    async def join() -> bytes:
        return b"".join([piece async for piece in metrics.render(openmetrics=openmetrics)])

    return asyncio.run(join())


def samples(metrics: Metrics) -> dict[str, float]:
    text = rendered(metrics)
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}": s.value
        for family in parse_text(text.decode())
        for s in family.samples
    }


def test_the_names_that_dashboards_know() -> None:
    found = samples(used())
    tool = "tool=get_weather"
    weather = "operation_name=chat,request_model=default/weather"
    expected = {
        "agent_gateway_requests_total{streaming=true}": 1,
        "agent_gateway_requests_total{streaming=false}": 1,
        "agent_gateway_request_latency_ms_sum{}": 400,
        "agent_gateway_request_latency_ms_bucket{le=1600.0}": 2,
        "agent_gateway_request_latency_ms_bucket{le=600000.0}": 2,
        "agent_gateway_runs_total{model=default/weather,outcome=failure}": 1,
        "agent_gateway_in_flight_requests{}": 0,
        f"agent_gateway_tool_invocations_total{{provider=function,source=sdk,status=error,{tool}}}": 1,
        "agent_gateway_tool_latency_ms_count{provider=function,source=sdk,tool=get_weather}": 2,
        "agent_gateway_upstream_requests_total{status=200,upstream=demo}": 1,
        "agent_gateway_upstream_requests_total{status=timeout,upstream=demo}": 1,
        "agent_gateway_upstream_latency_ms_count{upstream=demo}": 2,
        "agent_gateway_dropin_failures_total{kind=import}": 2,
        "agent_gateway_agents{status=ready}": 3,
        "agent_gateway_agents{status=stale}": 0,
        "agent_gateway_agents_refresh_duration_ms_count{outcome=changed}": 1,
        "agent_gateway_http_requests_total{method=POST,route=/v1/chat/completions,status=200}": 1,
        "agent_gateway_http_requests_total{method=POST,route=/v1/chat/completions,status=499}": 1,
        "agent_gateway_errors_total{code=model_not_found,domain=caller}": 1,
        f"gen_ai_server_time_to_first_token_count{{{weather}}}": 2,
        f"gen_ai_server_request_duration_sum{{{weather}}}": 0.4,
        f"gen_ai_client_token_usage_sum{{{weather},token_type=input}}": 20,
        f"gen_ai_client_token_usage_sum{{{weather},token_type=output}}": 7,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    assert not any("_created" in name for name in found)


def test_the_json_snapshot_is_the_documented_one() -> None:
    assert used().snapshot() == {
        "total_requests": 2,
        "streaming_requests": 1,
        "average_latency_ms": 200.0,
        "max_latency_ms": 300.0,
        "min_latency_ms": 100.0,
        "tool_invocations": 3,
        "tool_failures": 1,
        "average_tool_latency_ms": 14.0,
        "tool_breakdown": {
            "get_weather": {
                "sdk": {"provider": "function", "count": 2, "failures": 1, "latency_ms": 20.0},
                "gateway": {"provider": "mcp", "count": 1, "failures": 0, "latency_ms": 2.0},
            }
        },
        "dropin_failures": {"import": 2},
    }


def test_an_unused_gateway_has_zeros() -> None:
    snapshot = Metrics().snapshot()
    assert {value for value in snapshot.values() if not isinstance(value, dict)} == {0}


def test_runs_under_way_are_a_gauge() -> None:
    metrics = Metrics()
    metrics.run_started("a/b")
    metrics.run_started("a/b")
    metrics.run_finished("a/b", True, "cancelled", 1)
    assert samples(metrics)["agent_gateway_in_flight_requests{}"] == 1


def test_both_formats_hold_every_family_and_parse() -> None:
    metrics = used()
    text, openmetrics = rendered(metrics).decode(), rendered(metrics, openmetrics=True).decode()
    assert openmetrics.endswith("# EOF\n")
    assert openmetrics.count("# EOF") == 1
    assert text.count("# EOF") == 0
    ours = sorted((family.name, family.kind, family.documentation) for family in metrics.families)
    for families in (list(parse_text(text)), list(parse_openmetrics(openmetrics))):
        assert sorted((family.name, family.type, family.documentation) for family in families) == ours
    assert len({name for name, _, _ in ours}) == len(ours)


def test_label_values_are_escaped() -> None:
    name = 'a "b"\\\n{c}, d=é'
    metrics = Metrics()
    metrics.tool_invoked(name, "mcp", "sdk", "success", 0.01)
    for families in (
        parse_text(rendered(metrics).decode()),
        parse_openmetrics(rendered(metrics, openmetrics=True).decode()),
    ):
        named = [sample.labels["tool"] for family in families for sample in family.samples if "tool" in sample.labels]
        assert set(named) == {name}
        assert len(named) == 1 + 10 + 2  # the counter; buckets, count and sum


def test_numbers_are_written_as_they_are() -> None:
    metrics = Metrics()
    for number in (1e-7, 0.1, 3.0, 1e21, 123456789.25):
        metrics.cost("chat", f"a/{number}", "a", number)
    found = samples(metrics)
    for number in (1e-7, 0.1, 3.0, 1e21, 123456789.25):
        labels = f"operation_name=chat,provider_name=a,request_model=a/{number}"
        assert found[f"gen_ai_client_cost_total{{{labels}}}"] == number


def test_what_one_process_counted_can_be_added_to_another() -> None:
    first, sum_ = used(), used()
    for mine, other in zip(sum_.families, first.families, strict=True):
        for labels, numbers in other.totals():
            mine.add(labels, numbers)
    once, twice = samples(first), samples(sum_)
    assert {name: value * 2 for name, value in once.items()} == pytest.approx(twice)


def test_two_processes_worth_of_metrics_do_not_meet() -> None:
    first, second = used(), Metrics()
    assert second.snapshot()["total_requests"] == 0
    assert first.families[0] is not second.families[0]


def test_labels_are_bounded_and_cut() -> None:
    metrics = Metrics()
    for number in range(1_200):
        metrics.tool_invoked(f"tool-{number}" + "x" * 500, "mcp", "a/b", "success", 0)
        metrics.first_token(f"a/{number}", 0.1)
    found = samples(metrics)
    names = {name for name in found if name.startswith("agent_gateway_tool_invocations_total")}
    assert len(names) == 1_001
    assert found["agent_gateway_tool_invocations_total{provider=other,source=other,status=other,tool=other}"] == 200
    assert max(len(name) for name in names) < 300
    assert metrics.snapshot()["tool_breakdown"]["other"]["other"]["count"] == 200


def test_models_are_shown_as_the_gateway_knows_them() -> None:
    metrics, known = Metrics(), {"a/m": "a/m", "a/made-up": "a/*"}
    metrics.show_models_as(known.get)
    for model in ("a/m", "a/made-up", "gone"):
        metrics.run_started(model)
        metrics.run_finished(model, False, "success", 0.1)
    known["a/made-up"] = "a/made-up"
    metrics.forget_models()
    metrics.first_token("a/made-up", 0.1)
    found = samples(metrics)
    runs = "agent_gateway_runs_total{model="
    assert {name: value for name, value in found.items() if name.startswith(runs)} == {
        f"{runs}{shown},outcome=success}}": 1 for shown in ("a/m", "a/*", "other")
    }
    assert found["gen_ai_server_time_to_first_token_count{operation_name=chat,request_model=a/made-up}"] == 1


def test_a_method_nobody_knows_is_no_label() -> None:
    metrics = Metrics()
    metrics.http_request("(unknown)", "X" * 50, 405, 0.1)
    assert samples(metrics)["agent_gateway_http_requests_total{method=other,route=(unknown),status=405}"] == 1


def test_a_scrape_of_many_label_sets_is_written_in_small_pieces() -> None:
    metrics = Metrics()
    for number in range(1_000):
        metrics.first_token(f"a/{number}", 0.1)

    async def scrape() -> tuple[list[int], list[float]]:
        """The sizes of the pieces, and the CPU seconds that the loop gave to each of them at a stretch."""
        sizes, stretches = [], []
        turned = asyncio.Event()
        asyncio.get_running_loop().call_soon(turned.set)
        before = time.thread_time()
        async for piece in metrics.render():
            now = time.thread_time()
            stretches.append(now - before)
            sizes.append(len(piece))
            before = time.thread_time()
        assert turned.is_set(), "the loop never turned"
        return sizes, stretches

    def longest() -> float:
        sizes, stretches = asyncio.run(scrape())
        assert sum(sizes) > 1_000_000
        assert max(sizes) < sum(sizes) / 4
        return max(stretches)

    in_time(longest, 0.005)  # a collection of garbage may fall into any one of them


def test_recent_errors_keep_the_last_ones_newest_first() -> None:
    recent = RecentErrors(capacity=3)
    for number in range(5):
        recent.add(ErrorRecord(event="run.failed", message=str(number)))
    assert [record.message for record in recent.list_errors()] == ["4", "3", "2"]


JSON, TEXT, OPEN = "application/json", "text/plain", "application/openmetrics-text"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/json", JSON),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", JSON),
        ("text/plain", TEXT),
        ("text/*", TEXT),
        ("text/plain, */*", TEXT),
        ("application/openmetrics-text", OPEN),
        ("application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", OPEN),
        ("text/plain;q=0.4, application/json", JSON),
        ("text/plain;q=nonsense", JSON),
        ("application/json;q=0, */*", TEXT),
        ("image/png", JSON),
    ],
)
def test_accept_chooses_the_format(accept: str | None, chosen: str) -> None:
    assert negotiate(accept, (JSON, TEXT, OPEN)) == chosen


def test_what_is_observed_waits_until_it_is_counted_together() -> None:
    metrics = Metrics()
    for seconds in (0.01, 0.3, 0.3):
        metrics.http_request("/a", "GET", 200, seconds * 1000)
    metrics.settle()
    metrics.http_request("/a", "GET", 200, 1_000_000)
    found = samples(metrics)
    name = "agent_gateway_http_request_latency_ms"
    assert {key: found[f"{name}_bucket{{le={key},route=/a}}"] for key in ("25.0", "400.0", "600000.0", "+Inf")} == {
        "25.0": 1,
        "400.0": 3,
        "600000.0": 3,
        "+Inf": 4,
    }
    assert found[f"{name}_sum{{route=/a}}"] == pytest.approx(1_000_610)


PROMISED = (
    "auth_events policy_decisions access_denials credential_operations agent_runs tool_calls llm_requests llm_tokens "
    "team_runs audit_ knowledge_ versions_created forks version_approvals"
)


def test_names_of_other_gateways_lead_to_metrics_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "references" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", page.partition("## Names of other gateways")[2], re.MULTILINE)[1:]
    there, here = " ".join(row[0] for row in rows), " ".join(row[1] for row in rows)
    assert [name for name in PROMISED.split() if name not in there] == []
    known = {family.name: set(family.labels) for family in Metrics().families}
    named = re.findall(r"`((?:agent_gateway|gen_ai)\w+)(?:{([^}]*)})?`", here)
    assert len(named) >= 10
    for name, labels in named:
        assert name.removesuffix("_total") in known, name
        assert set(re.findall(r"([a-z_]+)(?:=|,|$)", labels)) <= known[name.removesuffix("_total")], (name, labels)
