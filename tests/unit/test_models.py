"""Model names, the client under the SDK's model classes, quirks of upstreams, and the Responses surface."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from agents import Agent, ModelSettings, Runner, function_tool
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel
from openai.types.shared import Reasoning
from pydantic import BaseModel

from gateway.errors import UnsupportedParameter, UpstreamError, UpstreamIncomplete, UpstreamMalformed
from gateway.events import ReasoningDelta, RefusalDelta, Usage
from sdk_adapter.clients import UpstreamClient
from sdk_adapter.model_choice import PLACEHOLDER_MODEL
from sdk_adapter.models import GatewayProvider
from tests.unit.sdk_fakes import FakeTable, FakeUpstream, Reply, World, run_async


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_without_a_model_sends_no_gpt5_settings(streamed: bool) -> None:
    world = World("ok")
    with world.installed():
        run_async(world.ask(Agent(name="a"), streamed=streamed))
    body = world.upstream.bodies[0]
    assert body["model"] == "default-model"
    assert not {"reasoning_effort", "verbosity", "store"} & set(body)


@pytest.mark.parametrize("streamed", [False, True])
def test_settings_of_a_gpt5_name_do_not_reach_the_model_it_is_mapped_to(streamed: bool) -> None:
    world = World("ok", known={"gpt-5": "qwen"})
    with world.installed():
        run_async(world.ask(Agent(name="a", model="gpt-5"), streamed=streamed))
    assert world.upstream.bodies[0]["model"] == "qwen"
    assert not {"reasoning_effort", "verbosity"} & set(world.upstream.bodies[0])


def test_settings_that_the_author_or_the_request_chose_do() -> None:
    own = ModelSettings(reasoning=Reasoning(effort="high"), verbosity="high")
    for agent, fields, expected in (
        (Agent(name="a", model="gpt-5", model_settings=own), {}, ("high", "high")),
        (Agent(name="a", model="gpt-5"), {"reasoning_effort": "low", "verbosity": "low"}, ("low", "low")),
    ):
        world = World("ok", known={"gpt-5": "qwen"})
        with world.installed():
            run_async(world.ask(agent, **fields))  # type: ignore[arg-type]
        body = world.upstream.bodies[0]
        assert (body["reasoning_effort"], body["verbosity"]) == expected


def test_a_gpt5_model_under_its_own_name_keeps_the_sdks_settings() -> None:
    world = World("ok")
    with world.installed():
        run_async(world.ask(Agent(name="a", model="gpt-5")))
    assert world.upstream.bodies[0]["reasoning_effort"] == "low"


def test_names_with_slashes_are_the_tables_business() -> None:
    world = World("ok", known={"foo/bar": "bar"})
    with world.installed():
        run_async(world.ask(Agent(name="a", model="foo/bar")))
    assert world.upstream.bodies[0]["model"] == "bar"


def test_the_placeholder_means_the_default_model() -> None:
    table = FakeTable(FakeUpstream())
    GatewayProvider(lambda: table).get_model(PLACEHOLDER_MODEL)  # type: ignore[arg-type,return-value]
    assert table.asked == [(None, None, None)]


def test_usage_is_asked_for_in_every_stream() -> None:
    world = World("ok")
    with world.installed():
        run_async(world.ask(Agent(name="a"), streamed=True))
    assert world.upstream.bodies[0]["stream_options"] == {"include_usage": True}


def test_details_of_usage_are_summed() -> None:
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    world = World(Reply("ok", usage=usage))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a")))
    assert answer.end.usage == Usage(10, 5, 4, 2, 1)


def test_provider_openai_gets_the_newer_name_of_the_token_limit() -> None:
    world = World("ok")
    world.upstream.config.provider = "openai"
    with world.installed():
        run_async(world.ask(Agent(name="a"), max_tokens=5))
    assert world.upstream.bodies[0]["max_completion_tokens"] == 5
    assert "max_tokens" not in world.upstream.bodies[0]


def test_completions_are_not_stored_at_openai() -> None:
    world = World("ok")
    world.upstream.base_url = "https://api.openai.com/v1"
    with world.installed():
        run_async(world.ask(Agent(name="a")))
    assert "store" not in world.upstream.bodies[0]


def test_headers_of_the_author_are_sent_without_the_sdks_own() -> None:
    world = World("ok", "ok")
    settings = ModelSettings(extra_headers={"x-team": "blue"})
    with world.installed():
        run_async(world.ask(Agent(name="a", model_settings=settings)))
        run_async(world.ask(Agent(name="a")))
    assert world.upstream.headers == [{"x-team": "blue"}, None]


@pytest.mark.parametrize("streamed", [False, True])
def test_quirks_of_local_servers_are_forgiven(streamed: bool) -> None:
    """No created, an odd finish reason, an unknown service tier, a tool call without type."""
    world = World()
    message = {"role": "assistant", "content": "hi"}
    whole = {
        "id": 7,
        "service_tier": "on_demand",
        "choices": [{"message": message, "finish_reason": "eos", "index": 0}],
    }
    chunks = [
        {"id": 7, "choices": [{"delta": {"content": "hi"}, "index": 0}], "service_tier": "on_demand"},
        {"id": 7, "choices": [{"delta": {}, "index": 0, "finish_reason": "eos"}]},
    ]

    async def chat(body: bytes, **_: Any) -> bytes:
        return json.dumps(whole).encode()

    async def chat_stream(body: bytes, **_: Any) -> Any:
        for chunk in chunks:
            yield json.dumps(chunk).encode()

    world.upstream.chat, world.upstream.chat_stream = chat, chat_stream  # type: ignore[assignment,method-assign]
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert (answer.text, answer.end.finish_reason) == ("hi", "stop")


@function_tool
def look(n: int) -> str:
    """Look."""
    return f"saw {n}"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("given", ["call_0", "", None])
def test_servers_that_give_calls_no_id_or_always_the_same_are_forgiven(streamed: bool, given: str | None) -> None:
    world = World()

    def call(index: int, n: int) -> dict[str, Any]:
        return {"index": index, "id": given, "function": {"name": "look", "arguments": json.dumps({"n": n})}}

    answers = iter(([call(0, 1)], [call(0, 2), call(1, 3)], []))

    async def chat(body: bytes, **_: Any) -> bytes:
        world.upstream.bodies.append(json.loads(body))
        calls = next(answers)
        message = {"role": "assistant", "content": None if calls else "done", "tool_calls": calls or None}
        return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()

    async def chat_stream(body: bytes, **_: Any) -> Any:
        world.upstream.bodies.append(json.loads(body))
        calls = next(answers)
        for delta in ({"tool_calls": [item]} for item in calls):
            yield json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode()
        last = {} if calls else {"content": "done"}
        yield json.dumps({"choices": [{"index": 0, "delta": last, "finish_reason": "stop"}]}).encode()

    world.upstream.chat, world.upstream.chat_stream = chat, chat_stream  # type: ignore[assignment,method-assign]
    history = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "o", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "old"},
    ]
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", tools=[look]), streamed=streamed, messages=history))
    assert answer.text == "done"
    told = [m for m in world.upstream.bodies[2]["messages"] if m["role"] == "tool"]
    assert [m["content"] for m in told] == ["old", "saw 1", "saw 2", "saw 3"]
    assert len({m["tool_call_id"] for m in told}) == 4


def test_calls_that_all_have_index_0_are_told_apart() -> None:
    world = World()
    pieces = [("a", "look", '{"n"'), ("a", "look", ": 1}"), ("b", "look", '{"n": 2}')]
    turns = iter((pieces, []))

    async def chat_stream(body: bytes, **_: Any) -> Any:
        world.upstream.bodies.append(json.loads(body))
        calls = next(turns)
        for id_, name, arguments in calls:
            piece = {"index": 0, "id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            yield json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]}).encode()
        last = {} if calls else {"content": "done"}
        yield json.dumps({"choices": [{"index": 0, "delta": last, "finish_reason": "stop"}]}).encode()

    world.upstream.chat_stream = chat_stream  # type: ignore[assignment,method-assign]
    with world.installed():
        assert run_async(world.ask(Agent(name="a", tools=[look]), streamed=True)).text == "done"
    assert [m["content"] for m in world.upstream.bodies[1]["messages"] if m["role"] == "tool"] == ["saw 1", "saw 2"]


def test_what_is_no_object_is_malformed() -> None:
    world = World()

    async def chat(body: bytes, **_: Any) -> bytes:
        return b"[1]"

    world.upstream.chat = chat  # type: ignore[assignment,method-assign]
    with world.installed(), pytest.raises(UpstreamMalformed):
        run_async(world.ask(Agent(name="a")))


def test_a_query_of_the_author_is_not_dropped_silently() -> None:
    world = World("ok")
    agent = Agent(name="a", model_settings=ModelSettings(extra_query={"v": "1"}))
    with world.installed(), pytest.raises(UpstreamError, match="extra_query"):
        run_async(world.ask(agent))


def _response(*output: dict[str, Any], status: str = "completed", **fields: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 10,
        "output_tokens": 5,
        "total_tokens": 15,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": status,
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    } | fields


def _message(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "call_1",
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


def _stream(response: dict[str, Any], text: str = "", kind: str = "response.completed") -> list[bytes]:
    events: list[dict[str, Any]] = [{"type": "response.created", "response": _response(status="in_progress")}]
    events += [
        {
            "type": "response.output_text.delta",
            "delta": text,
            "item_id": "msg_1",
            "output_index": 0,
            "content_index": 0,
            "logprobs": [],
        }
    ] * bool(text)
    events.append({"type": "response.unheard_of", "x": 1})
    events += [{"type": kind, "response": response}] * bool(kind)
    return [msgspec.json.encode(event | {"sequence_number": n}) for n, event in enumerate(events)]


@function_tool
def ping() -> str:
    """Ping."""
    return "pong"


def _raw(world: World, streamed: bool, *responses: tuple[dict[str, Any], str]) -> None:
    for response, text in responses:
        kind = "response.incomplete" if response["status"] == "incomplete" else "response.completed"
        world.upstream.raw.append(_stream(response, text, kind) if streamed else msgspec.json.encode(response))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_runs_on_the_responses_surface(streamed: bool) -> None:
    world = World(api="responses")
    _raw(world, streamed, (_response(_call("ping", "{}")), ""), (_response(_message("It said pong.")), "It said pong."))
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    with world.installed():
        answer = run_async(
            world.ask(
                Agent(name="a", tools=[ping]),
                streamed=streamed,
                response_format=wanted,
                verbosity="low",
                reasoning_effort="low",
                user="u",
                max_tokens=50,
            )
        )
    assert answer.text == "It said pong."
    assert answer.end.finish_reason == "stop"
    assert answer.end.usage == Usage(20, 10, 2, 4, 2)
    body = world.upstream.bodies[0]
    assert world.upstream.paths == ["/responses"] * 2
    assert body["text"] == {
        "verbosity": "low",
        "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}},
    }
    assert (body["reasoning"], body["user"], body["max_output_tokens"]) == ({"effort": "low"}, "u", 50)
    assert world.upstream.bodies[1]["input"][-1] == {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": "pong",
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("reason", "finish"), [("max_output_tokens", "length"), ("content_filter", "content_filter")])
def test_an_incomplete_response_is_an_answer_that_was_cut(streamed: bool, reason: str, finish: str) -> None:
    world = World(api="responses")
    response = _response(_message("half"), status="incomplete", incomplete_details={"reason": reason})
    _raw(world, streamed, (response, "half"))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert (answer.text, answer.end.finish_reason) == ("half", finish)


def test_a_failed_response_is_an_upstream_error() -> None:
    failed = _response(status="failed", error={"code": "server_error", "message": "went away"})
    for streamed in (False, True):
        world = World(api="responses")
        world.upstream.raw.append(_stream(failed, "", "response.failed") if streamed else msgspec.json.encode(failed))
        with world.installed(), pytest.raises(UpstreamError, match="went away"):
            run_async(world.ask(Agent(name="a"), streamed=streamed))


def test_a_responses_stream_without_an_end_is_incomplete() -> None:
    world = World(api="responses")
    world.upstream.raw.append(_stream({}, "half", ""))
    with world.installed(), pytest.raises(UpstreamIncomplete):
        run_async(world.ask(Agent(name="a"), streamed=True))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": "x"}, "stop"),
        ({"seed": 1}, "seed"),
        ({"instructions": "mine"}, "instructions"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"messages": [{"role": "user", "name": "ann", "content": "x"}]}, "messages[0].name"),
    ],
)
def test_fields_that_the_responses_surface_lacks_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    world = World(api="responses")
    with world.installed(), pytest.raises(UnsupportedParameter) as caught:
        run_async(world.ask(Agent(name="a"), **fields))
    assert caught.value.param == param


class Inner(BaseModel):
    a: int


def test_the_client_encodes_what_the_sdk_passes() -> None:
    upstream = FakeUpstream()
    upstream.replies = [Reply("ok")]
    client = UpstreamClient(upstream, None)  # type: ignore[arg-type]

    async def main() -> None:
        await client.with_options(max_retries=0).chat.completions.create(
            model="m", messages=[], tools=({"x": Inner(a=1)} for _ in range(1)), extra_body={"more": 1}, timeout=3
        )
        await client.close()

    run_async(main())
    assert upstream.bodies == [{"model": "m", "messages": [], "tools": [{"x": {"a": 1}}], "more": 1}]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_refusal_is_a_refusal(streamed: bool) -> None:
    for output_type in (None, Inner):
        world = World(Reply(refusal="I will not."))
        with world.installed():
            answer = run_async(world.ask(Agent(name="a", output_type=output_type), streamed=streamed))
        assert [event for event in answer.events if not isinstance(event, ReasoningDelta)] == [
            RefusalDelta("I will not."),
            answer.end,
        ]
        assert answer.end.finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_sync_tool_may_run_an_agent_in_its_own_thread_and_loop(streamed: bool) -> None:
    helper = Agent(name="helper")

    @function_tool
    def ask_helper() -> str:
        async def stream() -> str:
            result = Runner.run_streamed(helper, "q")
            async for _ in result.stream_events():
                pass
            return str(result.final_output)

        return asyncio.run(stream()) if streamed else str(asyncio.run(Runner.run(helper, "q")).final_output)

    world = World(Reply(calls=(("ask_helper", {}),)), "from the helper", "done")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", tools=[ask_helper])))
    assert answer.text == "done"
    assert world.upstream.bodies[2]["messages"][-1]["content"] == "from the helper"
    assert answer.end.usage == Usage(30, 15, requests=3)


def test_the_sdks_model_classes_take_the_client() -> None:
    """Contract: both classes take a client and use it as it is."""
    client: Any = UpstreamClient(FakeUpstream(), None)  # type: ignore[arg-type]
    assert OpenAIChatCompletionsModel("m", openai_client=client)._get_client() is client
    assert OpenAIResponsesModel("m", openai_client=client)._get_client() is client
