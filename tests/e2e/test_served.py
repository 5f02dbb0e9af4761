"""What one process promises, by two workers of `gateway serve`: refusals, the one door, refreshes, keys, states."""

from __future__ import annotations

import hashlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_every_route import METADATA, PUBLIC, concrete, table_rows
from tests.e2e.test_workers import CALL, serve, serving
from tests.support.house import ADMIN, write_agent
from tests.support.schema import assert_error
from tests.support.scripted_answers import Answer, Call
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

WORKERS = 2
TRIES = 8
"""Requests, each on a connection of its own, after which every worker has most likely answered one."""

STALL_S = 4
TOOLS = """import time

from agents import function_tool
from openai import AsyncOpenAI


@function_tool
async def ask_again(text: str) -> str:
    async with AsyncOpenAI() as client:
        answer = await client.chat.completions.create(
            model="up/m", messages=[{"role": "user", "content": text}]
        )
    return answer.choices[0].message.content


@function_tool
async def stand_still() -> str:
    time.sleep(120)
    return "never"

"""

KEYS = {
    "chat": "allow_agents: ['*']",
    "narrow": "allow_agents: ['nothing/*']",
    "expired": "allow_agents: ['*'], expires_at: '2020-01-01'",
    "limited": "allow_agents: ['*'], limits: {requests_per_minute: 3}",
}


def write_security(home: Path, keys: dict[str, str]) -> None:
    lines = ["version: 1", "api_keys:"]
    lines.append(f"  - {{id: admin, hashed_key: '{digest(ADMIN)}', scopes: [chat, admin], allow_agents: ['*']}}")
    lines += [f"  - {{id: {name}, hashed_key: '{digest('sk-' + name)}', {rest}}}" for name, rest in keys.items()]
    (home / "security.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, upstream: ScriptedUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("served")
    (home / "routing.yaml").write_text("health_interval_s: 3600\n", encoding="utf-8")
    (home / "upstreams.yaml").write_text(
        f"version: 1\nupstreams: [{{name: up, base_url: '{upstream.base_url}', "
        "models: [m, endless], default_model: m}]\n",
        encoding="utf-8",
    )
    write_security(home, KEYS)
    (home / "tools.yaml").write_text("version: 1\ntools: []\n", encoding="utf-8")
    write_agent(home / "agents", "Caller", "Help.", extra=TOOLS, tools="ask_again, stand_still")
    env = {
        "GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"),
        "GATEWAY_KEY_FAILURES_PER_MINUTE": "100000",
        "GATEWAY_SHUTDOWN_DRAIN_S": "2",
        "GATEWAY_WORKER_TIMEOUT_S": str(STALL_S),
    }
    with running_gateway(home, env=env, key=ADMIN, command=serve(WORKERS)) as gateway:
        serving(gateway, WORKERS)
        wait_for(lambda: in_workers(gateway, "default/caller") == ["ready", "ready"], what="agents")
        yield gateway


def in_workers(gateway: Gateway, agent: str) -> list[str]:
    """How an agent is in each worker, by slot."""
    return [here["status"] for here in gateway.listing()[agent]["metadata"]["workers"]]


def ask(gateway: Gateway, key: str, **fields: Any) -> Any:
    return gateway.post("/v1/chat/completions", CALL | fields, key=key)


def statuses(gateway: Gateway, key: str) -> set[int]:
    """Statuses of a call in every worker."""
    answers = gateway.ask_each_worker(WORKERS, "POST", "/v1/chat/completions", json_body=CALL, key=key)
    return {answer.status for answer in answers.values()}


@pytest.mark.parametrize("streamed", [True, False])
def test_refusals_have_their_status_whichever_worker_is_asked(served: Gateway, streamed: bool) -> None:
    for key, model, status, code in (
        ("sk-chat", "nobody/m", 404, "model_not_found"),
        ("sk-narrow", "up/m", 403, "model_not_allowed"),
        ("sk-expired", "up/m", 401, "invalid_api_key"),
    ):
        for _ in range(TRIES):
            answer = ask(served, key, model=model, stream=streamed)
            assert (answer.status, answer.error["code"]) == (status, code)
            assert_error(answer.json())


def test_a_limit_holds_over_the_workers_in_both_modes(served: Gateway) -> None:
    answers = [ask(served, "sk-limited", stream=number % 2 == 0) for number in range(12)]
    assert [answer.status for answer in answers].count(200) == 3
    refused = [answer for answer in answers if answer.status != 200]
    assert {(answer.status, answer.error["code"]) for answer in refused} == {(429, "rate_limit_exceeded")}


def test_every_route_but_the_public_ones_needs_a_key(served: Gateway) -> None:
    for method, path in sorted(set(table_rows())):
        public = 404 if (method, path) in METADATA else 200
        expected = public if (method, path) in PUBLIC else 401
        assert served.request(method, concrete(path), key="").status == expected, (method, path)
        hidden = served.request(method, concrete(path).rstrip("/") + "/.well-known/agent.json", key="")
        assert hidden.status == 401, (method, path)


def test_bodies_have_ten_megabytes_and_uploads_fifty(served: Gateway) -> None:
    def declared(path: str, kind: str, size: int) -> Any:
        headers = {"content-type": kind, "content-length": str(size), "expect": "nothing"}
        return served.request("POST", path, headers=headers, key=ADMIN)

    form = "multipart/form-data; boundary=x"
    assert declared("/v1/chat/completions", "application/json", 10_000_001).status == 413
    answer = declared("/v1/audio/transcriptions", form, 50_000_001)
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert "50,000,000" in answer.error["message"]


def test_security_is_read_again_in_every_worker(served: Gateway) -> None:
    assert statuses(served, "sk-fresh") == {401}
    write_security(served.home, KEYS | {"fresh": "allow_agents: ['up/*']"})
    answer = served.post("/security/refresh")
    assert (answer.status, answer.headers["x-gateway-workers"]) == (200, str(WORKERS)), answer.body
    assert "fresh" in {key["key_id"] for key in answer.json()}
    assert statuses(served, "sk-fresh") == {200}
    (served.home / "security.yaml").write_text("version: 1\napi_keys: 3\n", encoding="utf-8")
    wrong = served.post("/security/refresh")
    assert (wrong.status, wrong.error["code"]) == (400, "configuration_error")
    assert "security.yaml:2" in wrong.error["message"]
    assert statuses(served, "sk-fresh") == {200}
    write_security(served.home, KEYS)
    assert served.post("/security/refresh").status == 200
    assert statuses(served, "sk-fresh") == {401}


def test_tools_are_read_again_in_every_worker(served: Gateway) -> None:
    def names() -> set[tuple[str, ...]]:
        answers = served.ask_each_worker(WORKERS, "GET", "/tools").values()
        return {tuple(tool["name"] for tool in answer.json()["data"]) for answer in answers}

    assert names() == {()}
    tool = "{name: shout, provider: http, description: Shouts., method: GET, url: 'http://127.0.0.1:1/x'}"
    (served.home / "tools.yaml").write_text(f"version: 1\ntools:\n  - {tool}\n", encoding="utf-8")
    answer = served.post("/tools/refresh")
    assert (answer.status, answer.headers.get("x-gateway-workers")) == (200, str(WORKERS)), answer.body
    assert names() == {("shout",)}
    (served.home / "tools.yaml").write_text("version: 1\ntools: 3\n", encoding="utf-8")
    wrong = served.post("/tools/refresh")
    (served.home / "tools.yaml").write_text("version: 1\ntools: []\n", encoding="utf-8")
    assert (wrong.status, wrong.error["code"]) == (400, "configuration_error")
    assert "tools.yaml:2" in wrong.error["message"]
    assert names() == {("shout",)}


def test_a_made_key_opens_every_worker_and_its_end_cuts_the_streams_of_all(
    served: Gateway, upstream: ScriptedUpstream
) -> None:
    made = served.post("/security/keys", {"id": "guest", "allow_agents": ["up/*"]})
    assert made.status == 201, made.body
    key = made.json()["key"]
    wait_for(lambda: statuses(served, key) == {200}, what="every worker knows the key")
    upstream.script("endless", Answer(text="one two three", gate=upstream.gate()))
    body = CALL | {"model": "up/endless", "stream": True}
    with ExitStack() as stack:

        def begun() -> Iterator[str] | None:
            """A stream that has begun; none where the worker that was asked does not know the key yet."""
            events = stack.enter_context(served.stream("POST", "/v1/chat/completions", json_body=body, key=key)).data()
            first = next(events, None)
            return events if first is not None and "error" not in json.loads(first) else None

        streams = [wait_for(begun, what="the worker that is asked knows the key") for _ in range(TRIES)]
        revoked = time.monotonic()
        assert served.request("DELETE", "/security/keys/guest").status == 200
        ends = [json.loads(list(events)[-1]) for events in streams]
        assert {end["error"]["code"] for end in ends} == {"invalid_api_key"}
        assert time.monotonic() - revoked < 20, "long before the streams end by themselves"
    wait_for(lambda: statuses(served, key) == {401}, what="every worker refuses the key")


def test_an_override_begins_and_ends_in_every_worker(served: Gateway) -> None:
    assert statuses(served, "sk-narrow") == {403}
    grant = {"agent": "up/*", "ttl_seconds": 600, "reason": "test", "key_id": "narrow"}
    made = served.post("/security/override", grant)
    assert made.status == 200, made.body
    assert statuses(served, "sk-narrow") == {200}
    listed = [[item["id"] for item in served.get("/security/overrides").json()] for _ in range(TRIES)]
    assert listed == [[made.json()["id"]]] * TRIES
    assert served.request("DELETE", f"/security/overrides/{made.json()['id']}").status == 200
    assert statuses(served, "sk-narrow") == {403}


def test_an_upstreams_health_is_that_of_all_workers(served: Gateway) -> None:
    served.post("/upstreams/refresh")
    for _ in range(TRIES):
        (found,) = [item for item in served.get("/upstreams").json() if item["name"] == "up"]
        assert [(worker["slot"], worker["healthy"]) for worker in found["workers"]] == [(0, True), (1, True)]
        assert found["last_checked"] == max(worker["last_checked"] for worker in found["workers"])


def test_an_agent_that_one_worker_cannot_load_is_shown_so_by_all(served: Gateway) -> None:
    claim = served.home / "claimed"
    # Only one worker can make the file; pre-flights have another parent than the supervisor.
    once = (
        "import os\n\n"
        f"if os.getppid() == {served.process.pid}:\n"
        f"    os.close(os.open({str(claim)!r}, os.O_CREAT | os.O_EXCL))\n"
    )
    write_agent(served.agents, "Single", "Help.", extra=once)
    answer = served.post("/agents/refresh", timeout_s=60)
    assert (answer.status, answer.error["code"]) == (503, "workers_disagree"), answer.body
    for _ in range(TRIES):
        found = served.listing()["default/single"]
        here = found["metadata"]["workers"]
        assert (found["status"], found["metadata"]["workers_agree"]) == ("error", False)
        assert sorted(worker["status"] for worker in here) == ["error", "ready"]
        assert [worker["slot"] for worker in here] == [0, 1]
        assert "FileExistsError" in found["error"]
    write_agent(served.agents, "Single", "Help more.")
    answer = served.post("/agents/refresh", timeout_s=60)
    assert answer.status == 200, answer.body
    (record,) = [item for item in answer.json() if item["name"] == "single"]
    assert (record["status"], record["metadata"]["workers_agree"]) == ("ready", True)
    assert {worker["status"] for worker in record["metadata"]["workers"]} == {"ready"}


def test_an_agents_own_client_reaches_the_worker_it_runs_in(served: Gateway, upstream: ScriptedUpstream) -> None:
    for number in range(TRIES):
        upstream.enqueue(
            Answer(calls=[Call("ask_again", {"text": f"question {number}"})]),
            Answer(text=f"inner {number}"),
            Answer(text=f"outer {number}"),
        )
        answer = ask(served, "sk-chat", model="default/caller")
        assert (answer.status, answer.json()["choices"][0]["message"]["content"]) == (200, f"outer {number}")
        told = upstream.requests[-1].json["messages"][-1]
        assert (told["role"], told["content"]) == ("tool", f"inner {number}"), "another worker does not know its key"


def test_a_worker_whose_loop_stands_still_is_replaced(served: Gateway, upstream: ScriptedUpstream) -> None:
    before = serving(served, WORKERS)
    upstream.enqueue(Answer(calls=[Call("stand_still", {})]))
    outcome: list[str] = []

    def call() -> None:
        try:
            outcome.append(str(ask(served, "sk-chat", model="default/caller").status))
        except (OSError, http.client.HTTPException) as error:
            outcome.append(type(error).__name__)

    thread = threading.Thread(target=call)
    thread.start()
    (stalled,) = served.logged("worker.stalled")
    assert (stalled["pid"], stalled["after_s"]) == (before[stalled["slot"]], STALL_S)
    after = wait_for(
        lambda: (now := serving(served, WORKERS)) and now[stalled["slot"]] != stalled["pid"] and now,
        what="another has its slot",
    )
    other = 1 - stalled["slot"]
    assert after[other] == before[other]
    thread.join(60)
    assert outcome and outcome != ["200"]
    (died,) = served.logged("worker.died")
    assert "SIGKILL" in died["message"]
