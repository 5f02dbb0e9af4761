"""Limits and budgets by real gateways: exact over two processes, settled, released, with headers; agents and alerts."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import redis

from tests.support.databases import database
from tests.support.house import ADMIN, write_agent
from tests.support.scripted_answers import Answer, Call, status
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for
from tests.unit.test_limit_stores import REDIS_URL

PRICES = """\
version: 1
models:
  - {match: local/pictures, image: 0.04}
  - {match: 'local/*', input: 0, output: 1000} # a tenth of a cent for one token
"""
UPSTREAMS = "version: 1\nupstreams: [{{name: local, base_url: {url}, models: [m, e, pictures], default_model: m}}]\n"
TWENTY = {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}


def security(**limits: str) -> str:
    lines = ["version: 1", "api_keys:"]
    lines += [f'  - {{id: admin, hashed_key: "{digest(ADMIN)}", scopes: [chat, admin], limits: {{}}}}']
    for name, limit in limits.items():
        lines += [f'  - {{id: {name}, hashed_key: "{digest("sk-" + name)}", namespace: {name}, {limit}}}']
    return "\n".join(lines) + "\n"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@contextmanager
def gateway_of(home: Path, upstream: ScriptedUpstream, rules: str, **env: str) -> Iterator[Gateway]:
    home.mkdir(parents=True, exist_ok=True)
    (home / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
    (home / "upstreams.yaml").write_text(UPSTREAMS.format(url=upstream.base_url), encoding="utf-8")
    (home / "security.yaml").write_text(rules, encoding="utf-8")
    (home / "prices.yaml").write_text(PRICES, encoding="utf-8")
    with running_gateway(home, env={"GATEWAY_PRICES_CONFIG": str(home / "prices.yaml"), **env}, key=ADMIN) as gateway:
        yield gateway


def ask(
    gateway: Gateway, key: str, *, model: str = "local/m", path: str = "/v1/chat/completions", **fields: Any
) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], **fields}
    return gateway.post(path, body, key=f"sk-{key}")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, ScriptedUpstream]]:
    home = tmp_path_factory.mktemp("limits")
    cent = "limits: {cost_per_day_usd: 0.1}"
    rules = security(
        three="limits: {requests_per_minute: 3}",
        old="rate_limit: {per_minute: 2}",
        surfaces="limits: {requests_per_minute: 4}",
        streams="limits: {requests_per_minute: 50, tokens_per_minute: 20000}",
        one="limits: {concurrent_runs: 1}",
        poor=cent,
        cut=cent,
        painter=cent,
        agent=cent,
        maxima=cent,
        nested="limits: {cost_per_day_usd: 0.05}",
        tokens="limits: {tokens_per_minute: 60}",
        eager="limits: {requests_per_minute: 1}",
        broke="limits: {cost_per_day_usd: 0.001}",
        users="end_user_limits: {requests_per_minute: 2}",
        free="limits: {}",
    )
    with ScriptedUpstream() as upstream:
        extra = "from agents import function_tool\n\n@function_tool\ndef note(text: str) -> str:\n    return text\n\n"
        write_agent(home / "agents", "Tooled", "Help.", extra=extra, tools="note")
        itself = "\nagent.tools.append(agent.as_tool('again', 'Again.'))\n"
        folder = write_agent(home / "agents", "Itself", "Help.")
        folder.write_text(folder.read_text(encoding="utf-8") + itself, encoding="utf-8")
        env = {"GATEWAY_RATE_LIMIT_PER_MINUTE": "500", "GATEWAY_END_USER_HEADER": "X-End-User"}
        with gateway_of(home, upstream, rules, **env) as gateway:
            wait_for(lambda: len(gateway.listing()) == 2, what="the agents are there")
            yield gateway, upstream


House = tuple[Gateway, ScriptedUpstream]


@pytest.fixture(autouse=True)
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "house" in request.fixturenames:
        request.getfixturevalue("house")[1].clear()


def test_the_request_after_the_last_is_refused_as_openai_does(house: House) -> None:
    gateway, _ = house
    shown = []
    for _ in range(3):
        answer = ask(gateway, "three")
        assert answer.status == 200
        shown.append(answer.headers["x-ratelimit-remaining-requests"])
    assert shown == ["2", "1", "0"]
    answer = ask(gateway, "three")
    assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "requests", "rate_limit_exceeded")
    assert 50 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-three", max_retries=0) as client,
        pytest.raises(openai.RateLimitError, match="the key 'three' may send 3 a minute"),
    ):
        client.chat.completions.create(model="local/m", messages=[{"role": "user", "content": "x"}])
    gateway.logged("limit.rejected", where=lambda line: {"three", "requests"} <= set(map(str, line.values())))


def test_a_refused_request_reaches_no_upstream_and_a_wrong_one_costs_no_permit(house: House) -> None:
    gateway, upstream = house
    before = len(upstream.requests)
    assert ask(gateway, "old", model="local/no such").status == 404
    assert [ask(gateway, "old").status for _ in range(3)] == [200, 200, 429]
    assert len(upstream.requests) == before + 2


def test_every_surface_counts_against_the_same_limit(house: House) -> None:
    gateway, _ = house
    assert ask(gateway, "surfaces").status == 200
    assert ask(gateway, "surfaces", stream=True).status == 200
    assert gateway.post("/v1/embeddings", {"model": "local/e", "input": "x"}, key="sk-surfaces").status == 200
    gateway.post("/v1/moderations", {"model": "local/m", "input": "x"}, key="sk-surfaces")
    assert gateway.post("/v1/completions", {"model": "local/m", "prompt": "x"}, key="sk-surfaces").status == 429
    assert gateway.post("/v1/moderations", {"model": "local/m", "input": "x"}, key="sk-surfaces").status == 429
    assert ask(gateway, "surfaces", model="default/tooled", stream=True).status == 429


def test_streams_and_agents_carry_the_headers(house: House) -> None:
    gateway, _ = house
    for model in ("local/m", "default/tooled"):
        for stream in (False, True):
            headers = ask(gateway, "streams", model=model, stream=stream).headers
            assert headers["x-ratelimit-limit-requests"] == "50"
            assert headers["x-ratelimit-limit-tokens"] == "20000"
            assert int(headers["x-ratelimit-remaining-tokens"]) < 20_000
    assert "x-ratelimit-limit-requests" not in ask(gateway, "free").headers


def test_one_run_at_a_time_and_the_next_when_it_has_ended(house: House) -> None:
    gateway, upstream = house
    gate = upstream.gate()
    upstream.enqueue(Answer(text="slow answer", gate=gate))
    body = {"model": "local/m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with gateway.stream("POST", "/v1/chat/completions", json_body=body, key="sk-one") as stream:
        next(stream.lines())
        refused = ask(gateway, "one")
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        gate.open()
        list(stream.lines())
    wait_for(lambda: ask(gateway, "one").status == 200, what="the run has ended")


def test_who_leaves_in_the_middle_holds_nothing_and_pays_what_came(house: House) -> None:
    gateway, upstream = house
    gate = upstream.gate()
    upstream.enqueue(Answer(text="some words " * 40, gate=gate))
    fields = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 90}
    with gateway.stream(
        "POST", "/v1/chat/completions", json_body={"model": "local/m", **fields}, key="sk-cut"
    ) as stream:
        next(stream.lines())
        assert ask(gateway, "cut", max_tokens=20).status == 429, "0.09 of 0.1 USD are reserved"
    upstream.enqueue(Answer(text="ok", usage=TWENTY))
    wait_for(lambda: ask(gateway, "cut", max_tokens=60).status == 200, what="the reservation is settled")
    gate.open()


def test_pictures_are_reserved_by_their_price(house: House) -> None:
    gateway, upstream = house
    path, model, before = "/v1/images/generations", "local/pictures", len(upstream.requests)
    assert ask(gateway, "painter", model=model, path=path, n=3).error["code"] == "insufficient_quota"
    assert len(upstream.requests) == before
    upstream.enqueue(Answer(body={"created": 1, "data": [{"url": "https://a/b"}]}))
    assert ask(gateway, "painter", model=model, path=path, n=2).headers["x-gateway-cost-usd"] == "0.04"
    upstream.enqueue(Answer(body={"error": {"message": "no"}}))
    assert ask(gateway, "painter", model=model, path=path).status == 502, "a call that failed costs nothing"
    assert ask(gateway, "painter", model=model, path=path, n=2).status == 429
    upstream.enqueue(Answer(body={"created": 1, "data": [{"url": "https://a/b"}]}))
    assert ask(gateway, "painter", model=model, path=path).status == 200
    assert ask(gateway, "painter", model=model, path=path).status == 429


def test_a_budget_reserves_the_worst_case_and_keeps_what_was_used(house: House) -> None:
    gateway, upstream = house
    upstream.enqueue(*(Answer(text="ok", usage=TWENTY) for _ in range(3)))
    for _ in range(3):
        assert ask(gateway, "poor", max_tokens=40).status == 200
    answer = ask(gateway, "poor", max_tokens=41)
    assert (answer.status, answer.error["code"]) == (429, "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    upstream.enqueue(status(500))
    assert ask(gateway, "poor", max_tokens=40).status >= 500, "a call that failed costs nothing"
    upstream.enqueue(Answer(text="ok", usage={**TWENTY, "completion_tokens": 41}))
    assert ask(gateway, "poor", max_tokens=40).status == 200, "more than reserved counts, too"
    assert ask(gateway, "poor", max_tokens=1).status == 429
    attempts = len(upstream.requests)
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-poor", max_retries=2) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(model="local/m", messages=[{"role": "user", "content": "x"}])
    assert len(upstream.requests) == attempts


def test_an_agent_is_stopped_by_its_callers_budget_before_its_next_model_call(house: House) -> None:
    gateway, upstream = house
    spent = {**TWENTY, "completion_tokens": 40}
    upstream.enqueue(*(Answer(calls=[Call("note", {"text": "x"})], usage=spent) for _ in range(5)))
    before = len(upstream.requests)
    answer = ask(gateway, "agent", model="default/tooled", max_tokens=40)
    assert (answer.status, answer.error["code"]) == (429, "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert len(upstream.requests) - before == 2, "40 and 40 of 100 tokens' worth"
    upstream.clear()


def test_an_agent_that_is_its_own_tool_charges_one_budget_and_stops(house: House) -> None:
    gateway, upstream = house
    again = Answer(calls=[Call("again", {"input": "x"})], usage={**TWENTY, "completion_tokens": 1})
    upstream.enqueue(*(again for _ in range(40)))
    before = len(upstream.requests)
    answer = ask(gateway, "free", model="default/itself")
    assert (answer.status, answer.error["code"]) == (502, "run_budget_exceeded")
    assert "GATEWAY_RUN_MAX_DEPTH" in answer.error["message"]
    assert len(upstream.requests) - before == 9
    upstream.clear()
    expensive = Answer(calls=[Call("again", {"input": "x"})], usage=TWENTY)
    upstream.enqueue(*(expensive for _ in range(40)))
    before = len(upstream.requests)
    answer = ask(gateway, "nested", model="default/itself", max_tokens=20)
    assert (answer.status, answer.error["code"]) == (429, "insufficient_quota")
    assert len(upstream.requests) - before == 2, "20 tokens each of 50, whoever in the run calls"
    upstream.clear()


def test_tokens_a_minute(house: House) -> None:
    gateway, upstream = house
    upstream.enqueue(Answer(text="ok", usage=TWENTY))
    assert ask(gateway, "tokens").status == 200, "a default worst case above the limit does not refuse"
    answer = ask(gateway, "tokens", max_tokens=20)
    assert (answer.status, answer.error["type"]) == (429, "tokens")
    assert answer.headers["x-ratelimit-remaining-tokens"] == "35"


def test_end_users_are_limited_one_by_one(house: House) -> None:
    gateway, _ = house
    assert [ask(gateway, "users", user="ann").status for _ in range(3)] == [200, 200, 429]
    assert ask(gateway, "users", user={"id": "ann", "name": "Ann"}).status == 429
    assert ask(gateway, "users", user="bob").status == 200
    body = {"model": "local/m", "messages": [{"role": "user", "content": "x"}], "user": "carl"}
    headers = {"x-end-user": "ann"}
    answer = gateway.request("POST", "/v1/chat/completions", json_body=body, key="sk-users", headers=headers)
    assert answer.status == 429, "the header comes before the body"


def test_end_users_are_the_same_on_every_surface(house: House) -> None:
    gateway, upstream = house
    image = {"path": "/v1/images/generations", "model": "local/pictures", "prompt": "a house"}
    upstream.enqueue(*[Answer(body={"created": 1, "data": [{"url": "https://a/b"}]})] * 2)
    assert [ask(gateway, "users", user="dora", **image).status for _ in range(2)] == [200, 200]
    assert ask(gateway, "users", user="dora").status == 429, "pictures count for the end user, too"
    form = b"".join(
        b'--a-boundary-of-a-form\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % field
        for field in ((b"user", b"dora"), (b"prompt", b"a house"), (b"model", b"local/pictures"))
    )
    headers = {"content-type": "multipart/form-data; boundary=a-boundary-of-a-form"}
    edit = gateway.request(
        "POST", "/v1/images/edits", body=form + b"--a-boundary-of-a-form--\r\n", key="sk-users", headers=headers
    )
    assert edit.status == 429, edit.body
    body = {"model": "local/pictures", "prompt": "a house"}
    headers = {"X-END-USER": "dora"}
    answer = gateway.request("POST", "/v1/images/generations", json_body=body, key="sk-users", headers=headers)
    assert answer.status == 429, "the header names the end user there as well"
    call = {"name": "default__tooled", "arguments": {"input": "Hello"}}
    headers |= {"accept": "application/json, text/event-stream"}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    answer = gateway.request("POST", "/mcp", json_body=body, key="sk-users", headers=headers)
    assert b"rate_limit_exceeded" in answer.body, "and where an agent is asked by MCP"


def test_the_larger_of_two_maxima_is_reserved(house: House) -> None:
    gateway, upstream = house
    before = len(upstream.requests)
    answer = ask(gateway, "maxima", max_completion_tokens=1, max_tokens=1000)
    assert answer.error["code"] == "insufficient_quota", "an upstream may obey either"
    assert len(upstream.requests) == before


def test_the_gateway_counts_its_refusals(house: House) -> None:
    gateway, _ = house
    assert [ask(gateway, "eager").status for _ in range(2)] == [200, 429]
    assert ask(gateway, "broke", max_tokens=90).status == 429
    text = gateway.get("/metrics/prometheus").body.decode()
    assert 'agent_gateway_limit_rejections_total{limit="requests",scope="key"}' in text
    assert 'agent_gateway_limit_rejections_total{limit="cost",scope="key"}' in text


@contextmanager
def shared_store(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """The environment that makes several gateways share their counters."""
    if kind == "redis":
        try:
            redis.Redis.from_url(REDIS_URL).ping()
        except redis.RedisError:
            pytest.skip("no Redis at GATEWAY_TEST_REDIS_URL")
        yield {"GATEWAY_REDIS_URL": REDIS_URL}
        return
    with database(kind, folder) as url:
        yield {"GATEWAY_DATABASE_URL": url}


@pytest.mark.parametrize("kind", ["redis", "postgresql", "sqlite"])
def test_two_processes_admit_exactly_as_many_as_the_limit_says(kind: str, tmp_path: Path) -> None:
    key = f"pair-{tmp_path.name[-24:]}-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"
    rules = security(**{key: "limits: {requests_per_minute: 25}"})
    with ExitStack() as stack:
        upstream = stack.enter_context(ScriptedUpstream())
        env = stack.enter_context(shared_store(kind, tmp_path))
        pair = [stack.enter_context(gateway_of(tmp_path / name, upstream, rules, **env)) for name in ("a", "b")]
        with ThreadPoolExecutor(60) as pool:
            answers = list(pool.map(lambda n: ask(pair[n % 2], key).status, range(60)))
        assert (answers.count(200), answers.count(429)) == (25, 35)


class Hook(http.server.BaseHTTPRequestHandler):
    """Keeps what it is sent; refuses the first delivery."""

    got: list[tuple[dict[str, str], bytes]]
    lock: threading.Lock

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.lock:  # two gateways may deliver at once
            is_first = not self.got
            self.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(503 if is_first else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def webhook() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    got: list[tuple[dict[str, str], bytes]] = []
    own = type("OwnHook", (Hook,), {"got": got, "lock": threading.Lock()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/budget?from=gateway", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_budget_alerts_are_signed_and_come_once_for_each_share_over_two_processes(tmp_path: Path) -> None:
    rules = security(alerted="limits: {cost_per_day_usd: 0.1}")
    with ExitStack() as stack:
        url, got = stack.enter_context(webhook())
        upstream = stack.enter_context(ScriptedUpstream())
        env = stack.enter_context(shared_store("sqlite", tmp_path))
        env |= {
            "GATEWAY_BUDGET_ALERT_URL": url,
            "GATEWAY_BUDGET_ALERT_SECRET": "shh",
            "GATEWAY_BUDGET_ALERT_SHARES": "0.5,0.8",
        }
        pair = [stack.enter_context(gateway_of(tmp_path / name, upstream, rules, **env)) for name in ("a", "b")]
        for number in range(4):
            upstream.enqueue(Answer(text="ok", usage=TWENTY))
            assert ask(pair[number % 2], "alerted", max_tokens=20).status == 200
        wait_for(lambda: len(got) >= 3, what="both alerts arrive, one of them at the second try")
        wait_for(
            lambda: sum(len(gateway.log_events("budget.alert.sent")) for gateway in pair) == 2,
            what="both are logged as sent",
        )
    told = {}
    for headers, body in got:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(b"shh", signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        told[headers["webhook-id"]] = json.loads(body)
    assert len(got) == 3
    assert sorted(one["data"]["share"] for one in told.values()) == [0.5, 0.8]
    assert {(one["type"], one["data"]["scope"], one["data"]["id"]) for one in told.values()} == {
        ("budget.threshold_reached", "key", "alerted")
    }


def test_without_redis_speed_is_open_and_money_closed(tmp_path: Path) -> None:
    rules = security(fast="limits: {requests_per_minute: 1}", rich="limits: {cost_per_day_usd: 5}")
    with (
        ScriptedUpstream() as upstream,
        gateway_of(tmp_path, upstream, rules, GATEWAY_REDIS_URL="redis://127.0.0.1:1/0") as gateway,
    ):
        assert [ask(gateway, "fast").status for _ in range(3)] == [200, 200, 200]
        answer = ask(gateway, "rich")
        assert (answer.status, answer.error["code"]) == (503, "limits_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert ask(gateway, "fast").status == 200
        gateway.logged("limit.store.unreachable")
        assert (
            'agent_gateway_limit_store_errors_total{store="redis"}' in gateway.get("/metrics/prometheus").body.decode()
        )
