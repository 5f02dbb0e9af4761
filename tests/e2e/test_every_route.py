"""AC-9: every registered route without a key is 401, except an exact list; and no trick with the path changes it."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from api.admin import build_app
from api.route_table import TABLE
from tests.support.house import ADMIN
from tests.support.schema import assert_error
from tests.support.server import Gateway

PUBLIC = {("GET", path) for path in ("/", "/health", "/healthz", "/readyz", "/docs", "/openapi.json")}
"""Everything that answers without a key. A new line here is a decision."""


def table_rows() -> Iterator[tuple[str, str]]:
    for route in TABLE.routes:
        for path in (route.path, *route.aliases):
            yield route.method, path


def fastapi_rows() -> Iterator[tuple[str, str]]:
    app: FastAPI = build_app(TABLE)
    for context in iter_route_contexts(app.routes):
        for method in getattr(context, "methods", None) or {"GET"}:
            yield method, context.path


def concrete(path: str) -> str:
    path = path.replace("{file_id}", "file-1").replace("{batch_id}", "batch_1")
    return path.replace("{model:path}", "default/weatheragent").replace("{model}", "default/weatheragent")


def test_the_public_routes_are_exactly_these() -> None:
    public = {(r.method, path) for r in TABLE.routes if r.scope == "public" for path in (r.path, *r.aliases)}
    assert public == PUBLIC


def test_fastapi_serves_nothing_that_the_route_table_does_not_have() -> None:
    known = set(table_rows())
    extra = {(m, p) for m, p in fastapi_rows() if m != "HEAD"} - known
    assert not extra, f"routes that bypass the table: {sorted(extra)}"


@pytest.mark.parametrize(("method", "path"), sorted(set(table_rows())))
def test_without_a_key(gateway: Gateway, method: str, path: str) -> None:
    answer = gateway.request(method, concrete(path), key="")
    if (method, path) in PUBLIC:
        assert answer.status == 200, answer.body
    else:
        assert answer.status == 401, answer.body
        assert_error(answer.json())
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "suffix",
    ["/.well-known/agent.json", "/health", "/", "//", ";/health", "%2Fhealth", "?path=/health", "/../health", ".json"],
)
@pytest.mark.parametrize("path", ["/agents", "/v1/models", "/agents/errors", "/metrics", "/v1/chat/completions"])
def test_no_suffix_opens_a_route(gateway: Gateway, path: str, suffix: str) -> None:
    for method in ("GET", "POST"):
        answer = gateway.request(method, path + suffix, key="")
        assert answer.status == 401, (method, path + suffix, answer.status, answer.body[:200])


@pytest.mark.parametrize(
    "path",
    [
        "/health/../agents",
        "//agents",
        "/AGENTS",
        "/v1/agents",
        "/docs/oauth2-redirect",
        "/redoc",
        "/docs/../agents",
        "/%61gents",
        "/agents%00",
        "/nothing",
        "/.well-known/agent.json",
        "/.env",
    ],
)
def test_other_spellings_and_unknown_paths_need_a_key_too(gateway: Gateway, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        answer = gateway.request(method, path, key="")
        assert answer.status == 401, (method, path, answer.status)
        assert_error(answer.json())


def test_host_and_override_headers_do_not_change_the_route(gateway: Gateway) -> None:
    for headers in (
        {"x-http-method-override": "GET"},
        {"x-original-url": "/health"},
        {"x-rewrite-url": "/health"},
        {"host": "health"},
        {"x-forwarded-prefix": "/health"},
    ):
        assert gateway.get("/agents", key="", headers=headers).status == 401


def test_absolute_form_of_the_request_target(gateway: Gateway) -> None:
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    try:
        connection.putrequest("GET", f"http://127.0.0.1:{gateway.port}/agents", skip_host=True)
        connection.putheader("host", f"127.0.0.1:{gateway.port}")
        connection.endheaders()
        assert connection.getresponse().status in (400, 401)
    finally:
        connection.close()


def test_every_route_of_the_table_works_with_an_admin_key(gateway: Gateway) -> None:
    for method, path in table_rows():
        # Surfaces of raw models have a file of tests of their own, and an upstream that has them.
        if any(word in path for word in ("completions", "embeddings", "audio", "images", "moderations")):
            continue
        if path.startswith(("/v1/files", "/v1/batches")) and method != "GET":
            continue
        answer = gateway.request(method, concrete(path), key=ADMIN)
        assert answer.status == 200, (method, path, answer.body[:300])


def test_openapi_document_names_every_route_but_no_alias(gateway: Gateway) -> None:
    document = gateway.get("/openapi.json").json()
    paths = {path.replace(":path", "") for path in document["paths"]}
    for route in TABLE.routes:
        if route.path in ("/docs", "/openapi.json"):
            continue
        assert route.path.replace(":path", "") in paths, route.path
        for alias in route.aliases:
            assert alias.replace(":path", "") not in paths
