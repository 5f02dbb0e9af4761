"""Who a caller is: the routes that say it, the order of the checks, and the ids of requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.house import ADMIN, CHAT, NARROW
from tests.support.server import Gateway


def test_the_key_says_who_one_is(gateway: Gateway) -> None:
    assert gateway.get("/api/v1/auth/whoami", key=NARROW).json() == {
        "id": "narrow",
        "type": "api_key",
        "is_admin": False,
        "groups": ["default"],
        "scopes": ["chat"],
        "key_id": "narrow",
        "issuer": None,
    }
    admin = gateway.get("/api/v1/auth/whoami", key=ADMIN)
    assert admin.json()["is_admin"] is True and admin.json()["scopes"] == ["admin", "chat"]
    assert admin.headers["cache-control"] == "no-store"
    assert gateway.get("/api/v1/auth/whoami", key="").status == 401


def test_how_one_shows_who_one_is_needs_no_key(gateway: Gateway) -> None:
    answer = gateway.get("/auth/config", key="")
    assert answer.json() == {"type": "api_key", "headers": ["authorization: Bearer", "x-api-key"], "issuers": []}


def test_a_refusal_has_its_ids_and_the_log_knows_whom_it_met(gateway: Gateway) -> None:
    """The order: ids, then the key, then its scope."""
    unknown = gateway.get("/agents", key="sk-nobody-aaaaaaaaaaaaaaaaaaaa", headers={"x-request-id": "order-401"})
    foreign = gateway.get("/agents", key=NARROW, headers={"x-request-id": "order-403"})
    assert (unknown.status, unknown.headers["x-request-id"]) == (401, "order-401")
    assert (foreign.status, foreign.headers["x-request-id"]) == (403, "order-403")
    gateway.logged("http.request", request_id="order-401", key_id=None, status=401)
    gateway.logged("http.request", request_id="order-403", key_id="narrow", endpoint="/agents")


def test_a_correlation_id_is_the_callers_or_the_requests_own(gateway: Gateway) -> None:
    given = gateway.get("/v1/models", headers={"x-correlation-id": "whole-1", "x-request-id": "part-1"})
    assert (given.headers["x-correlation-id"], given.headers["x-request-id"]) == ("whole-1", "part-1")
    own = gateway.get("/v1/models", headers={"x-request-id": "part-2"})
    assert own.headers["x-correlation-id"] == "part-2"
    odd = gateway.get("/v1/models", headers={"x-correlation-id": "not well-formed", "x-request-id": "part-3"})
    assert odd.headers["x-correlation-id"] == "part-3"
    gateway.logged("http.request", correlation_id="whole-1")


@pytest.mark.parametrize("count", [200])
def test_requests_at_once_share_no_ids(gateway: Gateway, count: int) -> None:
    def ask(number: int) -> None:
        model = "default/weatheragent" if number % 4 == 0 else "local/test-model"
        body = {"model": model, "messages": [{"role": "user", "content": f"say n{number}"}], "stream": number % 2 == 0}
        headers = {"x-request-id": f"leak-r-{number}", "x-correlation-id": f"leak-c-{number}"}
        answer = gateway.post("/v1/chat/completions", body, key=CHAT, headers=headers)
        assert answer.status == 200 and f"n{number}".encode() in answer.body.replace(b'"}', b"")
        assert answer.headers["x-correlation-id"] == f"leak-c-{number}"

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(count)))

    gateway.logged("http.request", count=count, where=lambda line: line["request_id"].startswith("leak-r-"))
    for line in gateway.log_lines():
        if not str(line["request_id"]).startswith("leak-r-"):
            continue
        number = int(str(line["request_id"]).rpartition("-")[2])
        assert line["correlation_id"] == f"leak-c-{number}"
        is_agent = number % 4 == 0
        assert line.get("agent_id") == ("default/weatheragent" if is_agent else None), line
        if line["event"] == "run.finished":
            assert line["model"] == ("default/weatheragent" if is_agent else "local/test-model")
