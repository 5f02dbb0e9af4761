"""Tools that the client sends: offered to the model, returned as `tool_calls`, continued on the next request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.support.house import CHAT, WEBUI
from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_chunk, assert_completion, assert_error
from tests.support.server import Gateway


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {k: {"type": v} for k, v in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"{name}!", "parameters": parameters}}


OPEN_DOOR = tool("open_door", room="string")


def offered(upstream: ObedientUpstream, marker: str, index: int = 0) -> list[str]:
    return [t["function"]["name"] for t in upstream.find(marker)[index].body.get("tools", [])]


@pytest.mark.parametrize("model", ["default/weatheragent", "local/test-model"])
def test_a_call_goes_back_to_the_client_and_its_result_continues_the_run(
    client: OpenAI, upstream: ObedientUpstream, model: str
) -> None:
    text = f'call open_door {{"room":"attic"}} ;; echo ;; plain client tool {model}'
    messages: list[Any] = [{"role": "user", "content": text}]
    first = client.chat.completions.create(model=model, messages=messages, tools=[OPEN_DOOR])
    assert_completion(first.model_dump(exclude_unset=True))
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("open_door", '{"room":"attic"}')

    messages += [choice.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "the attic is open"}]
    second = client.chat.completions.create(model=model, messages=messages, tools=[OPEN_DOOR])
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content == "the attic is open"
    seen = upstream.find(f"plain client tool {model}")[-1]
    assert [m["role"] for m in seen.messages if m["role"] != "system"] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("model", ["default/weatheragent", "local/test-model"])
def test_streamed_call_has_index_id_name_and_whole_arguments(gateway: Gateway, model: str) -> None:
    request = {
        "model": model,
        "stream": True,
        "tools": [OPEN_DOOR, tool("ring", times="integer")],
        "messages": [{"role": "user", "content": 'call open_door {"room":"cellar"} && call ring {"times":2}'}],
    }
    with gateway.stream("POST", "/v1/chat/completions", json_body=request) as stream:
        chunks = list(stream.chunks())
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        assert_chunk(chunk)
        for part in chunk["choices"][0]["delta"].get("tool_calls") or ():
            call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            call["id"] = part.get("id") or call["id"]
            call["name"] = part["function"].get("name") or call["name"]
            call["arguments"] += part["function"].get("arguments") or ""
    assert {(c["name"], c["arguments"]) for c in calls.values()} == {
        ("open_door", '{"room":"cellar"}'),
        ("ring", '{"times":2}'),
    }
    assert sorted(calls) == [0, 1]
    assert len({c["id"] for c in calls.values()} - {""}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_streamed_official_helper_understands_the_calls(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="default/weatheragent",
        messages=[{"role": "user", "content": 'call open_door {"room":"hall"}'}],
        tools=[OPEN_DOOR],
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"room":"hall"}'


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_tool_never_replaces_the_agents_own(
    gateway: Gateway, upstream: ObedientUpstream, streamed: bool
) -> None:
    marker = f"collision {streamed}"
    request = {
        "model": "default/weatheragent",
        "stream": streamed,
        "tools": [tool("get_weather", evil="string"), OPEN_DOOR],
        "messages": [{"role": "user", "content": f'call get_weather {{"city":"Rome"}} ;; echo ;; {marker}'}],
    }
    answer = gateway.post("/v1/chat/completions", request)
    assert answer.status == 200, answer.body
    assert b"sunny" in answer.body
    assert sorted(offered(upstream, marker)) == ["get_weather", "open_door"]
    own = next(t for t in upstream.find(marker)[0].body["tools"] if t["function"]["name"] == "get_weather")
    assert "city" in own["function"]["parameters"]["properties"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_mixed_turn_returns_only_the_clients_call_and_keeps_the_servers_result(
    gateway: Gateway, upstream: ObedientUpstream, streamed: bool
) -> None:
    marker = f"mixed turn {streamed}"
    text = f'call get_weather {{"city":"Turin"}} && call open_door {{"room":"loft"}} ;; echo ;; {marker}'
    messages: list[Any] = [{"role": "user", "content": text}]
    request = {"model": "default/weatheragent", "stream": streamed, "tools": [OPEN_DOOR], "messages": messages}
    answer = gateway.post("/v1/chat/completions", request)
    assert answer.status == 200, answer.body
    assert b"open_door" in answer.body and b"get_weather" not in answer.body
    call_id = upstream_call_id(answer.body, streamed)
    messages += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": "open_door", "arguments": '{"room":"loft"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": call_id, "content": "the loft is open"},
    ]
    answer = gateway.post("/v1/chat/completions", request | {"stream": False})
    assert answer.status == 200, answer.body
    results = upstream.find(marker)[-1].tool_results
    assert sorted(results) == ["The weather in Turin is sunny", "the loft is open"]


def test_what_a_turn_left_behind_belongs_to_the_key_that_left_it(gateway: Gateway, upstream: ObedientUpstream) -> None:
    marker = "somebody else's turn"
    text = f'call get_weather {{"city":"Oran"}} && call open_door {{"room":"loft"}} ;; echo ;; {marker}'
    messages: list[Any] = [{"role": "user", "content": text}]
    request = {"model": "default/weatheragent", "tools": [OPEN_DOOR], "messages": messages}
    call_id = upstream_call_id(gateway.post("/v1/chat/completions", request).body, False)
    call = {"id": call_id, "type": "function", "function": {"name": "open_door", "arguments": "{}"}}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "open"},
    ]
    answer = gateway.post("/v1/chat/completions", request, key=CHAT)
    assert answer.status == 200, answer.body
    assert upstream.find(marker)[-1].tool_results == ["open"]


def upstream_call_id(body: bytes, streamed: bool) -> str:
    if not streamed:
        return str(json.loads(body)["choices"][0]["message"]["tool_calls"][0]["id"])
    events = [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]
    parts = [p for e in events for c in e["choices"] for p in c["delta"].get("tool_calls") or ()]
    return str(next(p["id"] for p in parts if p.get("id")))


def test_tools_of_a_browser_chat_are_ignored_for_the_openwebui_profile(
    gateway: Gateway, upstream: ObedientUpstream
) -> None:
    many = [tool(f"builtin_{i}", value="string") for i in range(36)]
    request = {
        "model": "default/weatheragent",
        "tools": many,
        "messages": [{"role": "user", "content": "say webui ignores"}],
    }
    answer = gateway.post("/v1/chat/completions", request, key=WEBUI)
    assert answer.status == 200, answer.body
    assert offered(upstream, "webui ignores") == ["get_weather"]
    answer = gateway.post("/v1/chat/completions", request | {"messages": [{"role": "user", "content": "say merges"}]})
    assert len(offered(upstream, "say merges")) == 37


def test_an_agent_that_refuses_client_tools_says_so(gateway: Gateway) -> None:
    request = {"tools": [OPEN_DOOR], "messages": [{"role": "user", "content": "say x"}]}
    answer = gateway.post("/v1/chat/completions", request | {"model": "default/refusing"})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == "tools"
    assert_error(answer.json())
    assert gateway.post("/v1/chat/completions", request | {"model": "default/refusing", "tools": []}).status == 200


def test_an_agent_that_ignores_client_tools_never_offers_them(gateway: Gateway, upstream: ObedientUpstream) -> None:
    request = {
        "model": "default/ignoring",
        "tools": [OPEN_DOOR],
        "tool_choice": "required",
        "messages": [{"role": "user", "content": "say agent ignores"}],
    }
    answer = gateway.post("/v1/chat/completions", request)
    assert answer.status == 200, answer.body
    assert offered(upstream, "agent ignores") == []


def test_a_schema_of_the_client_arrives_as_it_was_sent(client: OpenAI, upstream: ObedientUpstream) -> None:
    odd = {
        "type": "object",
        "properties": {"when": {"type": ["string", "null"], "pattern": "^\\d+$"}, "list": {"type": "array"}},
        "additionalProperties": True,
    }
    client.chat.completions.create(
        model="default/weatheragent",
        messages=[{"role": "user", "content": "say odd schema"}],
        tools=[{"type": "function", "function": {"name": "odd", "parameters": odd}}],
    )
    sent = next(t for t in upstream.find("odd schema")[0].body["tools"] if t["function"]["name"] == "odd")
    assert sent["function"]["parameters"] == odd
