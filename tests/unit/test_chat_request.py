"""The chat request is judged once, at the edge, and every refusal names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import completion_create_params

from gateway.chat import OFFICIAL_FIELDS, decode_body, decode_chat, decode_model, decode_relay
from gateway.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> Any:
    body = json.dumps({"model": "m", "messages": [USER], **fields}).encode()
    return decode_chat(body, decode_body(body))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "one JSON object"),
        (b'"x"', "one JSON object"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"model": Infinity}', "not valid JSON"),
        (b'{"model":"a"} {}', "not valid JSON"),
        (b'{"model":"a","model":"b"}', "more than once"),
        (b'{"model":"a","mod\\u0065l":"b"}', "more than once"),
        (b'{"model":"\xff"}', "UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_a_body_that_is_not_one_clean_json_object_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        decode_body(body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"functions": []}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"store": True}, "store"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
    ],
)
def test_a_field_an_agent_cannot_honour_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert "`" not in caught.value.message


def test_a_missing_field_is_a_missing_required_parameter() -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_chat(b'{"model":"m"}', decode_body(b'{"model":"m"}'))
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "messages")
    with pytest.raises(InvalidRequest) as caught:
        decode_model(decode_body(b"{}"))
    assert caught.value.param == "model"


def test_every_field_of_the_official_client_is_known() -> None:
    official = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert official - OFFICIAL_FIELDS == set()


def test_unknown_fields_travel_on_and_known_ones_do_not_repeat() -> None:
    request = chat(top_k=4, chat_template_kwargs={"thinking": False}, temperature=0.5)
    assert request.extra == {"top_k": 4, "chat_template_kwargs": {"thinking": False}}


def test_open_webui_sends_the_user_as_an_object() -> None:
    assert chat(user={"id": "7", "name": "Ann"}).user == {"id": "7", "name": "Ann"}


def test_history_with_tool_calls_and_null_content_is_accepted() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    request = chat(
        messages=[
            {"role": "developer", "content": "d"},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]},
        ]
    )
    assert request.messages[2].tool_calls[0].function.name == "f"


def test_a_relay_keeps_every_other_field_as_the_bytes_it_came_in() -> None:
    body = (
        b'{"model":"up/m", "messages":[{"role":"weird","x":1.50}],'
        b' "stream":true,"stream_options":{"include_usage":true}}'
    )
    fields = decode_body(body)
    relay = decode_relay("up/m", fields)
    assert bytes(relay.fields["messages"]) == b'[{"role":"weird","x":1.50}]'
    assert relay.stream and relay.include_usage


keys = st.text(min_size=0, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(keys, st.integers()), max_size=6))
def test_duplicate_keys_are_found_exactly(pairs: list[tuple[str, int]]) -> None:
    body = ("{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in pairs) + "}").encode()
    if len({k for k, _ in pairs}) == len(pairs):
        assert {k: int(bytes(v)) for k, v in decode_body(body).items()} == dict(pairs)
    else:
        with pytest.raises(InvalidRequest):
            decode_body(body)


def test_a_body_of_countless_fields_is_refused_at_once() -> None:
    def body(count: int) -> bytes:
        return b"{" + b",".join(b'"k%d":1' % number for number in range(count)) + b"}"

    assert len(decode_body(body(1_000))) == 1_000
    with pytest.raises(InvalidRequest, match="more than 1,000 top-level fields"):
        decode_body(body(200_000))
