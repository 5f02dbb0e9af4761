"""The demo model: it calls the tool that fits, with arguments that fit, and never claims to be more than a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gateway.config import Settings
from gateway.errors import UpstreamRejected
from gateway.upstreams.client import Upstream
from gateway.upstreams.config import load_upstreams
from gateway.upstreams.table import open_upstreams
from tests.support.schema import assert_chunk, assert_completion
from tests.support.upstream_calls import collect


def tool(name: str, description: str = "", **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


STRING = {"type": "string"}
WEATHER = tool("get_weather", city={"type": "string", "title": "City"})
TIME = tool("get_time", "Current time of a place", timezone_city=STRING)
ADD = tool("add", "Add two numbers", a={"type": "integer"}, b={"type": "integer"})


def with_demo(ask: Any) -> Any:
    async def main() -> Any:
        async with open_upstreams(load_upstreams(Settings(), {})) as owner:
            bound = owner.table.resolve("gpt-5-mini")
            return await ask(bound.upstream)

    return asyncio.run(main())


def body(messages: str | list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    if isinstance(messages, str):
        messages = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": messages}]
    return {"model": "demo", "messages": messages, **fields}


def chat(messages: str | list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """Return the choice, having checked that streaming gives the same one."""
    request = body(messages, **fields)

    async def ask(upstream: Upstream) -> tuple[Any, list[Any]]:
        whole = json.loads(await upstream.chat(json.dumps(request).encode()))
        streamed = {**request, "stream": True, "stream_options": {"include_usage": True}}
        return whole, await collect(upstream.chat_stream(json.dumps(streamed).encode()))

    whole, chunks = with_demo(ask)
    assert_completion(whole)
    for chunk in chunks:
        assert_chunk(chunk)
    choice: dict[str, Any] = whole["choices"][0]
    assert _joined(chunks) == (choice["message"]["content"] or "", _calls(choice), choice["finish_reason"])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    return choice


def _joined(chunks: list[Any]) -> tuple[str, list[tuple[str, Any]], str]:
    text, calls, reason = "", {}, ""
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls") or ():
            name, arguments = calls.get(part["index"], ("", ""))
            function = part["function"]
            calls[part["index"]] = (name + function.get("name", ""), arguments + function["arguments"])
        reason = choice["finish_reason"] or reason
    return text, [(name, json.loads(arguments)) for name, arguments in calls.values()], reason


def _calls(choice: Mapping[str, Any]) -> list[tuple[str, Any]]:
    made = choice["message"].get("tool_calls") or ()
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in made]


def after_tools(question: str, *results: str, tools: list[Any]) -> list[dict[str, Any]]:
    """Play the agent: answer every call the model makes."""
    choice = chat(question, tools=tools)
    assert choice["finish_reason"] == "tool_calls"
    calls = choice["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls) == len(results)
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(calls, results, strict=True)
    ]
    return [{"role": "user", "content": question}, choice["message"], *answers]


def test_weather_agent() -> None:
    messages = after_tools("What is the weather in Paris?", "The weather in Paris is sunny", tools=[WEATHER])
    assert _calls({"message": messages[1]}) == [("get_weather", {"city": "Paris"})]
    choice = chat(messages, tools=[WEATHER])
    assert choice["finish_reason"] == "stop"
    assert "The weather in Paris is sunny." in choice["message"]["content"]
    assert "demo model" in choice["message"]["content"]


@pytest.mark.parametrize(
    ("question", "tools", "calls"),
    [
        ("what's the weather like in New York today?", [WEATHER], [("get_weather", {"city": "New York"})]),
        ("Weather for Rio de Janeiro please", [WEATHER], [("get_weather", {"city": "Rio de Janeiro"})]),
        ("weather in São Paulo", [WEATHER], [("get_weather", {"city": "São Paulo"})]),
        ("weather: tokyo", [WEATHER], [("get_weather", {"city": "tokyo"})]),
        (
            "Compare the weather in Paris, London and Oslo",
            [WEATHER],
            [("get_weather", {"city": c}) for c in ("Paris", "London", "Oslo")],
        ),
        (
            "What is the weather in Paris and the time in Tokyo?",
            [WEATHER, TIME],
            [("get_weather", {"city": "Paris"}), ("get_time", {"timezone_city": "Tokyo"})],
        ),
        ("Please add 2 and 40", [ADD], [("add", {"a": 2, "b": 40})]),
        ("How much is 17 + 4?", [ADD], [("add", {"a": 17, "b": 4})]),
        ("Hello!", [WEATHER], []),
        ("Tell me a joke", [WEATHER, ADD], []),
        (
            'Search the web for "agent gateways"',
            [tool("search_files", query=STRING), tool("search_web", query=STRING)],
            [("search_web", {"query": "agent gateways"})],
        ),
        (
            "Send an email to ada@example.com",
            [tool("send_email", to_email={"type": "string", "format": "email"})],
            [("send_email", {"to_email": "ada@example.com"})],
        ),
        ("Where is order A-1234?", [tool("track_order", order_id=STRING)], [("track_order", {"order_id": "A-1234"})]),
        (
            "I want a refund for my invoice",
            [
                tool("transfer_to_billing_agent", "Handoff to the Billing agent. Refunds and invoices."),
                tool("transfer_to_spanish_agent", "Handoff to the Spanish agent to handle the request. "),
            ],
            [("transfer_to_billing_agent", {})],
        ),
        ("Hola, ¿cómo estás?", [tool("transfer_to_spanish_agent")], [("transfer_to_spanish_agent", {})]),
        ("What can you do?", [tool("transfer_to_spanish_agent", "Handoff to the Spanish agent")], []),
    ],
)
def test_tool_that_fits_is_called(question: str, tools: list[Any], calls: list[Any]) -> None:
    assert _calls(chat(question, tools=tools)) == calls


def test_two_results_make_two_sentences() -> None:
    messages = after_tools("weather in Paris and Oslo", "Paris: sunny", "Oslo: rain", tools=[WEATHER])
    assert chat(messages, tools=[WEATHER])["message"]["content"].startswith("Paris: sunny. Oslo: rain.")


def test_next_question_is_a_new_turn() -> None:
    messages = after_tools("weather in Paris?", "sunny", tools=[WEATHER])
    messages += [{"role": "assistant", "content": "sunny"}, {"role": "user", "content": "And the weather in Oslo?"}]
    assert _calls(chat(messages, tools=[WEATHER])) == [("get_weather", {"city": "Oslo"})]


def test_agent_that_was_handed_to_uses_its_tools_and_ends() -> None:
    spanish = tool("transfer_to_weather_agent")
    messages = after_tools("weather in Paris", '{"assistant": "Weather agent"}', tools=[spanish])
    choice = chat(messages, tools=[WEATHER, spanish])
    assert _calls(choice) == [("get_weather", {"city": "Paris"})]
    messages += [choice["message"], {"role": "tool", "tool_call_id": choice["message"]["tool_calls"][0]["id"],
                                     "content": "sunny"}]  # fmt: skip
    assert chat(messages, tools=[WEATHER, spanish])["message"]["content"].startswith("sunny.")


def test_tool_choice_is_honoured() -> None:
    assert _calls(chat("weather in Paris", tools=[WEATHER], tool_choice="none")) == []
    assert _calls(chat("Hello", tools=[ADD], tool_choice="required")) == [("add", {"a": 1, "b": 1})]
    named = {"type": "function", "function": {"name": "add"}}
    assert _calls(chat("weather in Paris", tools=[WEATHER, ADD], tool_choice=named)) == [("add", {"a": 1, "b": 1})]
    one = chat("weather in Paris and Oslo", tools=[WEATHER], parallel_tool_calls=False)
    assert _calls(one) == [("get_weather", {"city": "Paris"})]


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "kind": {"enum": ["sunny", "rainy"]},
        "degrees": {"type": "number", "minimum": -10, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "place": {"$ref": "#/$defs/Place"},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]},
        "fixed": {"const": 7},
        "flag": {"type": "boolean"},
        "nothing": {"type": "null"},
        "either": {"type": ["null", "integer"]},
        "all": {"allOf": [{"type": "integer"}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
        "numbers": {"type": "array", "items": {"type": "integer"}},
    },
    "required": [
        "city",
        "kind",
        "degrees",
        "tags",
        "place",
        "note",
        "fixed",
        "flag",
        "nothing",
        "either",
        "all",
        "list",
        "numbers",
    ],
    "additionalProperties": False,
    "$defs": {
        "Place": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


def test_answer_fits_the_schema() -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    choice = chat("It is rainy at 99 degrees in Oslo", response_format=asked)
    value = json.loads(choice["message"]["content"])
    Draft202012Validator(SCHEMA).validate(value)
    assert (value["city"], value["kind"], value["degrees"]) == ("Oslo", "rainy", 40)
    assert json.loads(chat("Hi", response_format={"type": "json_object"})["message"]["content"])["answer"]


@pytest.mark.parametrize(
    "schema",
    [{}, {"$ref": "#/nowhere"}, {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
     {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
      "$ref": "#/$defs/n"}, {"type": 7}, {"anyOf": []}, {"enum": []}],
)  # fmt: skip
def test_odd_schemas_end(schema: dict[str, Any]) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    json.loads(chat("Hi", response_format=asked)["message"]["content"])


def test_stop_and_length() -> None:
    text = chat("Hello")["message"]["content"]
    stopped = chat("Hello", stop=["script"])
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (text.split("script")[0], "stop")
    short = chat("Hello", max_completion_tokens=3)
    assert (short["message"]["content"], short["finish_reason"]) == ("You said: Hello.", "length")
    assert "demo model" in text


def test_same_request_same_answer() -> None:
    assert chat("weather in Paris", tools=[WEATHER]) == chat("weather in Paris", tools=[WEATHER])


def test_several_choices() -> None:
    async def ask(upstream: Upstream) -> tuple[Any, list[Any]]:
        request = body("Hi", n=3)
        whole = json.loads(await upstream.chat(json.dumps(request).encode()))
        return whole, await collect(upstream.chat_stream(json.dumps({**request, "stream": True}).encode()))

    whole, chunks = with_demo(ask)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1, 2}
    assert "usage" not in chunks[0]


@pytest.mark.parametrize(
    "bad", [b"{}", b"[]", b'{"model":"demo","messages":[]}', b'{"model":"demo","messages":"x"}', b"{"]
)
def test_bad_request_is_refused(bad: bytes) -> None:
    with pytest.raises(UpstreamRejected):
        with_demo(lambda upstream: upstream.chat(bad))


def test_other_surfaces_are_refused_and_closing_is_easy() -> None:
    async def ask(upstream: Upstream) -> None:
        with pytest.raises(UpstreamRejected, match="answers chat completions only"):
            await upstream.post("/embeddings", b"{}")
        await upstream.probe()
        stream = upstream.chat_stream(json.dumps(body("Hi")).encode())
        await anext(stream)
        await stream.aclose()

    with_demo(ask)


def test_content_parts_are_read() -> None:
    parts = [{"type": "text", "text": "weather in Paris"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    assert _calls(chat([{"role": "user", "content": parts}], tools=[WEATHER])) == [("get_weather", {"city": "Paris"})]
    assert chat([{"role": "system", "content": "x"}])["message"]["content"].startswith("You said: nothing.")
