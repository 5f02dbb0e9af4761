"""The embedded demo upstream: the scripted model of `demo_script` behind the interface of a real server.

It speaks ``/chat/completions``, streamed and not, and needs no network, key or file, so that a fresh checkout answers
at once and an agent's tools are really called.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from gateway.chat import CHAT_PATH
from gateway.errors import UpstreamRejected
from gateway.upstreams.client import EventSource, Take, Upstream
from gateway.upstreams.demo_script import HANDOFF_PREFIX, Answer, Situation, ToolOffer, ToolResult, answer, words_of
from gateway.upstreams.relaying import ByteRequest, OnHead


class DemoUpstream(Upstream):
    """A deterministic model inside the process; it takes any model name."""

    async def probe(self) -> None:
        """Do nothing: there is nothing open."""

    def retire(self) -> None:
        """Do nothing: there is nothing open."""

    async def aclose(self) -> None:
        """Do nothing: there is nothing open."""

    async def fetch_models(self) -> tuple[str, ...]:
        """See `Upstream.fetch_models`."""
        return self.config.models or ()

    async def _post(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> bytes:
        return _Completion(self._decode(path, body), body).whole()

    async def _open(
        self, path: str, body: bytes, request_id: str | None, headers: Mapping[str, str] | None, on_head: OnHead | None
    ) -> EventSource:
        return _DemoEvents(_Completion(self._decode(path, body), body).chunks())

    def _relay(
        self, request: ByteRequest, request_id: str | None, on_head: OnHead | None
    ) -> AsyncGenerator[bytes, None]:
        raise self._chat_only()

    def _chat_only(self) -> UpstreamRejected:
        return UpstreamRejected(
            f"The demo model '{self.name}' answers chat completions only. For other endpoints add a real upstream to "
            "upstreams.yaml and name a model of it."
        )

    def _decode(self, path: str, body: bytes) -> _Request:
        if path != CHAT_PATH:
            raise self._chat_only()
        try:
            request = _REQUEST.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamRejected(f"The demo model cannot read this request: {error}.") from error
        if not request.messages:
            raise UpstreamRejected("'messages' must hold at least one message.", param="messages")
        return request


class _DemoEvents:
    """Gives one chunk at a time, letting other tasks run in between, as a network would."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._released = asyncio.Event()

    async def read(self) -> list[bytes]:
        await asyncio.sleep(0)
        chunk = next(self._chunks, None)
        return [] if chunk is None else [chunk]

    async def pipe(self, take: Take) -> None:
        while events := await self.read():
            more = take(events)
            if more is None:
                return
            if not more:
                self._released.clear()
                await self._released.wait()

    def release(self) -> None:
        self._released.set()

    def close(self, *, drain: bool = False) -> None:
        self._chunks = iter(())


class _Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(Struct):
    function: _Function | None = None


class _CalledFunction(Struct):
    name: str = ""


class _ToolCall(Struct):
    id: str = ""
    function: _CalledFunction | None = None


class _Message(Struct):
    role: str
    content: Any = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _JsonSchema(Struct):
    schema: dict[str, Any] | None = None


class _Format(Struct):
    type: str = "text"
    json_schema: _JsonSchema | None = None


class _Request(Struct):
    model: str
    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream_options: _StreamOptions | None = None


_REQUEST = msgspec.json.Decoder(_Request)
_encode = msgspec.json.Encoder().encode


class _Completion:
    """One answer of the demo model in OpenAI's shapes; ids come from the request, so equal requests answer alike."""

    def __init__(self, request: _Request, body: bytes) -> None:
        self._request = request
        self._digest = hashlib.sha256(body).hexdigest()
        self._created = int(time.time())
        self._count = min(max(request.n or 1, 1), 16)
        self._answer, self._reason = _finish(answer(_situation(request)), request)

    def whole(self) -> bytes:
        said: dict[str, Any] = {"role": "assistant", "content": self._answer.text or None, "refusal": None}
        if self._answer.calls:
            said["tool_calls"] = self._tool_calls()
        else:
            said["content"] = self._answer.text
        choices = [
            {"index": index, "message": said, "logprobs": None, "finish_reason": self._reason}
            for index in range(self._count)
        ]
        return _encode({**self._frame("chat.completion"), "choices": choices, "usage": self._usage()})

    def chunks(self) -> Iterator[bytes]:
        asked = self._request.stream_options is not None and bool(self._request.stream_options.include_usage)
        frame = self._frame("chat.completion.chunk")
        tail: dict[str, Any] = {"usage": None} if asked else {}
        for index in range(self._count):
            for delta, reason in self._deltas():
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
                yield _encode({**frame, "choices": [choice], **tail})
        if asked:
            yield _encode({**frame, "choices": [], "usage": self._usage()})

    def _deltas(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        yield {"role": "assistant", "content": None if self._answer.calls else ""}, None
        for index, call in enumerate(self._tool_calls()):
            head = {**call, "index": index, "function": {"name": call["function"]["name"], "arguments": ""}}
            yield {"tool_calls": [head]}, None
            text = call["function"]["arguments"]
            for start in range(0, len(text), 12):
                yield {"tool_calls": [{"index": index, "function": {"arguments": text[start : start + 12]}}]}, None
        for word in words_of(self._answer.text):
            yield {"content": word}, None
        yield {}, self._reason

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-demo-{self._digest[:24]}",
            "object": kind,
            "created": self._created,
            "model": self._request.model,
        }

    def _tool_calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": f"call_{hashlib.sha256(f'{self._digest}{index}'.encode()).hexdigest()[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(self._answer.calls)
        ]

    def _usage(self) -> dict[str, Any]:
        """Count words: plausible numbers, the same every time."""
        prompt = sum(4 + len(words_of(_text_of(message.content))) for message in self._request.messages)
        prompt += sum(16 for _ in self._request.tools or ())
        written = [self._answer.text, *(f"{call.name} {call.arguments}" for call in self._answer.calls)]
        completion = self._count * max(1, sum(len(words_of(text)) for text in written))
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _finish(said: Answer, request: _Request) -> tuple[Answer, Literal["stop", "length", "tool_calls"]]:
    if said.calls:
        return said, "tool_calls"
    text = said.text
    for stop in [request.stop] if isinstance(request.stop, str) else request.stop or ():
        if stop:
            text = text.split(stop, 1)[0]
    limit = request.max_completion_tokens or request.max_tokens
    words = words_of(text)
    if limit is not None and len(words) > limit:
        return Answer("".join(words[: max(limit, 0)])), "length"
    return Answer(text), "stop"


def _situation(request: _Request) -> Situation:
    last = max((i for i, message in enumerate(request.messages) if message.role == "user"), default=-1)
    since = request.messages[last + 1 :]
    names = {call.id: call.function.name for m in since for call in m.tool_calls or () if call.function is not None}
    results = [
        ToolResult(names.get(message.tool_call_id or "", ""), _text_of(message.content))
        for message in since
        if message.role == "tool"
    ]
    tools = [
        ToolOffer(tool.function.name, tool.function.description or "", tool.function.parameters or {})
        for tool in request.tools or ()
        if tool.function is not None
    ]
    schema: dict[str, Any] | None = None
    if request.response_format is not None and request.response_format.json_schema is not None:
        schema = request.response_format.json_schema.schema or {}
    return Situation(
        text=_text_of(request.messages[last].content) if last >= 0 else "",
        tools=tools,
        results=[result for result in results if not result.name.startswith(HANDOFF_PREFIX)],
        handed_off=frozenset(name for name in names.values() if name.startswith(HANDOFF_PREFIX)),
        forced=_forced(request.tool_choice),
        parallel=request.parallel_tool_calls is not False,
        schema=schema,
        json_object=request.response_format is not None and request.response_format.type == "json_object",
    )


def _forced(choice: Any) -> str | None:
    """Return the tool that must be called: a name, ``"*"`` for any, ``""`` for none, None for a free choice."""
    if choice == "none":
        return ""
    if choice == "required":
        return "*"
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        return name if isinstance(name, str) else "*"
    return None


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return ""
