"""Request ids on every answer and log line; logs are JSON and hold no secret; health, readiness and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from openai import OpenAI

from tests.support.house import ADMIN, CHAT, NARROW, UPSTREAM_KEY, drop
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway


def test_every_answer_has_a_request_id(gateway: Gateway) -> None:
    chat = {"model": "default/weatheragent", "messages": [{"role": "user", "content": "say x"}]}
    answers = [
        gateway.get("/health", key=""),
        gateway.get("/readyz", key=""),
        gateway.get("/", key=""),
        gateway.get("/v1/models", key=""),
        gateway.get("/agents"),
        gateway.get("/nothing"),
        gateway.get("/docs", key=""),
        gateway.post("/v1/chat/completions", chat),
        gateway.post("/v1/chat/completions", chat | {"stream": True}),
        gateway.request("POST", "/v1/chat/completions", body=b"{"),
        gateway.get("/v1/chat/completions"),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(ids) and len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", ["/health", "/agents", "/nothing"])
def test_the_clients_own_request_id_is_kept(gateway: Gateway, path: str) -> None:
    assert gateway.get(path, headers={"x-request-id": "mine-123"}).headers["x-request-id"] == "mine-123"


@pytest.mark.parametrize("bad", ["a b", "x" * 500, 'a"b', "a\tb", "<script>"])
def test_an_odd_request_id_is_replaced(gateway: Gateway, bad: str) -> None:
    assert gateway.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_the_official_client_shows_the_request_id(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default/weatheragent",
        messages=[{"role": "user", "content": "say x"}],
        extra_headers={"x-request-id": "official-1"},
    )
    assert answer._request_id == "official-1"


def test_one_request_can_be_followed_through_the_log(gateway: Gateway, client: OpenAI) -> None:
    client.chat.completions.create(
        model="default/weatheragent",
        messages=[{"role": "user", "content": 'call get_weather {"city":"Log"} ;; echo'}],
        extra_headers={"x-request-id": "follow-me"},
    )
    gateway.logged("http.request", request_id="follow-me")
    gateway.logged(
        "run.finished", request_id="follow-me", model="default/weatheragent", key_id="chat", outcome="success"
    )


def test_every_line_of_the_log_is_json_with_the_same_fields(gateway: Gateway) -> None:
    gateway.get("/agents")
    text = gateway.log_text()
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("{"))
    for line in lines[first:]:
        record = json.loads(line)
        assert {"timestamp", "level", "logger", "event", "request_id", "message"} <= set(record), line


def test_no_secret_and_no_prompt_is_in_the_log(gateway: Gateway, client: OpenAI, upstream: ObedientUpstream) -> None:
    wrong = "sk-wrong-canary-key-zzzzzzzzzzzzzzzz"
    prompt = "say canary-prompt-0815"
    client.chat.completions.create(
        model="default/weatheragent",
        messages=[{"role": "user", "content": prompt}],
        user="canary-user-4711",
        extra_headers={"cookie": "session=canary-cookie"},
    )
    gateway.get("/v1/models", key=wrong)
    gateway.get("/v1/models?api_key=canary-query-string")
    gateway.get("/agents", key=NARROW)
    for script in ("[status=500] say canary-upstream-text", "[fault=html] say x", "[status=401] say canary-401"):
        for model in ("default/weatheragent", "local/test-model"):
            body = {"model": model, "messages": [{"role": "user", "content": script}]}
            gateway.post("/v1/chat/completions", body)
    body = {"model": "default/tooltrouble", "messages": [{"role": "user", "content": "call hard ;; say x"}]}
    gateway.post("/v1/chat/completions", body, headers={"x-request-id": "after-canaries"})
    gateway.logged("http.request", request_id="after-canaries")
    text = gateway.log_text()
    for secret in (
        ADMIN,
        CHAT,
        NARROW,
        UPSTREAM_KEY,
        wrong,
        "canary-prompt-0815",
        "canary-user-4711",
        "canary-cookie",
        "canary-query-string",
        "canary-upstream-header",
        "canary-portal",
    ):
        assert secret not in text, f"{secret} is in the log"


def test_health_is_liveness_and_readyz_waits_for_agents(gateway: Gateway) -> None:
    health = gateway.get("/health", key="")
    assert health.status == 200 and health.json()["status"] == "ok"
    assert health.json()["service"] == "agent-gateway"
    assert gateway.get("/", key="").status == 200


def test_health_and_raw_models_answer_while_agents_still_load(
    start: Callable[..., Gateway], upstream: ObedientUpstream
) -> None:
    gateway = start(prepare=lambda home: drop("broken/Sleeper", home / "agents"), ready="/health")
    assert gateway.get("/health", key="").status == 200
    body = {"model": "local/test-model", "messages": [{"role": "user", "content": "say early bird"}]}
    answer = gateway.post("/v1/chat/completions", body, key=CHAT)
    assert answer.json()["choices"][0]["message"]["content"] == "early bird"


def test_metrics_as_json_and_for_prometheus(gateway: Gateway, client: OpenAI) -> None:
    client.chat.completions.create(
        model="default/weatheragent",
        messages=[{"role": "user", "content": 'call get_weather {"city":"Metric"} ;; echo'}],
    )
    found = gateway.get("/metrics").json()
    assert found["total_requests"] > 0 and found["tool_invocations"] > 0
    assert "get_weather" in found["tool_breakdown"]
    text = gateway.get("/metrics", headers={"accept": "text/plain"}).body.decode()
    assert "# TYPE" in text and "agent_gateway_" in text
    assert gateway.get("/metrics/prometheus").body.decode().startswith("#")
    assert gateway.get("/metrics/prometheus", key=CHAT).status == 403
    assert gateway.get("/metrics/prometheus", key="").status == 401


def test_head_and_query_strings_do_not_confuse(gateway: Gateway) -> None:
    assert gateway.request("HEAD", "/health", key="").status == 200
    assert gateway.get("/v1/models?limit=5").status == 200
