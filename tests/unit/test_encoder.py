"""Chunks and completions say exactly what the run said: one id, role first, a true finish reason, usage where asked."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from api.chat_completions.encoder import ChunkEncoder, CompletionBuilder, encode_error
from gateway.chat import decode_body, decode_chat
from gateway.errors import UpstreamIncomplete
from gateway.events import (
    AgentSwitched,
    ReasoningDelta,
    RefusalDelta,
    RelayedChunk,
    RelayEnded,
    RunEvent,
    RunFinished,
    TextDelta,
    ToolCallRequested,
    ToolFinished,
    ToolStarted,
    Usage,
)
from gateway.principal import Principal
from gateway.run import Run

BODY = b'{"model":"default/x","messages":[{"role":"user","content":"hi"}]}'
RUN = Run(
    id=uuid.UUID(int=7),
    request_id="r",
    principal=Principal("p", "k", ("*",)),
    model="default/x",
    request=decode_chat(BODY, decode_body(BODY)),
    streamed=True,
    created=1700000000,
    deadline_s=1,
)
USAGE = Usage(10, 5, 3, 2, 1)
CALL = ToolCallRequested(0, "call_1", "lookup", '{"q":"a"}')


def stream(events: list[RunEvent], *, include_usage: bool = False) -> list[Any]:
    encoder = ChunkEncoder(RUN, include_usage=include_usage)
    text = b"".join(encoder.encode(event) for event in events).decode()
    frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
    return [frame if frame == "[DONE]" else json.loads(frame) for frame in frames]


def complete(events: list[RunEvent]) -> Any:
    builder = CompletionBuilder(RUN)

    async def feed() -> None:
        for event in events:
            await builder.add(event)

    asyncio.run(feed())
    return json.loads(builder.body())


def test_a_stream_has_one_id_the_role_first_and_done_last() -> None:
    frames = stream([TextDelta("Hé\n"), TextDelta('"y"'), RunFinished("stop", USAGE)])
    assert frames[-1] == "[DONE]"
    chunks = frames[:-1]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-" + "0" * 31 + "7"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "Hé\n", '"y"', None]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_is_one_more_chunk_without_choices_and_null_elsewhere() -> None:
    chunks = stream([TextDelta("a"), RunFinished("length", USAGE)], include_usage=True)[:-1]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None, None]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_tools_of_the_gateway_stay_hidden_and_tools_of_the_client_do_not() -> None:
    events: list[RunEvent] = [
        ToolStarted("s1", "secret_tool", "A"),
        ToolFinished("s1", "secret_tool", "A"),
        AgentSwitched("B"),
        CALL,
        RunFinished("tool_calls", None),
    ]
    chunks = stream(events)[:-1]
    assert "secret_tool" not in json.dumps(chunks)
    assert chunks[1]["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": '{"q":"a"}'}}
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    message = complete(events)["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["id"] == "call_1"


def test_an_empty_answer_still_has_a_role_and_an_end() -> None:
    chunks = stream([RunFinished("stop", None)])[:-1]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert complete([RunFinished("stop", None)])["choices"][0]["message"]["content"] == ""


def test_reasoning_and_refusal_have_their_own_fields() -> None:
    events: list[RunEvent] = [ReasoningDelta("hm"), RefusalDelta("no"), RunFinished("stop", USAGE)]
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(events)[:-1]]
    assert {"reasoning_content": "hm"} in deltas
    assert {"refusal": "no"} in deltas
    message = complete(events)["choices"][0]["message"]
    assert (message["refusal"], message["reasoning_content"], message["content"]) == ("no", "hm", None)


def test_relayed_chunks_go_out_as_they_came() -> None:
    assert stream([RelayedChunk(b'{"a": 1.50}'), RelayEnded("stop", USAGE)]) == [{"a": 1.5}, "[DONE]"]


def test_a_broken_stream_ends_with_an_error_object() -> None:
    text = encode_error(UpstreamIncomplete("cut")).decode()
    assert json.loads(text.removeprefix("data: "))["error"] == {
        "message": "cut",
        "type": "server_error",
        "param": None,
        "code": "upstream_incomplete",
    }
