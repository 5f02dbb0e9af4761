"""The cold routes, the OpenAPI document and the plain service routes, against a registry with good and bad agents."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from jsonschema import Draft202012Validator

from api.admin import build_app
from api.bootstrap import Gateway
from api.client import Client
from api.health import health, overview, ready
from api.metrics import metrics, prometheus
from api.providers import Needs
from api.route_table import TABLE
from api.routing import Request, Response, Route, RouteTable
from api.shared import share
from gateway import __version__
from gateway.config import Settings
from gateway.errors import (
    GatewayError,
    NotFound,
    ServiceUnavailable,
    UpstreamAuthFailed,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from gateway.observability.metrics import Metrics
from gateway.observability.recent import ErrorRecord, RecentErrors
from gateway.refreshing import Refresher
from gateway.registry.entry import AgentEntry, AgentOptions, Diagnostic
from gateway.registry.registry import Registry
from gateway.security.throttle import FailureThrottle
from gateway.upstreams.status import UpstreamStatus
from gateway.workers.workers import Workers
from tests.support.asgi import Answer, call

BROKEN = Diagnostic(
    kind="import",
    code="syntax_error",
    message="The file is not Python: expected ':'.",
    fix="Put a ':' at the end of line 3.",
    file="Broken/agent.py",
    line=3,
    cause="SyntaxError: expected ':'",
    module="Broken.agent",
    occurred_at=1_700_000_000.25,
)
WARNING = Diagnostic(
    kind="validation", code="odd", message="An odd thing.", fix="", file="Good/agent.py", severity="warning"
)


def entry(name: str, **fields: Any) -> AgentEntry:
    given: dict[str, Any] = {
        "display_name": name.title(),
        "kind": "sdk",
        "source": "file",
        "created": 1_700_000_000,
        "executor": object(),
        "upstream": "demo",
        "model": "demo-model",
        "description": "Says things.",
        "tools": ("get_weather",),
        "aliases": (name,),
        "file": f"{name.title()}/agent.py",
        "content_hash": "abc",
        "generation": 2,
        **fields,
    }
    return AgentEntry(id=f"default/{name}", namespace="default", name=name, **given)


class FakeUpstream:
    """Stands in for an upstream: counts how often it was asked, and fails while it is told to."""

    def __init__(self, error: GatewayError | None = None) -> None:
        self.name, self.error, self.asked = "fake", error, 0
        self.status = UpstreamStatus()

    async def probe(self) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


class Reloader:
    """Stands in for the watcher: counts, or fails."""

    def __init__(self) -> None:
        self.refreshed = 0
        self.error: Exception | None = None

    async def refresh_agents(self) -> None:
        if self.error is not None:
            raise self.error
        self.refreshed += 1


def gateway(*, loaded: bool = True, settings: Settings | None = None, **upstreams: FakeUpstream) -> Any:
    registry = Registry.build(
        [
            entry("good", diagnostics=(WARNING,)),
            entry("old", status="stale", diagnostics=(BROKEN,), options=AgentOptions(expose=False)),
            entry("broken", executor=None, status="error", diagnostics=(BROKEN,), upstream=None, model=None, tools=()),
        ]
    )
    event = asyncio.Event()
    if loaded:
        event.set()
    tried = asyncio.Event()
    tried.set()
    reloader, workers = Reloader(), Workers()
    refresher = Refresher(
        Settings(), workers, lambda: registry, parts={"agents": (reloader.refresh_agents, ("agents.yaml",))}, files={}
    )
    made = SimpleNamespace(
        settings=settings or Settings(),
        holder=SimpleNamespace(
            current=SimpleNamespace(registry=registry, upstreams=SimpleNamespace(upstreams=dict(upstreams)))
        ),
        metrics=Metrics(),
        engine=SimpleNamespace(recent_errors=RecentErrors(), ends_at=None),
        catalogue=SimpleNamespace(recent_errors=lambda: (BROKEN,)),
        tools=SimpleNamespace(violations=()),
        reloader=reloader,
        workers=workers,
        refresher=refresher,
        store=SimpleNamespace(check=idle),
        keys=SimpleNamespace(tried=tried),
        throttle=FailureThrottle(100),
        loaded=event,
        needs=Needs(),
    )
    share(cast("Gateway", made))
    return made


async def idle() -> str:
    return "idle"


def ask(gate: Any, method: str, path: str) -> Answer:
    return call(build_app(TABLE), method, path, state={"gateway": gate})


GOOD = {
    "name": "good",
    "namespace": "default",
    "qualified_name": "default/good",
    "display_name": "Good",
    "kind": "sdk",
    "model": "demo-model",
    "upstream": "demo",
    "description": "Says things.",
    "tools": ["get_weather"],
    "status": "ready",
    "error": None,
}


@pytest.mark.parametrize("path", ["/agents", "/admin/agents"])
def test_agents_are_listed_with_those_that_did_not_load(path: str) -> None:
    answer = ask(gateway(), "GET", path)
    assert answer.status == 200
    by_name = {record["name"]: record for record in answer.json()}
    good = by_name["good"]
    assert {k: v for k, v in good.items() if k != "metadata"} == GOOD
    assert good["metadata"]["file"] == "Good/agent.py"
    assert good["metadata"]["diagnostics"][0]["code"] == "odd"
    assert (by_name["old"]["status"], by_name["old"]["metadata"]["expose"]) == ("stale", False)
    broken = by_name["broken"]
    assert (broken["status"], broken["model"], broken["upstream"], broken["tools"]) == ("error", None, None, [])
    assert broken["error"] == "The file is not Python: expected ':'. Put a ':' at the end of line 3."
    diagnostic = {
        "kind": "import",
        "code": "syntax_error",
        "severity": "error",
        "message": "The file is not Python: expected ':'.",
        "fix": "Put a ':' at the end of line 3.",
        "file": "Broken/agent.py",
        "line": 3,
        "module": "Broken.agent",
        "cause": "SyntaxError: expected ':'",
        "occurred_at": "2023-11-14T22:13:20.250Z",
    }
    assert broken["metadata"].items() >= diagnostic.items()
    assert broken["metadata"]["diagnostics"] == [diagnostic]


@pytest.mark.parametrize("path", ["/agents/refresh", "/admin/agents/refresh"])
def test_a_refresh_refreshes_and_answers_with_the_list(path: str) -> None:
    gate = gateway()
    answer = ask(gate, "POST", path)
    assert (answer.status, gate.reloader.refreshed) == (200, 1)
    assert {record["name"] for record in answer.json()} == {"good", "old", "broken"}


@pytest.mark.parametrize("path", ["/agents/errors", "/admin/agents/errors"])
def test_errors_of_discovery_and_of_runs_come_newest_first(path: str) -> None:
    gate = gateway()
    gate.engine.recent_errors.add(
        ErrorRecord(
            event="run.failed",
            message="The model answered nonsense.",
            occurred_at=1_700_000_001,
            request_id="req-1",
            agent_id="default/good",
            error_stage="run",
            details={"code": "model_behavior_error"},
        )
    )
    assert ask(gate, "GET", path).json() == [
        {
            "timestamp": "2023-11-14T22:13:21.000Z",
            "event": "run.failed",
            "message": "The model answered nonsense.",
            "request_id": "req-1",
            "agent_id": "default/good",
            "module_path": None,
            "error_stage": "run",
            "details": {"code": "model_behavior_error"},
        },
        {
            "timestamp": "2023-11-14T22:13:20.250Z",
            "event": "agent.dropin.failed",
            "message": "The file is not Python: expected ':'.",
            "request_id": None,
            "agent_id": None,
            "module_path": "Broken.agent",
            "error_stage": "import",
            "details": {
                "code": "syntax_error",
                "severity": "error",
                "file": "Broken/agent.py",
                "line": 3,
                "cause": "SyntaxError: expected ':'",
                "fix": "Put a ':' at the end of line 3.",
            },
        },
    ]


def test_at_most_two_hundred_errors_are_listed() -> None:
    gate = gateway()
    for number in range(250):
        gate.engine.recent_errors.add(ErrorRecord(event="run.failed", message=str(number)))
    found = ask(gate, "GET", "/agents/errors").json()
    assert len(found) == 200
    assert found[0]["message"] == "249"


def test_a_refresh_that_fails_answers_in_openais_shape_and_is_counted() -> None:
    gate = gateway()
    gate.reloader.error = ServiceUnavailable("The agents are being refreshed already; try again.", retry_after_s=1.5)
    answer = ask(gate, "POST", "/agents/refresh")
    assert answer.status == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.json() == {
        "error": {
            "message": "The agents are being refreshed already; try again.",
            "type": "service_unavailable_error",
            "param": None,
            "code": "service_unavailable",
        }
    }
    assert b'agent_gateway_errors_total{code="service_unavailable",domain="own"} 1' in plain(prometheus, gate).body


def test_what_fastapi_itself_refuses_has_the_same_shape() -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("PUT", "/agents", 405)):
        answer = ask(gateway(), method, path)
        assert answer.status == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_row_that_nothing_serves_is_found_when_the_application_is_built() -> None:
    with pytest.raises(KeyError, match=r"unheard\.of"):
        build_app(RouteTable([Route("GET", "/new", "unheard.of", "admin", "New.")]))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    answer = ask(gateway(), "GET", "/openapi.json")
    assert answer.status == 200
    return cast("dict[str, Any]", answer.json())


def test_the_document_names_every_route_once_and_no_alias(document: dict[str, Any]) -> None:
    found = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert found == {(route.method, route.path.replace(":path", "")) for route in TABLE.routes}
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert {operation["operationId"] for operation in operations} == {route.action for route in TABLE.routes}


def test_the_document_says_which_routes_need_no_key(document: dict[str, Any]) -> None:
    for route in TABLE.routes:
        operation = document["paths"][route.path.replace(":path", "")][route.method.lower()]
        assert operation["x-required-scope"] == route.scope
        assert (operation.get("security") == []) == (route.scope == "public")
        assert "default" in operation["responses"]
        assert set(operation["responses"]) & {"200", "201", "405"}
        assert "422" not in operation["responses"]


def test_every_reference_of_the_document_resolves_and_every_schema_is_one(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', msgspec.json.encode(document).decode()))
    assert references <= set(schemas)
    assert {"ChatRequest", "ChatCompletion", "ChatCompletionChunk", "AgentRecord", "ErrorEntry", "Error"} <= set(
        schemas
    )
    assert not {"HTTPValidationError", "ValidationError"} & set(schemas)
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_the_chat_request_of_the_document_takes_what_the_gateway_takes(document: dict[str, Any]) -> None:
    validator = Draft202012Validator({**document, "$ref": "#/components/schemas/ChatRequest"})
    good = {"model": "default/good", "messages": [{"role": "user", "content": "hi"}], "stream": True, "top_k": 5}
    assert validator.is_valid(good)
    assert not validator.is_valid({"model": "default/good"})
    assert "extra" not in document["components"]["schemas"]["ChatRequest"]["properties"]


@pytest.mark.parametrize(
    ("action", "name"),
    [("agents.list", "AgentRecord"), ("agents.errors", "ErrorEntry"), ("agents.refresh", "AgentRecord")],
)
def test_the_answers_fit_the_document(document: dict[str, Any], action: str, name: str) -> None:
    route = next(route for route in TABLE.routes if route.action == action)
    validator = Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"})
    for item in ask(gateway(), route.method, route.path).json():
        validator.validate(item)


def test_the_explorer_needs_no_other_host_and_runs_only_its_own_script() -> None:
    answer = ask(gateway(), "GET", "/docs")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(rb'(?:src|href)="(?:https?:)?//', answer.body)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    for tag in (b"script", b"style"):
        found = re.search(rb"<%b>(.*?)</%b>" % (tag, tag), answer.body, re.DOTALL)
        assert found
        assert base64.b64encode(hashlib.sha256(found.group(1)).digest()).decode() in policy


def plain(handler: Any, gate: Any, headers: dict[str, str] | None = None) -> Response:
    unused = cast("Any", None)
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    client = Client({}, send, ())
    response = asyncio.run(handler(Request({}, unused, client, gate, "req", headers or {}, None)))
    if isinstance(response, Response):
        return response
    begun = dict(sent[0]["headers"])
    return Response(b"".join(part["body"] for part in sent[1:]), sent[0]["status"], begun[b"content-type"])


def test_health_and_overview_name_the_service() -> None:
    gate = gateway(settings=Settings(project_name="my-gateway"))
    assert msgspec.json.decode(plain(health, gate).body) == {"status": "ok", "service": "my-gateway"}
    page = msgspec.json.decode(plain(overview, gate).body)
    assert (page["status"], page["service"], page["version"]) == ("ok", "my-gateway", __version__)
    paths = {path for route in TABLE.routes for path in (route.path, *route.aliases)}
    assert set(page["links"].values()) <= paths


def test_readiness_is_503_until_the_agents_are_loaded() -> None:
    early, late = plain(ready, gateway(loaded=False)), plain(ready, gateway())
    assert (early.status, late.status) == (503, 200)
    assert msgspec.json.decode(early.body)["components"]["agents"] == "loading"
    assert msgspec.json.decode(late.body)["status"] == "ready"


def look(needs: Needs, gate: Any, times: int = 1) -> list[dict[str, str]]:
    async def ask_all() -> list[dict[str, str]]:
        return list(await asyncio.gather(*(needs.look(gate) for _ in range(times))))

    return asyncio.run(ask_all())


def test_readiness_asks_for_what_it_needs_once_for_all_who_ask_and_not_again_at_once() -> None:
    one, other = FakeUpstream(UpstreamUnreachable("gone")), FakeUpstream()
    gate = gateway(settings=Settings(ready_needs=("upstreams",)), one=one, other=other)
    needs = Needs(kept_s=60)
    assert look(needs, gate, 20) == [{"upstreams": "ok"}] * 20, "one of them is enough"
    assert look(needs, gate) == [{"upstreams": "ok"}]
    assert (one.asked, other.asked) == (1, 1)
    assert (one.status.healthy, other.status.healthy) == (False, True), "routing knows it, too"


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (UpstreamUnreachable("x"), "down"),
        (UpstreamTimeout("x"), "timeout"),
        (UpstreamAuthFailed("x"), "reachable"),
        (UpstreamRateLimited("x"), "reachable"),
        (UpstreamUnavailable("x"), "down"),
    ],
)
def test_how_an_upstream_failed_is_one_word(error: GatewayError, word: str) -> None:
    gate = gateway(settings=Settings(ready_needs=("upstreams",)), one=FakeUpstream(error))
    gate.needs = Needs(kept_s=0)
    answer = plain(ready, gate)
    body = msgspec.json.decode(answer.body)
    assert body["needs"] == {"upstreams": word}
    assert answer.status == (200 if word == "reachable" else 503)
    assert body["status"] == ("ready" if word == "reachable" else "waiting")
    gate.holder.current.upstreams.upstreams["one"].error = None
    assert plain(ready, gate).status == 200, "it is well again"
    assert plain(ready, gateway(one=FakeUpstream(error))).status == 200, "nothing is needed unless the operator says so"


def test_metrics_come_in_the_format_that_is_asked_for() -> None:
    gate = gateway()
    assert msgspec.json.decode(plain(metrics, gate).body)["total_requests"] == 0
    assert plain(metrics, gate, {"accept": "text/plain"}).body.startswith(b"# HELP")
    assert plain(metrics, gate, {"accept": "application/openmetrics-text"}).body.endswith(b"# EOF\n")
    assert plain(prometheus, gate, {"accept": "application/json"}).content_type.startswith(b"text/plain")


def test_the_exposition_can_be_switched_off() -> None:
    gate = gateway(settings=Settings(prometheus_enabled=False))
    assert plain(metrics, gate, {"accept": "text/plain"}).content_type == b"application/json"
    with pytest.raises(NotFound, match="GATEWAY_PROMETHEUS_ENABLED"):
        plain(prometheus, gate)


def test_the_metrics_snapshot_fits_the_document(document: dict[str, Any]) -> None:
    gate = gateway()
    gate.metrics.tool_invoked("t", "function", "default/good", "success", 0.1)
    validator = Draft202012Validator({**document, "$ref": "#/components/schemas/MetricsSnapshot"})
    validator.validate(msgspec.json.decode(plain(metrics, gate).body))
