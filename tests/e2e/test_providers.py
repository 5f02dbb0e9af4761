"""What the gateway leans on, as admins and probes see it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.house import ADMIN, CHAT, drop
from tests.support.server import Gateway, StartFailed


def test_admins_see_what_there_is(gateway: Gateway) -> None:
    found = gateway.get("/api/v1/providers")
    kinds = found.json()
    assert isinstance(kinds.pop("tools")["available"], list), "other tests register some"
    assert kinds == {
        "llm": {"default": "local", "available": ["local", "hasty", "gone"]},
        "store": {"default": "sqlite", "available": ["sqlite"]},
    }
    assert found.headers["cache-control"] == "no-store"
    for path in ("/api/v1/providers", "/api/v1/providers/status"):
        assert gateway.get(path, key=CHAT).status == 403


def test_each_is_asked_and_one_that_is_down_takes_nobody_along(gateway: Gateway) -> None:
    answer = gateway.get("/api/v1/providers/status")
    assert answer.status == 200
    checks = answer.json()["checks"]
    assert answer.json()["status"] == "degraded"
    assert (checks["llm/local"], checks["llm/hasty"], checks["llm/gone"]) == ("ok", "ok", "down")
    assert checks["store"] in ("ok", "unknown")
    ready = gateway.get("/readyz", key="")
    assert (ready.status, ready.json()["components"]["upstreams"], ready.json()["needs"]) == (200, "ok", {})
    assert not {"local", "hasty", "gone", "127.0.0.1"} & set(ready.body.decode().split('"')), "no names without a key"


@pytest.fixture
def needy(start: Callable[..., Gateway]) -> Gateway:
    """A gateway whose operator wants no traffic without Redis, which is down."""
    env = {"GATEWAY_REDIS_URL": "redis://127.0.0.1:9/0", "GATEWAY_READY_NEEDS": "upstreams,store,redis"}
    return start(prepare=lambda home: drop("WeatherAgent", home / "agents"), env=env, ready="/health")


def test_an_operator_says_what_readiness_needs(needy: Gateway) -> None:
    chat = {"model": "default/weatheragent", "messages": [{"role": "user", "content": "say hi"}]}
    assert needy.post("/v1/chat/completions", chat, key=CHAT).status == 200, "readiness is no door"
    probe = needy.get("/readyz", key="")
    assert (probe.status, probe.json()["status"]) == (503, "waiting")
    assert probe.headers["retry-after"] == "1"
    needs = probe.json()["needs"]
    assert (needs["redis"], needs["upstreams"]) == ("down", "ok") and needs["store"] in ("ok", "unknown")
    assert needy.get("/api/v1/providers", key=ADMIN).json()["redis"] == {"default": "redis", "available": ["redis"]}
    assert needy.get("/api/v1/providers/status").json()["checks"]["redis"] == "down"


def said(gateway: Gateway, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "gateway_cli", "health", "--url", gateway.url, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.returncode, " ".join(result.stdout.split()), result.stderr


@pytest.fixture
def fresh(start: Callable[..., Gateway]) -> Gateway:
    """A gateway that no other test has registered anything in."""
    return start(prepare=lambda home: drop("WeatherAgent", home / "agents"))


def test_the_terminal_shows_the_same(fresh: Gateway) -> None:
    gateway = fresh
    code, shown, _ = said(gateway, "--ready")
    assert code == 0 and f"{gateway.url}/readyz: 200 ready agents ready" in shown and "upstreams " in shown
    code, shown, _ = said(gateway, "--providers", "--key", ADMIN)
    assert code == 1 and "200 degraded" in shown and "llm/local ok" in shown and "llm/gone down" in shown
    code, _, why = said(gateway, "--providers", "--key", CHAT)
    assert code == 1 and "admin key" in why


def test_a_need_that_cannot_be_met_is_refused_at_the_start(start: Callable[..., Gateway]) -> None:
    with pytest.raises(StartFailed, match="GATEWAY_READY_NEEDS names redis, and GATEWAY_REDIS_URL is not set"):
        start(env={"GATEWAY_READY_NEEDS": "redis"})
