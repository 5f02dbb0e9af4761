"""AC-6 and the keys: unknown, foreign, expired, missing, and what a chat key may not do; streamed and not."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from openai import OpenAI

from tests.support.house import ADMIN, CHAT, EXPIRED, NARROW, drop
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error, assert_model, assert_models
from tests.support.server import Gateway, StartFailed

CASES = {
    "unknown model": (CHAT, "default/nobody", 404, "model_not_found"),
    "unknown upstream model": (CHAT, "local/nobody", 404, "model_not_found"),
    "foreign model": (NARROW, "default/handoff", 403, "model_not_allowed"),
    "foreign upstream model": (NARROW, "local/test-model", 403, "model_not_allowed"),
    "foreign model by alias": (NARROW, "triage", 403, "model_not_allowed"),
    "foreign model in capitals": (NARROW, "DEFAULT/HandOff", 403, "model_not_allowed"),
    "expired key": (EXPIRED, "default/weatheragent", 401, "invalid_api_key"),
    "wrong key": ("sk-wrong-canary-0123456789", "default/weatheragent", 401, "invalid_api_key"),
    "no key": ("", "default/weatheragent", 401, "invalid_api_key"),
    "wrong key and unknown model": ("sk-wrong-canary-0123456789", "default/nobody", 401, "invalid_api_key"),
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_refusal_has_its_status_and_openais_shape(gateway: Gateway, case: str, streamed: bool) -> None:
    key, model, status, code = CASES[case]
    request = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": "say never"}]}
    answer = gateway.post("/v1/chat/completions", request, key=key)
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert_error(answer.json())
    assert answer.error["code"] == code
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == ("model" if status in (403, 404) else None)
    assert "canary" not in answer.body.decode()
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_official_client_raises_its_own_exceptions(gateway: Gateway, openai_client: Callable[..., OpenAI]) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with pytest.raises(openai.NotFoundError) as unknown:
        openai_client(gateway).chat.completions.create(model="default/nobody", **ask)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        openai_client(gateway, key=NARROW).chat.completions.create(model="default/handoff", **ask)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        openai_client(gateway, key="sk-wrong").chat.completions.create(model="default/handoff", **ask)


def test_models_are_listed_and_described_by_what_the_key_reaches(gateway: Gateway) -> None:
    listed = gateway.get("/v1/models", key=NARROW)
    assert_models(listed.json())
    assert {model["id"] for model in listed.json()["data"]} == {"default/weatheragent", "labs/research"}
    one = gateway.get("/v1/models/labs/research", key=NARROW)
    assert one.status == 200
    assert_model(one.json())
    assert one.json()["metadata"]["display_name"] == "Research desk"
    assert gateway.get("/v1/models/default/handoff", key=NARROW).status == 403
    assert gateway.get("/v1/models/default/nobody", key=NARROW).status == 404


def test_models_say_nothing_about_the_server_to_ordinary_keys(gateway: Gateway) -> None:
    text = gateway.get("/v1/models", key=CHAT).body.decode()
    assert ".py" not in text and str(gateway.home) not in text and "content_hash" not in text


def test_hidden_foreign_models_do_not_exist(start: Callable[..., Gateway]) -> None:
    gateway = start(
        prepare=lambda home: [drop(name, home / "agents") for name in ("WeatherAgent", "Handoff")],
        hide_foreign_models=True,
    )
    for streamed in (True, False):
        seen = []
        for model in ("default/handoff", "default/nobodyxx"):
            request = {"model": model, "stream": streamed, "messages": [{"role": "user", "content": "hi"}]}
            answer = gateway.post("/v1/chat/completions", request, key=NARROW)
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")
            seen.append(answer.error["message"].replace(model, "MODEL"))
        assert seen[0] == seen[1], "a hidden model answers word for word as one that does not exist"
    for path in ("/v1/models/default/handoff", "/v1/models/default/nobodyxx"):
        assert gateway.get(path, key=NARROW).status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/agents"), ("POST", "/agents/refresh"), ("GET", "/agents/errors"), ("GET", "/metrics")],
)
@pytest.mark.parametrize("prefix", ["", "/admin"])
def test_a_chat_key_does_not_reach_admin_routes(gateway: Gateway, method: str, path: str, prefix: str) -> None:
    answer = gateway.request(method, prefix + path, key=CHAT)
    assert answer.status == 403, answer.body
    assert answer.error["code"] == "insufficient_scope"
    assert_error(answer.json())
    assert gateway.request(method, prefix + path, key=ADMIN).status == 200


def test_two_different_keys_in_one_request_are_not_a_way_in(gateway: Gateway) -> None:
    request = {"model": "default/handoff", "messages": [{"role": "user", "content": "hi"}]}
    for bearer, other in ((NARROW, ADMIN), (ADMIN, NARROW), ("sk-wrong-0123456789", ADMIN)):
        answer = gateway.post("/v1/chat/completions", request, key=bearer, headers={"x-api-key": other})
        assert answer.status in (400, 401, 403), (bearer[:12], other[:12], answer.body)


def test_without_any_key_only_loopback_is_served_and_it_is_said_once(start: Callable[..., Gateway]) -> None:
    gateway = start(prepare=lambda home: drop("WeatherAgent", home / "agents"), security=False)
    assert gateway.get("/v1/models", key="").status == 200
    assert gateway.get("/v1/models", key="dev-secret").status == 200
    for headers in (
        {"host": "gateway.example.com"},
        {"x-forwarded-for": "203.0.113.9"},
        {"forwarded": "for=203.0.113.9"},
        {"host": "127.0.0.1.evil.example"},
    ):
        answer = gateway.get("/v1/models", key="", headers=headers)
        assert answer.status == 401, headers
        answer = gateway.get("/v1/models", key="dev-secret", headers=headers)
        assert answer.status == 401, headers


def test_production_without_a_key_does_not_start_and_says_how_to_make_one(start: Callable[..., Gateway]) -> None:
    with pytest.raises(StartFailed) as failure:
        start(env={"GATEWAY_ENV": "production"}, security=False)
    assert "gateway keys" in str(failure.value)
    assert "Traceback" not in str(failure.value)


def test_production_does_not_know_the_development_key(
    start: Callable[..., Gateway], upstream: ObedientUpstream
) -> None:
    gateway = start(env={"GATEWAY_ENV": "production"})
    assert gateway.get("/v1/models", key="dev-secret").status == 401
    assert gateway.get("/v1/models", key="").status == 401
    assert gateway.get("/v1/models", key=CHAT).status == 200


def test_a_broken_security_file_names_the_line_and_start_fails(start: Callable[..., Gateway]) -> None:
    def prepare(home: object) -> None:
        path = home / "security.yaml"  # type: ignore[operator]
        path.write_text(path.read_text(encoding="utf-8").replace("allow_agents:", "allow_agent:", 1), encoding="utf-8")

    with pytest.raises(StartFailed) as failure:
        start(prepare=prepare)
    assert "security.yaml:" in str(failure.value) and "allow_agents" in str(failure.value)
    assert "Traceback" not in str(failure.value)
