"""The edge through the front door: CORS, forwarded addresses and the headers of every answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import Gateway, running_gateway

KEY = "sk-test-edge-aaaaaaaaaaaaaaaaaaaaaaaaaa"
ORIGIN = "https://app.example.com"
SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    env = {
        "GATEWAY_API_KEY": KEY,
        "GATEWAY_CORS_ORIGINS": ORIGIN,
        "GATEWAY_TRUSTED_HOSTS": "127.0.0.1,api.example.com",
        "GATEWAY_TRUSTED_PROXIES": "127.0.0.1",
    }
    home: Path = tmp_path_factory.mktemp("edge")
    with running_gateway(home, env=env, key=KEY, command=("-m", "gateway_cli", "serve", "--port")) as server:
        yield server


def test_every_answer_is_harmless_to_a_browser(gateway: Gateway) -> None:
    for path, key in (("/health", ""), ("/v1/models", KEY), ("/v1/models", ""), ("/nowhere", KEY), ("/agents", KEY)):
        answer = gateway.get(path, key=key)
        assert {name: answer.headers.get(name) for name in SAFE} == SAFE, path
        assert "strict-transport-security" not in answer.headers
    page = gateway.get("/docs", key="")
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"


def test_a_browser_asks_without_a_key_and_calls_with_one(gateway: Gateway) -> None:
    ask = {"origin": ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    asked = gateway.request("OPTIONS", "/v1/chat/completions", key="", headers=ask)
    assert (asked.status, asked.headers["access-control-allow-origin"]) == (204, ORIGIN)
    assert asked.headers["access-control-allow-headers"] == "authorization"
    foreign = gateway.request(
        "OPTIONS", "/v1/chat/completions", key="", headers=ask | {"origin": "https://evil.example"}
    )
    assert foreign.status == 401
    assert "access-control-allow-origin" not in foreign.headers
    for key, status in ((KEY, 200), ("", 401)):
        called = gateway.get("/v1/models", key=key, headers={"origin": ORIGIN})
        assert (called.status, called.headers["access-control-allow-origin"]) == (status, ORIGIN)
        assert called.headers["access-control-allow-credentials"] == "true"
        assert called.headers["vary"] == "origin"


def test_a_foreign_host_is_refused_and_a_probe_is_not(gateway: Gateway) -> None:
    refused = gateway.get("/v1/models", headers={"host": "evil.example"})
    assert (refused.status, refused.error["code"]) == (400, "untrusted_host")
    assert gateway.get("/v1/models", headers={"host": "api.example.com:443"}).status == 200
    assert gateway.get("/readyz", key="", headers={"host": "10.1.2.3:8000"}).status == 200


def test_the_log_names_the_client_behind_a_declared_proxy(gateway: Gateway) -> None:
    spoof = {"x-forwarded-for": "6.6.6.6, 198.51.100.7", "x-request-id": "edge-forwarded"}
    assert gateway.get("/v1/models", headers=spoof).status == 200
    gateway.logged("http.request", request_id="edge-forwarded", client_ip="198.51.100.7")


def test_health_shows_its_parts_to_admins_alone(gateway: Gateway) -> None:
    assert set(gateway.get("/health", key="").json()) == {"status", "service"}
    assert set(gateway.get("/health", key="wrong").json()) == {"status", "service"}
    parts = gateway.get("/health").json()["components"]
    assert set(parts) == {"agents", "upstreams", "store", "process"}
    assert parts["process"]["memory_bytes"] > 10_000_000
