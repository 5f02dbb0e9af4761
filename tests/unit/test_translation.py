"""Chat messages as SDK items, as the upstream then sees them; request fields as model settings."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent, ModelSettings
from openai.types.shared import Reasoning
from pydantic import BaseModel

from gateway.chat import decode_body, decode_chat
from gateway.errors import InvalidRequest, UnsupportedParameter
from sdk_adapter.messages import items_of
from sdk_adapter.translation import as_text
from tests.unit.sdk_fakes import World, make_run, run_async


def sent(messages: list[dict[str, Any]], **request: Any) -> dict[str, Any]:
    """The body the upstream gets for a request to a plain agent."""
    world = World("ok")
    with world.installed():
        run_async(world.ask(Agent(name="a", instructions="Own."), messages=messages, **request))
    return world.upstream.bodies[0]


def test_a_whole_conversation_reaches_the_upstream_as_it_was() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Client system."},
        {"role": "developer", "content": [{"type": "text", "text": "Client developer."}]},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city":"Rome"}'}},
                {"id": "c2", "type": "function", "function": {"name": "w", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": None, "refusal": "I will not."},
        {"role": "user", "content": "go on"},
    ]
    got = sent(messages)["messages"]
    assert got[0] == {"role": "system", "content": "Own."}
    assert got[1:4] == [
        messages[0],
        {"role": "developer", "content": [{"type": "text", "text": "Client developer."}]},
        messages[2],
    ]
    assert got[4] == messages[3]
    assert got[5] == messages[4]
    assert got[6] == {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "rain"}]}
    assert got[7] == {"role": "assistant", "refusal": "I will not."}
    assert got[8] == messages[7]


def test_images_audio_and_files_pass() -> None:
    content = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA==", "filename": "a.pdf"}},
        {"type": "file", "file": {"file_id": "file-1"}},
    ]
    got = sent([{"role": "user", "content": content}])["messages"][1]["content"]
    content[2] = {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "auto"}}
    assert got == content


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": ""}}, "messages[0].content[1].image_url.url"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "messages[0].content[1].input_audio"),
        ({"type": "file", "file": {"filename": "a.pdf"}}, "messages[0].content[1].file"),
    ],
)
def test_an_empty_part_is_refused_by_name(part: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])
    assert caught.value.param == param


def test_a_user_object_without_an_id_still_names_somebody() -> None:
    assert sent([{"role": "user", "content": "x"}], user={"email": "a@example.org"})["user"] == "a@example.org"


def test_participants_keep_their_names() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "name": "ann", "content": "hi"},
        {"role": "assistant", "name": "bot", "content": "hello"},
        {"role": "user", "name": "bob", "content": [{"type": "text", "text": "hey"}]},
    ]
    assert sent(messages)["messages"][1:] == messages


def test_the_deprecated_function_dialect_in_a_history_is_continued() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "result"},
    ]
    got = sent(messages)["messages"]
    call_id = got[2]["tool_calls"][0]["id"]
    assert got[3] == {"role": "tool", "tool_call_id": call_id, "content": "result"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "tool_call_id": "c9", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages[0].name"),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "user", "content": "never mind"},
            ],
            "messages[0].tool_calls",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c1", "type": "custom", "custom": {"name": "f", "input": "free"}}],
                }
            ],
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_history_with_a_hole_is_refused_by_name(messages: list[dict[str, Any]], param: str) -> None:
    run = make_run(messages=messages)
    with pytest.raises(InvalidRequest) as caught:
        items_of(run.request.messages)  # type: ignore[union-attr]
    assert caught.value.param == param


def test_every_sampling_field_reaches_the_upstream() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.1,
        "stop": ["a", "b"],
        "seed": 7,
        "logit_bias": {"50256": -100.0},
        "verbosity": "low",
        "reasoning_effort": "brand-new",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "explicit"},
        "service_tier": "flex",
        "prediction": {"type": "content", "content": "x"},
        "web_search_options": {},
        "moderation": {"model": "omni-moderation-latest"},
        "top_k": 40,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    body = sent([{"role": "user", "content": "x"}], user={"id": "u1", "name": "Ann"}, max_completion_tokens=9, **fields)
    assert {name: body.get(name) for name in fields} == fields
    assert (body["user"], body["max_tokens"]) == ("u1", 9)
    assert "metadata" not in body
    assert "store" not in body


def test_the_smallest_token_limit_wins() -> None:
    for author, option, asked, expected in ((None, 5, 9, 5), (None, 9, 5, 5), (3, 9, 5, 3), (None, None, None, None)):
        world = World("ok")
        agent = Agent(name="a", model_settings=ModelSettings(max_tokens=author))
        fields = {"max_tokens": asked} if asked else {}
        with world.installed():
            run_async(world.ask(agent, options={"max_completion_tokens": option}, **fields))
        assert world.upstream.bodies[0].get("max_tokens") == expected


def test_extra_fields_are_laid_over_the_authors() -> None:
    agent = Agent(name="a", model_settings=ModelSettings(extra_body={"top_k": 1, "x": 1}, extra_args={"seed": 1}))
    world = World("ok")
    with world.installed():
        run_async(world.ask(agent, top_k=2))
    body = world.upstream.bodies[0]
    assert (body["top_k"], body["x"], body["seed"]) == (2, 1, 1)


def test_a_response_format_keeps_its_name_and_schema() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": {"type": "object"}, "strict": False}}
    assert sent([{"role": "user", "content": "x"}], response_format=wanted)["response_format"] == wanted
    assert sent([{"role": "user", "content": "x"}], response_format={"type": "json_object"})["response_format"] == {
        "type": "json_object"
    }
    assert "response_format" not in sent([{"role": "user", "content": "x"}], response_format={"type": "text"})


class Thing(BaseModel):
    a: int


def test_a_schema_for_an_agent_with_its_own_is_refused() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": {"type": "object"}}}
    world = World("ok")
    with world.installed(), pytest.raises(UnsupportedParameter) as caught:
        run_async(world.ask(Agent(name="a", output_type=Thing), response_format=wanted))
    assert caught.value.param == "response_format"


def test_a_json_object_is_what_a_structured_agent_gives_anyway() -> None:
    world = World('{"a": 1}')
    with world.installed():
        run_async(world.ask(Agent(name="a", output_type=Thing), response_format={"type": "json_object"}))
    assert world.upstream.bodies[0]["response_format"]["type"] == "json_schema"


def test_reasoning_effort_of_the_request_wins_over_the_authors() -> None:
    agent = Agent(name="a", model_settings=ModelSettings(reasoning=Reasoning(effort="high")))
    world = World("ok")
    with world.installed():
        run_async(world.ask(agent, reasoning_effort="low"))
    assert world.upstream.bodies[0]["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("value", "text"),
    [("as is", "as is"), (Thing(a=1), '{"a":1}'), ({"b": [1]}, '{"b":[1]}'), (3, "3"), (None, "null")],
)
def test_a_final_output_is_text_or_json(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_the_request_is_decoded_as_official_clients_send_it() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    assert items_of(decode_chat(body, decode_body(body)).messages) == [{"role": "user", "content": "x"}]
