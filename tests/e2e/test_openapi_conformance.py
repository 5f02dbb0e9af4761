"""Schemathesis asks every operation of our own OpenAPI document: nothing answers 500, or anything undocumented."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from api.admin.app import build_app
from api.admin.openapi import build_document
from api.route_table import TABLE
from tests.support.house import ADMIN, CHAT, drop, furnish
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error
from tests.support.server import Gateway, running_gateway

NAMES = {
    "model": ["default/weatheragent", "local/test-model", "gpt-5-mini", "no/model", "é/\u0000"],
    "name": ["ping", "nothing", "a b"],
    "key_id": ["admin", "made", "no-key"],
    "override_id": ["ovr_1"],
    "server": ["nobody", "ping"],
    "file_id": ["file-1", ".."],
    "batch_id": ["batch_1"],
}
"""What paths and models are filled with: made-up names alone would end at the first 404."""

TOOLS = 'version: 1\ntools:\n  - {name: ping, provider: local, module: "conformance_tools:ping"}\n'
CHECKED = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")


@cache
def document() -> dict[str, Any]:
    """The product's own document, with names that exist."""
    app = build_app(TABLE)
    made: dict[str, Any] = json.loads(json.dumps(build_document(TABLE, app.routes)))
    for methods in made["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path":
                    parameter["schema"] = {"enum": NAMES[parameter["name"]]}
            for content in operation.get("requestBody", {}).get("content", {}).values():
                _name_models(content["schema"])
    _name_models(made["components"]["schemas"]["ChatRequest"])
    # The tests show their own keys; made-up ones beside them would end at the door.
    del made["security"], made["components"]["securitySchemes"]
    return made


def _name_models(schema: dict[str, Any]) -> None:
    if "model" in schema.get("properties", {}):
        schema["properties"]["model"] = {"enum": NAMES["model"]}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("conformance")
    furnish(home, upstream.url)
    drop("WeatherAgent", home / "agents")
    text = (home / "security.yaml").read_text(encoding="utf-8")
    text = text.replace(
        "default:\n", 'default:\n  allow_tools: ["*"]\n  local_tools_allowlist: ["conformance_tools:*"]\n'
    )
    (home / "security.yaml").write_text(text, encoding="utf-8")
    (home / "tools.yaml").write_text(TOOLS, encoding="utf-8")
    (home / "conformance_tools.py").write_text("def ping() -> str:\n    return 'pong'\n", encoding="utf-8")
    with running_gateway(home, env={"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml")}, key=ADMIN) as server:
        yield server


OPERATIONS = sorted(
    (path, method) for path, methods in document()["paths"].items() for method in methods if path != "/docs"
)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_answers_as_documented(asked: Gateway, path: str, method: str, mode: GenerationMode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operation = schemathesis.openapi.from_dict(document())[path][method]
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
            return
        strategy = operation.as_strategy(generation_mode=mode)
    checks = CHECKS.get_by_names(list(CHECKED))

    chat = document()["paths"][path][method]["x-required-scope"] == "chat"
    with requests.Session() as session:

        @settings(
            max_examples=5,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def ask(case: Case) -> None:
            for key in (ADMIN, CHAT) if mode is GenerationMode.POSITIVE else (CHAT if chat else ADMIN,):
                headers = {"authorization": f"Bearer {key}"}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    answer = case.call(base_url=asked.url, headers=headers, session=session, timeout=60)
                    assert answer.status_code != 500, (answer.content, case.as_curl_command())
                    if answer.status_code >= 400 and answer.content and not path.startswith("/mcp"):
                        assert_error(answer.json())
                    case.validate_response(answer, checks=checks)

        ask()


def test_none_of_it_crashed(asked: Gateway) -> None:
    assert not asked.log_events("http.request.crashed")


HELLO = {"messages": [{"role": "user", "content": "hello"}]}
GOOD: list[tuple[str, str, dict[str, Any], int]] = [
    ("/v1/chat/completions", "post", {"body": {"model": "default/weatheragent", **HELLO}}, 200),
    ("/v1/chat/completions", "post", {"body": {"model": "default/weatheragent", "stream": True, **HELLO}}, 200),
    ("/v1/chat/completions", "post", {"body": {"model": "local/test-model", **HELLO}}, 200),
    ("/v1/chat/completions", "post", {"body": {"model": "local/test-model", "stream": True, **HELLO}}, 200),
    ("/tools/{name}/invoke", "post", {"path_parameters": {"name": "ping"}, "body": {"arguments": {}}}, 200),
    ("/security/keys", "post", {"body": {"id": "made-well", "limits": {"requests_per_minute": 5}}}, 201),
    ("/security/keys/{key_id}/rotate", "post", {"path_parameters": {"key_id": "made-well"}, "body": {}}, 200),
    ("/security/keys", "get", {}, 200),
    ("/security/keys/{key_id}", "delete", {"path_parameters": {"key_id": "made-well"}}, 200),
    ("/usage", "get", {"query": {"group_by": "key,model", "limit": 5}}, 200),
    ("/mcp", "post", {"body": {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}}, 200),
]


def test_what_is_well_asked_is_well_answered(asked: Gateway) -> None:
    for path, method, given_, status in GOOD:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            operation = schemathesis.openapi.from_dict(document())[path][method]
            if "body" in given_:
                given_ = {"media_type": "application/json", **given_}
            case = operation.Case(**given_)
            answer = case.call(base_url=asked.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=60)
            assert answer.status_code == status, (path, answer.content)
            case.validate_response(answer, checks=CHECKS.get_by_names(list(CHECKED)))


def test_the_document_speaks_of_every_body() -> None:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            takes_none = operation["operationId"].endswith(".refresh")
            assert method != "post" or takes_none or "requestBody" in operation, path
