"""Routing by a real gateway over two scripted upstreams: fail-over, budget, breaker, cool-down, the caller's choice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, NARROW, write_agent
from tests.support.schema import assert_error
from tests.support.scripted_answers import Answer, Call, status
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, free_port, running_gateway
from tests.support.waiting import wait_for

UPSTREAMS = """\
version: 1
upstreams:
  - name: first
    base_url: {first}
    models: [m, plain, storm]
    default_model: m
    timeouts: {{connect_s: 2}}
  - name: second
    base_url: {second}
    models: [n, plain]
    default_model: n
    priority: 2
    max_tokens_field: max_completion_tokens
  - {{name: dead, base_url: "http://127.0.0.1:{dead}/v1", models: [m, plain], default_model: m, priority: 1}}
"""
ROUTING = """\
version: 1
models:
  both: {targets: [{model: first/m}, {model: second/n}]}
  half: {targets: [{model: dead/m}, {model: second/n}]}
  rest: {targets: [{model: first/cooling}, {model: second/n}]}
  long: {targets: [{model: first/m}], context_length_fallbacks: [second/n]}
  probe: {targets: [{model: first/probed}, {model: second/n}]}
breaker: {failures: 3, open_s: OPEN_S}
health_interval_s: 3600
"""
OPEN_S = 1
KEYS = (("admin", ADMIN, "[chat, admin]", '["*"]'), ("chat", CHAT, "[chat]", '["*"]'))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class House:
    def __init__(self, gateway: Gateway, first: ScriptedUpstream, second: ScriptedUpstream) -> None:
        self.gateway, self.first, self.second = gateway, first, second

    def ask(self, model: str, *, streamed: bool = False, **options: Any) -> Any:
        body = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": "Hello"}]}
        return self.gateway.post("/v1/chat/completions", body, **options)

    def models_asked(self) -> tuple[list[str], list[str]]:
        """The model names each upstream was asked for, since the last `forget`."""
        asked = ([r.json["model"] for r in up.requests if r.method == "POST"] for up in (self.first, self.second))
        first, second = asked
        return first, second

    def forget(self) -> None:
        self.first.requests.clear()
        self.second.requests.clear()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("routing")
    with ScriptedUpstream() as first, ScriptedUpstream() as second:
        text = UPSTREAMS.format(first=first.base_url, second=second.base_url, dead=free_port())
        (home / "upstreams.yaml").write_text(text, encoding="utf-8")
        (home / "routing.yaml").write_text(ROUTING.replace("OPEN_S", str(OPEN_S)), encoding="utf-8")
        rows = [
            f"  - {{id: {id_}, hashed_key: {digest(key)}, scopes: {scopes}, allow_agents: {allow}}}"
            for id_, key, scopes, allow in (
                *KEYS,
                ("narrow", NARROW, "[chat]", '["both", "default/*", "second/plain"]'),
            )
        ]
        (home / "security.yaml").write_text("version: 1\napi_keys:\n" + "\n".join(rows), encoding="utf-8")
        write_agent(home / "agents", "Helper", "Help.", extra='__gateway__ = {"model": "plain"}\n')
        write_agent(home / "agents", "Virtual", "Help.", extra='__gateway__ = {"model": "both"}\n')
        tool = "from agents import function_tool\n\n@function_tool\ndef note(text: str) -> str:\n    return text\n\n"
        write_agent(
            home / "agents", "Tooled", "Help.", extra=f'{tool}__gateway__ = {{"model": "both"}}\n', tools="note"
        )
        with running_gateway(home, env={"GATEWAY_AGENT_AUTO_RELOAD": "1"}, key=ADMIN) as gateway:
            wait_for(lambda: len(gateway.listing()) == 3, what="the agents are there")
            yield House(gateway, first, second)


@pytest.fixture
def house(running: House) -> House:
    """The gateway with its breakers closed: one good answer of each target."""
    running.first.script("m", Answer(text="first"))
    running.second.script("n", Answer(text="second"))
    for upstream in (running.first, running.second):
        upstream.script("plain", Answer(text="plain"))
    wait_for(lambda: running.ask("first/m").status == 200, what="the first upstream answers again")
    wait_for(lambda: running.ask("both").headers.get("x-gateway-upstream") == "first", what="the breaker closed again")
    running.forget()
    return running


def text_of(answer: Any) -> str:
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for x in map(json.loads, lines) for c in x["choices"])


@pytest.mark.parametrize("streamed", [False, True])
def test_the_limit_of_tokens_goes_to_each_upstream_under_the_name_it_takes(house: House, streamed: bool) -> None:
    house.first.script("m", fault("html"))
    body = {"model": "both", "stream": streamed, "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}
    assert house.gateway.post("/v1/chat/completions", body).status == 200
    first, second = house.first.requests[0].json, house.second.requests[-1].json
    assert (first["max_tokens"], "max_completion_tokens" in first) == (5, False)
    assert (second["max_completion_tokens"], "max_tokens" in second) == (5, False)
    # Elsewhere the field has no second name.
    house.gateway.post("/v1/completions", {"model": "second/n", "prompt": "x", "max_tokens": 5})
    assert house.second.requests[-1].json["max_tokens"] == 5


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "name", ["reset_at_once", "refuse_after_accept", "html", "error_object_at_once", "not_an_object"]
)
def test_the_next_upstream_answers_where_one_fails_before_its_first_event(
    house: House, name: str, streamed: bool
) -> None:
    house.first.script("m", fault(name))
    answer = house.ask("both", streamed=streamed)
    assert answer.status == 200, answer.body
    assert text_of(answer) == "second"
    assert answer.headers["x-gateway-upstream"] == "second"
    assert int(answer.headers["x-gateway-attempts"]) in (2, 3)
    assert set(house.models_asked()[1]) == {"n"}
    request_id = answer.headers["x-request-id"]
    house.gateway.logged(
        "routing.failed_over", request_id=request_id, upstream="first", next_upstream="second", route="both"
    )


@pytest.mark.parametrize("model", ["both", "default/virtual"])
def test_never_after_the_first_event(house: House, model: str) -> None:
    house.first.script("m", fault("cut_between_events"))
    answer = house.ask(model, streamed=True)
    assert answer.status == 200
    assert "[DONE]" not in answer.body.decode() and '"error"' in answer.body.decode()
    assert answer.headers["x-gateway-upstream"] == "first"
    assert house.models_asked() == (["m"], [])


def test_a_plain_name_is_served_in_order_of_priority_for_clients_and_agents(house: House) -> None:
    assert house.ask("plain").headers["x-gateway-upstream"] == "first"
    house.first.script("plain", status(500))
    for model in ("plain", "default/helper"):
        answer = house.ask(model)
        assert answer.status == 200, answer.body
        assert answer.headers["x-gateway-upstream"] == "second"
    assert house.ask("first/plain").status == 502


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agents_model_call_fails_over_in_the_middle_of_a_run(house: House, streamed: bool) -> None:
    house.first.enqueue(Answer(calls=[Call("note", {"text": "once"})]), status(503))
    answer = house.ask("default/tooled", streamed=streamed)
    assert answer.status == 200, answer.body
    assert text_of(answer) == "second"
    assert house.models_asked() == (["m", "m"], ["n"])
    roles = [message["role"] for message in house.second.requests[0].json["messages"]]
    assert roles.count("tool") == 1, "the tool ran once, and its result went along"


def test_a_conversation_too_long_for_one_goes_to_another(house: House) -> None:
    house.first.script("m", status(400, error={"message": "too long", "code": "context_length_exceeded"}))
    answer = house.ask("long")
    assert (answer.status, text_of(answer)) == (200, "second")
    house.first.script("m", status(400, error={"message": "bad field", "code": "invalid_value"}))
    assert house.ask("long").status == 400


def test_a_virtual_model_is_listed_and_a_key_needs_its_name(house: House) -> None:
    assert {"both", "long", "first/m"} <= house.gateway.model_ids()
    assert house.gateway.model_ids(key=NARROW) & {"both", "long", "second/plain", "first/m"} == {"both", "second/plain"}
    assert house.ask("both", key=NARROW).status == 200
    assert house.ask("long", key=NARROW).status == 403
    assert house.ask("plain", key=NARROW).headers["x-gateway-upstream"] == "second", "the one the key reaches"


def test_a_dead_upstream_is_not_beaten_by_300_requests_at_once(house: House) -> None:
    house.first.script("storm", fault("refuse_after_accept"))
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: house.ask("first/storm", timeout_s=60), range(300)))
    assert {answer.status for answer in answers} <= {502, 503}
    asked = house.models_asked()[0].count("storm")
    assert asked <= 360, asked
    assert_error(answers[0].json())
    assert answers[0].headers["x-gateway-upstream"] == "first"


def test_a_breaker_leaves_a_dead_upstream_alone_and_lets_it_come_back(house: House) -> None:
    house.first.script("probed", status(500))
    began = time.monotonic()
    answers = [house.ask("probe") for _ in range(6)]
    probes = int((time.monotonic() - began) / OPEN_S)  # none, but on a machine that is busy with other things
    assert [answer.headers["x-gateway-upstream"] for answer in answers] == ["second"] * 6
    assert 3 <= house.models_asked()[0].count("probed") <= 3 + probes
    assert len(house.gateway.logged("routing.breaker.opened", upstream_model="probed")) <= 1 + probes
    metrics = house.gateway.get("/metrics/prometheus").body.decode()
    states = [line for line in metrics.splitlines() if "routing_breaker_state{" in line and '"probed"' in line]
    assert len(states) == 1 and 'upstream="first"' in states[0] and float(states[0].rpartition(" ")[2]) == 2.0, states
    house.first.script("probed", Answer(text="back"))
    wait_for(lambda: text_of(house.ask("probe")) == "back", what="the probe goes through")
    house.gateway.logged("routing.breaker.closed", upstream_model="probed")


def test_retry_after_is_honoured_as_a_cool_down(house: House) -> None:
    house.first.script("cooling", status(429, retry_after="1"))
    began = time.monotonic()
    assert [house.ask("rest").headers["x-gateway-upstream"] for _ in range(4)] == ["second"] * 4
    again = int(time.monotonic() - began)  # 0, but on a machine that is busy with other things
    assert 1 <= house.models_asked()[0].count("cooling") <= 1 + again
    house.first.script("cooling", Answer(text="cool"))
    wait_for(lambda: text_of(house.ask("rest")) == "cool", what="the cool-down ends")


@pytest.mark.parametrize("model", ["both", "default/virtual", "default/helper"])
def test_a_caller_chooses_the_upstream_who_may(house: House, model: str) -> None:
    answer = house.ask(model, headers={"x-gateway-upstream": "second"})
    assert answer.status == 200, answer.body
    assert answer.headers["x-gateway-upstream"] == "second"
    refused = house.ask(model, key=NARROW, headers={"x-gateway-upstream": "second"})
    assert refused.status == 403
    assert_error(refused.json())
    unknown = house.ask(model, headers={"x-gateway-upstream": "nobody"})
    assert unknown.status == 400, unknown.body
    house.second.script("n", status(500))
    house.second.script("plain", status(500))
    alone = house.ask(model, headers={"x-gateway-upstream": "second"})
    assert alone.status == 502, "nobody steps in where the caller has chosen"


def test_the_file_is_reloaded_and_a_bad_one_keeps_the_old(house: House) -> None:
    path: Path = house.gateway.home / "routing.yaml"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("breaker:", "  fresh: {targets: [{model: second/n}]}\nbreaker:"), encoding="utf-8")
    wait_for(lambda: house.ask("fresh").status == 200, what="the new name is served")
    path.write_text("models: {both: {targets: [{model: nowhere/m}]}}", encoding="utf-8")
    house.gateway.logged("config.reload.failed", where=lambda line: "nowhere/m" in line["message"])
    assert house.ask("fresh").status == 200
    path.write_text(before, encoding="utf-8")
    wait_for(lambda: house.ask("fresh").status == 404, what="the name is gone")
