"""Guarantee 10: what people write, and every secret, stays out of logs, metrics, traces, errors, ledger and health.

One gateway at the level debug is asked on every surface with a marked text in every place that a request, an upstream
or an author's code can put one. Then everything that it wrote is searched for the marks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_tools import prepare_tools
from tests.support.house import ADMIN, CHAT, UPSTREAM_KEY, drop, furnish, write_agent
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.otlp_receiver import Collector, otlp_receiver
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

PROMPT, ARGUMENT, RESULT = "zqmark-prompt", "zqmark-argument", "zqmark-result"
EXCEPTION, UPSTREAM, HEADER = "zqmark-exception", "zqmark-upstream", "zqmark-header"
COOKIE, CREDENTIAL, QUERY, BODY = "zqmark-cookie", "zqmark-credential", "zqmark-query", "zqmark-body"
WRONG_KEY = "sk-zqmark-wrong-key-aaaaaaaaaaaaaaaaaaaa"
COLLECTOR_KEY = "zqmark-collector-key"
MARKS = (
    PROMPT,
    ARGUMENT,
    RESULT,
    EXCEPTION,
    UPSTREAM,
    HEADER,
    COOKIE,
    CREDENTIAL,
    QUERY,
    BODY,
    COLLECTOR_KEY,
    "zqmark",
)
SECRETS = (ADMIN, CHAT, UPSTREAM_KEY)

# The marks are put together where they are used: the lines of code that a traceback shows hold none.
CODE = """\
from agents import function_tool

RESULT = "zq" + "mark-result"
EXCEPTION = "zq" + "mark-exception"


@function_tool
def fetch(what: str) -> str:
    return RESULT + what


@function_tool(failure_error_function=None)
def hard(what: str) -> str:
    raise ValueError(EXCEPTION + what)


@function_tool
def soft(what: str) -> str:
    raise ValueError(EXCEPTION + what)
"""

LOCAL_TOOLS = """

def told(what: str) -> str:
    return "zq" + "mark-result" + what


def failing(what: str) -> str:
    raise ValueError("zq" + "mark-exception" + what)
"""

MARKED = {
    "cookie": f"session={COOKIE}",
    "x-cred-jira-api-token": CREDENTIAL,
    "x-aws-secret-access-key": CREDENTIAL,
    "x-custom": HEADER,
    "tracestate": f"a={HEADER}",
    "baggage": f"a={HEADER}",
    "traceparent": HEADER,
    "x-request-id": f"{HEADER} is not well-formed",
    "x-correlation-id": f"{HEADER} is not well-formed",
    "referer": f"https://x.example/?q={QUERY}",
}


@dataclass
class Stage:
    """A gateway with a collector, and every error that it answered."""

    gateway: Gateway
    collector: Collector
    errors: list[bytes]

    def send(self, method: str, path: str, body: Any = None, *, key: str = CHAT) -> Response:
        """Send a marked request; keep the answer if it is an error."""
        raw = body if isinstance(body, bytes) else None
        given = None if body is None or raw is not None else body
        path = f"{path}{'&' if '?' in path else '?'}api_key={QUERY}"
        answer = self.gateway.request(method, path, json_body=given, body=raw, key=key, headers=MARKED)
        told = answer.body
        if answer.status < 400:
            wrong = (b'data: {"error"', b'{"jsonrpc":"2.0","id":1,"error"')
            told = b"".join(line for line in told.splitlines() if line.startswith(wrong) or b'"isError":true' in line)
        if told:
            # What an upstream says of a request is told to whoever sent it; to nobody else.
            told = told.replace(UPSTREAM.encode(), b"")
            self.errors.append(told + repr(sorted(answer.headers.items())).encode())
        return answer

    def chat(self, text: str, *, model: str, stream: bool = False, **more: Any) -> Response:
        """Ask a model."""
        messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "stream": stream, "user": "somebody", "metadata": {"a": PROMPT}}
        return self.send("POST", "/v1/chat/completions", body | more)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("canary")
    furnish(home, upstream.url)
    prepare_tools(home)
    with (home / "shop_tools.py").open("a", encoding="utf-8") as file:
        file.write(LOCAL_TOOLS)
    with (home / "tools.yaml").open("a", encoding="utf-8") as file:
        for name in ("told", "failing"):
            file.write(f'  - {{name: {name}, provider: local, module: "shop_tools:{name}"}}\n')
    write_agent(home / "agents", "Marked", "You are marked.", extra=CODE, tools="fetch, hard, soft")
    for name in ("InputGuardrail", "OutputGuardrail", "Structured"):
        drop(name, home / "agents")
    with otlp_receiver() as collector:
        env = {
            "GATEWAY_LOG_LEVEL": "debug",
            "GATEWAY_TRACES": "1",
            "GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"),
            "GATEWAY_USAGE_FLUSH_S": "0.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_HEADERS": f"x-key={COLLECTOR_KEY}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        with running_gateway(home, env=env, key=ADMIN, cwd=home) as gateway:
            yield Stage(gateway, collector, [])


def test_no_mark_is_left_anywhere(stage: Stage) -> None:
    drive_chat(stage)
    drive_others(stage)
    drive_bad_bodies(stage)
    rest = settle(stage)
    places = {
        "the log": stage.gateway.log_text().encode(),
        "a trace": b"".join(stage.collector.bodies),
        "an error": b"\n".join(stage.errors),
        **rest,
    }
    assert len(stage.errors) > 30, "the faults that carry the marks did happen"
    found = [
        f"{mark} is in {place}: {around(text, mark)}"
        for place, text in places.items()
        for mark in (*MARKS, *SECRETS)
        if mark.encode() in text
    ]
    assert not found, "\n".join(found)


def drive_chat(stage: Stage) -> None:
    """Raw models and agents, whole and streamed, with every fault."""
    call = '{"what":"' + ARGUMENT + '"}'
    faults = ("status=500", "status=401", "status=403", "status=429", "status=400", "fault=html", "fault=cut")
    for stream in (False, True):
        for model in ("local/test-model", "default/marked"):
            assert stage.chat(f"say {PROMPT}", model=model, stream=stream).status == 200
            for fault in faults:
                stage.chat(f"[{fault}] say {UPSTREAM}", model=model, stream=stream)
            stage.chat(PROMPT, model=model, stream=stream, temperature=PROMPT)
            stage.chat(PROMPT, model=model, stream=stream, max_tokens=-1)
            stage.chat(PROMPT, model=model, stream=stream, tools=[{"type": PROMPT}])
        for tool in ("fetch", "soft", "hard"):
            stage.chat(f"call {tool} {call} ;; say {PROMPT}", model="default/marked", stream=stream)
            stage.chat(f'call {tool} {{"other": "{ARGUMENT}"}} ;; say x', model="default/marked", stream=stream)
            stage.chat(f"call {tool} {ARGUMENT} ;; say x", model="default/marked", stream=stream)
        stage.chat(f"call nobody {call} ;; say x", model="default/marked", stream=stream)
        stage.chat(f"homework {PROMPT}", model="default/inputguardrail", stream=stream)
        stage.chat(f"say secret {PROMPT}", model="default/outputguardrail", stream=stream)
        stage.chat(f"say {PROMPT}", model="default/structured", stream=stream)


def drive_others(stage: Stage) -> None:
    """Embeddings, byte relays, tools, the MCP face, keys that are none."""
    stage.send("POST", "/v1/embeddings", {"model": "local/test-model", "input": PROMPT})
    stage.send("POST", "/v1/completions", {"model": "local/test-model", "prompt": PROMPT})
    stage.send("POST", "/v1/moderations", {"model": "local/test-model", "input": PROMPT})
    stage.send("POST", "/v1/images/generations", {"model": "local/test-model", "prompt": PROMPT})
    stage.send("POST", "/v1/files", PROMPT.encode())
    stage.send("GET", f"/v1/files/x?purpose={QUERY}")
    for tool in ("told", "failing", "boom"):
        stage.send("POST", f"/tools/{tool}/invoke", {"arguments": {"what": ARGUMENT}})
        stage.send("POST", f"/tools/{tool}/invoke", {"arguments": {"other": ARGUMENT}})
        stage.send("POST", f"/tools/{tool}/invoke", {"arguments": ARGUMENT})
        params = {"name": tool, "arguments": {"what": ARGUMENT}}
        stage.send("POST", "/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    stage.send("POST", "/mcp", f'{{"jsonrpc": {PROMPT}'.encode())
    for key in (WRONG_KEY, "zqmark"):
        stage.send("GET", "/v1/models", key=key)
        stage.send("GET", "/agents", key=key)


def drive_bad_bodies(stage: Stage) -> None:
    """Every route with a body that is none, as admin: what is wrong is said without quoting what was sent."""
    document = json.loads(stage.gateway.get("/openapi.json", key="").body)
    bodies: tuple[Any, ...] = (
        f"{{{BODY}".encode(),
        {"zq" + "field": BODY},
        [BODY],
        f'"{BODY}"'.encode(),
        b"\xff" + BODY.encode(),
    )
    for path, methods in document["paths"].items():
        filled = path.replace("{", "").replace("}", "")
        for method in methods:
            if method in ("post", "put", "patch", "delete"):
                for body in bodies:
                    stage.send(method.upper(), filled, body, key=ADMIN)


def settle(stage: Stage) -> dict[str, bytes]:
    """Wait until everything is written; return what the gateway says of itself, and its database."""
    last = stage.gateway.get("/v1/models", headers={"x-request-id": "last-of-all"})
    assert last.status == 200
    stage.collector.wait_for_request("last-of-all")
    stage.gateway.logged("http.request", request_id="last-of-all")
    shown = {
        path: stage.gateway.get(path).body
        for path in ("/health", "/readyz", "/agents", "/agents/errors", "/upstreams", "/metrics", "/metrics/prometheus",
                     "/api/health/endpoints", "/tools", "/security/keys", "/usage")
    }  # fmt: skip
    assert len(json.loads(shown["/agents/errors"])) > 10
    state = stage.gateway.home / "state"

    def database() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file())

    stage.chat("say last words", model="default/marked", session="")
    wait_for(lambda: b"default/marked" in database(), what="the ledger is written")
    return {**shown, "the database": database()}


def around(text: bytes, mark: str) -> str:
    at = text.index(mark.encode())
    return repr(text[max(0, at - 300) : at + 120])


def test_the_search_would_find_a_mark(stage: Stage) -> None:
    """Asked for, the texts are there: the places that are searched are those where they would stand."""
    assert stage.chat("say zqproof", model="local/test-model").body.count(b"zqproof") == 1
    assert around(b"x zqmark y", "zqmark") == repr(b"x zqmark y")
    assert Path(stage.gateway.home / "state").is_dir()
