"""What routing asks of the things it routes to; the upstreams of `gateway.upstreams` have this shape."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

from gateway.chunks import Chunk

OnHead = Callable[[int, Mapping[bytes, bytes]], None]
"""Is told status and headers of a successful answer before its first byte."""


class TargetConfig(Protocol):
    """The part of an upstream's configuration that callers of models look at."""

    @property
    def provider(self) -> str:
        """The preset it was made from."""
        ...

    @property
    def models(self) -> tuple[str, ...] | None:
        """Names or fnmatch patterns that it serves; None: whatever it is asked for."""
        ...

    @property
    def default_model(self) -> str | None:
        """The model of agents that name none."""
        ...

    @property
    def named(self) -> frozenset[str]:
        """The models it is configured to have by name, the default one among them."""
        ...

    def serves(self, model: str) -> bool:
        """Whether it is asked for this model."""
        ...

    @property
    def max_tokens_field(self) -> Literal["max_tokens", "max_completion_tokens"] | None:
        """The field in which it takes the limit of a chat answer's tokens; None: whichever comes."""
        ...

    @property
    def lent_key_header(self) -> str | None:
        """The header in which callers lend a key of their own for it; None where none is taken."""
        ...

    @property
    def allow_server_credentials(self) -> Literal["never", "fallback", "always"]:
        """When calls are made with the gateway's own key."""
        ...

    @property
    def hosted_tools(self) -> tuple[str, ...] | None:
        """The hosted tools it has."""
        ...

    @property
    def passthrough_keys(self) -> tuple[str, ...]:
        """Further top-level chunk keys that reach a client."""
        ...


class TargetStatus(Protocol):
    """What is known of an upstream's health."""

    @property
    def healthy(self) -> bool | None:
        """None until somebody has asked."""
        ...


class TargetStream(Protocol):
    """A streamed answer that has begun; ``async with`` it. ``first`` are the events that came first."""

    @property
    def first(self) -> list[Chunk]:
        """The first events; empty where the answer ended without any."""
        ...

    async def __aenter__(self) -> TargetStream: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def read(self) -> list[Chunk]:
        """Return the next events; an empty list is the proper end."""
        ...

    async def pipe(self, take: Callable[[list[Chunk]], bool | None]) -> None:
        """Hand all further events to ``take``; when it returns False, nothing more comes until `release`."""
        ...

    def release(self) -> None:
        """Go on after ``take`` returned False."""
        ...


class Target(Protocol):
    """A server with models; a `RoutedUpstream` is one too, so that callers need not know the difference."""

    @property
    def name(self) -> str:
        """The upstream's configured name."""
        ...

    @property
    def api(self) -> Literal["chat", "responses"]:
        """What agents speak to it."""
        ...

    @property
    def base_url(self) -> str:
        """Its address."""
        ...

    @property
    def config(self) -> TargetConfig:
        """Its configuration."""
        ...

    @property
    def is_lent(self) -> bool:
        """Whether the latest call was made with a key that its caller lent."""
        ...

    def for_caller(self, sent: Mapping[str, str]) -> Target:
        """Return it as the caller uses it who sent these headers of credentials."""
        ...

    async def post(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> bytes:
        """Send one JSON request and return the JSON answer."""
        ...

    async def start(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> TargetStream:
        """Send one streamed request and return with its first events."""
        ...

    def stream(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        on_head: OnHead | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the payload of each event as it comes."""
        ...

    async def chat(
        self, body: bytes, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Return a finished chat completion."""
        ...

    def chat_stream(
        self, body: bytes, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield chat completion chunks up to the finished end."""
        ...

    def relay(
        self, request: Any, *, request_id: str | None = None, on_head: OnHead | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer of a request that is relayed as bytes."""
        ...


class Server(Target, Protocol):
    """A target that is a real server."""

    @property
    def status(self) -> TargetStatus:
        """What is known of its health."""
        ...

    async def check(self) -> object:
        """Ask it whether it is well and note the answer in ``status``; never raises for what it does."""
        ...


class Binding(Protocol):
    """A model by the name its upstream knows it by."""

    @property
    def upstream(self) -> Target:
        """Who serves it."""
        ...

    @property
    def model(self) -> str:
        """The model's name there."""
        ...


class ServerBinding(Protocol):
    """A binding to one real server."""

    @property
    def upstream(self) -> Server:
        """Who serves it."""
        ...

    @property
    def model(self) -> str:
        """The model's name there."""
        ...


class ListedModel(Protocol):
    """A row of a model list."""

    @property
    def id(self) -> str:
        """What a client sends."""
        ...

    @property
    def owned_by(self) -> str:
        """Whose it is."""
        ...

    @property
    def created(self) -> int:
        """Epoch seconds."""
        ...

    @property
    def name(self) -> str:
        """What people read."""
        ...


class ServerTable(Protocol):
    """The configured upstreams, in order of priority."""

    @property
    def upstreams(self) -> Mapping[str, Server]:
        """Every upstream by name."""
        ...

    @property
    def default_model(self) -> str | None:
        """The model of agents that name neither a model nor an upstream."""
        ...

    def resolve(
        self, name: str | None, *, upstream: str | None = None, default_model: str | None = None
    ) -> ServerBinding:
        """Bind the model name of an agent."""
        ...

    def find_model(self, model_id: str) -> ServerBinding | None:
        """Bind the id ``upstream/model`` of a raw model."""
        ...

    def list_models(self) -> Sequence[ListedModel]:
        """Return the models that are known by name."""
        ...

    def find_pattern(self, name: str) -> str | None:
        """Return the pattern that lets a model through which is not listed, or None."""
        ...


class ModelTable(Protocol):
    """What a model name means: the upstream table with routing on top."""

    def resolve(
        self,
        name: str | None,
        *,
        upstream: str | None = None,
        default_model: str | None = None,
        fallbacks: tuple[str, ...] = (),
    ) -> Binding:
        """Bind the model name of an agent; raise the table's own error for one that nobody serves."""
        ...

    def find_model(self, model_id: str) -> Binding | None:
        """Bind the id of a raw model, or return None."""
        ...

    def list_models(self) -> Sequence[ListedModel]:
        """Return the models that are known by name."""
        ...
