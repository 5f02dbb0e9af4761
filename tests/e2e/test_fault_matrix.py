"""Every fault of an upstream on every surface, under both servers: an error in OpenAI shape, in time, and no secret."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.by_hand import read_until, send_by_hand
from tests.support.house import CHAT, UPSTREAM_KEY, write_agent
from tests.support.schema import assert_error
from tests.support.scripted_answers import Answer, status
from tests.support.scripted_faults import FAULTS, fault
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.server import UVICORN, Gateway, running_gateway
from tests.support.waiting import wait_for

SERVERS = {"uvicorn": UVICORN, "serve": ("-m", "gateway_cli", "serve", "--workers", "1", "--port")}
UPSTREAMS = """\
version: 1
upstreams:
  - name: up
    base_url: {url}
    api_key: {key}
    default_model: agents
    timeouts: {{connect_s: 30, first_byte_s: 0.5, idle_s: 0.5, total_s: 1.5}}
  - {{name: patient, base_url: {url}, api_key: {key}, default_model: patients}}
"""
SURFACES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "chat": ("chat/completions", False, {"messages": [{"role": "user", "content": "Hi"}]}),
    "chat-streamed": ("chat/completions", True, {"messages": [{"role": "user", "content": "Hi"}]}),
    "completions": ("completions", False, {"prompt": "Hi"}),
    "completions-streamed": ("completions", True, {"prompt": "Hi"}),
    "embeddings": ("embeddings", False, {"input": "Hi"}),
    "bytes": ("moderations", False, {"input": "Hi"}),
    "agent": ("chat/completions", False, {"messages": [{"role": "user", "content": "Hi"}]}),
    "agent-streamed": ("chat/completions", True, {"messages": [{"role": "user", "content": "Hi"}]}),
}
IN_TIME_S = 20.0
"""The deadlines above, for a machine that is busy with other things; without them it would be minutes."""

CHAT_ONLY = {"no_finish_reason", "no_finish_no_done", "no_events"}
"""Faults of chat's own grammar: a list of embeddings knows no end of a sentence."""

LEGAL_AS_BYTES = {
    "bad_json", "bad_utf8", "not_an_object", "wrong_shape", "error_object", "error_object_at_once", "error_object_json",
    "html_unlabelled", "empty_body", "gzip_bomb", "huge_event",
}  # fmt: skip
"""Bytes are relayed as they are; a client of such an endpoint reads what the upstream said."""

STATUSES = {
    "401": (status(401), 502),
    "403": (status(403), 502),
    "404": (status(404), 502),
    "429-1": (status(429, retry_after="1"), 429),
    "429-86400": (status(429, retry_after="86400"), 429),
    "429-garbage": (status(429, retry_after="soon"), 429),
    "500": (status(500), 502),
    "503": (status(503, retry_after="3"), 503),
    "500-page": (status(500, error="<html>internal 10.0.0.7</html>"), 502),
}


class House:
    def __init__(self, gateway: Gateway, upstream: ScriptedUpstream, server: str) -> None:
        self.gateway, self.upstream, self.server = gateway, upstream, server

    def ask(self, surface: str, answer: Answer, *, patiently: bool = False) -> Any:
        """Ask for an answer; ``patiently`` where none is waited for in vain, so that a busy machine makes no fault."""
        path, streamed, fields = SURFACES[surface]
        for model in ("m", "agents", "patients"):
            self.upstream.script(model, answer)
        agent, raw = ("default/patient", "patient/m") if patiently else ("default/helper", "up/m")
        model = agent if surface.startswith("agent") else raw
        body = {"model": model, **fields, **({"stream": True} if streamed else {})}
        try:
            return self.gateway.post(f"/v1/{path}", body)
        except (http.client.IncompleteRead, ConnectionError):
            # Bytes that had begun under 200 cannot become an error object: the cut is how the client is told.
            assert surface == "bytes"
            return None

    def is_well(self) -> bool:
        self.upstream.script("well", Answer(text="well"))
        request = {"model": "patient/well", "messages": [{"role": "user", "content": "Hi"}]}
        return bool(self.gateway.post("/v1/chat/completions", request).status == 200)


@pytest.fixture(scope="module", params=SERVERS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("faults")
    FAULTS["gzip_bomb"](False)  # packed once, now, not while the upstream has a deadline
    with ScriptedUpstream() as upstream:
        (home / "upstreams.yaml").write_text(
            UPSTREAMS.format(url=upstream.base_url, key=UPSTREAM_KEY), encoding="utf-8"
        )
        row = f'  - {{id: chat, hashed_key: {hashlib.sha256(CHAT.encode()).hexdigest()}, allow_agents: ["*"]}}\n'
        (home / "security.yaml").write_text("version: 1\napi_keys:\n" + row, encoding="utf-8")
        write_agent(home / "agents", "Helper", "Help.")
        write_agent(home / "agents", "Patient", "Help.", extra='__gateway__ = {"upstream": "patient"}\n')
        with running_gateway(home, key=CHAT, command=SERVERS[request.param], env=ENV) as gateway:
            wait_for(lambda: {"default/helper", "default/patient"} <= gateway.model_ids(), what="the agents are there")
            yield House(gateway, upstream, request.param)


ENV = {"GATEWAY_STREAM_PING_S": "5", "GATEWAY_USAGE_LEDGER": "0", "GATEWAY_CLIENT_STALL_S": "1"}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_error_in_time(house: House, name: str, surface: str) -> None:
    if name in CHAT_ONLY and surface in ("embeddings", "bytes"):
        pytest.skip("no fault of this surface")
    if house.server == "uvicorn" and surface not in ("chat", "chat-streamed", "agent-streamed"):
        pytest.skip("seen under `gateway serve`; the servers differ in how answers leave")
    started = time.monotonic()
    answer = house.ask(surface, fault(name))
    assert time.monotonic() - started < IN_TIME_S
    judge(answer, is_bytes=surface == "bytes" and name in LEGAL_AS_BYTES)
    assert house.is_well(), "others are served on"


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", STATUSES)
def test_a_status_is_an_error_in_openai_shape(house: House, name: str, surface: str) -> None:
    answer, expected = STATUSES[name]
    seen = house.ask(surface, answer, patiently=True)
    assert seen.status == expected, seen.body
    judge(seen)
    assert b"10.0.0.7" not in seen.body
    wait = seen.headers.get("retry-after")
    assert wait == {"429-1": "1", "503": "3"}.get(name, wait)
    if name == "429-garbage":
        assert wait is None or wait.isdigit()


def judge(answer: Any, *, is_bytes: bool = False) -> None:
    """Assert that the client was told of an error, before or inside the stream, and nothing of the inside."""
    if answer is None:
        return
    text = answer.body.decode("utf-8", "replace")
    for secret in (UPSTREAM_KEY, "Traceback", "site-packages", ".py", "127.0.0.1"):
        assert secret not in text, f"{secret!r} leaks: {text[:500]}"
    if is_bytes:
        return
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        assert events and events[-1] != "[DONE]", text[-500:]
        assert_error(json.loads(events[-1]))
        return
    assert answer.status >= 400, (answer.status, text[:300])
    assert_error(json.loads(text))


@pytest.mark.parametrize("surface", ["chat", "chat-streamed", "completions-streamed", "embeddings", "bytes", "agent"])
@pytest.mark.parametrize("name", ["gzip_bomb", "endless_line", "huge_event", "endless_comment", "endless_headers"])
def test_memory_is_bounded(house: House, name: str, surface: str) -> None:
    for warm in (Answer(text="well"), fault("no_events"), fault(name)):
        house.ask(surface, warm)
    before = house.gateway.rss_mb()
    for _ in range(2):
        house.ask(surface, fault(name))
    assert house.gateway.rss_mb() - before < 20


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", ["hang_before_headers", "hang_after_headers"])
def test_the_upstream_is_left_within_a_second_of_the_client(house: House, name: str, surface: str) -> None:
    path, streamed, fields = SURFACES[surface]
    for model in ("m", "patients"):
        house.upstream.script(model, fault(name))
    house.upstream.requests.clear()
    model = "default/patient" if surface.startswith("agent") else "patient/m"
    body = {"model": model, **fields, **({"stream": True} if streamed else {})}
    with send_by_hand(house.gateway, body, key=CHAT, path=f"/v1/{path}"):
        house.upstream.wait_for_request(1)
    left = time.monotonic()
    assert house.upstream.wait_closed(1) - left < IN_TIME_S, "sooner than any deadline of the upstream"


@pytest.mark.parametrize("surface", ["chat-streamed", "completions-streamed", "agent-streamed"])
def test_the_upstream_is_left_within_a_second_after_the_first_token(house: House, surface: str) -> None:
    path, _, fields = SURFACES[surface]
    for model in ("m", "patients"):
        house.upstream.script(model, fault("hang_part_way"))
    house.upstream.requests.clear()
    model = "default/patient" if surface.startswith("agent") else "patient/m"
    body = {"model": model, "stream": True, **fields}
    with send_by_hand(house.gateway, body, key=CHAT, path=f"/v1/{path}") as sock:
        read_until(sock, b"one")
    left = time.monotonic()
    assert house.upstream.wait_closed(1) - left < IN_TIME_S
