"""AC-9: every registered route without a key is 401, except an exact list; and no trick with the path changes it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from api.admin import build_app
from api.route_table import TABLE
from api.routing import Route
from tests.support.house import ADMIN, CHAT, furnish
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error
from tests.support.server import UVICORN, Gateway, running_gateway

PUBLIC = {("GET", path) for path in ("/", "/health", "/healthz", "/readyz", "/docs", "/openapi.json", "/auth/config")}
"""Everything that answers without a key. A new line here is a decision."""

METADATA = {("GET", f"/.well-known/oauth-protected-resource{path}") for path in ("", "/mcp")}
"""Where MCP clients without a token look for its issuer (RFC 9728); 404 where there is none."""
PUBLIC |= METADATA

BODIES: dict[str, object] = {
    f"{prefix}{path}": body
    for prefix in ("", "/admin")
    for path, body in (
        ("/security/preview", {"agent": "default/weatheragent"}),
        ("/security/override", {"agent": "nobody/*", "ttl_seconds": 1, "reason": "a test of routes"}),
        ("/security/keys", {"id": f"made{prefix.replace('/', '-')}", "allow_agents": []}),
    )
} | {
    "/tools": {"name": "made", "provider": "http", "url": "http://127.0.0.1:9/"},
    "/tools/servers": {"name": "made_server", "url": "http://127.0.0.1:9/mcp"},
}
"""What routes that need a body are sent."""


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
    path = path.replace("{override_id}", "ovr_1")
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
        assert answer.status == (404 if (method, path) in METADATA else 200), answer.body
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
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    try:
        connection.putrequest("GET", f"http://127.0.0.1:{gateway.port}/agents", skip_host=True)
        connection.putheader("host", f"127.0.0.1:{gateway.port}")
        connection.endheaders()
        assert connection.getresponse().status in (400, 401)
    finally:
        connection.close()


def test_every_route_of_the_table_works_with_an_admin_key(gateway: Gateway) -> None:
    for method, path in table_rows():
        # Surfaces of raw models have a file of tests of their own, and an upstream that has them; so has MCP.
        if any(word in path for word in ("completions", "embeddings", "audio", "images", "moderations", "mcp")):
            continue
        if path.startswith(("/v1/files", "/v1/batches")) and method != "GET":
            continue
        asked = concrete(path) + ("?query=weather" if path == "/tools/search" else "")
        answer = gateway.request(method, asked, json_body=BODIES.get(path), key=ADMIN)
        # What a made-up id names is not there; the route is.
        is_made_up = any(name in path for name in ("_id}", "{name}", "{server}")) or (method, path) in METADATA
        accepted = (200, 404) if is_made_up else (200, 201)
        assert answer.status in accepted, (method, path, answer.body[:300])


def test_openapi_document_names_every_route_but_no_alias(gateway: Gateway) -> None:
    document = gateway.get("/openapi.json").json()
    paths = {path.replace(":path", "") for path in document["paths"]}
    for route in TABLE.routes:
        if route.path in ("/docs", "/openapi.json"):
            continue
        assert route.path.replace(":path", "") in paths, route.path
        for alias in route.aliases:
            assert alias.replace(":path", "") not in paths


SERVE = ("-m", "gateway_cli", "serve", "--port")
SCRAPE = "sk-test-metrics-canary-gggggggggggggggggggggggg"
GUARDED = sorted(
    (route.method, path, route.scope)
    for route in TABLE.routes
    if route.scope != "public"
    for path in (route.path, *route.aliases)
)


@pytest.fixture(scope="module", params=["gateway serve", "uvicorn"])
def door(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream
) -> Iterator[Gateway]:
    """The same door under both servers, with a page that may call and no throttle in the way."""
    home = tmp_path_factory.mktemp("door")
    furnish(home, upstream.url)
    env = {
        "GATEWAY_METRICS_TOKEN": SCRAPE,
        "GATEWAY_KEY_FAILURES_PER_MINUTE": "1000000",
        "GATEWAY_CORS_ORIGINS": "https://app.example.com",
    }
    with running_gateway(
        home, env=env, key=ADMIN, command=SERVE if request.param == "gateway serve" else UVICORN
    ) as it:
        yield it


def status_of(gateway: Gateway, *lines: str, start: str = "GET /agents HTTP/1.1", body: bytes = b"") -> int:
    """Send a head byte for byte and return the status of the answer."""
    text = "\r\n".join([start, "Host: localhost", "Connection: close", *lines, "", ""]).encode("latin-1")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(text + body)
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(
    "wrong", [{"scope": "none"}, {"scope": ""}, {"scope": "publi"}, {"action": ""}, {"action": "x"}]
)
def test_a_route_without_a_scope_or_an_action_cannot_be_made(wrong: dict[str, Any]) -> None:
    row: dict[str, Any] = {"method": "GET", "path": "/x", "action": "x.read", "scope": "chat", "summary": "X."}
    Route(**row)
    with pytest.raises(ValueError, match="GET /x has no"):
        Route(**row | wrong)
    for name in ("action", "scope"):
        with pytest.raises(TypeError):
            Route(**{field: value for field, value in row.items() if field != name})


def test_each_scope_opens_its_own_routes_and_no_other(door: Gateway) -> None:
    for method, path, scope in GUARDED:
        chat = door.request(method, concrete(path), key=CHAT)
        scraper = door.request(method, concrete(path), key=SCRAPE)
        assert (chat.status == 403) == (scope != "chat"), (method, path, chat.status, chat.body)
        assert (scraper.status == 403) == (scope != "metrics"), (method, path, scraper.status, scraper.body)
        for answer in (chat, scraper):
            if answer.status == 403:
                assert answer.error["code"] == "insufficient_scope", (method, path, answer.body)
        assert door.request(method, concrete(path), key="").status == 401


@pytest.mark.parametrize(
    "lines",
    [
        [f"Authorization: Bearer {ADMIN}", f"Authorization: Bearer {ADMIN}"],
        ["Authorization: Bearer wrong", f"Authorization: Bearer {ADMIN}"],
        [f"X-Api-Key: {ADMIN}", "X-Api-Key: wrong"],
        ["X-Api-Key: wrong", f"X-Api-Key: {ADMIN}"],
        [f"Authorization: Bearer {ADMIN}", f"X-Api-Key: {CHAT}"],
        [f"Authorization: Basic {ADMIN}"],
        [f"Authorization: {ADMIN}"],
        [f"Authorization: Bearer {ADMIN},"],
        [f"Authorization: Bearer: {ADMIN}"],
        [f"Authorization: Token {ADMIN}"],
        ["Authorization: Basic eDp5", f"X-Api-Key: {ADMIN}"],
        [f"Proxy-Authorization: Bearer {ADMIN}"],
        [f"X-Authorization: Bearer {ADMIN}"],
        [f"X_Api_Key: {ADMIN}"],
        [f"Api-Key: {ADMIN}"],
        [f"Cookie: authorization=Bearer {ADMIN}; x-api-key={ADMIN}; token={ADMIN}"],
        [f"Sec-WebSocket-Protocol: openai-insecure-api-key.{ADMIN}"],
        ["Host: 127.0.0.1"],
        ["X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: localhost", "X-Forwarded-User: admin"],
        ["X-Original-URL: /health", "X-Rewrite-URL: /health", "X-Forwarded-Path: /health"],
        ["Origin: https://app.example.com"],
    ],
)
def test_a_key_counts_in_its_header_alone(door: Gateway, lines: list[str]) -> None:
    assert status_of(door, *lines) in (400, 401)


@pytest.mark.parametrize(
    "target", [f"/agents?api_key={ADMIN}&key={ADMIN}&access_token={ADMIN}", f"/agents;key={ADMIN}"]
)
def test_a_key_in_the_target_or_the_body_counts_for_nothing(door: Gateway, target: str) -> None:
    assert status_of(door, start=f"GET {target} HTTP/1.1") == 401
    assert status_of(door, start=f"GET http://x:{ADMIN}@localhost/agents HTTP/1.1") in (400, 401)
    body = f'{{"api_key": "{ADMIN}", "authorization": "Bearer {ADMIN}"}}'.encode()
    length = f"Content-Length: {len(body)}"
    assert (
        status_of(door, length, "Content-Type: application/json", start="POST /agents/refresh HTTP/1.1", body=body)
        == 401
    )


@pytest.mark.parametrize(
    "target",
    [
        "/agents",
        "/agents/",
        "//agents",
        "/agents.",
        "/agents%2Ferrors",
        "/agents%2ferrors",
        "/%2e%2e/agents",
        "/mcp",
        "/mcp/",
        "/health/../agents",
        "/health%2F..%2Fagents",
        "/health;/agents",
        "/health?/agents#",
        "/agents#/health",
        "/health%00",
        "http://localhost/agents",
        "/v1//models",
        "/v1/models/..%2F..%2Fagents",
        "/agents%20",
        "/\\agents",
        "*",
    ],
)
def test_no_spelling_of_a_target_opens_anything(door: Gateway, target: str) -> None:
    for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH", "TRACE"):
        status = status_of(door, "X-HTTP-Method-Override: GET", start=f"{method} {target} HTTP/1.1")
        public = target == "/health?/agents#" and method in ("GET", "HEAD")
        assert status in ((200,) if public else (400, 401)), (method, target, status)


def test_a_preflight_opens_nothing(door: Gateway) -> None:
    asked = ["Access-Control-Request-Method: GET", "Access-Control-Request-Headers: authorization"]
    for path in sorted({path for _, path in table_rows()})[::5]:
        start = f"OPTIONS {concrete(path)} HTTP/1.1"
        assert status_of(door, "Origin: https://app.example.com", *asked, start=start) == 204
        assert status_of(door, "Origin: https://evil.example.com", *asked, start=start) == 401
        assert status_of(door, "Origin: https://app.example.com", start=start) == 401, "no question"
    for method in ("GET", "POST"):
        start = f"{method} /agents HTTP/1.1"
        assert status_of(door, "Origin: https://app.example.com", *asked, start=start) == 401


def test_a_key_in_a_trailer_counts_for_nothing(door: Gateway, request: pytest.FixtureRequest) -> None:
    if "uvicorn" in request.node.name:
        pytest.skip("uvicorn's own protocol takes trailers that come with the head for headers")
    body = f"0\r\nAuthorization: Bearer {ADMIN}\r\n\r\n".encode()
    assert status_of(door, "Transfer-Encoding: chunked", start="POST /agents/refresh HTTP/1.1", body=body) == 401
