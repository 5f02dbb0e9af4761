"""Hedging over real upstreams: a second target is asked when the first is slow: once, within the budget, visibly."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.by_hand import send_by_hand
from tests.support.house import ADMIN, write_agent
from tests.support.scripted_answers import Answer, status, steps_of
from tests.support.scripted_faults import fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

UPSTREAMS = """\
version: 1
upstreams:
  - {{name: first, base_url: "{first}", default_model: m, timeouts: {{first_byte_s: 20}}}}
  - {{name: second, base_url: "{second}", default_model: n, priority: 2}}
  - {{name: dead, base_url: "{dead}", default_model: m, priority: 3}}
"""
ROUTING = """\
version: 1
models:
  quick: {targets: [{model: first/m}, {model: second/n}], hedge: {after_s: 0.15}}
  calm: {targets: [{model: first/m}, {model: second/n}], hedge: {after_s: 20}}
  patient: {targets: [{model: first/m}, {model: second/n}]}
  usual: {targets: [{model: first/u}, {model: second/n}], hedge: {percentile: 90}}
  crowd: {targets: [{model: first/crowd}, {model: second/n}], hedge: {after_s: 0.1}}
  lame: {targets: [{model: first/m}, {model: dead/hedge}], hedge: {after_s: 0.15}}
breaker: {failures: 1000}
health_interval_s: 3600
"""


LONG_BEFORE_A_DEADLINE_S = 20.0


@dataclass
class House:
    gateway: Gateway
    first: ScriptedUpstream
    second: ScriptedUpstream
    dead: ScriptedUpstream

    def ask(self, model: str, *, streamed: bool = False, path: str = "chat/completions", **more: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **more}
        if streamed:
            body["stream"] = True
        return self.gateway.post(f"/v1/{path}", body, timeout_s=30)

    def ask_held(self, model: str, answer: Answer, until: Callable[[], object], **options: Any) -> Any:
        """Ask; the first upstream gives ``answer`` when ``until`` has returned, however busy the machine is."""
        gate = self.first.gate()

        def steps(streamed: bool) -> Iterator[Any]:
            yield gate.event
            yield from steps_of(answer, "/chat/completions", {"stream": streamed})

        self.first.script("m", Answer(steps=steps))
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(self.ask, model, **options)
            try:
                until()
            finally:
                gate.open()
            return asking.result()

    def counts(self) -> tuple[int, int]:
        return len(self.first.requests), len(self.second.requests)

    def hedges(self, upstream: str, outcome: str) -> float:
        text = self.gateway.get("/metrics/prometheus").body.decode()
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("agent_gateway_routing_hedges_total{") and f'"{upstream}"' in name and outcome in name:
                return float(value)
        return 0.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("hedging")
    with ScriptedUpstream() as first, ScriptedUpstream() as second, ScriptedUpstream() as dead:
        text = UPSTREAMS.format(first=first.base_url, second=second.base_url, dead=dead.base_url)
        (home / "upstreams.yaml").write_text(text, encoding="utf-8")
        (home / "routing.yaml").write_text(ROUTING, encoding="utf-8")
        digest = hashlib.sha256(ADMIN.encode()).hexdigest()
        row = f'  - {{id: admin, hashed_key: {digest}, scopes: [chat, admin], allow_agents: ["*"]}}\n'
        (home / "security.yaml").write_text("version: 1\napi_keys:\n" + row, encoding="utf-8")
        write_agent(home / "agents", "Helper", "Help.", extra='__gateway__ = {"model": "quick"}\n')
        with running_gateway(home, key=ADMIN) as gateway:
            wait_for(lambda: len(gateway.listing()) == 1, what="the agent is there")
            yield House(gateway, first, second, dead)


@pytest.fixture
def house(running: House) -> House:
    """The gateway with tokens to spend: good answers of everyone."""
    running.first.script("m", Answer(text="first"))
    running.first.script("u", Answer(text="first"))
    running.second.script("n", Answer(text="second"))
    running.dead.script("hedge", status(500))
    for _ in range(12):
        assert running.ask("first/m").status == 200
    for upstream in (running.first, running.second, running.dead):
        upstream.requests.clear()
    return running


def text_of(answer: Any) -> str:
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in answer.body.decode().splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for x in map(json.loads, lines) for c in x["choices"])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", ["quick", "default/helper"])
@pytest.mark.parametrize("how", ["hang_before_headers", "hang_after_headers"])
def test_a_second_target_answers_where_the_first_is_slow(house: House, model: str, streamed: bool, how: str) -> None:
    house.first.script("m", fault(how))
    won = house.hedges("second", "won")
    started = time.monotonic()
    answer = house.ask(model, streamed=streamed)
    assert (answer.status, text_of(answer)) == (200, "second"), answer.body
    assert 0.15 <= time.monotonic() - started < LONG_BEFORE_A_DEADLINE_S
    assert answer.headers["x-gateway-upstream"] == "second"
    assert (answer.headers["x-gateway-attempts"], answer.headers["x-gateway-hedged"]) == ("2", "true")
    assert house.counts() == (1, 1)
    assert house.first.wait_closed(1) - started < LONG_BEFORE_A_DEADLINE_S, "the slow request is given up at once"
    assert house.second.requests[0].json["model"] == "n"
    assert house.hedges("second", "won") == won + 1
    request_id = answer.headers["x-request-id"]
    house.gateway.logged(
        "routing.hedged", request_id=request_id, upstream="first", next_upstream="second", route="quick"
    )
    house.gateway.logged("routing.decided", request_id=request_id, hedged=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_hedge_that_comes_too_late_is_cancelled(house: House, streamed: bool) -> None:
    house.second.script("n", fault("hang_after_headers"))
    lost = house.hedges("second", "lost")
    started = time.monotonic()
    answer = house.ask_held("quick", Answer(text="first"), house.second.wait_for_request, streamed=streamed)
    assert text_of(answer) == "first"
    assert answer.headers["x-gateway-upstream"] == "first"
    assert (answer.headers["x-gateway-attempts"], answer.headers["x-gateway-hedged"]) == ("2", "true")
    assert house.second.wait_closed(1) - started < LONG_BEFORE_A_DEADLINE_S
    assert house.hedges("second", "lost") == lost + 1


def test_the_usage_of_the_request_that_lost_is_estimated_and_charged(house: House) -> None:
    house.first.script("m", fault("hang_before_headers"))
    answer = house.ask("quick")
    assert answer.json()["usage"]["prompt_tokens"] == 11, "the client sees the upstream's own numbers"
    (finished,) = house.gateway.logged("run.finished", request_id=answer.headers["x-request-id"])
    assert finished["usage_estimated"] is True
    assert finished["input_tokens"] == 11 + len(house.first.requests[0].body) // 4


def test_a_fast_target_is_asked_alone_and_nothing_is_hedged_unasked(house: House) -> None:
    answer = house.ask("calm")
    assert text_of(answer) == "first" and "x-gateway-hedged" not in answer.headers
    house.first.script("m", Answer(text="first", first_delay_s=0.5))
    assert "x-gateway-hedged" not in house.ask("patient").headers
    assert house.counts() == (2, 0)


@pytest.mark.parametrize("more", [{"store": True}, {"store": True, "stream": True}])
def test_what_an_upstream_is_asked_to_keep_is_never_sent_twice(house: House, more: dict[str, Any]) -> None:
    house.first.script("m", Answer(text="first", first_delay_s=0.5))
    assert "x-gateway-hedged" not in house.ask("quick", **more).headers
    assert house.counts() == (1, 0)
    house.first.script("m", fault("hang_before_headers"))
    assert house.ask("quick", store=False).headers["x-gateway-hedged"] == "true"


@pytest.mark.parametrize("path", ["images/generations", "audio/speech", "moderations"])
def test_other_endpoints_are_never_hedged(house: House, path: str) -> None:
    house.first.script("m", Answer(body=b'{"data":[]}', first_delay_s=0.5))
    answer = house.ask("quick", path=path, input="x", prompt="x", voice="alloy")
    assert "x-gateway-hedged" not in answer.headers
    assert house.counts() == (1, 0), answer.body


def test_a_first_target_that_fails_while_the_hedge_runs_is_failed_over_by_it(house: House) -> None:
    failure = Answer(status=500, body={"error": {"message": "x"}})
    house.second.script("n", Answer(text="second", first_delay_s=0.2))
    answer = house.ask_held("quick", failure, house.second.wait_for_request)
    assert text_of(answer) == "second"
    assert house.counts() == (1, 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_hedge_that_fails_harms_nobody(house: House, streamed: bool) -> None:
    failed = house.hedges("dead", "failed")

    def has_failed() -> None:
        wait_for(lambda: house.hedges("dead", "failed") == failed + 1, what="the hedge has failed")

    answer = house.ask_held("lame", Answer(text="first"), has_failed, streamed=streamed)
    assert text_of(answer) == "first"
    assert len(house.dead.requests) == 1


def test_a_refused_request_is_not_answered_by_the_hedge(house: House) -> None:
    house.first.script("m", Answer(status=400, body={"error": {"message": "bad field"}}, first_delay_s=0.4))
    house.second.script("n", fault("hang_before_headers"))
    assert house.ask("quick").status == 400
    house.second.wait_closed(1)


@pytest.mark.parametrize("streamed", [False, True])
def test_both_requests_end_when_the_client_leaves(house: House, streamed: bool) -> None:
    for upstream, model in ((house.first, "m"), (house.second, "n")):
        upstream.script(model, fault("hang_before_headers"))
    body = {"model": "quick", "stream": streamed, "messages": [{"role": "user", "content": "Hello"}]}
    with send_by_hand(house.gateway, body, key=ADMIN):
        house.second.wait_for_request(1)
    left = time.monotonic()
    assert house.first.wait_closed(1) - left < LONG_BEFORE_A_DEADLINE_S
    assert house.second.wait_closed(1) - left < LONG_BEFORE_A_DEADLINE_S


def test_a_percentile_is_learnt_first(house: House) -> None:
    assert "x-gateway-hedged" not in house.ask("usual").headers
    for _ in range(25):
        house.ask("usual")
    house.first.script("u", fault("hang_before_headers"))
    started = time.monotonic()
    assert house.ask("usual").headers["x-gateway-hedged"] == "true"
    assert time.monotonic() - started < LONG_BEFORE_A_DEADLINE_S
    # Streams are another matter: none was measured.
    house.first.script("u", Answer(text="first", first_delay_s=0.3))
    assert "x-gateway-hedged" not in house.ask("usual", streamed=True).headers


def test_a_slow_upstream_adds_a_fifth_to_the_traffic_at_most(house: House) -> None:
    house.first.script("crowd", Answer(text="slow", first_delay_s=0.4))
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: house.ask("crowd"), range(100)))
    assert {answer.status for answer in answers} == {200}
    first, second = house.counts()
    assert first == 100
    assert 10 <= second <= 20, second
    assert "routing_retries_suppressed_total" in house.gateway.get("/metrics/prometheus").body.decode()
