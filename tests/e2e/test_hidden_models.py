"""With hide_foreign_models what a key does not reach is, on every surface, what does not exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.house import ADMIN, CHAT, NARROW, furnish, write_agent
from tests.support.http import Response
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_error
from tests.support.server import Gateway, running_gateway

FOREIGN, ABSENT = "secret/zebrafish", "secret/zebraphone"
"""Of one length, so that an answer may differ in the name alone."""

TOOLS = """\
version: 1
tools:
  - {name: opentool, provider: local, module: "hidden_tools:ping"}
  - {name: darktool, provider: local, module: "hidden_tools:ping"}
"""

FRONT = """\
from agents import Agent

vault = Agent(name="Zebrafish", instructions="You are the vault.")
agent = Agent(name="Front", instructions="You are the front.", handoffs=[vault])
__agents__ = [agent, vault]
__gateway__ = {"namespace": "open"}
"""


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory, upstream: ObedientUpstream) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("hidden")
    furnish(home, upstream.url, hide_foreign_models=True)
    security = home / "security.yaml"
    text = security.read_text(encoding="utf-8").replace(
        'allow_agents: ["default/weatheragent", "labs/*"]',
        'allow_agents: ["open/front", "open/twin", "gone/*"]\n    allow_tools: [opentool]',
    )
    text = text.replace('allow_agents: ["*"]\n', 'allow_agents: ["*"]\n    allow_tools: ["*"]\n')
    text = text.replace("default:\n", 'default:\n  local_tools_allowlist: ["hidden_tools:*"]\n')
    security.write_text(text, encoding="utf-8")
    agents = home / "agents"
    for folder, namespace in (
        ("secret/Zebrafish", "secret"),
        ("secret/Twin", "secret"),
        ("open/Twin", "open"),
        ("secret/Gone-Model", "secret"),
    ):
        name = Path(folder).name
        extra = f"__gateway__ = {{'namespace': {namespace!r}}}\n"
        write_agent(agents, folder, f"You are {name} of {namespace}.", extra=extra)
    (agents / "open" / "Front").mkdir(parents=True)
    (agents / "open" / "Front" / "agent.py").write_text(FRONT, encoding="utf-8")
    (home / "tools.yaml").write_text(TOOLS, encoding="utf-8")
    (home / "hidden_tools.py").write_text("def ping() -> str:\n    return 'pong'\n", encoding="utf-8")
    with running_gateway(home, env={"GATEWAY_TOOL_CONFIG": str(home / "tools.yaml")}, key=ADMIN) as server:
        yield server


def question(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]}


def ask(gateway: Gateway, surface: str, name: str) -> Response:
    match surface:
        case "get":
            return gateway.get(f"/v1/models/{name}", key=NARROW)
        case "chat":
            return gateway.post("/v1/chat/completions", question(name), key=NARROW)
        case "stream":
            return gateway.post("/v1/chat/completions", question(name) | {"stream": True}, key=NARROW)
        case "completions":
            return gateway.post("/v1/completions", {"model": name, "prompt": "a"}, key=NARROW)
        case "embeddings":
            return gateway.post("/v1/embeddings", {"model": name, "input": "a"}, key=NARROW)
        case "speech":
            return gateway.post("/v1/audio/speech", {"model": name, "input": "a", "voice": "b"}, key=NARROW)
        case _:
            return mcp(gateway, "tools/call", {"name": name.replace("/", "__"), "arguments": {"input": "hello"}})


def mcp(gateway: Gateway, method: str, params: dict[str, object], key: str = NARROW) -> Response:
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    headers = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
    return gateway.post("/mcp", message, key=key, headers=headers)


@pytest.mark.parametrize("surface", ["get", "chat", "stream", "completions", "embeddings", "speech", "mcp"])
@pytest.mark.parametrize(
    ("foreign", "absent"),
    [
        (FOREIGN, ABSENT),
        ("zebrafish", "zebraphon"),
        ("SECRET/ZebraFish", "SECRET/ZebraPhon"),
        ("local/test-model", "local/test-mudel"),
        ("local/hasty-model", "local/hasty-mudel"),
    ],
)
def test_foreign_and_absent_answer_alike(hidden: Gateway, surface: str, foreign: str, absent: str) -> None:
    one, other = ask(hidden, surface, foreign), ask(hidden, surface, absent)
    assert one.status == other.status
    assert surface == "mcp" or one.status == 404, one.body
    spoken = foreign.replace("/", "__") if surface == "mcp" else foreign
    unspoken = absent.replace("/", "__") if surface == "mcp" else absent
    assert one.body.replace(spoken.encode(), b"X") == other.body.replace(unspoken.encode(), b"X")
    assert set(one.headers) == set(other.headers)


def test_a_bare_name_that_a_foreign_agent_shares_is_ones_own(hidden: Gateway) -> None:
    mine = hidden.post("/v1/chat/completions", question("twin"), key=NARROW)
    assert mine.status == 200, mine.body
    assert mine.json()["model"] == "open/twin"
    assert hidden.get("/v1/models/Twin", key=NARROW).json()["id"] == "open/twin"
    asked = {"agent": "twin", "key_id": "narrow"}
    assert hidden.post("/security/preview", asked).json()["agent"] == "open/twin"
    both = hidden.post("/v1/chat/completions", question("twin"), key=CHAT)
    assert both.status == 404, "who reaches both has to say which"


def test_a_foreign_agents_short_name_takes_no_model_from_others(hidden: Gateway) -> None:
    answer = hidden.post("/v1/embeddings", {"model": "gone-model", "input": "a"}, key=NARROW)
    assert (answer.status, answer.error["code"]) != (404, "model_not_found"), "a raw model that the key reaches"
    assert "gone/gone-model" in hidden.model_ids(key=NARROW)


def test_lists_show_what_is_reached_and_nothing_else(hidden: Gateway) -> None:
    assert hidden.model_ids(key=NARROW) == {"open/front", "open/twin", "gone/gone-model"}
    tools = mcp(hidden, "tools/list", {}).body
    assert b"opentool" in tools and b"open__front" in tools
    assert b"darktool" not in tools and b"secret" not in tools
    listed = hidden.get("/tools", key=NARROW).json()["data"]
    assert [tool["name"] for tool in listed] == ["opentool"]


def test_foreign_and_absent_tools_answer_alike(hidden: Gateway) -> None:
    one, other = (hidden.post(f"/tools/{name}/invoke", {}, key=NARROW) for name in ("darktool", "dorktool"))
    assert one.status == other.status == 404
    assert_error(one.json())
    assert one.body.replace(b"darktool", b"X") == other.body.replace(b"dorktool", b"X")
    asked, absent = (mcp(hidden, "tools/call", {"name": name, "arguments": {}}) for name in ("darktool", "dorktool"))
    assert asked.body.replace(b"darktool", b"X") == absent.body.replace(b"dorktool", b"X")
    assert hidden.post("/tools/opentool/invoke", {}, key=NARROW).json()["result"] == "pong"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_handoff_to_a_foreign_agent_does_not_name_it(hidden: Gateway, streamed: bool) -> None:
    body = question("open/front") | {"stream": streamed}
    body["messages"] = [{"role": "user", "content": "call transfer_to_zebrafish {}"}]
    answer = hidden.post("/v1/chat/completions", body, key=NARROW)
    assert b"model_not_allowed" in answer.body
    assert b"open/front-zebrafish" not in answer.body


def test_hints_and_usage_name_only_ones_own(hidden: Gateway) -> None:
    near = hidden.post("/v1/chat/completions", question("secret/zebrafis"), key=NARROW)
    assert near.status == 404
    assert "zebrafish" not in near.error["message"]
    assert hidden.post("/v1/chat/completions", question("open/twim"), key=NARROW).error["message"].count("open/twin")
    foreign = hidden.get("/usage?key=admin", key=NARROW)
    assert foreign.status == 403
    usage = hidden.get("/usage?group_by=key,model", key=NARROW)
    assert usage.status == 200, usage.body
    groups = usage.json()["data"]
    assert {row["key"] for row in groups} <= {"narrow"}
    for path in ("/agents", "/agents/errors", "/upstreams", "/security/keys", "/metrics", "/api/health/endpoints"):
        refused = hidden.get(path, key=NARROW)
        assert refused.status == 403
        assert "secret" not in json.dumps(refused.json()).lower().replace("'secret'", "")
