"""The gateway's tools by the real server: agents and clients call them, under rights, rules, schemas and limits."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI, PermissionDeniedError

from tests.e2e.conftest import GatewayFactory
from tests.support.house import ADMIN, CHAT, NARROW, furnish
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.server import Gateway, running_gateway
from tests.support.waiting import wait_for

CODE = """\
import asyncio
import pathlib
import time

HERE = pathlib.Path(__file__).parent
VERSION = "one"


def weather(city: str, days: int = 1) -> dict:
    "The weather of a city.\\n\\nNot shown."
    return {"city": city, "days": days, "version": VERSION}


async def whole(*, arguments: dict, context):
    return f"{arguments['x']} {context.agent} {context.source} {context.key_id} {context.user}"


def forbidden(path: str) -> str:
    with (HERE / "forbidden.log").open("a") as file:
        file.write(path + "\\n")
    return "done"


def hang() -> str:
    (HERE / "hanging").touch()
    while not (HERE / "go").exists():
        time.sleep(0.01)
    return VERSION


async def stubborn() -> str:
    while not (HERE / "go").exists():
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            pass
    return "late"


def boom() -> str:
    raise ValueError("sk-secret-in-exception-aaaaaaaaaaaaaa")


def mistaken(n: int) -> str:
    with (HERE / "mistaken.log").open("a") as file:
        file.write("ran\\n")
    return "x" + n


def leave() -> str:
    raise SystemExit(7)


async def leave_async() -> str:
    raise SystemExit(7)


def huge() -> str:
    return "x" * 2_000_000
"""

TOOLS = """\
version: 1
defaults: {timeout: 5}
tools:
  - {name: weather, provider: local, module: "shop_tools:weather"}
  - name: whole
    provider: local
    module: shop_tools:whole
    schema: {type: object, required: [x], properties: {x: {type: integer}}}
  - {name: forbidden, provider: local, module: "shop_tools:forbidden", rules: [{argument: path, prefix: /data/}]}
  - {name: ending, provider: local, module: "shop_tools:forbidden", on_denied: end_run, allowed_for: {agents: [no/*]}}
  - {name: hang, provider: local, module: "shop_tools:hang", timeout: 0.3, max_concurrency: 1}
  - {name: stubborn, provider: local, module: "shop_tools:stubborn", timeout: 0.3}
  - {name: boom, provider: local, module: "shop_tools:boom"}
  - {name: mistaken, provider: local, module: "shop_tools:mistaken"}
  - {name: leave, provider: local, module: "shop_tools:leave"}
  - {name: leave_async, provider: local, module: "shop_tools:leave_async"}
  - {name: huge, provider: local, module: "shop_tools:huge"}
  - {name: blocked, provider: local, module: "os:getcwd"}
  - {name: agents_only, provider: local, module: "shop_tools:weather", allowed_for: {direct: false}}
"""

AGENT = """\
from agents import Agent, function_tool
from sdk_adapter.gateway_tools import gateway_tool, use_gateway_tool


@function_tool
def native(word: str) -> str:
    return word.upper()


@function_tool
def clumsy(n: int) -> str:
    with open("mistaken.log", "a") as file:
        print("ran", file=file)
    return "x" + n


names = ["whole", "forbidden", "ending", "blocked", "boom", "mistaken"]
agent = Agent(
    name="Shop",
    instructions="You are the shop.",
    tools=[gateway_tool("weather", description="Ask for rain."), *map(use_gateway_tool, names), native, clumsy],
)
inner = Agent(name="Inner", instructions="You are the inner.", tools=[native, gateway_tool("weather")])
outer = Agent(
    name="Outer", instructions="You are the outer.", tools=[inner.as_tool(tool_name="ask", tool_description="Ask.")]
)
needy = Agent(name="Needy", instructions="You are needy.", tools=[gateway_tool("weather", required=True)])
lost = Agent(name="Lost", instructions="You are lost.", tools=[gateway_tool("nowhere", required=True)])
__agents__ = {"desk": agent, "outer": outer, "needy": needy, "lost": lost}
"""

DECLARED = """\
version: 1
agents:
  - {name: Plain, instructions: You are plain., upstream: local, tools: [weather]}
"""


def prepare(home: Path) -> None:
    (home / "shop_tools.py").write_text(CODE, encoding="utf-8")
    (home / "tools.yaml").write_text(TOOLS, encoding="utf-8")
    (home / "agents.yaml").write_text(DECLARED, encoding="utf-8")
    (home / "agents" / "Shop").mkdir(parents=True)
    (home / "agents" / "Shop" / "agent.py").write_text(AGENT, encoding="utf-8")
    security = (home / "security.yaml").read_text(encoding="utf-8")
    security = security.replace("default:\n", 'default:\n  local_tools_allowlist: ["shop_tools:*"]\n')
    security = security.replace("  - id: admin\n", '  - id: admin\n    allow_tools: ["*"]\n')
    security = security.replace("  - id: chat\n", '  - id: chat\n    allow_tools: ["*"]\n')
    (home / "security.yaml").write_text(security.replace('"labs/*"]', '"labs/*", "default/*"]'), encoding="utf-8")


def prepare_tools(home: Path) -> None:
    """No agents: a gateway without them starts at once."""
    prepare(home)
    shutil.rmtree(home / "agents" / "Shop")
    (home / "agents.yaml").unlink()


def env_of(home: Path, **more: str) -> dict[str, str]:
    return {"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml"), **more}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("shop")
    furnish(home, upstream.url)
    prepare(home)
    with running_gateway(home, env=env_of(home), key=ADMIN, cwd=home) as server:
        yield server


def invoke(gateway: Gateway, name: str, arguments: object = None, *, key: str = CHAT) -> Response:
    return gateway.request("POST", f"/tools/{name}/invoke", json_body={"arguments": arguments or {}}, key=key)


def ask(gateway: Gateway, text: str, *, model: str = "default/shop", key: str = CHAT, **options: Any) -> str:
    with OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        said = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)
    return said.choices[0].message.content or ""


def test_agents_are_there_and_a_missing_tool_is_a_warning(shop: Gateway) -> None:
    listing = shop.listing()
    assert {name: entry["status"] for name, entry in listing.items()} == dict.fromkeys(listing, "ready")
    (lost,) = [entry for name, entry in listing.items() if "lost" in name]
    (problem,) = [item for item in lost["metadata"]["diagnostics"] if item["code"] == "gateway_tool_missing"]
    assert problem["severity"] == "warning"
    assert "'nowhere'" in problem["message"]
    assert problem["line"] is not None


def test_an_agent_calls_a_gateway_tool_with_the_tools_own_schema(shop: Gateway, upstream: ObedientUpstream) -> None:
    said = ask(shop, 'call weather {"city":"Bern"} ;; echo')
    assert json.loads(said) == {"city": "Bern", "days": 1, "version": "one"}
    (tool,) = [item for item in upstream.calls[-1].body["tools"] if item["function"]["name"] == "weather"]
    assert tool["function"]["description"] == "Ask for rain."
    assert tool["function"]["parameters"]["properties"] == {
        "city": {"type": "string"},
        "days": {"type": "integer"},
    }


def test_a_call_carries_the_runs_context(shop: Gateway) -> None:
    said = ask(shop, 'call whole {"x": 4, "undeclared": 1} ;; echo', user="mia")
    assert said == "4 default/shop sdk chat mia"


def test_streamed_runs_call_tools_too(shop: Gateway) -> None:
    with OpenAI(api_key=CHAT, base_url=f"{shop.url}/v1", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="default/shop",
            messages=[{"role": "user", "content": 'call weather {"city":"Bern"} ;; echo'}],
            stream=True,
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert json.loads(said)["city"] == "Bern"


def test_a_declared_agent_has_gateway_tools(shop: Gateway) -> None:
    assert json.loads(ask(shop, 'call weather {"city":"Ulm"} ;; echo', model="default/plain"))["city"] == "Ulm"


def test_wrong_arguments_are_told_to_the_model(shop: Gateway) -> None:
    told = json.loads(ask(shop, 'call weather {"city": 5} ;; echo'))
    assert told["error"] == {
        "code": "invalid_tool_arguments",
        "message": "arguments.city: must be of type string.",
    }
    assert json.loads(ask(shop, 'call whole {"x": true} ;; echo'))["error"]["code"] == "invalid_tool_arguments"


FORBIDDEN = (
    '{"path":"/etc/passwd"}',
    '{"path":"/data/../etc/passwd"}',
    '{"path":"/data/%2e%2e/etc"}',
    '{"path":["/data/x"]}',
    "{}",
)


def test_a_forbidden_call_is_executed_never(shop: Gateway) -> None:
    for arguments in FORBIDDEN:
        told = json.loads(ask(shop, f"call forbidden {arguments} ;; echo"))
        assert told["error"]["code"] in ("tool_denied", "invalid_tool_arguments"), told
        assert invoke(shop, "forbidden", json.loads(arguments)).status in (400, 403)
    assert not (shop.home / "forbidden.log").exists()
    assert ask(shop, 'call forbidden {"path":"/data/x"} ;; echo') == "done"
    assert (shop.home / "forbidden.log").read_text() == "/data/x\n"
    (shop.home / "forbidden.log").unlink()


def test_a_key_without_the_right_executes_nothing(shop: Gateway) -> None:
    script = 'call weather {} && call forbidden {"path":"/data/x"} ;; echo'
    assert "does not reach the tool" in ask(shop, script, key=NARROW)
    before = shop.counted("agent_gateway_access_decisions")
    refused = invoke(shop, "forbidden", {"path": "/data/x"}, key=NARROW)
    assert (refused.status, refused.json()["error"]["code"]) == (403, "tool_denied")
    after = shop.counted("agent_gateway_access_decisions")
    denied, allowed = (f'decision="{word}",kind="tool"' for word in ("deny", "allow"))
    assert (after[denied] - before[denied], after.get(allowed)) == (1, before.get(allowed))
    assert not (shop.home / "forbidden.log").exists()


def test_a_refusal_ends_the_run_where_the_tool_says_so(shop: Gateway) -> None:
    with pytest.raises(PermissionDeniedError) as caught:
        ask(shop, 'call ending {"path":"/data/x"} ;; say never')
    assert caught.value.code == "tool_denied"
    assert "allowed_for.agents" in caught.value.message
    assert not (shop.home / "forbidden.log").exists()


def test_a_required_tool_that_is_missing_or_refused_fails_loudly(shop: Gateway) -> None:
    ids = shop.model_ids()
    needy, lost = (next(name for name in ids if word in name) for word in ("needy", "lost"))
    with pytest.raises(BadRequestError, match="nowhere") as missing:
        ask(shop, "say hi", model=lost)
    assert missing.value.code == "tool_missing"
    with pytest.raises(PermissionDeniedError, match="weather") as refused:
        ask(shop, "say hi", model=needy, key=NARROW)
    assert refused.value.code == "tool_denied"
    assert ask(shop, "say hi", model=needy) == "hi"


def test_a_module_that_is_not_allowed_is_403_and_was_not_imported(shop: Gateway) -> None:
    refused = invoke(shop, "blocked")
    assert (refused.status, refused.json()["error"]["code"]) == (403, "tool_denied")
    assert "local_tools_allowlist" in refused.json()["error"]["message"]
    errors = [error for error in shop.get("/agents/errors").json() if error["event"] == "tool.module.blocked"]
    assert len(errors) == 1 and "'blocked'" in errors[0]["message"]
    assert (errors[0]["error_stage"], errors[0]["details"]["code"]) == ("security", "tool_not_allowed")


def test_a_callable_that_raises_ran_once(shop: Gateway) -> None:
    answer = invoke(shop, "mistaken", {"n": 1})
    assert (answer.status, answer.json()["error"]["code"]) == (502, "tool_error")
    assert (shop.home / "mistaken.log").read_text() == "ran\n"
    (shop.home / "mistaken.log").unlink()


@pytest.mark.parametrize("tool", ["mistaken", "clumsy"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_that_raises_in_a_run_ran_once(shop: Gateway, tool: str, streamed: bool) -> None:
    body = {
        "model": "default/shop",
        "stream": streamed,
        "messages": [{"role": "user", "content": f'call {tool} {{"n":1}} ;; say done'}],
    }
    answer = shop.post("/v1/chat/completions", body, key=CHAT)
    assert answer.status == 200 and b"done" in answer.body
    assert (shop.home / "mistaken.log").read_text() == "ran\n"
    (shop.home / "mistaken.log").unlink()


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("hang", 504, "tool_timeout"),
        ("stubborn", 504, "tool_timeout"),
        ("boom", 502, "tool_error"),
        ("leave", 502, "tool_error"),
        ("leave_async", 502, "tool_error"),
        ("huge", 502, "tool_result_too_large"),
        ("nowhere", 404, "tool_not_found"),
        ("agents_only", 403, "tool_denied"),
    ],
)
def test_a_hostile_callable_costs_its_own_call(shop: Gateway, name: str, status: int, code: str) -> None:
    answer = invoke(shop, name, {"city": "x"} if name == "agents_only" else {})
    assert (answer.status, answer.json()["error"]["code"]) == (status, code)
    assert "sk-secret" not in answer.body.decode()
    assert invoke(shop, "weather", {"city": "Bern"}).json()["result"]["city"] == "Bern"


def test_a_tool_that_hangs_hurts_itself_alone(shop: Gateway) -> None:
    assert invoke(shop, "hang").status == 504
    assert invoke(shop, "hang").status in (503, 504)
    assert invoke(shop, "weather", {"city": "Bern"}).status == 200


def test_the_list_is_the_keys_own(shop: Gateway) -> None:
    seen = {tool["name"]: tool for tool in shop.get("/tools", key=ADMIN).json()["data"]}
    assert seen["weather"]["module"] == "shop_tools:weather"
    assert (seen["weather"]["provider"], seen["weather"]["timeout"], seen["weather"]["status"]) == ("local", 5, "ready")
    assert seen["weather"]["description"] == "The weather of a city."
    assert seen["weather"]["health"]["status"] == "ok"
    assert seen["agents_only"]["allowed_for"] == {"agents": ["*"], "keys": ["*"], "direct": False}
    assert seen["blocked"]["status"] == "unavailable"
    assert "local_tools_allowlist" in seen["blocked"]["problem"]
    mine = {tool["name"]: tool for tool in shop.get("/tools", key=CHAT).json()["data"]}
    assert (mine["weather"]["module"], mine["weather"]["allowed_for"]) == (None, None)
    assert mine["weather"]["schema"]["required"] == ["city"]
    assert shop.get("/tools", key=NARROW).json()["data"] == []
    assert shop.request("POST", "/tools/refresh", key=CHAT).status == 403


def test_calls_are_counted_and_logged_without_arguments(shop: Gateway) -> None:
    ask(shop, 'call weather {"city":"canary-city"} && call native {"word":"x"} ;; echo')
    outer = next(name for name in shop.model_ids() if "outer" in name)
    inner_script = 'call native {"word":"deep"} ;;; call weather {"city":"Ulm"} ;;; echo'
    script = f"call ask {json.dumps({'input': inner_script})} ;; echo"
    ask(shop, script, model=outer)
    invoke(shop, "weather", {"city": "canary-city"})
    for name, provider, source in (
        ("weather", "local", "sdk"),
        ("weather", "local", "api"),
        ("native", "native", "sdk"),
    ):
        shop.logged("tool.invoke", tool_name=name, provider=provider, source=source, status="success")
    inner = shop.logged("tool.invoke", count=2, agent="Inner")
    assert {line["tool_name"] for line in inner} == {"native", "weather"}
    runs = {line["run_id"] for line in inner}
    assert len(runs) == 1 and None not in runs and {line["key_id"] for line in inner} == {"chat"}
    assert "canary-city" not in shop.log_text()
    breakdown = shop.get("/metrics", key=ADMIN).json()["tool_breakdown"]
    assert breakdown["weather"]["sdk"]["provider"] == "local"
    assert breakdown["weather"]["api"]["count"] >= 1
    text = shop.get("/metrics/prometheus", key=ADMIN).body.decode()
    counted = [line for line in text.splitlines() if line.startswith("agent_gateway_tool_invocations_total{")]
    labels = ('tool="weather"', 'provider="local"', 'status="success"', 'source="api"')
    assert any(all(label in line for label in labels) for line in counted)
    assert 'agent_gateway_access_decisions_total{decision="allow",kind="tool"}' in text


def test_a_refresh_drops_old_callables_while_running_calls_finish(start: GatewayFactory, tmp_path: Path) -> None:
    home = tmp_path / "home"
    gateway = start(prepare=prepare_tools, env=env_of(home))
    tools = (home / "tools.yaml").read_text(encoding="utf-8")
    (home / "tools.yaml").write_text(tools.replace("timeout: 0.3, max", "timeout: 20, max"), encoding="utf-8")
    assert gateway.request("POST", "/tools/refresh", key=ADMIN).status == 200
    answers: list[Response] = []
    running = threading.Thread(target=lambda: answers.append(invoke(gateway, "hang")))
    running.start()
    wait_for((home / "hanging").exists, what="the call runs")
    assert invoke(gateway, "whole", {"x": 1}).status == 200, "the server answers"
    (home / "shop_tools.py").write_text(CODE.replace('"one"', '"two"'), encoding="utf-8")
    assert invoke(gateway, "weather", {"city": "x"}).json()["result"]["version"] == "one"
    assert gateway.request("POST", "/tools/refresh", key=ADMIN).status == 200
    assert invoke(gateway, "weather", {"city": "x"}).json()["result"]["version"] == "two"
    (home / "go").touch()
    running.join(60)
    assert answers[0].json()["result"] == "one"
    (home / "tools.yaml").write_text("tools: [{name: x, provider: locl}]", encoding="utf-8")
    refused = gateway.request("POST", "/tools/refresh", key=ADMIN)
    assert (refused.status, refused.json()["error"]["code"]) == (400, "configuration_error")
    assert invoke(gateway, "weather", {"city": "x"}).status == 200


def test_the_file_is_watched(start: GatewayFactory, tmp_path: Path) -> None:
    home = tmp_path / "home"
    gateway = start(prepare=prepare_tools, env=env_of(home, GATEWAY_TOOL_AUTO_RELOAD="1"))
    assert invoke(gateway, "fresh", {"city": "x"}).status == 404
    (home / "tools.yaml").write_text(TOOLS + '  - {name: fresh, provider: local, module: "shop_tools:weather"}\n')
    wait_for(lambda: invoke(gateway, "fresh", {"city": "x"}).status == 200, what="the new tool is there")


# --- HTTP ------------------------------------------------------------------------------------------------------------


class Canary(http.server.BaseHTTPRequestHandler):
    """A server inside that counts who reaches it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Any = self.server
        self.rfile.read(int(self.headers.get("content-length", 0)))
        server.seen.append((self.command, self.path, dict(self.headers)))
        status, headers, body = server.answers(self)
        if body is None:
            self._send_for_ever()
            return
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_GET

    def _send_for_ever(self) -> None:
        """Send a body without a length until the client has had enough."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            while True:
                self.wfile.write(b"x" * 65_536)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def canary(answers: Any = lambda handler: (200, {}, b"reached")) -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    server.daemon_threads = True
    server.seen, server.answers = [], answers  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


OWN = "{allow_private: [127.0.0.1/32]}"
SPELLINGS = (
    "127.0.0.1", "localhost", "0177.0.0.1", "2130706433", "0x7f.1", "127.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]", "[::]",
    "127.0.0.1.", "LOCALHOST",
)  # fmt: skip


def test_only_what_changes_nothing_a_second_time_is_tried_again(start: GatewayFactory, tmp_path: Path) -> None:
    def busy_at_first(handler: Any) -> tuple[int, dict[str, str], bytes]:
        asked = [path for _, path, _ in handler.server.seen].count(handler.path)
        return (503, {"retry-after": "0"}, b"busy") if asked == 1 else (200, {}, b"done")

    with canary(busy_at_first) as server:
        methods = {"read": "GET", "replace": "PUT", "order": "POST", "order_once": "POST"}
        entries = "".join(
            f"  - {{name: {name}, provider: http, method: {method}, network: {OWN}, "
            f'url: "http://127.0.0.1:{server.server_address[1]}/{name}"'
            f"{', idempotent: true' if name == 'order_once' else ''}}}\n"
            for name, method in methods.items()
        )

        def fill(home: Path) -> None:
            prepare_tools(home)
            (home / "tools.yaml").write_text("version: 1\ndefaults: {timeout: 20}\ntools:\n" + entries)

        gateway = start(prepare=fill, env=env_of(tmp_path / "home"))
        answers = {name: invoke(gateway, name).json() for name in methods}
        assert [name for name in methods if answers[name].get("result") == "done"] == ["read", "replace", "order_once"]
        paths = [path for _, path, _ in server.seen]
        assert {name: paths.count(f"/{name}") for name in methods} == {
            "read": 2, "replace": 2, "order": 1, "order_once": 2,
        }  # fmt: skip
        # Whoever may be asked twice can tell that it is the same call.
        keys = [headers.get("idempotency-key") for _, path, headers in server.seen if path == "/order_once"]
        assert keys[0] is not None and keys[0] == keys[1]


def test_http_tools_cannot_reach_inside(start: GatewayFactory, tmp_path: Path) -> None:
    with canary() as server:
        port = server.server_address[1]
        entries = "".join(
            f'  - {{name: t{index}, provider: http, method: GET, url: "http://{host}:{port}/"}}\n'
            for index, host in enumerate(SPELLINGS)
        )
        entries += f'  - {{name: ok, provider: http, method: GET, url: "http://127.0.0.1:{port}/", network: {OWN}}}\n'

        def fill(home: Path) -> None:
            prepare_tools(home)
            (home / "tools.yaml").write_text("version: 1\ndefaults: {timeout: 5}\ntools:\n" + entries)

        gateway = start(prepare=fill, env=env_of(tmp_path / "home"))
        for index, host in enumerate(SPELLINGS):
            answer = invoke(gateway, f"t{index}")
            assert answer.status in (403, 503), (host, answer.body)
            assert str(port) not in answer.body.decode()
        assert server.seen == []
        assert invoke(gateway, "ok").json()["result"] == "reached"  # the canary sings where it may


def test_http_tools_are_bounded_and_follow_nothing(start: GatewayFactory, tmp_path: Path) -> None:
    flaky = iter((503, 503, 200))

    def answers(handler: Any) -> tuple[int, dict[str, str], bytes | None]:
        match handler.path.partition("?")[0]:
            case "/redirect":
                return 302, {"location": "http://127.0.0.1:1/"}, b""
            case "/bomb":
                return 200, {"content-encoding": "gzip"}, b"\x1f\x8b" + b"0" * 100
            case "/big":
                return 200, {}, b"x" * 5_000_000
            case "/endless":
                return 200, {}, None
            case "/flaky":
                return next(flaky), {}, b'{"n":1}'
            case "/missing":
                return 404, {}, b"no such order"
            case "/once":
                return 503, {}, b"down"
        return 200, {"content-type": "application/json"}, b'{"ok":true}'

    with canary(answers) as server:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        tools: list[dict[str, Any]] = [
            {"name": name, "method": "GET", "url": f"{base}/{name}"}
            for name in ("redirect", "bomb", "big", "endless", "flaky", "missing")
        ]
        tools.append({"name": "once", "method": "POST", "url": f"{base}/once"})
        schema = {"type": "object", "properties": {"id": {"type": "string"}, "q": {"type": "array"}}}
        tools.append({"name": "order", "method": "GET", "url": f"{base}/orders/{{id}}?a=1", "schema": schema})
        for tool in tools:
            tool |= {
                "provider": "http",
                "network": {"allow_private": ["127.0.0.0/8"]},
                "headers": {"authorization": "Bearer env:SHOP_TOKEN"},
            }

        def fill(home: Path) -> None:
            prepare_tools(home)
            (home / "tools.yaml").write_text(json.dumps({"version": 1, "defaults": {"timeout": 5}, "tools": tools}))

        gateway = start(prepare=fill, env=env_of(tmp_path / "home", SHOP_TOKEN="sk-shop-canary-token-abcdef"))
        for name in ("redirect", "bomb", "big"):
            assert invoke(gateway, name).status == 502, name
        assert invoke(gateway, "endless").json()["error"]["code"] == "tool_result_too_large"
        assert gateway.rss_mb() < 200
        assert invoke(gateway, "flaky").json()["result"] == '{"n":1}'
        missing = invoke(gateway, "missing").json()
        assert (missing["result"], missing["error"]) == (None, "HTTP 404: no such order")
        before = len(server.seen)
        assert "HTTP 503" in invoke(gateway, "once").json()["error"]
        assert len(server.seen) == before + 1
        found = invoke(gateway, "order", {"id": "a/../b?c", "q": ["1", "x y"]})
        assert found.json()["result"] == {"ok": True}
        _, path, headers = server.seen[-1]
        assert path == "/orders/a%2F..%2Fb%3Fc?a=1&q=1&q=x%20y"
        assert headers["authorization"] == "Bearer sk-shop-canary-token-abcdef"
        assert invoke(gateway, "order", {"id": ".."}).status == 400
        assert "sk-shop-canary" not in gateway.log_text()
        assert "sk-shop-canary" not in gateway.get("/tools", key=ADMIN).body.decode()


DOCUMENT: dict[str, Any] = {
    "openapi": "3.0.3",
    "info": {"title": "Shop", "version": "1"},
    "paths": {
        "/orders/{id}": {
            "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "integer"}}],
            "get": {
                "operationId": "getOrder",
                "summary": "One order.",
                "parameters": [{"name": "fields", "in": "query", "schema": {"type": "array", "items": {}}}],
                "responses": {"200": {"description": "ok"}},
            },
            "put": {
                "operationId": "putOrder",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Order"}}},
                },
                "responses": {"200": {"description": "ok"}},
            },
        },
        "/secret": {"get": {"operationId": "secret", "responses": {"200": {"description": "ok"}}}},
    },
    "components": {
        "schemas": {
            "Order": {
                "type": "object",
                "required": ["total"],
                "properties": {
                    "total": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
                    "note": {"type": "string", "nullable": True},
                    "parent": {"$ref": "#/components/schemas/Order"},
                },
            }
        }
    },
}


def test_operations_of_a_document_are_tools(start: GatewayFactory, tmp_path: Path) -> None:
    with canary(lambda handler: (200, {"content-type": "application/json"}, b'{"id": 7}')) as server:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        entry = {
            "name": "shop",
            "provider": "openapi",
            "document": "shop.json",
            "server": base,
            "exclude": ["secret"],
            "network": {"allow_private": ["127.0.0.1/32"]},
            "overrides": {"putOrder": {"rules": [{"argument": "body.total", "max": 100}]}},
        }

        def fill(home: Path) -> None:
            prepare_tools(home)
            (home / "tools.yaml").write_text(json.dumps({"tools": [entry]}))
            (home / "shop.json").write_text(json.dumps(DOCUMENT))

        gateway = start(prepare=fill, env=env_of(tmp_path / "home"))
        listed = {tool["name"]: tool for tool in gateway.get("/tools", key=ADMIN).json()["data"]}
        assert set(listed) == {"shop__getOrder", "shop__putOrder"}
        assert (listed["shop__getOrder"]["read_only"], listed["shop__putOrder"]["idempotent"]) == (True, True)
        assert invoke(gateway, "shop__getOrder", {"id": 7, "fields": ["a", "b"]}).json()["result"] == {"id": 7}
        assert server.seen[-1][1] == "/orders/7?fields=a&fields=b"
        assert invoke(gateway, "shop__putOrder", {"id": 7, "body": {"total": 0}}).status == 400
        assert invoke(gateway, "shop__putOrder", {"id": 7, "body": {"total": 5, "parent": {"note": "x"}}}).status == 400
        assert invoke(gateway, "shop__putOrder", {"id": 7, "body": {"total": 500}}).status == 403
        assert len(server.seen) == 1


def test_of_a_catalogue_of_hundreds_agents_see_what_is_included_with_their_callers_credential(
    start: GatewayFactory, tmp_path: Path
) -> None:
    with canary(lambda handler: (200, {}, handler.headers.get("authorization", "none").encode())) as server:
        operations = [f"{noun}_{verb}" for noun in ("issues", "mails", "events") for verb in map(str, range(100))]
        document = {
            "openapi": "3.1.0",
            "info": {"title": "Catalogue", "version": "1"},
            "servers": [{"url": f"http://127.0.0.1:{server.server_address[1]}"}],
            "paths": {f"/{name}": {"get": {"operationId": name, "responses": {}}} for name in operations},
        }
        entry = {
            "name": "catalogue",
            "provider": "openapi",
            "document": "catalogue.json",
            "include": ["issues_1", "issues_2?"],
            "exclude": ["issues_29"],
            "caller_headers": {"authorization": "Bearer x-cred-tracker-token"},
            "network": {"allow_private": ["127.0.0.1/32"]},
        }

        def fill(home: Path) -> None:
            prepare_tools(home)
            (home / "tools.yaml").write_text(json.dumps({"tools": [entry]}))
            (home / "catalogue.json").write_text(json.dumps(document))

        gateway = start(prepare=fill, env=env_of(tmp_path / "home"))
        names = {tool["name"] for tool in gateway.get("/tools", key=CHAT).json()["data"]}
        assert names == {"catalogue__issues_1", *(f"catalogue__issues_2{number}" for number in range(9))}
        for token in ("one", "two"):
            answer = gateway.request(
                "POST",
                "/tools/catalogue__issues_1/invoke",
                json_body={"arguments": {}},
                key=CHAT,
                headers={"x-cred-tracker-token": token},
            )
            assert answer.json()["result"] == f"Bearer {token}", answer.body
        refused = invoke(gateway, "catalogue__issues_1")
        assert refused.status == 503 and "x-cred-tracker-token" in refused.error["message"]
        assert invoke(gateway, "catalogue__mails_1").status == 404
        assert len(server.seen) == 2


def test_documents_and_secrets_are_watched_with_the_file_that_names_them(start: GatewayFactory, tmp_path: Path) -> None:
    secret = tmp_path / "secrets" / "token"
    secret.parent.mkdir()
    secret.write_text("first")
    with canary(lambda handler: (200, {}, handler.headers.get("x-token", "").encode())) as server:
        base = f"http://127.0.0.1:{server.server_address[1]}"
        network = {"allow_private": ["127.0.0.1/32"]}
        entry = {"name": "shop", "provider": "openapi", "document": "shop.json", "server": base, "network": network}
        asking = {"name": "ask", "provider": "http", "method": "GET", "url": base, "network": network}
        asking["headers"] = {"x-token": f"file:{secret}"}

        def fill(home: Path) -> None:
            prepare_tools(home)
            (home / "tools.yaml").write_text(json.dumps({"tools": [entry, asking]}))
            (home / "shop.json").write_text(json.dumps(DOCUMENT))

        gateway = start(prepare=fill, env=env_of(tmp_path / "home", GATEWAY_TOOL_AUTO_RELOAD="1"))
        assert invoke(gateway, "ask").json()["result"] == "first"
        gateway.logged("agent.watch.started")

        def rotated() -> bool:
            secret.write_text("second")
            return invoke(gateway, "ask").json()["result"] == "second"

        wait_for(rotated, what="the new secret is used")
        text = json.dumps(DOCUMENT).replace("getOrder", "findOrder")
        (gateway.home / "shop.json").write_text(text)
        wait_for(
            lambda: "shop__findOrder" in {tool["name"] for tool in gateway.get("/tools", key=ADMIN).json()["data"]},
            what="the new document is read",
        )


def test_a_read_only_call_ends_when_its_client_leaves(start: GatewayFactory, tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(60)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    text = f'tools: [{{name: slow, provider: http, method: GET, url: "{url}", network: {OWN}}}]'

    def fill(home: Path) -> None:
        prepare_tools(home)
        (home / "tools.yaml").write_text(text)

    gateway = start(prepare=fill, env=env_of(tmp_path / "home"))
    client = socket.create_connection(("127.0.0.1", gateway.port))
    head = f"POST /tools/slow/invoke HTTP/1.1\r\nhost: localhost\r\nx-api-key: {CHAT}\r\ncontent-length: 2\r\n\r\n"
    client.sendall(head.encode() + b"{}")
    with listener, listener.accept()[0] as served:
        served.settimeout(60)
        assert served.recv(4096)
        client.close()
        assert served.recv(4096) == b""  # within a second, well before the tool's timeout
    wait_for(
        lambda: [line["status"] for line in gateway.log_events("tool.invoke")] == ["cancelled"],
        what="the call is logged as cancelled",
    )
