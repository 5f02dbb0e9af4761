"""What the scripted upstream can be told to answer, and how that looks on the wire."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Step = bytes | float | Literal["hang", "reset", "close"] | asyncio.Event
"""Bytes to send, seconds to wait, something to do with the connection, or an event to wait for."""

Steps = Iterable[Step]


@dataclass(frozen=True)
class Call:
    """A tool call to make."""

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What to answer: the parts of a model's turn, or a status, or the very bytes (``steps``).

    ``gate`` (see `ScriptedUpstream.gate`) holds a stream after its first word until it is opened; ``close`` closes the
    connection afterwards. ``usage`` None leaves the numbers out.
    """

    text: str | None = None
    calls: Sequence[Call] = ()
    reasoning: str | None = None
    refusal: str | None = None
    finish_reason: str | None = ""
    usage: Mapping[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    )
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Mapping[str, Any] | None = None
    delay_s: float = 0.0
    first_delay_s: float = 0.0
    done: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    gate: Gate | None = None
    close: bool = False
    steps: Callable[[bool], Steps] | None = None


class Gate:
    """Holds an answer until it is opened."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.event = asyncio.Event()

    def open(self) -> None:
        """Let the answer go on."""
        self._loop.call_soon_threadsafe(self.event.set)


def status(code: int, *, retry_after: str | None = None, error: Mapping[str, Any] | str | None = None) -> Answer:
    """Answer with an HTTP error: OpenAI's error object, or any text."""
    given = error if error is not None else {"message": f"status {code}", "type": "x", "param": None, "code": None}
    headers = {"retry-after": retry_after} if retry_after is not None else {}
    if isinstance(given, str):
        return Answer(status=code, headers={**headers, "content-type": "text/plain"}, body=given.encode())
    return Answer(status=code, headers=headers, body={"error": dict(given)})


def sse(*payloads: bytes | Mapping[str, Any]) -> list[bytes]:
    """Return chunked frames, one event each."""
    return [frame(b"data: " + (p if isinstance(p, bytes) else dump(p)) + b"\n\n") for p in payloads]


def dump(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def chunk(delta: Mapping[str, Any], finish_reason: str | None = None, **extra: Any) -> dict[str, Any]:
    """One chat completion chunk."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**FRAME, "object": "chat.completion.chunk", "choices": [choice], **extra}


FRAME = {"id": "chatcmpl-scripted", "object": "chat.completion", "created": 1700000000, "model": "scripted-1"}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def obvious(request: Mapping[str, Any]) -> Answer:
    """Return what an unscripted request is answered with."""
    messages = request.get("messages") or request.get("input") or [{}]
    last = messages[-1] if isinstance(messages, list) else {"role": "user", "content": messages}
    text = last.get("content") or last.get("output") or ""
    text = text if isinstance(text, str) else " ".join(part.get("text", "") for part in text)
    if last.get("role") == "tool" or last.get("type") == "function_call_output":
        return Answer(text=f"The tool said: {text}")
    tools = request.get("tools") or []
    if tools and request.get("tool_choice") != "none":
        function = tools[0].get("function") or tools[0]
        found = re.search(r"\{.*\}", text, re.DOTALL)
        arguments = json.loads(found.group()) if found else _filled(function.get("parameters") or {})
        return Answer(calls=[Call(function["name"], arguments)])
    return Answer(text=f"You said: {text}")


def _filled(schema: Mapping[str, Any]) -> Any:
    samples = {"string": "x", "integer": 1, "number": 1.5, "boolean": True, "array": [], "null": None}
    properties = schema.get("properties")
    if properties is not None or schema.get("type") == "object":
        return {name: _filled(item) for name, item in (properties or {}).items()}
    return samples.get(str(schema.get("type", "string")), "x")


def steps_of(answer: Answer, path: str, request: Mapping[str, Any]) -> Steps:
    """Return what to send for a request to ``path``."""
    streamed = bool(request.get("stream"))
    if answer.steps is not None:
        return answer.steps(streamed)
    if answer.status != 200 or answer.body is not None:
        body = answer.body if isinstance(answer.body, bytes) else dump(answer.body or {})
        return [answer.first_delay_s, whole(answer.status, body, answer.headers), *_ending(answer)]
    if path.partition("?")[0].endswith("/responses"):
        return _response_steps(answer, streamed)
    if not streamed:
        return [answer.first_delay_s, whole(200, dump(completion(answer)), answer.headers), *_ending(answer)]
    return _stream_steps(answer, bool((request.get("stream_options") or {}).get("include_usage")))


def _ending(answer: Answer) -> Steps:
    return ["close"] if answer.close else []


def _finish_of(answer: Answer) -> str | None:
    return ("tool_calls" if answer.calls else "stop") if answer.finish_reason == "" else answer.finish_reason


def _tool_calls(answer: Answer) -> list[dict[str, Any]]:
    made = []
    for index, call in enumerate(answer.calls):
        arguments = call.arguments if isinstance(call.arguments, str) else dump(call.arguments).decode()
        made.append(
            {"id": f"call_{index}", "type": "function", "function": {"name": call.name, "arguments": arguments}}
        )
    return made


def completion(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = _tool_calls(answer)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_of(answer)}
    usage = {"usage": answer.usage} if answer.usage is not None else {}
    return {**FRAME, "choices": [choice], **usage, **answer.extra}


def _stream_steps(answer: Answer, include_usage: bool) -> Iterator[Step]:
    yield answer.first_delay_s
    yield STREAM_HEAD
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if answer.calls else ""}]
    for key, text in (("reasoning_content", answer.reasoning), ("content", answer.text), ("refusal", answer.refusal)):
        deltas += [{key: word} for word in re.findall(r"\s*\S+", text or "")]
    for index, call in enumerate(_tool_calls(answer)):
        arguments = call["function"]["arguments"]
        head = {**call, "index": index, "function": {"name": call["function"]["name"], "arguments": ""}}
        deltas += [{"tool_calls": [head]}]
        deltas += [{"tool_calls": [{"index": index, "function": {"arguments": arguments[i : i + 8]}}]}
                   for i in range(0, len(arguments), 8)]  # fmt: skip
    for number, delta in enumerate(deltas):
        yield from sse(chunk(delta, **answer.extra))
        yield answer.delay_s
        if number == 1 and answer.gate is not None:
            yield answer.gate.event
    if _finish_of(answer) is not None:
        yield from sse(chunk({}, _finish_of(answer), **answer.extra))
    if include_usage and answer.usage is not None:
        yield from sse({**FRAME, "object": "chat.completion.chunk", "choices": [], "usage": answer.usage})
    if answer.done:
        yield from sse(b"[DONE]")
    yield LAST
    yield from _ending(answer)


def _response_steps(answer: Answer, streamed: bool) -> Iterator[Step]:
    output: list[dict[str, Any]] = [
        {"type": "function_call", "id": f"fc_{i}", "call_id": call["id"], "status": "completed", **call["function"]}
        for i, call in enumerate(_tool_calls(answer))
    ]
    if not output:
        part = {"type": "output_text", "text": answer.text or "", "annotations": []}
        output = [{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]}]
    usage = {
        "input_tokens": 11,
        "output_tokens": 7,
        "total_tokens": 18,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    response: dict[str, Any] = {
        "id": "resp_scripted",
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "model": "scripted-1",
        "output": output,
        "usage": usage if answer.usage is not None else None,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
    }
    if not streamed:
        yield whole(200, dump(response), answer.headers)
        return
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> bytes:
        payload = {"type": kind, "sequence_number": next(numbers), **fields}
        return frame(b"event: " + kind.encode() + b"\ndata: " + dump(payload) + b"\n\n")

    yield STREAM_HEAD
    yield event("response.created", response={**response, "status": "in_progress", "output": [], "usage": None})
    for index, item in enumerate(output):
        yield event("response.output_item.added", output_index=index, item={**item, "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": index}
        for word in re.findall(r"\s*\S+", answer.text or "") if item["type"] == "message" else ():
            yield event("response.output_text.delta", **place, content_index=0, delta=word, logprobs=[])
            yield answer.delay_s
        yield event("response.output_item.done", output_index=index, item=item)
    if answer.finish_reason is not None:
        yield event("response.completed", response=response)
    yield LAST


def whole(code: int, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {code} Scripted\r\n{lines}\r\n".encode("latin-1") + body


def frame(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
