"""RunEvents → chat completion chunks, or one chat completion.

Shapes: ``chat.completion`` and ``chat.completion.chunk`` of openai-openapi 2.3.0. Tools that run in the gateway
never appear; tools of the client do, with ``finish_reason: "tool_calls"``.
"""

from __future__ import annotations

from typing import Any, assert_never

import msgspec

from api.errors import error_object, routed_headers
from api.routing import Headers, Response
from gateway.errors import GatewayError
from gateway.events import (
    AgentSwitched,
    ReasoningDelta,
    RefusalDelta,
    RelayedBody,
    RelayedChunk,
    RelayedHead,
    RelayEnded,
    Routed,
    RunEvent,
    RunFinished,
    TextDelta,
    ToolCallRequested,
    ToolFinished,
    ToolStarted,
    Usage,
)
from gateway.run import RelayedAnswer, Run
from gateway.usage.prices import usd

DONE = b"data: [DONE]\n\n"
_ROLE = b'{"role":"assistant","content":"","refusal":null}'
_encode = msgspec.json.encode


def completion_id(run: Run) -> str:
    """Return the id of the run on this surface: the same digits as on every other."""
    return f"chatcmpl-{run.id.hex}"


def usage_object(usage: Usage | None) -> dict[str, Any]:
    """Return OpenAI's ``usage`` object, summed over all model calls of the run."""
    usage = usage or Usage()
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def spending_headers(usage: Usage | None) -> Headers:
    """Return what an unstreamed answer says of its cost, and whether its numbers are an estimate."""
    if usage is None:
        return ()
    headers: Headers = ()
    if usage.cost is not None:
        headers = ((b"x-gateway-cost-usd", usd(usage.cost).encode()),)
        if usage.cost_reported:
            headers += ((b"x-gateway-cost-reported", b"true"),)
    return (*headers, (b"x-gateway-usage-estimated", b"true")) if usage.estimated else headers


def encode_error(error: GatewayError) -> bytes:
    """Return the event that ends a broken stream; no ``[DONE]`` follows it."""
    return b"data: " + _encode(error_object(error)) + b"\n\n"


class ChunkEncoder:
    """Encodes one streamed answer: one id, the role first, `RunFinished` last."""

    def __init__(self, run: Run, *, include_usage: bool) -> None:
        self._base = (
            b'data: {"id":'
            + _encode(completion_id(run))
            + b',"object":"chat.completion.chunk","created":'
            + _encode(run.created)
            + b',"model":'
            + _encode(run.model)
            + b',"choices":['
        )
        self._open = self._base + b'{"index":0,"delta":'
        self._include_usage = include_usage
        tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._close = b',"logprobs":null,"finish_reason":null}' + tail
        self._tail = tail
        self._role_sent = False

    def encode(self, event: RunEvent) -> bytes:
        """Return the bytes to send for ``event``; empty when it has no form on this surface."""
        match event:
            case RelayedChunk(data):  # these two are most events by far
                return b"data: " + data + b"\n\n"
            case TextDelta(text):
                return self._delta(b'{"content":' + _encode(text) + b"}")
            case ReasoningDelta(text):
                return self._delta(b'{"reasoning_content":' + _encode(text) + b"}")
            case RefusalDelta(text):
                return self._delta(b'{"refusal":' + _encode(text) + b"}")
            case ToolCallRequested():
                return self._delta(_encode({"tool_calls": [{"index": event.index} | _tool_call(event)]}))
            case RunFinished(finish_reason, usage):
                return self._finish(finish_reason, usage)
            case RelayEnded():
                return DONE
            case ToolStarted() | ToolFinished() | AgentSwitched() | RelayedHead() | Routed():
                return b""
            case RelayedBody():
                raise TypeError("a whole body in a streamed run")
            case _:
                assert_never(event)

    def _delta(self, delta: bytes) -> bytes:
        return self._role() + self._open + delta + self._close

    def _role(self) -> bytes:
        if self._role_sent:
            return b""
        self._role_sent = True
        return self._open + _ROLE + self._close

    def _finish(self, finish_reason: str, usage: Usage | None) -> bytes:
        parts = self._role() + self._open + b'{},"logprobs":null,"finish_reason":' + _encode(finish_reason) + b"}"
        parts += self._tail
        if self._include_usage:
            parts += self._base + b'],"usage":' + _encode(usage_object(usage)) + b"}\n\n"
        return parts + DONE


def limit_headers(run: Run) -> Headers:
    """Return the headers that say how far the caller is from its limits."""
    return () if run.reservation is None else run.reservation.headers


def answer_response(answer: RelayedAnswer, headers: Headers = ()) -> Response:
    """Return the response of a whole relayed answer; ``headers`` are further ones."""
    headers += answer.head.headers + spending_headers(answer.body.usage)
    if answer.routed is not None:
        headers += routed_headers(answer.routed.upstream, answer.routed.attempts, answer.routed.hedged)
    return Response(answer.body.data, headers=headers)


class CompletionBuilder:
    """Collects one unstreamed answer."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._body: bytes | None = None
        self.headers: Headers = ()

    async def add(self, event: RunEvent) -> None:
        """Take one event of the run."""
        match event:
            case TextDelta(text):
                self._text.append(text)
            case ReasoningDelta(text):
                self._reasoning.append(text)
            case RefusalDelta(text):
                self._refusal.append(text)
            case ToolCallRequested():
                self._tool_calls.append(_tool_call(event))
            case RunFinished(finish_reason, usage):
                self._body = self._finish(finish_reason, usage)
                self.headers += spending_headers(usage)
            case RelayedBody(data):
                self._body = data
                self.headers += spending_headers(event.usage)
            case RelayedHead(headers):
                self.headers += headers
            case Routed():
                self.headers += routed_headers(event.upstream, event.attempts, event.hedged)
            case ToolStarted() | ToolFinished() | AgentSwitched():
                pass
            case RelayedChunk() | RelayEnded():
                raise TypeError("a chunk in an unstreamed run")
            case _:
                assert_never(event)

    def body(self) -> bytes:
        """Return the JSON of the finished run."""
        assert self._body is not None, "the run did not finish"
        return self._body

    def _finish(self, finish_reason: str, usage: Usage | None) -> bytes:
        content = "".join(self._text)
        refusal = "".join(self._refusal) or None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if not content and (self._tool_calls or refusal) else content,
            "refusal": refusal,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._tool_calls:
            message["tool_calls"] = self._tool_calls
        return _encode(
            {
                "id": completion_id(self._run),
                "object": "chat.completion",
                "created": self._run.created,
                "model": self._run.model,
                "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
                "usage": usage_object(usage),
            }
        )


def _tool_call(event: ToolCallRequested) -> dict[str, Any]:
    return {
        "id": event.call_id,
        "type": "function",
        "function": {"name": event.name, "arguments": event.arguments},
    }
