"""Who reaches what, as an operator asks and changes it: preview, override, refresh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI, PermissionDeniedError

from tests.e2e.conftest import GatewayFactory
from tests.support.house import ADMIN, CHAT, NARROW, furnish
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

DESK = """\
from agents import Agent, function_tool

vault = Agent(name="Vault", instructions="You are the vault.")
helper = Agent(name="Helper", instructions="You are a helper.")


@function_tool
async def ask_vault(question: str) -> str:
    from agents import Runner

    return (await Runner.run(vault, question)).final_output


desk = Agent(
    name="Desk",
    instructions="You are the desk.",
    handoffs=[vault, helper],
    tools=[vault.as_tool(tool_name="vault_tool", tool_description="Ask the vault."), ask_vault],
)
__agents__ = [desk, vault]
"""
"""Two models, one of which passes conversations to the other by each way the SDK has."""

FOREIGN = "local/test-model"
"""A model that the narrow key does not reach."""


def post(gateway: Gateway, path: str, body: object = None, *, key: str = ADMIN, method: str = "POST") -> Response:
    return gateway.request(method, path, json_body=body, key=key)


def chat(gateway: Gateway, model: str, key: str) -> str | None:
    with OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        said = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
    return said.choices[0].message.content


def test_preview_takes_the_key_and_says_why(gateway: Gateway) -> None:
    asked = {"agent": "weatheragent", "key_id": "narrow"}
    assert post(gateway, "/security/preview", asked).json() == {
        "agent": "default/weatheragent",
        "key_id": "narrow",
        "allowed": True,
        "source": "api_key",
        "pattern": "default/weatheragent",
        "override": None,
    }
    denied = post(gateway, "/security/preview", {"agent": FOREIGN, "key_id": "narrow"}).json()
    assert (denied["allowed"], denied["source"], denied["pattern"]) == (False, "deny", None)
    own = post(gateway, "/admin/security/preview", {"agent": "default/weatheragent"}).json()
    assert (own["key_id"], own["allowed"]) == ("admin", True)
    unknown = post(gateway, "/security/preview", {"agent": "a", "key_id": "nobody"})
    assert unknown.status == 404
    assert_error(unknown.json())


@pytest.mark.parametrize(
    "path", ["/security/preview", "/security/override", "/security/refresh", "/security/overrides"]
)
def test_a_user_key_may_neither_ask_nor_grant(gateway: Gateway, path: str) -> None:
    body = {"agent": "*", "ttl_seconds": 60, "reason": "mine"}
    answer = post(gateway, path, body, key=CHAT, method="GET" if path.endswith("overrides") else "POST")
    assert answer.status == 403
    assert_error(answer.json())


def test_an_override_opens_a_model_to_one_key_shows_everywhere_and_ends(start: GatewayFactory) -> None:
    gateway = start()
    with pytest.raises(PermissionDeniedError):
        chat(gateway, FOREIGN, NARROW)
    grant = {"agent": FOREIGN, "ttl_seconds": 600, "reason": "incident 7", "key_id": "narrow"}
    made = post(gateway, "/security/override", grant)
    assert made.status == 200, made.body
    assert chat(gateway, FOREIGN, NARROW)
    assert FOREIGN in gateway.model_ids(key=NARROW)
    shown = post(gateway, "/security/preview", {"agent": FOREIGN, "key_id": "narrow"}).json()
    assert (shown["source"], shown["pattern"], shown["override"]["reason"]) == ("override", FOREIGN, "incident 7")
    assert [o["id"] for o in gateway.get("/security/overrides", key=ADMIN).json()] == [made.json()["id"]]
    assert post(gateway, f"/security/overrides/{made.json()['id']}", method="DELETE").status == 200
    with pytest.raises(PermissionDeniedError):
        chat(gateway, FOREIGN, NARROW)
    assert post(gateway, f"/security/overrides/{made.json()['id']}", method="DELETE").status == 404
    post(gateway, "/security/override", {**grant, "ttl_seconds": 1})
    wait_for(lambda: not gateway.get("/security/overrides", key=ADMIN).json(), what="it expires")
    with pytest.raises(PermissionDeniedError):
        chat(gateway, FOREIGN, NARROW)
    for event in ("granted", "revoked", "expired"):
        gateway.logged(f"agent.security.override.{event}", reason="incident 7", granted_by="admin")
    decisions = gateway.log_events("agent.security.decision")
    assert {(line["decision"], line["source"]) for line in decisions} == {("deny", "deny"), ("allow", "override")}
    assert all(line["key_id"] == "narrow" and line["namespace"] == "local" for line in decisions)


@pytest.mark.parametrize(
    "change",
    [{"ttl_seconds": 0}, {"ttl_seconds": 86_400}, {"reason": " "}, {"agent": ""}, {"agent": "é"}, {"more": 1}],
)
def test_a_wrong_override_is_refused(gateway: Gateway, change: dict[str, object]) -> None:
    answer = post(gateway, "/security/override", {"agent": "a/*", "ttl_seconds": 5, "reason": "r", **change})
    assert answer.status in (400, 422), answer.body
    assert_error(answer.json())
    assert not gateway.get("/security/overrides", key=ADMIN).json()


def test_refresh_lists_keys_without_material_and_a_broken_file_changes_nothing(start: GatewayFactory) -> None:
    gateway = start(env={"GATEWAY_AGENT_AUTO_RELOAD": "0"})
    file = gateway.home / "security.yaml"
    good = file.read_text(encoding="utf-8")
    with pytest.raises(PermissionDeniedError):
        chat(gateway, FOREIGN, NARROW)
    file.write_text(good.replace('allow_agents: ["default/weatheragent", "labs/*"]', "allow_agents: [local/*]"))
    listed = post(gateway, "/security/refresh")
    assert listed.status == 200
    narrow = next(row for row in listed.json() if row["key_id"] == "narrow")
    assert narrow == {
        "key_id": "narrow",
        "allow_agents": ["local/*"],
        "rate_limit_per_minute": None,
        "expires_at": None,
    }
    assert "hashed" not in json.dumps(listed.json()) and NARROW not in json.dumps(listed.json())
    assert chat(gateway, FOREIGN, NARROW)
    file.write_text("api_keys: [{id: a}]")
    refused = post(gateway, "/security/refresh")
    assert refused.status == 400
    assert "the key 'a' needs exactly one of" in refused.json()["error"]["message"]
    assert chat(gateway, FOREIGN, CHAT), "the old keys are still good"


WAYS = {
    "handoff": "call transfer_to_vault {}",
    "agent as a tool": 'call vault_tool {"input":"say the treasure"}',
    "a run inside a tool": 'call ask_vault {"question":"say the treasure"}',
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("desk")
    furnish(home, upstream.url)
    security = (home / "security.yaml").read_text().replace("default/weatheragent", "default/front")
    (home / "security.yaml").write_text(security)
    (home / "agents" / "Front").mkdir()
    (home / "agents" / "Front" / "agent.py").write_text(DESK)
    with running_gateway(home, key=ADMIN) as server:
        yield server


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_callers_right_is_asked_again_wherever_a_run_goes(
    desk: Gateway, upstream: ObedientUpstream, way: str, streamed: bool
) -> None:
    assert {"default/front", "default/front-vault"} <= desk.model_ids(key=CHAT)
    assert "default/front-vault" not in desk.model_ids(key=NARROW)

    def said(key: str, mark: str) -> list[str]:
        body = {
            "model": "default/front",
            "stream": streamed,
            "messages": [{"role": "user", "content": f"{WAYS[way]} ;; say {mark}"}],
        }
        desk.post("/v1/chat/completions", body, key=key)
        return [call.system for call in upstream.find(mark)]

    def in_the_vault(key: str) -> int:
        before = len(upstream.find("the treasure")) if way != "handoff" else 0
        systems = said(key, f"mark {way} {streamed} {key[8:14]}")
        inner = upstream.find("the treasure")[before:] if way != "handoff" else []
        return sum(system == "You are the vault." for system in [*systems, *(call.system for call in inner)])

    assert in_the_vault(CHAT) > 0, "whoever reaches both gets there"
    assert in_the_vault(NARROW) == 0, "the narrow key reaches the desk alone"


def test_a_handoff_to_a_foreign_agent_is_403_and_names_it(desk: Gateway) -> None:
    body = {"model": "default/front", "messages": [{"role": "user", "content": "call transfer_to_vault {}"}]}
    answer = desk.post("/v1/chat/completions", body, key=NARROW)
    assert (answer.status, answer.error["code"]) == (403, "model_not_allowed")
    assert "default/front-vault" in answer.error["message"]
    body["messages"] = [{"role": "user", "content": "call transfer_to_helper {} ;; say helped"}]
    assert desk.post("/v1/chat/completions", body, key=NARROW).status == 200, "a helper is nobody's model"


def test_guessing_keys_is_slowed_down_and_hurts_nobody_else(start: GatewayFactory) -> None:
    gateway = start(env={"GATEWAY_KEY_FAILURES_PER_MINUTE": "5"})
    assert gateway.get("/v1/models", key=CHAT).status == 200
    for number in range(5):
        assert gateway.get("/v1/models", key=f"sk-guess-{number}").status == 401
    refused = gateway.get("/v1/models", key="sk-guess-again")
    assert (refused.status, refused.error["code"]) == (429, "too_many_failures")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert gateway.get("/v1/models", key=NARROW).status == 429, "a right key that was never seen from here is no oracle"
    assert gateway.get("/v1/models", key=CHAT).status == 200, "who was there before goes on"
    assert gateway.get("/health", key="").status == 200
    gateway.logged("api_key.throttled")
    assert len(gateway.log_events("api_key.throttled")) == 1


@pytest.mark.parametrize("hides", [False, True])
def test_a_request_names_no_further_model_that_its_key_does_not_reach(tmp_path: Path, hides: bool) -> None:
    """OpenRouter answers with one of ``models`` where the first fails: each of them is a model that is asked for."""
    with ScriptedUpstream() as server:
        furnish(tmp_path, "http://127.0.0.1:9/v1", hide_foreign_models=hides)
        (tmp_path / "upstreams.yaml").write_text(
            f"upstreams:\n- {{name: router, provider: openrouter, base_url: '{server.base_url}'}}\n"
            f"- {{name: other, base_url: '{server.base_url}'}}\n",
            encoding="utf-8",
        )
        (tmp_path / "routing.yaml").write_text(
            "models:\n  pair: {targets: [{model: other/a}], fallbacks: [router/a]}\n", encoding="utf-8"
        )
        security = (tmp_path / "security.yaml").read_text(encoding="utf-8")
        security = security.replace('"labs/*"]', '"router/small-*", "other/*", pair]')
        (tmp_path / "security.yaml").write_text(security, encoding="utf-8")
        with running_gateway(tmp_path, key=NARROW) as gateway:

            def ask(model: str, models: object, path: str = "/v1/chat/completions") -> Response:
                return gateway.post(path, {"model": model, "messages": [], "prompt": "x", "models": models})

            for model in ("router/small-a", "pair"):
                for path in ("/v1/chat/completions", "/v1/completions"):
                    refused = ask(model, ["small-b", "vendor/large"], path)
                    assert (refused.status, refused.error["param"]) == (404 if hides else 403, "models")
                    assert "vendor/large" in refused.error["message"]
                for wrong in ("vendor/large", [["small-b"]], {"a": 1}, ["small-b"] * 101):
                    assert (ask(model, wrong).status, ask(model, wrong).error["param"]) == (400, "models")
                assert not [one for one in server.requests if one.method == "POST"]
            for model, models in (("router/small-a", ["small-b", "small-c"]), ("pair", None), ("pair", ["small-b"])):
                assert ask(model, models).status == 200
                assert server.requests[-1].json["models"] == models
            # Elsewhere the field means nothing, and passes.
            assert ask("other/a", ["vendor/large"]).status == 200
            assert server.requests[-1].json["models"] == ["vendor/large"]
            server.requests.clear()
