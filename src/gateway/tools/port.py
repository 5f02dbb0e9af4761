"""The port between the tool manager and whatever runs a tool: specs, contexts, results, and the provider protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from msgspec import Struct

from gateway.caller_context import NOTHING, CallerContext
from gateway.principal import Principal

ProviderKind = Literal["local", "http", "mcp", "openapi", "shell", "file_ops", "research"]
ToolSource = Literal["sdk", "api", "mcp"]
"""Who asks for a call: an agent of the SDK, a client of `POST /tools/{name}/invoke`, a client of `/mcp`."""

HealthStatus = Literal["unknown", "ok", "degraded", "down"]
Progress = Callable[[float, float | None, str | None], Awaitable[None]]
"""Told of a tool's progress: how far, of how much (if known), a sentence (if any)."""


_MARGIN_S = 1.0


class ToolSpec(Struct, frozen=True, kw_only=True):
    """One callable tool as its provider describes it; the manager adds what `tools.yaml` says about it.

    ``name`` is unique in the gateway and matches ``^[A-Za-z0-9_-]{1,64}$``. ``entry`` is the entry of `tools.yaml` it
    comes from, ``remote_name`` what its own server calls it. ``parameters`` is the JSON Schema of its arguments, an
    object at the top. ``idempotent``: a second call with the same arguments changes nothing more; ``read_only``: no
    call changes anything. ``digest`` is the pinned hash, where the provider pins. ``quarantined`` says why the tool
    is listed but not callable. ``address`` (a URL without its query) and ``method`` say where a call goes: for admins.
    """

    name: str
    entry: str
    provider: ProviderKind
    description: str
    parameters: Mapping[str, Any]
    remote_name: str = ""
    title: str | None = None
    output_schema: Mapping[str, Any] | None = None
    idempotent: bool = False
    read_only: bool = False
    digest: str | None = None
    quarantined: str | None = None
    address: str | None = None
    method: str | None = None


class ToolPart(Struct, frozen=True, kw_only=True):
    """A piece of a result that is not text: an image, a sound, a file.

    ``data`` is base64; ``uri`` an address instead of data.
    """

    kind: Literal["image", "audio", "resource"]
    media_type: str
    data: str | None = None
    uri: str | None = None


class ToolResult(Struct, frozen=True, kw_only=True):
    """What a call gave. ``text`` is what a model reads; ``structured`` the JSON value behind it, if there is one.

    ``is_error`` marks a failure that the tool itself reports (MCP's ``isError``, an HTTP 404): the words are for the
    model, and are shown to it. A call that could not be made at all is a raised `gateway.errors.ToolError` instead.
    """

    text: str
    structured: Any = None
    parts: tuple[ToolPart, ...] = ()
    is_error: bool = False


class ToolContext(Struct, frozen=True, kw_only=True):
    """On whose behalf a call is made.

    ``deadline`` is on the event loop's clock (``loop.time()``): the call has ended by then, whatever it takes; the
    manager cancels it otherwise. ``max_result_bytes`` is the most that may be read as its result. ``agent`` is the
    canonical id of the model the client named (None without an agent), ``agent_name`` the name of the agent that
    calls, which may be one behind a handoff. ``call_id`` differs between calls and stays the same when one is tried
    again: what an idempotency key is made of. ``caller`` is what the caller sent along: its credentials for other
    services, its choice of providers.
    """

    principal: Principal
    request_id: str
    source: ToolSource
    deadline: float
    max_result_bytes: int
    call_id: str
    agent: str | None = None
    agent_name: str | None = None
    run_id: str | None = None
    session_id: str | None = None
    user: str | None = None
    headers: Mapping[str, str] = {}
    caller: CallerContext = NOTHING
    progress: Progress | None = None

    def seconds_left(self) -> float:
        """Return how long it is to the deadline, by the running loop's clock; negative once it is past."""
        return self.deadline - asyncio.get_running_loop().time()

    def seconds_to_work(self) -> float:
        """Return what of that the work itself may take: a second, or a quarter of it, is left to say how it went."""
        left = self.seconds_left()
        return max(left - min(_MARGIN_S, left / 4), 0.05)


class ProviderHealth(Struct, frozen=True, kw_only=True):
    """The last word about a provider. ``detail`` is shown to callers: no secret, no path, no address."""

    status: HealthStatus = "unknown"
    detail: str | None = None
    checked_at: float | None = None


class ToolProvider(Protocol):
    """What one entry of `tools.yaml` becomes: one tool (local, http) or many (mcp, openapi).

    A provider is made by ``open_provider(config, on_change)`` of its kind (see `gateway.tools.providers`) without
    doing any work; it lives from `open` to `aclose`. A refresh makes new providers for the entries that changed,
    swaps the table, and closes the old ones once their last call is done.
    """

    kind: ProviderKind
    entry: str

    async def open(self) -> None:
        """Start; return soon and raise only `ConfigError`. Connecting goes on in tasks that the provider owns."""
        ...

    async def aclose(self) -> None:
        """End everything, within a few seconds, however the other side behaves."""
        ...

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the tools as known now, without asking anybody. Call ``on_change`` when the answer has changed."""
        ...

    async def refresh(self) -> None:
        """Ask the other side for its tools again (`POST /tools/refresh`); failures show in `health`."""
        ...

    async def call(self, tool: ToolSpec, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Run one call and return its result.

        ``arguments`` were validated against ``tool.parameters`` and judged by policy. Many calls run at once; the
        manager bounds their number, their time and the size of what they return, but what a provider reads from a
        network it caps itself at ``context.max_result_bytes``. Cancellation ends the call at the other side, too.
        Raises `ToolUnavailable` where the call never reached the tool, `ToolFailed` where it failed under way, both
        without addresses, keys or stacks in their words.
        """
        ...

    def health(self) -> ProviderHealth:
        """Return the last word about the other side, without asking it."""
        ...


OnChange = Callable[[], None]
"""Called by a provider, on the event loop, when `ToolProvider.list_tools` would answer differently."""
