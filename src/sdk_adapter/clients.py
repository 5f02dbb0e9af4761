"""The client that the SDK's OpenAI model classes talk to: JSON over a gateway upstream, no HTTP library in between.

`UpstreamClient` has the few attributes that `OpenAIChatCompletionsModel` and `OpenAIResponsesModel` use. It records
what those classes lose (the true ``finish_reason``, usage of failed turns) and keeps them from turning a truncated
or filtered answer into an exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import aclosing
from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec
from openai import NotGiven, Omit
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseStreamEvent,
)
from pydantic import BaseModel, TypeAdapter, ValidationError

from gateway.errors import UpstreamError, UpstreamIncomplete, UpstreamMalformed
from gateway.events import FinishReason, Usage
from gateway.limits.run_budget import OpenCall
from gateway.reserving import candidates, worst_case
from gateway.routing.routed import RoutedUpstream
from gateway.usage.estimate import estimate_usage
from gateway.usage.prices import MOST_TOKENS, reported_cost
from gateway.usage.reported import with_thoughts
from sdk_adapter.call_ids import CallIds
from sdk_adapter.messages import NamedText
from sdk_adapter.scope import Level

if TYPE_CHECKING:
    from gateway.routing.targets import Target

T = TypeVar("T")

_FINISH: dict[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
_DETAILS = {
    "input_tokens_details": ("cached_tokens", "cache_write_tokens"),
    "output_tokens_details": ("reasoning_tokens",),
}
_NOT_BODY = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})


class CallRecord:
    """What one model call did; added to the run's usage exactly once, also when the call fails half way.

    ``heard``: something of an answer has come.
    """

    __slots__ = (
        "_answered",
        "_call",
        "_closed",
        "_level",
        "_model",
        "_request_bytes",
        "_text_chars",
        "_upstream",
        "_usage",
        "finish_reason",
        "heard",
    )

    def __init__(self, upstream: Target, level: Level | None) -> None:
        self._upstream, self._level = upstream, level
        self._model = ""
        self._request_bytes = self._text_chars = 0
        self._usage: Usage | None = None
        self._answered = self._closed = self.heard = False
        self._call: OpenCall | None = None
        self.finish_reason: FinishReason | None = None

    async def ask(self, model: str, request_bytes: int, output_tokens: object) -> None:
        """Start a call (a record serves the calls of one model object, one after the other), and reserve for it.

        ``output_tokens`` is the most it may write, where the request says so. Raises as `RunBudget.begin_call` does.
        """
        self._model = model
        self._request_bytes, self._text_chars, self._usage = request_bytes, 0, None
        self._answered = self._closed = False
        self.finish_reason = None
        self._release()
        if self._level is None:
            return
        scope = self._level.scope
        promised = output_tokens if isinstance(output_tokens, int) else None
        estimate = worst_case(
            scope.meter,
            candidates(self._upstream, model),
            request_bytes,
            promised or scope.budget.output_tokens,
            is_promised=promised is not None,
        )
        self._call = await _run_at_home(self._level, scope.budget.begin_call(estimate))

    def finished(self, reason: str | None) -> None:
        """Note how the answer ended."""
        self._answered = True
        self.finish_reason = _FINISH.get(reason or "stop", "stop")
        if self._level is not None:
            self._level.finish_reason = self.finish_reason

    def wrote(self, characters: int) -> None:
        """Note how much came, for the estimate."""
        self._answered = True
        self._text_chars += characters

    def used(self, usage: Usage) -> None:
        """Note the upstream's own numbers; of several, the last counts."""
        self._answered = True
        self._usage = usage

    def close(self) -> None:
        """Account for the call."""
        if self._closed:
            return
        if not self._answered:
            self._release()
            return
        self._closed = True
        if self._level is not None:
            usage = self._usage or estimate_usage(self._request_bytes, self._text_chars)
            target = self._upstream
            upstream, model = target.served if isinstance(target, RoutedUpstream) else (target.name, self._model)
            lost = target.lost if isinstance(target, RoutedUpstream) else None
            self._level.scope.charge(usage, upstream, model, self._call, lost, byok=target.is_lent)

    def _release(self) -> None:
        call, self._call = self._call, None
        if call is not None and self._level is not None:
            self._level.scope.at_home(call.release)


class UpstreamClient:
    """Looks like ``AsyncOpenAI`` to the SDK's model classes; sends to one upstream.

    ``base_url`` is the upstream's, except for chat at api.openai.com: the SDK would switch on storing there.
    """

    def __init__(self, upstream: Target, level: Level | None) -> None:
        official = urlsplit(str(upstream.base_url or "")).hostname == "api.openai.com"
        self.base_url = "" if official and upstream.api == "chat" else str(upstream.base_url or "")
        self.record = CallRecord(upstream, level)
        self.chat = _Chat(upstream, level, self.record)
        self.responses = _Responses(upstream, level, self.record)

    def with_options(self, **_: Any) -> UpstreamClient:
        """Return itself: there are no retries of a client's own to switch off."""
        return self

    async def close(self) -> None:
        """Do nothing: the upstream belongs to the gateway."""


class _Chat:
    def __init__(self, upstream: Target, level: Level | None, record: CallRecord) -> None:
        self.completions = _ChatCompletions(upstream, level, record)


class _ChatCompletions:
    def __init__(self, upstream: Target, level: Level | None, record: CallRecord) -> None:
        self._upstream, self._level, self._record = upstream, level, record

    async def create(self, **kwargs: Any) -> ChatCompletion | AsyncGenerator[ChatCompletionChunk, None]:
        """Send a chat completion request; the SDK passes what ``chat.completions.create`` takes."""
        if self._upstream.config.provider == "openai" and not _is_absent(kwargs.get("max_tokens")):
            kwargs["max_completion_tokens"] = kwargs.pop("max_tokens")
        streamed = kwargs.get("stream") is True
        if streamed:
            asked = kwargs.get("stream_options")
            kwargs["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
        _name_participants(kwargs["messages"])
        body, arguments = _encode_request(kwargs, self._level)
        _refuse_query(kwargs)
        written = kwargs.get("max_completion_tokens")
        written = kwargs.get("max_tokens") if _is_absent(written) else written
        await self._record.ask(str(kwargs["model"]), len(body), written)
        if streamed:
            return self._chunks(_at_home(self._level, self._upstream.chat_stream(body, **arguments)))
        data = await _run_at_home(self._level, self._upstream.chat(body, **arguments))
        self._record.heard = True
        completion = _parse(ChatCompletion, data)
        try:
            self._settle(completion)
        finally:
            self._record.close()
        return completion

    def _settle(self, completion: ChatCompletion) -> None:
        _take_usage(self._record, completion)
        for choice in (completion.choices or ())[:1]:
            self._record.finished(choice.finish_reason)
            self._record.wrote(len(choice.message.content or ""))
            self._call_ids().settle(choice.message)
            if self._record.finish_reason in ("length", "content_filter"):
                choice.finish_reason = "stop"

    async def _chunks(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[ChatCompletionChunk, None]:
        record, calls = self._record, self._call_ids()
        try:
            async with aclosing(events):
                async for data in events:
                    record.heard = True
                    chunk = _parse(ChatCompletionChunk, data)
                    _take_usage(record, chunk)
                    for choice in chunk.choices or ():
                        if getattr(choice, "delta", None) is None:
                            choice.delta = ChoiceDelta()  # Azure's, when its content filter alone has something to say
                        record.wrote(len(choice.delta.content or ""))
                        for call in choice.delta.tool_calls or ():
                            calls.follow(call)
                        if choice.finish_reason is not None:
                            record.finished(choice.finish_reason)
                            if record.finish_reason in ("length", "content_filter"):
                                choice.finish_reason = "stop"
                    yield chunk
        finally:
            record.close()

    def _call_ids(self) -> CallIds:
        return CallIds(self._level.scope.call_ids if self._level is not None else set())


class _Responses:
    def __init__(self, upstream: Target, level: Level | None, record: CallRecord) -> None:
        self._upstream, self._level, self._record = upstream, level, record

    async def create(self, **kwargs: Any) -> Response | AsyncGenerator[ResponseStreamEvent, None]:
        """Send a Responses request; the SDK passes what ``responses.create`` takes."""
        _move_response_format(kwargs)
        body, arguments = _encode_request(kwargs, self._level)
        path = "/responses" + _query(kwargs)
        await self._record.ask(str(kwargs["model"]), len(body), kwargs.get("max_output_tokens"))
        if kwargs.get("stream") is True:
            return self._events(_at_home(self._level, self._upstream.stream(path, body, **arguments)))
        data = await _run_at_home(self._level, self._upstream.post(path, body, **arguments))
        self._record.heard = True
        response = _parse(Response, data)
        try:
            self._settle(response)
        finally:
            self._record.close()
        return response

    def _settle(self, response: Response) -> None:
        """Record usage and the end; a truncated or filtered answer goes on as a completed one."""
        _take_usage(self._record, response)
        _refuse_strange_items(response)
        if response.status == "failed" or response.error is not None:
            raise UpstreamError(_failure(response))
        if response.status == "incomplete":
            details = response.incomplete_details
            self._record.finished((details.reason if details else None) or "length")
            response.status = "completed"
        else:
            calls = any(item.type == "function_call" for item in response.output or ())
            self._record.finished("tool_calls" if calls else "stop")

    async def _events(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[ResponseStreamEvent, None]:
        ended = False
        try:
            async with aclosing(events):
                async for data in events:
                    self._record.heard = True
                    event = _parse_response_event(data)
                    if event is None:
                        continue
                    if event.type == "response.output_text.delta":
                        self._record.wrote(len(event.delta))
                    elif event.type == "error":
                        raise UpstreamError(f"The upstream ended its answer with an error: {event.message}")
                    elif event.type == "response.failed":
                        raise UpstreamError(_failure(event.response))
                    elif event.type in ("response.completed", "response.incomplete"):
                        ended = True
                        self._settle(event.response)
                        event = _completed(event)
                    yield event
            if not ended:
                raise UpstreamIncomplete("The upstream's answer ended before it was finished.")
        finally:
            self._record.close()


_ABSENT = (NoneType, Omit, NotGiven)


def _is_absent(value: Any) -> bool:
    return value.__class__ in _ABSENT


def _encode_request(kwargs: dict[str, Any], level: Level | None) -> tuple[bytes, dict[str, Any]]:
    """Return the JSON body and the keyword arguments of the upstream's call."""
    body = {name: value for name, value in kwargs.items() if value.__class__ not in _ABSENT and name not in _NOT_BODY}
    body.update(kwargs.get("extra_body") or {})
    headers = {k: v for k, v in (kwargs.get("extra_headers") or {}).items() if k.lower() != "user-agent"}
    arguments: dict[str, Any] = {"request_id": level.scope.run.request_id if level is not None else None}
    if headers:
        arguments["headers"] = headers
    return msgspec.json.encode(body, enc_hook=_enc_hook), arguments


def _enc_hook(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Iterable):
        return list(value)
    raise NotImplementedError(f"{type(value).__name__} has no JSON form")


def _query(kwargs: dict[str, Any]) -> str:
    query = kwargs.get("extra_query")
    return f"?{urlencode(query)}" if query else ""


def _name_participants(messages: list[dict[str, Any]]) -> None:
    """Put back the names of participants, which SDK items have no place for."""
    for message in messages:
        content = message.get("content")
        texts = [content] if isinstance(content, str) else [part.get("text") for part in content or ()]
        named = next((text for text in texts if isinstance(text, NamedText)), None)
        if named is not None:
            message["name"] = named.name


def _refuse_query(kwargs: dict[str, Any]) -> None:
    if kwargs.get("extra_query"):
        raise UpstreamError(
            "'extra_query' in an agent's model settings is not sent to chat upstreams; use 'extra_body'."
        )


def _move_response_format(kwargs: dict[str, Any]) -> None:
    """Spell a chat ``response_format`` as the Responses surface does."""
    wanted = kwargs.pop("response_format", None)
    if _is_absent(wanted):
        return
    spelled = {"type": wanted["type"], **wanted.get("json_schema", {})}
    text = kwargs.get("text")
    kwargs["text"] = {**(text if isinstance(text, dict) else {}), "format": spelled}


M = TypeVar("M", ChatCompletion, ChatCompletionChunk, Response)


def _parse(model: type[M], data: bytes) -> M:
    """Parse strictly (fast); fall back to the official client's lenient construction for upstreams with quirks."""
    try:
        return model.model_validate_json(data)
    except ValidationError:
        pass
    try:
        fields = msgspec.json.decode(data)
        if not isinstance(fields, dict):
            raise UpstreamMalformed("The upstream's answer is not a JSON object.")
        return model.construct(**fields)
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise UpstreamMalformed("The upstream's answer is not what its protocol allows.") from error


@lru_cache(maxsize=1)
def _response_event_adapter() -> TypeAdapter[Any]:
    """Built on first use: the union is large."""
    return TypeAdapter(ResponseStreamEvent)


def _parse_response_event(data: bytes) -> Any:
    try:
        return _response_event_adapter().validate_json(data)
    except ValidationError:
        pass
    try:
        fields = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise UpstreamMalformed("The upstream's stream holds something that is not JSON.") from error
    if isinstance(fields, dict) and fields.get("type") in (
        "response.completed",
        "response.incomplete",
        "response.failed",
    ):
        try:
            return _response_event_adapter().validate_python(_with_details_of_usage(fields))
        except ValidationError as error:
            raise UpstreamMalformed("The upstream's last event is not what its protocol allows.") from error
    return None


def _with_details_of_usage(event: dict[str, Any]) -> dict[str, Any]:
    """Add the details of usage that an upstream of an earlier protocol does not know."""
    response = event.get("response")
    usage = response.get("usage") if isinstance(response, dict) else None
    if isinstance(usage, dict):
        for group, names in _DETAILS.items():
            given = usage.get(group)
            usage[group] = dict.fromkeys(names, 0) | (given if isinstance(given, dict) else {})
    return event


def _completed(event: Any) -> ResponseCompletedEvent:
    """Return the end that the SDK takes for one; how it really ended is in the record."""
    return ResponseCompletedEvent.construct(
        type="response.completed", response=event.response, sequence_number=event.sequence_number
    )


def _failure(response: Response) -> str:
    message = response.error.message if response.error is not None else "no reason given"
    return f"The upstream could not finish its answer: {message}"


def _refuse_strange_items(response: Response) -> None:
    """Raise `UpstreamMalformed` for items that lenient parsing lets through, and that the SDK would fail at later."""
    for item in response.output or ():
        match item:
            case ResponseOutputMessage():
                is_good = getattr(item, "type", None) == "message" and isinstance(getattr(item, "content", None), list)
            case ResponseFunctionToolCall():
                is_good = isinstance(getattr(item, "arguments", None), str)
            case _:
                is_good = isinstance(item, BaseModel)
        if not is_good:
            raise UpstreamMalformed("The upstream's answer holds an item that is not what its protocol allows.")


def _take_usage(record: CallRecord, answer: ChatCompletion | ChatCompletionChunk | Response) -> None:
    """Record what an answer says of its usage; what is no usage is taken off it, for the SDK would fail at it."""
    usage = answer.usage
    if usage is None:
        return
    names = ("input", "output") if isinstance(answer, Response) else ("prompt", "completion")
    used = _usage(usage, *names)
    if used is None:
        answer.usage = None
    else:
        record.used(used)


def _usage(usage: object, reading: str, writing: str) -> Usage | None:
    """Both APIs say the same under other names; lenient servers leave any of it out. None: these are no numbers."""
    inputs = getattr(usage, f"{reading}_tokens_details", None)
    outputs = getattr(usage, f"{writing}_tokens_details", None)
    read, written, total, *numbers = found = [
        *(getattr(usage, name, None) for name in (f"{reading}_tokens", f"{writing}_tokens", "total_tokens")),
        getattr(inputs, "cached_tokens", None),
        getattr(inputs, "audio_tokens", None),
        getattr(usage, "cache_creation_input_tokens", None) or getattr(inputs, "cache_write_tokens", None),
        getattr(outputs, "reasoning_tokens", None),
        getattr(outputs, "audio_tokens", None),
    ]
    if not all(isinstance(part, BaseModel | None) for part in (usage, inputs, outputs)):
        return None
    if not all(number is None or (type(number) is int and 0 <= number <= MOST_TOKENS) for number in found):
        return None
    cached, audio_read, cache_write, thought, audio_written = (number or 0 for number in numbers)
    output = written or 0
    if read is not None and written is not None and total is not None:
        output, thought = with_thoughts(read, written, total, thought, cached + cache_write)
    cost = reported_cost(getattr(usage, "cost", None))
    return Usage(
        input_tokens=read or 0,
        output_tokens=output,
        cached_input_tokens=cached,
        reasoning_tokens=thought,
        requests=1,
        audio_input_tokens=audio_read,
        audio_output_tokens=audio_written,
        cost=cost,
        cost_reported=cost is not None,
        cache_write_tokens=cache_write,
    )


async def _run_at_home(level: Level | None, call: Coroutine[Any, Any, T]) -> T:
    """Await on the gateway's loop: a sync tool that calls ``Runner.run_sync`` has a loop of its own in its thread."""
    if level is None or level.scope.loop is asyncio.get_running_loop():
        return await call
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, level.scope.loop))


def _at_home(level: Level | None, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    if level is None or level.scope.loop is asyncio.get_running_loop():
        return events
    return _forward(level.scope.loop, events)


async def _forward(loop: asyncio.AbstractEventLoop, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async def step() -> bytes | None:
        return await anext(events, None)

    try:
        while (data := await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(step(), loop))) is not None:
            yield data
    finally:
        asyncio.run_coroutine_threadsafe(_close(events), loop)


async def _close(events: AsyncIterator[bytes]) -> None:
    if isinstance(events, AsyncGenerator):
        await events.aclose()
