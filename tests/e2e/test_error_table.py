"""The table of `docs/references/errors.md`: what each kind of failure is at the front door, plain and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, NARROW
from tests.support.http import Response
from tests.support.schema import assert_error
from tests.support.server import Gateway

RAW = "local/test-model"
INVALID = "invalid_request_error"


def chat(text: object = "say hi", *, model: str = RAW, key: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]} | fields
    return {"method": "POST", "path": "/v1/chat/completions", "key": key, "json_body": body}


def route(method: str, path: str, body: object = None, *, key: str = ADMIN) -> dict[str, Any]:
    return {"method": method, "path": path, "key": key, "json_body": body}


TABLE: dict[str, tuple[dict[str, Any], int, str, str | None, str | None]] = {
    "a field is missing": (
        chat() | {"json_body": {"model": "default/weatheragent"}},
        400,
        INVALID,
        "missing_required_parameter",
        "messages",
    ),
    "a field has the wrong type": (
        chat(model="default/weatheragent", temperature="warm"),
        400,
        INVALID,
        None,
        "temperature",
    ),
    "a field is not supported": (
        chat(model="default/weatheragent", n=2),
        400,
        INVALID,
        "unsupported_value",
        "n",
    ),
    "a body of an admin route lacks a field": (route("POST", "/security/preview", {}), 400, INVALID, None, "agent"),
    "a body is no object": (route("POST", "/security/preview", [1]), 400, INVALID, None, None),
    "an input guardrail refuses": (
        chat("say x ;; homework", model="default/inputguardrail"),
        400,
        INVALID,
        "content_policy_violation",
        "messages",
    ),
    "no key": (chat(key=""), 401, INVALID, "invalid_api_key", None),
    "a wrong key": (chat(key="sk-wrong"), 401, INVALID, "invalid_api_key", None),
    "a model out of reach": (chat(key=NARROW), 403, INVALID, "model_not_allowed", "model"),
    "a scope is missing": (route("GET", "/agents", key=CHAT), 403, INVALID, "insufficient_scope", None),
    "an unknown path": (route("GET", "/nothing"), 404, INVALID, "not_found", None),
    "an unknown model": (chat(model="default/nobody"), 404, INVALID, "model_not_found", "model"),
    "an unknown key": (route("DELETE", "/security/keys/nobody"), 404, INVALID, "not_found", None),
    "a wrong method": (route("PUT", "/agents"), 405, INVALID, "method_not_allowed", None),
    "it is there already": (route("POST", "/security/keys", {"id": "chat"}), 409, INVALID, "conflict", "id"),
    "a person must approve": (
        chat('call delete_account {"name":"Ada"}', model="default/approval"),
        409,
        INVALID,
        "approval_required",
        None,
    ),
    "the author's code raises": (
        chat("call hard", model="default/tooltrouble"),
        502,
        "server_error",
        "agent_error",
        None,
    ),
    "the model answers nonsense": (
        chat("say no json", model="default/structured"),
        502,
        "server_error",
        "model_behavior_error",
        None,
    ),
    "the upstream refuses the request": (
        chat("[status=400 code=context_length_exceeded param=messages] say x", model="default/weatheragent"),
        400,
        INVALID,
        "context_length_exceeded",
        "messages",
    ),
    "the upstream limits": (
        chat("[status=429 retry=7] say x", model="default/weatheragent"),
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
        None,
    ),
    "the upstream refuses our key": (chat("[status=401] say x"), 502, "server_error", "upstream_auth_error", None),
    "the upstream fails": (chat("[status=500] say x"), 502, "server_error", "upstream_error", None),
    "the upstream has no such thing": (chat("[status=501] say x"), 502, "server_error", "upstream_error", None),
    "the upstream is overloaded": (chat("[status=503] say x"), 503, "server_error", "upstream_unavailable", None),
    "the upstream cannot be reached": (
        chat(model="gone/gone-model"),
        502,
        "server_error",
        "upstream_unreachable",
        None,
    ),
    "the upstream is silent": (
        chat("[wait=3] say x", model="hasty/hasty-model"),
        504,
        "server_error",
        "upstream_timeout",
        None,
    ),
}

RETRY = {
    "a person must approve": "false",
    "it is there already": "false",
    "the author's code raises": "false",
    "the model answers nonsense": "false",
    "the upstream refuses our key": "false",
}
"""`x-should-retry`, where the gateway knows better than the client's own rule."""


def assert_row(answer: Response, case: str) -> None:
    _, status, type_, code, param = TABLE[case]
    assert answer.headers["x-request-id"]
    if answer.headers["content-type"].startswith(
        "text/event-stream"
    ):  # it had begun, with text or a keep-alive comment
        *_, last = [event for event in answer.body.decode().split("\n\n") if event]
        assert answer.status == 200 and last.startswith("data: {"), last
        body = json.loads(last.removeprefix("data: "))
    else:
        assert answer.status == status, answer.body
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers.get("x-should-retry") == RETRY.get(case)
        body = answer.json()
    assert_error(body)
    error = body["error"]
    assert (error["type"], error["code"], error["param"]) == (type_, code, param), error
    assert "canary" not in answer.body.decode() and "Traceback" not in answer.body.decode()


@pytest.mark.parametrize("case", TABLE)
def test_a_failure_is_what_the_table_says(gateway: Gateway, case: str) -> None:
    request = dict(TABLE[case][0])
    whole = gateway.request(**request)
    assert whole.headers["content-type"] == "application/json"
    assert_row(whole, case)
    if request["path"] == "/v1/chat/completions":
        request["json_body"] = request["json_body"] | {"stream": True}
        assert_row(gateway.request(**request), case)
