"""What the tests of `sdk_adapter` share: a scripted in-process upstream, a table over it, and a way to run an agent."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec
from agents import Agent

from gateway.chat import ChatRequest, decode_body, decode_chat
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.events import RefusalDelta, RunEvent, RunFinished, TextDelta, ToolCallRequested
from gateway.observability.metrics import Metrics
from gateway.principal import Principal, Profile
from gateway.registry.entry import AgentOptions
from gateway.run import Run
from sdk_adapter.executor import AdapterServices, AgentExecutor, prepare_agent
from sdk_adapter.runner import install

T = TypeVar("T")
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


@dataclass
class Reply:
    """One scripted answer: text, calls of tools (name, arguments) or a failure; ``hold`` waits before it goes on."""

    text: str | None = None
    calls: tuple[tuple[str, Any], ...] = ()
    finish: str | None = None
    error: Exception | None = None
    error_after: int | None = None
    refusal: str | None = None
    reasoning: str | None = None
    usage: Mapping[str, Any] | None = field(default_factory=lambda: USAGE)
    hold: asyncio.Event | None = None

    @property
    def reason(self) -> str:
        return self.finish or ("tool_calls" if self.calls else "stop")


class FakeUpstream:
    """Answers chat calls from a script, remembers the bodies, and whether a stream was closed early."""

    def __init__(self, name: str = "fake", api: str = "chat", provider: str = "openai-compatible") -> None:
        self.name, self.api = name, api
        self.base_url = "http://127.0.0.1:1/v1"
        self.config = SimpleNamespace(provider=provider)
        self.is_lent = False
        self.replies: list[Reply | Callable[[dict[str, Any]], Reply]] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str] | None] = []
        self.paths: list[str] = []
        self.raw: list[bytes | list[bytes]] = []
        self.started = asyncio.Event()
        self.answering = asyncio.Event()
        self.closed = asyncio.Event()
        self._calls = 0

    def for_caller(self, sent: Mapping[str, str]) -> FakeUpstream:
        return self

    def _next(self, body: bytes) -> Reply:
        self.bodies.append(json.loads(body))
        self.started.set()
        reply = self.replies.pop(0)
        return reply if isinstance(reply, Reply) else reply(self.bodies[-1])

    async def chat(self, body: bytes, *, request_id: str | None = None, headers: Any = None) -> bytes:
        self.headers.append(headers)
        reply = self._next(body)
        try:
            if reply.hold is not None:
                await reply.hold.wait()
        except asyncio.CancelledError:
            self.closed.set()
            raise
        if reply.error is not None:
            raise reply.error
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                {"id": f"call_{self._number()}", "type": "function", "function": {"name": n, "arguments": _json(a)}}
                for n, a in reply.calls
            ]
        completion = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": reply.reason, "logprobs": None}],
            "usage": reply.usage,
        }
        return msgspec.json.encode(completion)

    async def chat_stream(
        self, body: bytes, *, request_id: str | None = None, headers: Any = None
    ) -> AsyncGenerator[bytes, None]:
        self.headers.append(headers)
        reply = self._next(body)
        if reply.error is not None and reply.error_after is None:
            raise reply.error
        try:
            for sent, delta in enumerate(self._deltas(reply)):
                if reply.error is not None and sent == reply.error_after:
                    raise reply.error
                yield _chunk(delta, None)
                if reply.hold is not None and sent == 1:
                    self.answering.set()
                    await reply.hold.wait()
            yield _chunk({}, reply.reason)
            if reply.usage is not None and self.bodies[-1].get("stream_options", {}).get("include_usage"):
                yield msgspec.json.encode(
                    {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
                    | {"usage": reply.usage}
                )
        except (GeneratorExit, asyncio.CancelledError):
            self.closed.set()
            raise

    def _deltas(self, reply: Reply) -> Iterator[dict[str, Any]]:
        yield {"role": "assistant", "content": ""}
        for word in (reply.reasoning or "").split(" "):
            if word:
                yield {"reasoning_content": word}
        words = (reply.text or "").split(" ")
        for index, word in enumerate(words):
            if word or len(words) > 1:
                yield {"content": word if index == len(words) - 1 else word + " "}
        if reply.refusal:
            yield {"refusal": reply.refusal}
        for index, (name, arguments) in enumerate(reply.calls):
            function = {"name": name, "arguments": ""}
            yield {
                "tool_calls": [
                    {"index": index, "id": f"call_{self._number()}", "type": "function", "function": function}
                ]
            }
            yield {"tool_calls": [{"index": index, "function": {"arguments": _json(arguments)}}]}

    async def post(self, path: str, body: bytes, *, request_id: str | None = None, headers: Any = None) -> bytes:
        self.paths.append(path)
        self.bodies.append(json.loads(body))
        data = self.raw.pop(0)
        assert isinstance(data, bytes)
        return data

    async def stream(
        self, path: str, body: bytes, *, request_id: str | None = None, headers: Any = None
    ) -> AsyncGenerator[bytes, None]:
        self.paths.append(path)
        self.bodies.append(json.loads(body))
        for data in self.raw.pop(0):
            assert isinstance(data, bytes)
            yield data

    def _number(self) -> int:
        self._calls += 1
        return self._calls


class FakeTable:
    """Every name is a model of the one upstream, unless ``known`` limits them; remembers what was asked for."""

    def __init__(self, upstream: FakeUpstream, known: Mapping[str, str] | None = None) -> None:
        self.default = upstream
        self.known = known
        self.asked: list[tuple[str | None, str | None, str | None]] = []

    def resolve(self, name: str | None, *, upstream: str | None = None, default_model: str | None = None) -> Any:
        self.asked.append((name, upstream, default_model))
        if name is not None and self.known is not None:
            if name not in self.known:
                raise ConfigError(f"The model '{name}' is not served; add it to 'aliases' in upstreams.yaml.")
            return SimpleNamespace(upstream=self.default, model=self.known[name])
        return SimpleNamespace(upstream=self.default, model=name or default_model or "default-model")


class World:
    """One upstream, its table, and the services an executor gets."""

    def __init__(
        self, *replies: Any, api: str = "chat", known: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        self.upstream = FakeUpstream(api=api)
        self.upstream.replies = [Reply(r) if isinstance(r, str) else r for r in replies]
        self.table = FakeTable(self.upstream, known)
        self.metrics = Metrics()
        self.services = AdapterServices(lambda: self.table, self.metrics, Settings(**settings))  # type: ignore[arg-type,return-value]

    @contextmanager
    def installed(self) -> Iterator[World]:
        with install(self.services):
            yield self

    def prepare(self, agent: Agent[Any], **options: Any) -> AgentExecutor:
        prepared = prepare_agent(
            agent, agent_id="default/test", options=AgentOptions(**options), services=self.services
        )
        return prepared.executor

    async def ask(self, agent: Agent[Any] | AgentExecutor, *, streamed: bool = False, **request: Any) -> Answer:
        options = request.pop("options", {})
        executor = agent if isinstance(agent, AgentExecutor) else self.prepare(agent, **options)
        events = [event async for event in executor.execute(make_run(streamed=streamed, **request))]
        return Answer(events)


@dataclass
class Answer:
    """The events of a run."""

    events: list[RunEvent]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def refusal(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, RefusalDelta))

    @property
    def end(self) -> RunFinished:
        last = self.events[-1]
        assert isinstance(last, RunFinished)
        return last

    @property
    def calls(self) -> list[ToolCallRequested]:
        return [event for event in self.events if isinstance(event, ToolCallRequested)]


def make_run(
    *,
    streamed: bool = False,
    messages: Iterable[Mapping[str, Any]] | str = "hello",
    key_id: str = "key",
    profile: Profile = "openai",
    session_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Run:
    """Return a run of ``default/test``; ``fields`` are fields of the chat request."""
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    body = json.dumps({"model": "default/test", "messages": conversation, "stream": streamed, **fields}).encode()
    request: ChatRequest = decode_chat(body, decode_body(body))
    return Run(
        id=uuid.uuid4(),
        request_id="req-1",
        principal=Principal("someone", key_id, ("*",), profile=profile),
        model="default/test",
        request=request,
        streamed=streamed,
        created=1,
        deadline_s=60,
        session_id=session_id,
        metadata=request.metadata or {},
        headers=headers or {},
    )


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; a hang is a failure, not a wait."""

    async def bounded() -> T:
        return await asyncio.wait_for(main, 120)

    return asyncio.run(bounded())


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _chunk(delta: Mapping[str, Any], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return msgspec.json.encode(
        {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    )
