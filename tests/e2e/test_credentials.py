"""What a caller sends along for other services: its own run reads it, nobody else does, and it is written nowhere."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import ADMIN, CHAT, NARROW, furnish
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.otlp_receiver import Collector, otlp_receiver
from tests.support.server import Gateway, running_gateway

TOGETHER = 50

AGENT = f"""\
import asyncio, hashlib, threading
from agents import Agent, RunContextWrapper, function_tool
from sdk_adapter.gateway_tools import gateway_tool

everybody = asyncio.Event()
inside = 0


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


@function_tool
async def together(ctx: RunContextWrapper) -> str:
    "Reads its credential once all callers are inside, and again afterwards."
    global inside
    before = sha(ctx.context.caller.credentials["vault"]["api_token"])
    inside += 1
    if inside == {TOGETHER}:
        everybody.set()
    await asyncio.wait_for(everybody.wait(), 60)
    return before + " " + sha(ctx.context.caller.credentials["vault"]["api_token"])


@function_tool
def in_a_thread(ctx: RunContextWrapper) -> str:
    return sha(ctx.context.caller.credentials["vault"]["api_token"])


@function_tool
def whole(ctx: RunContextWrapper) -> str:
    caller = ctx.context.caller
    services = {{name: sorted(caller.credentials[name]) for name in caller.credentials}}
    return repr([services, dict(caller.providers), caller.agent_id])


@function_tool
def shown(ctx: RunContextWrapper) -> str:
    import json
    return repr(ctx.context) + str(ctx.context.caller) + json.dumps(ctx.context)


@function_tool
def missing(ctx: RunContextWrapper) -> str:
    try:
        return ctx.context.caller.credentials["github"]["token"]
    except KeyError as error:
        return str(error)


@function_tool
def leaking(ctx: RunContextWrapper) -> str:
    return "leaked " + ctx.context.caller.credentials["vault"]["api_token"]


@function_tool(failure_error_function=None)
def failing(ctx: RunContextWrapper) -> str:
    token = ctx.context.caller.credentials["vault"]["api_token"]
    raise ValueError("x" * 1_990 + token)


inner = Agent(name="Inner", instructions="You are the inner.", tools=[in_a_thread])
tools = [together, in_a_thread, whole, shown, missing, leaking, failing, gateway_tool("local"), gateway_tool("remote")]
tools.append(inner.as_tool(tool_name="ask", tool_description="Ask."))
agent = Agent(name="Lender", instructions="You lend.", tools=tools)
"""

LOCAL = """\
import hashlib


async def local(*, arguments, context):
    return hashlib.sha256(context.caller.credentials["vault"]["api_token"].encode()).hexdigest() + repr(context)
"""

TOOLS = """\
version: 1
tools:
  - {name: local, provider: local, module: "lending_tools:local"}
  - name: remote
    provider: http
    method: GET
    url: URL/whoami
    caller_headers: {authorization: Bearer x-cred-vault-api-token}
    network: {allow_private: [127.0.0.0/8]}
"""


@contextmanager
def remote_server(seen: list[str]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["authorization"])
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Stage:
    def __init__(self, gateway: Gateway, collector: Collector, seen: list[str]) -> None:
        self.gateway, self.collector, self.seen = gateway, collector, seen

    def ask(self, text: str, *, model: str = "default/lender", key: str = CHAT, **headers: str) -> Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.post("/v1/chat/completions", body, key=key, headers=given, timeout_s=90)

    def said(self, text: str, **headers: str) -> str:
        answer = self.ask(text, **headers)
        assert answer.status == 200, answer.body
        return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("lending")
    furnish(home, upstream.url)
    seen: list[str] = []
    with remote_server(seen) as url, otlp_receiver() as collector:
        _prepare(home, url)
        env = {
            "GATEWAY_LOG_LEVEL": "debug",
            "GATEWAY_LOG_EXCEPTION_TEXT": "1",
            "GATEWAY_TRACES": "1",
            "GATEWAY_TRACES_CONTENT": "1",
            "GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"),
            "GATEWAY_USAGE_FLUSH_S": "0.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        with running_gateway(home, env=env, key=ADMIN, cwd=home) as gateway:
            yield Stage(gateway, collector, seen)


def _prepare(home: Path, url: str) -> None:
    (home / "agents" / "Lender").mkdir(parents=True)
    (home / "agents" / "Lender" / "agent.py").write_text(AGENT, encoding="utf-8")
    (home / "lending_tools.py").write_text(LOCAL, encoding="utf-8")
    (home / "tools.yaml").write_text(TOOLS.replace("URL", url), encoding="utf-8")
    security = (home / "security.yaml").read_text(encoding="utf-8")
    security = security.replace("default:\n", 'default:\n  local_tools_allowlist: ["lending_tools:*"]\n')
    for name in ("chat", "narrow"):
        security = security.replace(f"  - id: {name}\n", f'  - id: {name}\n    allow_tools: ["*"]\n')
    (home / "security.yaml").write_text(security.replace('"labs/*"]', '"labs/*", "default/*"]'), encoding="utf-8")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def token(number: int) -> str:
    # With what JSON escapes: a mask that looks for the raw text alone would miss it in a log line.
    return f'zqlent-"{number:03d}"-aaaa\\bbbb'


def test_fifty_callers_at_once_each_read_their_own(stage: Stage) -> None:
    """Natively, in a thread, in an agent used as a tool, in a local and in an HTTP tool of the gateway."""
    script = "call together {} && call in_a_thread {} && call local {} && call remote {} ;; echo"
    key_of = (CHAT, NARROW)

    def one(number: int) -> str:
        return stage.said(script, key=key_of[number % 2], x_cred_vault_api_token=token(number))

    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(one, range(TOGETHER)))
    for number, said in enumerate(answers):
        mine = sha(token(number))
        assert said.count(mine) == 4, said
        assert not [other for other in range(TOGETHER) if other != number and sha(token(other)) in said]
    assert sorted(stage.seen) == sorted(f"Bearer {token(number)}" for number in range(TOGETHER))


def test_an_inner_agent_reads_what_its_run_was_given(stage: Stage) -> None:
    said = stage.said('call ask {"input": "call in_a_thread {} ;;; echo"} ;; echo', x_cred_vault_api_token=token(71))
    assert said == sha(token(71))


def test_every_kind_of_header_is_there_by_its_name(stage: Stage) -> None:
    before = stage.gateway.counted("agent_gateway_credential_operations")
    said = stage.said(
        "call whole {} ;; echo",
        X_Cred_Jira_Api_Key="a",
        X_Cred_Jira_Base_Url="http://169.254.169.254/",
        X_Cred_Desk_Support_Key="b",
        X_AWS_Access_Key_Id="c",
        X_AWS_Secret_Access_Key="d",
        X_AWS_Session_Token="e",
        X_AWS_Region="eu-central-1",
        X_Provider="mem0",
        X_Provider_Code_Interpreter="jupyter",
        X_Agent_Id="desk-7",
        x_request_id="kinds",
    )
    services = {
        "jira": ["api_key"],
        "desk": ["support_key"],
        "aws": ["access_key_id", "region", "secret_access_key", "session_token"],
    }
    assert said == repr([services, {"*": "mem0", "code_interpreter": "jupyter"}, "desk-7"])
    (denied,) = stage.gateway.logged("network.access.denied", request_id="kinds")
    assert (denied["headers"], denied["key_id"]) == (["x-cred-jira-base-url"], "chat")
    assert _grown(stage.gateway, before) == {"received": 6, "refused": 1}


def test_what_was_not_sent_is_said(stage: Stage) -> None:
    assert "x-cred-github-" in stage.said("call missing {} ;; echo")
    before = stage.gateway.counted("agent_gateway_credential_operations")
    refused = stage.gateway.post("/tools/remote/invoke", {"arguments": {}}, key=CHAT)
    assert refused.status == 503 and "x-cred-vault-api-token" in refused.error["message"]
    stage.said("call remote {} ;; echo", x_cred_vault_api_token=token(3))
    assert _grown(stage.gateway, before) == {"missing": 1, "received": 1, "lent": 1}


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("x-cred-vault", "zq1", "x-cred-vault"),
        ("x-cred-vault-", "zq1", "x-cred-vault-"),
        ("x-cred-va.ult-key", "zq1", "x-cred-va.ult-key"),
        ("x-cred-vault-key", "v" * 8_193, "8,192"),
        ("x-cred-vault-key", "caf\xe9", "ASCII"),
        ("x-provider", "a b", "x-provider"),
        ("x-agent-id", "a\tb", "x-agent-id"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_by_name(stage: Stage, name: str, value: str, named: str) -> None:
    refused = stage.ask("say x", **{name: value})
    assert (refused.status, refused.error["code"]) == (400, "invalid_header")
    assert named in refused.error["message"] and value not in refused.error["message"].replace(name, "")
    assert stage.ask("say x", model="local/test-model", **{name: value}).status == 200, "a relayed call reads none"


def test_too_many_are_refused(stage: Stage) -> None:
    many = {f"x_cred_s{number}_key": "v" for number in range(33)}
    assert "32" in stage.ask("say x", **many).error["message"]


def test_they_are_written_nowhere_and_sent_to_no_upstream(stage: Stage, upstream: ObedientUpstream) -> None:
    """With everything that tells more switched on: debug lines, texts of exceptions, contents in traces."""
    mark, raw = 'zqlent-"mark-cc\\cccccc', "zqlent-raw-dddddddd"
    before = len(upstream.calls)
    sent = {"x_cred_vault_api_token": mark, "x_aws_secret_access_key": raw, "x_request_id": "marked"}
    shown = stage.said("call shown {} ;; echo", **sent)
    stage.said("call local {} && call remote {} && call in_a_thread {} ;; echo", **sent)
    failed = stage.ask("call failing {} ;; say x", **{**sent, "x_request_id": "marked-failing"})
    assert failed.status == 502
    for model in ("local/test-model", "default/lender"):
        for fault in ("status=500", "status=401", "status=429"):
            failed = stage.ask(f"[{fault}] say x", model=model, **sent)
    stage.gateway.post("/v1/embeddings", {"model": "local/test-model", "input": "x"}, key=CHAT, headers=_dashed(sent))
    stage.gateway.request("POST", "/v1/files", body=b"x", key=CHAT, headers=_dashed(sent))
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "local", "arguments": {}}}
    accepts = {"accept": "application/json, text/event-stream"}
    told = stage.gateway.post("/mcp", call, key=CHAT, headers=_dashed(sent) | accepts)
    assert sha(mark).encode() in told.body, "it is read there, too"
    invoked = stage.gateway.post("/tools/local/invoke", {"arguments": {}}, key=CHAT, headers=_dashed(sent))
    assert sha(mark) in str(invoked.json()["result"])
    stage.collector.wait_for_request("marked-failing")
    stage.gateway.logged("http.request", request_id="marked-failing")
    state = stage.gateway.home / "state"
    pages = ("/agents/errors", "/metrics", "/metrics/prometheus", "/usage", "/tools", "/health")
    places = {
        "the log": stage.gateway.log_text().encode(),
        "a trace": b"".join(stage.collector.bodies),
        "an error": failed.body + b"".join(stage.gateway.get(path).body for path in pages),
        "the store": b"".join(path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file()),
        "the upstream": repr([(c.headers, c.body) for c in upstream.calls[before:]]).encode(),
        "an answer": shown.encode() + told.body + invoked.body,
    }
    assert not [place for place, text in places.items() if b"zqlent" in text], "not half of one either"
    assert b"ValueError" in places["the log"], "where it would stand"


def test_a_tool_that_gives_its_credential_away_leaves_it_in_no_trace(stage: Stage) -> None:
    said = stage.said("call leaking {} ;; echo", x_cred_vault_api_token="zqgiven-away", x_request_id="leaking")
    assert said == "leaked zqgiven-away", "what a tool returns goes to the model"
    stage.collector.wait_for_request("leaking")
    traces = b"".join(stage.collector.bodies)
    assert b"leaked ***" in traces and b"zqgiven" not in traces and "zqgiven" not in stage.gateway.log_text()


def _grown(gateway: Gateway, before: dict[str, float]) -> dict[str, float]:
    """What happened to credentials since, by operation."""
    now = gateway.counted("agent_gateway_credential_operations")
    grown = {labels.split('"')[1]: value - before.get(labels, 0) for labels, value in now.items()}
    return {operation: count for operation, count in grown.items() if count}


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
