"""Traces as a collector receives them over OTLP, what they hold and what not, and what a dead collector costs."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import GatewayFactory
from tests.e2e.test_tools import prepare_tools
from tests.support.house import ADMIN, CHAT, drop, furnish
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.otlp_receiver import Collector, Span, otlp_receiver
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with otlp_receiver() as server:
        yield server


def env_of(home: Path, collector: Collector, **more: str) -> dict[str, str]:
    return {
        "GATEWAY_TRACES": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-collector-key=canary-collector-key",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        **more,
    }


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream, collector: Collector
) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("traced")
    furnish(home, upstream.url)
    for name in ("WeatherAgent", "Handoff", "InputGuardrail", "AgentAsTool", "ToolTrouble"):
        drop(name, home / "agents")
    prepare_tools(home)
    with running_gateway(home, env=env_of(home, collector) | tools_env(home), key=ADMIN) as server:
        yield server


def tools_env(home: Path) -> dict[str, str]:
    return {"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"), "PYTHONPATH": f"{Path('src').resolve()}:{home}"}


def ask(gateway: Gateway, request_id: str, text: str, *, model: str = "local/test-model", **more: Any) -> int:
    headers = {"x-request-id": request_id} | more.pop("headers", {})
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return gateway.post("/v1/chat/completions", body, key=CHAT, headers=headers).status


def by_name(spans: list[Span]) -> dict[str, Span]:
    return {span.name: span for span in spans}


@pytest.mark.parametrize("stream", [False, True])
def test_a_relayed_call_is_two_spans_by_opentelemetrys_names(
    traced: Gateway, collector: Collector, upstream: ObedientUpstream, stream: bool
) -> None:
    rid = f"relayed-{stream}"
    assert ask(traced, rid, f"say {rid}", stream=stream) == 200
    spans = by_name(collector.wait_for_request(rid))
    assert set(spans) == {"POST /v1/chat/completions", "chat local/test-model"}
    server, call = spans["POST /v1/chat/completions"], spans["chat local/test-model"]
    assert server.kind == "SERVER" and call.kind == "CLIENT"
    assert call.parent == server.id and server.parent == ""
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gateway.request_id": rid,
        "gateway.correlation_id": rid,
        "gateway.key_id": "chat",
    }
    seconds = call.attributes.pop("gen_ai.response.time_to_first_chunk")
    run_id = call.attributes.pop("gateway.run_id")
    assert 0 < seconds < 30 and len(run_id) == 32
    assert call.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "local",
        "gen_ai.request.model": "local/test-model",
        "gen_ai.response.model": "test-model",
        "gen_ai.request.stream": stream,
        "gen_ai.usage.input_tokens": call.attributes["gen_ai.usage.input_tokens"],
        "gen_ai.usage.output_tokens": call.attributes["gen_ai.usage.output_tokens"],
        "gen_ai.response.finish_reasons": ["stop"],
        "gateway.request_id": rid,
        "gateway.key_id": "chat",
    }
    assert call.attributes["gen_ai.usage.output_tokens"] > 0
    (at_upstream,) = upstream.find(rid)
    assert at_upstream.headers["traceparent"] == f"00-{call.trace}-{call.id}-01"


@pytest.mark.parametrize("stream", [False, True])
def test_an_agents_run_is_a_tree(
    traced: Gateway, collector: Collector, upstream: ObedientUpstream, stream: bool
) -> None:
    rid = f"agent-{stream}"
    text = f'call get_weather {{"city":"{rid}"}} ;; echo'
    assert ask(traced, rid, text, model="default/weatheragent", stream=stream) == 200
    spans = collector.wait_for_request(rid)
    assert sorted(span.name for span in spans) == [
        "POST /v1/chat/completions",
        "chat test-model",
        "chat test-model",
        "execute_tool get_weather",
        "invoke_agent Weather Agent",
        "invoke_agent default/weatheragent",
    ]
    found = by_name(spans)
    run, agent = found["invoke_agent default/weatheragent"], found["invoke_agent Weather Agent"]
    assert run.parent == found["POST /v1/chat/completions"].id
    assert agent.parent == run.id
    calls = [span for span in spans if span.name == "chat test-model"]
    assert {call.parent for call in calls} == {agent.id} == {found["execute_tool get_weather"].parent}
    assert {call.kind for call in calls} == {"CLIENT"}
    for call in calls:
        assert call.attributes["gen_ai.provider.name"] == "local"
        assert call.attributes["gen_ai.usage.input_tokens"] > 0
    total = sum(call.attributes["gen_ai.usage.input_tokens"] for call in calls)
    assert run.attributes["gen_ai.usage.input_tokens"] == total
    assert run.attributes["gen_ai.operation.name"] == "invoke_agent"
    assert found["execute_tool get_weather"].attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "get_weather",
        "gen_ai.tool.type": "function",
    }
    sent = {call.headers["traceparent"] for call in upstream.find(rid)}
    assert sent == {f"00-{call.trace}-{call.id}-01" for call in calls}


def test_handoffs_and_guardrails_are_spans(traced: Gateway, collector: Collector) -> None:
    assert ask(traced, "handed", "call transfer_to_billing ;; say paid", model="default/handoff") == 200
    spans = by_name(collector.wait_for_request("handed"))
    assert spans["handoff"].attributes == {"gateway.handoff.from": "Triage", "gateway.handoff.to": "Billing"}
    assert {"invoke_agent Triage", "invoke_agent Billing"} <= set(spans)
    assert ask(traced, "guarded", "homework please", model="default/inputguardrail") == 400
    spans = by_name(collector.wait_for_request("guarded"))
    assert spans["guardrail no_homework"].attributes["gateway.guardrail.triggered"] is True
    run = spans["invoke_agent default/inputguardrail"]
    assert run.failed and run.attributes["error.type"] == "content_policy_violation"
    assert not spans["POST /v1/chat/completions"].failed, "the caller's own mistake"


def test_only_the_ids_of_a_callers_span_are_taken(traced: Gateway, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00", "tracestate": "canary=state", "baggage": "canary=baggage"}
    assert ask(traced, "inbound", "say inbound", headers=headers) == 200
    spans = collector.wait_for_request("inbound")
    assert {span.trace for span in spans} == {TRACE}
    assert by_name(spans)["POST /v1/chat/completions"].parent == PARENT
    assert not any(b"canary=" in body for body in collector.bodies)
    for number, odd in enumerate((f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}")):
        assert ask(traced, f"odd-{number}", "say odd", headers={"traceparent": odd}) == 200
        assert by_name(collector.wait_for_request(f"odd-{number}"))["POST /v1/chat/completions"].parent == ""


def test_tools_called_by_clients_are_spans(traced: Gateway, collector: Collector) -> None:
    headers = {"x-request-id": "by-api"}
    body = {"arguments": {"city": "Rome"}}
    assert traced.post("/tools/weather/invoke", body, headers=headers).status == 200
    spans = by_name(collector.wait_for_request("by-api"))
    assert set(spans) == {"POST /tools/{name}/invoke", "execute_tool weather"}


def test_failures_have_a_word_and_no_text(traced: Gateway, collector: Collector) -> None:
    assert ask(traced, "failed-500", "[status=500] say canary-upstream-text") == 502
    spans = by_name(collector.wait_for_request("failed-500"))
    assert spans["chat local/test-model"].failed
    assert spans["chat local/test-model"].attributes["error.type"] == "upstream_error"
    assert spans["POST /v1/chat/completions"].attributes["error.type"] == "upstream_error"
    assert traced.get("/v1/models", key="sk-wrong-canary-key", headers={"x-request-id": "no-key"}).status == 401
    (span,) = collector.wait_for_request("no-key")
    assert (span.attributes["http.response.status_code"], span.failed) == (401, False)
    assert ask(traced, "tool-failed", "call hard ;; say x", model="default/tooltrouble") == 502
    spans = by_name(collector.wait_for_request("tool-failed"))
    assert spans["invoke_agent default/tooltrouble"].attributes["error.type"] == "agent_error"


def test_nothing_that_people_wrote_is_in_a_trace_unless_asked_for(traced: Gateway, collector: Collector) -> None:
    for number, (model, stream) in enumerate(
        (model, stream) for model in ("local/test-model", "default/weatheragent") for stream in (False, True)
    ):
        text = "say canary-said" if "/test" in model else 'call get_weather {"city":"canary-city"} ;; say canary-said'
        assert ask(traced, f"private-{number}", text, model=model, stream=stream) == 200
        collector.wait_for_request(f"private-{number}")
    everything = b"".join(collector.bodies)
    for canary in (b"canary-said", b"canary-city", b"sunny", CHAT.encode(), ADMIN.encode(), b"canary-collector-key"):
        assert canary not in everything
    assert b"canary" not in everything


def test_the_collector_is_told_who_sends_and_by_the_standard_variables(traced: Gateway, collector: Collector) -> None:
    assert ask(traced, "resource", "say x") == 200
    collector.wait_for_request("resource")
    resource = collector.resources[-1]
    assert resource["service.name"] == "agent-gateway"
    assert resource["deployment.environment.name"] == "test"
    assert collector.headers[-1]["x-collector-key"] == "canary-collector-key"
    assert "canary-collector-key" not in traced.log_text()


def test_health_and_metrics_leave_no_trace(traced: Gateway, collector: Collector) -> None:
    for path in ("/health", "/readyz", "/metrics"):
        assert traced.get(path, headers={"x-request-id": f"quiet{path}".replace("/", "-")}).status == 200
    assert ask(traced, "after-quiet", "say x") == 200
    collector.wait_for_request("after-quiet")
    assert not [span for span in collector.spans if "quiet-" in str(span.attributes.get("gateway.request_id"))]


def test_prompts_and_answers_are_there_when_asked_for(start: GatewayFactory, tmp_path: Path) -> None:
    with otlp_receiver() as collector:
        home = tmp_path / "told"
        env = env_of(home, collector, GATEWAY_TRACES_CONTENT="1")
        gateway = start(home=home, env=env, prepare=lambda home: drop("WeatherAgent", home / "agents"))
        for stream in (False, True):
            assert ask(gateway, f"told-{stream}", "say shown-answer", stream=stream) == 200
            call = by_name(collector.wait_for_request(f"told-{stream}"))["chat local/test-model"]
            assert "say shown-answer" in call.attributes["gen_ai.input.messages"]
            assert "shown-answer" in call.attributes["gen_ai.output.messages"]
            text = f'call get_weather {{"city":"Rome-{stream}"}} ;; echo'
            assert ask(gateway, f"agent-told-{stream}", text, model="default/weatheragent", stream=stream) == 200
            tool = by_name(collector.wait_for_request(f"agent-told-{stream}"))["execute_tool get_weather"]
            assert f"Rome-{stream}" in tool.attributes["gen_ai.tool.call.arguments"]
            assert "sunny" in tool.attributes["gen_ai.tool.call.result"]


@pytest.mark.parametrize("fault", ["hangs", "refuses", "is gone"])
def test_a_collector_that_is_down_slows_nothing_and_says_so_once(
    start: GatewayFactory, tmp_path: Path, fault: str
) -> None:
    with otlp_receiver() as collector:
        collector.refuse = fault == "refuses"
        if fault == "hangs":
            collector.hanging.set()
        home = tmp_path / "down"
        env = env_of(home, collector, OTEL_EXPORTER_OTLP_TIMEOUT="0.5", OTEL_BSP_SCHEDULE_DELAY="20")
        if fault == "is gone":
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
        gateway = start(home=home, env=env)
        times = []
        for number in range(60):
            began = time.perf_counter()
            assert ask(gateway, f"down-{number}", "say x") == 200
            times.append(time.perf_counter() - began)
        assert min(times) < 0.1, "every call waited for the collector"
        gateway.logged("traces.export.failed")

        def lost() -> float:
            text = gateway.get("/metrics/prometheus").body.decode()
            lines = [
                line for line in text.splitlines() if line.startswith('agent_gateway_trace_spans_total{outcome="f')
            ]
            return float(lines[0].rpartition(" ")[2]) if lines else 0

        seen = lost()
        assert ask(gateway, "down-again", "say x") == 200
        wait_for(lambda: lost() > seen, what="the next batch is lost, too")
        assert len(gateway.log_events("traces.export.failed")) == 1, "one line a minute"
        assert not [
            line for line in gateway.log_lines() if str(line["logger"]).startswith(("opentelemetry", "urllib3"))
        ]
        began = time.perf_counter()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(60)
        assert time.perf_counter() - began < 8, "a dead collector holds the end up"


def test_spans_that_wait_are_sent_at_the_end(start: GatewayFactory, tmp_path: Path) -> None:
    with otlp_receiver() as collector:
        home = tmp_path / "flush"
        gateway = start(home=home, env=env_of(home, collector, OTEL_BSP_SCHEDULE_DELAY="60000"))
        assert ask(gateway, "last-words", "say x") == 200
        assert not collector.spans
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(60)
        assert set(by_name(collector.wait_for_request("last-words"))) == {
            "POST /v1/chat/completions",
            "chat local/test-model",
        }


def test_without_the_setting_nothing_is_traced_or_imported(
    gateway: Gateway, client: OpenAI, upstream: ObedientUpstream
) -> None:
    client.chat.completions.create(
        model="local/test-model",
        messages=[{"role": "user", "content": "say untraced"}],
        extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    )
    (call,) = upstream.find("untraced")
    assert "traceparent" not in call.headers
    maps = Path(f"/proc/{gateway.process.pid}/maps").read_text(encoding="utf-8")
    assert "google/_upb" not in maps, "protobuf is loaded, so OpenTelemetry's exporter is"


def test_a_share_that_is_none_is_refused(start: GatewayFactory, tmp_path: Path) -> None:
    from tests.support.server import StartFailed  # noqa: PLC0415

    with pytest.raises(StartFailed, match="GATEWAY_TRACES=7 is no share"):
        start(home=tmp_path / "no", env={"GATEWAY_TRACES": "7"})
