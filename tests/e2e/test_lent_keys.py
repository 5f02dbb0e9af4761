"""Keys that callers bring for upstreams (`allow_server_credentials`): for their own calls, and told nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.house import ADMIN, CHAT, UPSTREAM_KEY, write_agent
from tests.support.http import Response
from tests.support.scripted_answers import LAST, STREAM_HEAD, Answer, sse, status
from tests.support.scripted_upstream import Request, ScriptedUpstream
from tests.support.server import Gateway, StartFailed, running_gateway
from tests.support.waiting import wait_for

OWN = 'sk-own-canary-"hh\\hh-hhhhhhhhhhhhhhhhhhhhhhhh'
"""With what JSON escapes: a mask that looks for the raw text alone would miss it."""

OPERATORS = "sk-canary-operator-iiiiiiiiiiiiiiiiiiiiiiii"

UPSTREAMS = f"""\
version: 1
default_upstream: mixed
upstreams:
  - {{name: own-only, base_url: URL, models: [m, e, tts-1], default_model: m, allow_server_credentials: never}}
  - {{name: mixed, base_url: URL, api_keys: [{UPSTREAM_KEY}, {UPSTREAM_KEY}2], models: [m, n], default_model: m,
      allow_server_credentials: fallback}}
  - {{name: azure, provider: azure, base_url: URL, headers: {{Api-Key: {OPERATORS}, x-team: a}}, models: [m],
      allow_server_credentials: fallback}}
  - {{name: plain, base_url: URL, api_key: {UPSTREAM_KEY}, models: [m]}}
aliases: {{mine: own-only/m}}
"""
ROUTING = """\
version: 1
breaker: {failures: 2}
models:
  perhaps: {targets: [{model: own-only/m}, {model: plain/m}]}
  nobody: {targets: [{model: own-only/m}, {model: own-only/e}]}
  rescued: {targets: [{model: own-only/m}], fallbacks: [plain/m]}
  hasty: {targets: [{model: mixed/m}, {model: plain/m}]}
"""
CACHE = "models: [{match: 'mixed/*', ttl_s: 60}]\n"
SECURITY = f"""\
version: 1
api_keys:
  - id: admin
    hashed_key: "{hashlib.sha256(ADMIN.encode()).hexdigest()}"
    allow_agents: ["*"]
    scopes: [chat, admin]
  - {{id: chat, hashed_key: "{hashlib.sha256(CHAT.encode()).hexdigest()}", allow_agents: ["*"]}}
"""


class Stage:
    """One gateway over one upstream that is known under several names."""

    def __init__(self, gateway: Gateway, server: ScriptedUpstream) -> None:
        self.gateway, self.server = gateway, server

    def ask(self, model: str, *, said: str = "Hi", headers: Mapping[str, str] | None = None, **body: Any) -> Response:
        messages = [{"role": "user", "content": said}]
        body = {"model": model, "messages": messages, **body}
        return self.gateway.post("/v1/chat/completions", body, key=CHAT, headers=headers)

    def asked(self, since: int) -> list[Request]:
        return self.server.requests[since:]

    def shown(self, since: int) -> list[str | None]:
        """The key that each request showed."""
        return [one.headers.get("authorization") for one in self.asked(since)]

    def rows(self, request_id: str) -> list[dict[str, Any]]:
        def find() -> list[dict[str, Any]]:
            data = self.gateway.get("/usage?group_by=none&limit=50").json()["data"]
            return [row for row in data if row["request_id"] == request_id]

        wait_for(find, what="the row is written")
        return find()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("lent")
    with ScriptedUpstream() as server:
        (home / "upstreams.yaml").write_text(UPSTREAMS.replace("URL", server.base_url), encoding="utf-8")
        (home / "routing.yaml").write_text(ROUTING, encoding="utf-8")
        (home / "cache.yaml").write_text(CACHE, encoding="utf-8")
        (home / "security.yaml").write_text(SECURITY, encoding="utf-8")
        inner = 'Agent(name="Inner", model="mixed/n").as_tool(tool_name="ask", tool_description="Ask.")'
        write_agent(home / "agents", "Lender", "You lend.", extra='__gateway__ = {"model": "mine"}\n', tools=inner)
        env = {
            "GATEWAY_LOG_LEVEL": "debug",
            "GATEWAY_USAGE_FLUSH_S": "0.1",
            "GATEWAY_CACHE_CONFIG": str(home / "cache.yaml"),
        }
        with running_gateway(home, env=env, key=ADMIN) as gateway:
            yield Stage(gateway, server)
            text = gateway.log_text()
            canaries = ("own-canary", OPERATORS, UPSTREAM_KEY)
            assert [canary for canary in canaries if canary in text] == []


@pytest.fixture
def mark(stage: Stage) -> int:
    stage.server.clear()
    return len(stage.server.requests)


def lent(upstream: str, key: str = OWN) -> dict[str, str]:
    return {f"X-Cred-{upstream}-Api-Key": key}


def test_without_a_key_of_the_callers_nothing_goes_out(stage: Stage, mark: int) -> None:
    for model in ("own-only/m", "mine", "nobody"):
        answer = stage.ask(model, headers=lent("mixed"))
        assert answer.status == 401
        assert answer.error["code"] == "upstream_key_missing"
        assert "'x-cred-own_only-api-key'" in answer.error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert "www-authenticate" not in answer.headers
    assert stage.asked(mark) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_is_made_with_the_callers_key(
    stage: Stage, mark: int, openai_client: Callable[..., OpenAI], streamed: bool
) -> None:
    client = openai_client(stage.gateway, key=CHAT).with_options(
        default_headers=lent("own_only") | {"x-request-id": f"with-own-{streamed}"}
    )
    answer = client.chat.completions.create(
        model="own-only/m", messages=[{"role": "user", "content": "Hi"}], stream=streamed
    )
    text = "".join(c.choices[0].delta.content or "" for c in answer if c.choices) if streamed else ""
    assert text == "You said: Hi" or not streamed
    assert stage.shown(mark) == [f"Bearer {OWN}"]
    assert not [name for name in stage.asked(mark)[0].headers if name.startswith("x-cred")]
    (row,) = stage.rows(f"with-own-{streamed}")
    assert (row["byok"], row["upstream"], row["input_tokens"]) == (True, "own-only", 11)


def test_the_gateways_key_serves_who_brings_none(stage: Stage, mark: int) -> None:
    counted = "agent_gateway_credential_operations"
    before = stage.gateway.counted(counted).get('operation="lent"', 0)
    for headers in (None, lent("mixed"), lent("own_only")):
        assert stage.ask("mixed/m", headers={**(headers or {}), "x-request-id": "fall-back"}).status == 200
    assert stage.gateway.counted(counted)['operation="lent"'] == before + 1
    shown = stage.shown(mark)
    assert shown[1] == f"Bearer {OWN}"
    assert {shown[0], shown[2]} <= {f"Bearer {UPSTREAM_KEY}", f"Bearer {UPSTREAM_KEY}2"}
    wait_for(lambda: len(stage.rows("fall-back")) == 3)
    assert sorted(row["byok"] for row in stage.rows("fall-back")) == [False, False, True]
    total = stage.gateway.get("/usage?upstream=mixed").json()["data"][0]
    assert 0 < total["byok_calls"] < total["model_calls"]
    assert total["byok_cost_usd"] == "0"


def test_where_the_operator_wrote_the_key_into_a_header_of_its_own(stage: Stage, mark: int) -> None:
    assert stage.ask("azure/m").status == stage.ask("azure/m", headers=lent("azure")).status == 200
    assert [one.headers["api-key"] for one in stage.asked(mark)] == [OPERATORS, OWN]
    assert [one.headers["x-team"] for one in stage.asked(mark)] == ["a", "a"]


def test_every_surface_takes_them(stage: Stage, mark: int) -> None:
    gateway, headers = stage.gateway, lent("own_only")
    assert gateway.post("/v1/embeddings", {"model": "own-only/e", "input": "x"}, headers=headers).status == 200
    stage.server.enqueue(Answer(body=b"RIFF", headers={"content-type": "audio/wav"}))
    speech = {"model": "own-only/tts-1", "input": "x", "voice": "v"}
    assert gateway.post("/v1/audio/speech", speech, headers=headers).body == b"RIFF"
    stage.server.enqueue(Answer(body={"object": "list", "data": []}))
    whole = {**headers, "x-gateway-upstream": "own-only"}
    assert gateway.get("/v1/files", headers=whole).json()["data"] == []
    assert stage.shown(mark) == [f"Bearer {OWN}"] * 3
    for answer in (
        gateway.post("/v1/audio/speech", speech),
        gateway.get("/v1/files", headers={"x-gateway-upstream": "own-only"}),
    ):
        assert answer.error["code"] == "upstream_key_missing"
    assert len(stage.asked(mark)) == 3


def test_agents_and_those_they_ask_call_models_with_the_keys_of_their_run(stage: Stage, mark: int) -> None:
    headers = {**lent("own_only"), **lent("mixed", "sk-other-canary-jjjjjjjjjjjj"), "x-request-id": "by-agent"}
    answer = stage.ask("default/lender", headers=headers)
    assert answer.status == 200, answer.body
    assert stage.shown(mark) == [f"Bearer {OWN}", "Bearer sk-other-canary-jjjjjjjjjjjj", f"Bearer {OWN}"]
    wait_for(lambda: len(stage.rows("by-agent")) == 4, what="three calls and a run are written")
    assert sorted((row["upstream"] or "", row["byok"]) for row in stage.rows("by-agent")) == [
        ("", False), ("mixed", True), ("own-only", True), ("own-only", True),
    ]  # fmt: skip
    answer = stage.ask("default/lender")
    assert (answer.status, answer.error["code"]) == (401, "upstream_key_missing")


def test_routing_leaves_out_who_needs_a_key_that_did_not_come(stage: Stage, mark: int) -> None:
    served = [
        stage.ask(model, headers=headers).headers["x-gateway-upstream"]
        for model in ("perhaps", "rescued")
        for headers in (None, lent("own_only"))
    ]
    assert served == ["plain", "own-only", "plain", "own-only"]
    assert stage.shown(mark)[0] == f"Bearer {UPSTREAM_KEY}"


def test_a_refused_key_is_told_its_owner_and_hurts_nobody_else(stage: Stage, mark: int) -> None:
    """Twice is enough for a breaker, once for the gateway's own key to be put aside, and a 429 for a cool-down."""
    for code in (401, 403, 401):
        stage.server.enqueue(status(code, error={"message": f"bad {OWN}", "code": "invalid_api_key"}))
        answer = stage.ask("mixed/m", headers=lent("mixed"))
        assert (answer.status, answer.error["code"]) == (401, "upstream_key_refused")
        assert "'x-cred-mixed-api-key'" in answer.error["message"]
        assert "canary" not in str(answer.body)
    for _ in range(3):
        stage.server.enqueue(status(429, retry_after="30", error={"message": f"slow {OWN}", "code": "x"}))
        answer = stage.ask("hasty", headers=lent("mixed"))
        assert (answer.status, answer.headers["retry-after"]) == (429, "30")
        assert answer.error["message"] == "slow ***"
    assert len(stage.asked(mark)) == 6, "none is tried again, nor elsewhere"
    assert stage.gateway.log_events("upstream.key.aside") == []
    assert stage.gateway.log_events("routing.breaker.opened") == []
    assert stage.ask("hasty").headers["x-gateway-upstream"] == "mixed"
    assert {stage.ask("mixed/n", said=str(n)).status for n in range(4)} == {200}
    assert set(stage.shown(mark)[7:]) == {f"Bearer {UPSTREAM_KEY}", f"Bearer {UPSTREAM_KEY}2"}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_refusal_that_comes_with_status_200_is_told_its_owner_as_well(
    stage: Stage, mark: int, streamed: bool
) -> None:
    refusal = {"error": {"message": f"bad {OWN}", "code": 401}}
    asking = ("/v1/chat/completions", "/v1/images/generations")
    for path in asking:
        events = Answer(steps=lambda streamed: [STREAM_HEAD, *sse(refusal), LAST])
        stage.server.enqueue(events if streamed else Answer(body=refusal))
        body = {"model": "mixed/m", "messages": [], "prompt": "x", "stream": streamed}
        answer = stage.gateway.post(path, body, key=CHAT, headers=lent("mixed"))
        said = answer.body.decode()
        assert "upstream_key_refused" in said, said
        assert "'x-cred-mixed-api-key' (401)" in said
        assert "canary" not in str(answer.body)
        assert path != asking[0] or answer.status == 401


def test_a_failure_of_the_upstream_is_everybodys(stage: Stage, mark: int) -> None:
    stage.server.enqueue(status(500))
    answer = stage.ask("perhaps", headers=lent("own_only"))
    assert (answer.status, answer.headers["x-gateway-upstream"]) == (200, "plain")
    assert stage.shown(mark)[0] == f"Bearer {OWN}"
    assert stage.shown(mark)[-1] == f"Bearer {UPSTREAM_KEY}"


def test_answers_to_keys_are_not_kept_for_others(stage: Stage, mark: int) -> None:
    for headers in (lent("mixed"), lent("mixed"), None, None):
        answer = stage.ask("mixed/n", said="kept?", headers=headers)
        assert answer.headers["x-cache"] == "bypass"
    assert len(stage.asked(mark)) == 4


def test_a_header_that_makes_no_sense_is_refused(stage: Stage, mark: int) -> None:
    answer = stage.ask("mixed/m", headers=lent("mixed", "x" * 9_000))
    assert (answer.status, answer.error["code"]) == (400, "invalid_header")
    assert stage.ask("plain/m", headers=lent("plain")).status == 200
    assert stage.shown(mark) == [f"Bearer {UPSTREAM_KEY}"]


def test_the_client_knows_the_error(stage: Stage, openai_client: Callable[..., OpenAI]) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        openai_client(stage.gateway, key=CHAT).chat.completions.create(model="mine", messages=[])
    assert refused.value.code == "upstream_key_missing"


def test_an_upstream_without_a_key_of_ours_is_healthy_when_it_asks_for_one(tmp_path: Path) -> None:
    with ScriptedUpstream() as server:
        server.enqueue_listings(*[status(401)] * 1_000)
        text = "upstreams: [{name: a, base_url: URL, allow_server_credentials: never}, {name: b, base_url: URL}]"
        (tmp_path / "upstreams.yaml").write_text(text.replace("URL", server.base_url), encoding="utf-8")
        with running_gateway(tmp_path, env={"GATEWAY_API_KEY": ADMIN}, key=ADMIN) as gateway:

            def healthy() -> dict[str, bool | None]:
                return {row["name"]: row["healthy"] for row in gateway.get("/upstreams").json()}

            wait_for(lambda: healthy() == {"a": True, "b": False}, what="both have been asked")
            assert {row["upstream"] for row in gateway.log_events("upstream.models.failed")} <= {"b"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("provider: demo, allow_server_credentials: never", "'demo' takes no keys"),
        ("base_url: 'http://127.0.0.1:9/v1', allow_server_credentials: sometimes", "sometimes"),
        (
            "base_url: 'http://127.0.0.1:9/v1', allow_server_credentials: never}, {name: A, "
            "base_url: 'http://127.0.0.1:9/v1', allow_server_credentials: fallback",
            "'a' and 'A' would both take",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(tmp_path: Path, fields: str, said: str) -> None:
    (tmp_path / "upstreams.yaml").write_text(f"upstreams: [{{name: a, {fields}}}]", encoding="utf-8")
    with pytest.raises(StartFailed, match=said), running_gateway(tmp_path, env={"GATEWAY_API_KEY": ADMIN}, key=ADMIN):
        pass
