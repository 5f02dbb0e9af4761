"""Upstreams without a socket for tests of routing: each answers what it was told, or fails."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.chunks import Chunk
from gateway.errors import GatewayError
from gateway.upstreams.config import UpstreamConfig
from gateway.upstreams.status import UpstreamStatus


@dataclass(eq=False)
class FakeStream:
    """A streamed answer: ``first``, then what `read` finds in ``rest``."""

    first: list[Chunk]
    rest: Sequence[GatewayError | list[Chunk]]

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def read(self) -> list[Chunk]:
        step, *self.rest = self.rest
        if isinstance(step, GatewayError):
            raise step
        return step

    async def pipe(self, take: Callable[[list[Chunk]], bool | None]) -> None:
        while events := await self.read():
            take(events)

    def release(self) -> None:
        return None


@dataclass(eq=False)
class FakeServer:
    """Takes the next of ``script`` for each call (the last one stays): an error to raise, or True to answer."""

    name: str
    script: list[GatewayError | bool] = field(default_factory=lambda: [True])
    models: tuple[str, ...] = ("m",)
    api: Literal["chat", "responses"] = "chat"
    bodies: list[bytes] = field(default_factory=list)
    fails_after_first: GatewayError | None = None
    base_url: str = ""
    status: UpstreamStatus = field(default_factory=UpstreamStatus)
    is_lent: bool = False

    def for_caller(self, sent: Mapping[str, str]) -> FakeServer:
        return self

    @property
    def config(self) -> UpstreamConfig:
        return UpstreamConfig(name=self.name, models=self.models)

    def _next(self, body: bytes) -> None:
        self.bodies.append(body)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, GatewayError):
            raise step

    async def post(self, path: str, body: bytes, **options: Any) -> bytes:
        self._next(body)
        return self.name.encode()

    async def start(self, path: str, body: bytes, **options: Any) -> FakeStream:
        self._next(body)
        rest: list[GatewayError | list[Chunk]] = [[Chunk(b"end")], []]
        return FakeStream([Chunk(self.name.encode())], [self.fails_after_first] if self.fails_after_first else rest)

    async def stream(self, path: str, body: bytes, **options: Any) -> AsyncGenerator[bytes, None]:
        async with await self.start(path, body) as stream:
            chunks = stream.first
            while chunks:
                for chunk in chunks:
                    yield chunk.data
                chunks = await stream.read()

    async def chat(self, body: bytes, **options: Any) -> bytes:
        return await self.post("/chat/completions", body)

    def chat_stream(self, body: bytes, **options: Any) -> AsyncGenerator[bytes, None]:
        return self.stream("/chat/completions", body)

    async def relay(self, request: Any, **options: Any) -> AsyncGenerator[bytes, None]:
        self._next(b"")
        yield self.name.encode()

    async def check(self) -> object:
        return self.status


@dataclass(frozen=True)
class FakeBinding:
    upstream: FakeServer
    model: str


@dataclass(frozen=True)
class FakeTable:
    """The upstream table in as many lines as the tests need."""

    upstreams: Mapping[str, FakeServer]
    default_model: str | None = None

    def resolve(
        self, name: str | None, *, upstream: str | None = None, default_model: str | None = None
    ) -> FakeBinding:
        asked = name or default_model or "m"
        prefix, slash, rest = asked.partition("/")
        if slash:
            return FakeBinding(self.upstreams[prefix], rest)
        chosen = [self.upstreams[upstream]] if upstream is not None else self.upstreams.values()
        return next(FakeBinding(server, asked) for server in chosen if asked in server.models)

    def find_model(self, model_id: str) -> FakeBinding | None:
        prefix, _, model = model_id.partition("/")
        server = self.upstreams.get(prefix)
        return FakeBinding(server, model) if server is not None and model in server.models else None

    def list_models(self) -> Sequence[Any]:
        return ()


def table(*servers: FakeServer) -> FakeTable:
    """Return a table of these, in order of priority."""
    return FakeTable({server.name: server for server in servers})
