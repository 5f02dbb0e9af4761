"""The frozen table of tools that a snapshot holds, and what a call of one is made of."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from gateway.caller_context import NOTHING, CallerContext
from gateway.principal import Principal
from gateway.tools.config import AllowedFor, McpTools
from gateway.tools.port import OnChange, Progress, ToolProvider, ToolSource, ToolSpec
from gateway.tools.rights import reaches, why_not

if TYPE_CHECKING:  # they need JSON Schema, which is loaded when there is a tool
    from gateway.tools.judging import ArgumentJudge
    from gateway.tools.schemas import ArgumentSchema

OpenMcp = Callable[[McpTools, OnChange], ToolProvider]
"""Makes the provider of an MCP server."""


class ToolCaller(Struct, frozen=True, kw_only=True):
    """Who calls a tool, and on which way; see `ToolContext`, of which this is the part that callers know.

    ``deadline`` is the run's own, on the event loop's clock; None where there is none.
    """

    principal: Principal
    request_id: str
    source: ToolSource
    agent: str | None = None
    agent_name: str | None = None
    run_id: str | None = None
    session_id: str | None = None
    user: str | None = None
    headers: Mapping[str, str] = {}
    caller: CallerContext = NOTHING
    call_id: str | None = None
    deadline: float | None = None
    progress: Progress | None = None


@dataclass(slots=True, eq=False)
class ProviderLease:
    """A provider and the calls it is at."""

    provider: ToolProvider
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self) -> None:
        """Count one more call."""
        self.running += 1

    def leave(self) -> None:
        """Count one call less."""
        self.running -= 1
        if not self.running:
            self.idle.set()

    async def wait_idle(self) -> None:
        """Return when no call is under way."""
        while self.running:
            self.idle.clear()
            await self.idle.wait()


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """One tool as the gateway offers it. ``problem`` says why it cannot be called now, if so."""

    spec: ToolSpec
    lease: ProviderLease
    description: str
    schema: ArgumentSchema | None
    rules: ArgumentJudge
    problem: str | None
    allowed_for: AllowedFor
    timeout_s: float
    max_concurrency: int
    max_result_bytes: int
    on_denied: Literal["tell_model", "end_run"]
    idempotent: bool
    read_only: bool
    gate: asyncio.Semaphore

    @property
    def name(self) -> str:
        """The name that models and clients call it by."""
        return self.spec.name

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON Schema of its arguments."""
        return self.spec.parameters

    @property
    def digest(self) -> str:
        """The pinned hash of its definition; where nothing is pinned, that of its name, description and schema."""
        if self.spec.digest is not None:
            return self.spec.digest
        definition = (self.spec.name, self.spec.description, self.spec.parameters)
        return hashlib.sha256(msgspec.json.encode(definition, order="deterministic")).hexdigest()

    def is_reached_by(self, principal: Principal) -> bool:
        """Return whether a key may call it directly or through some agent, and so may know of it."""
        return reaches(self.name, self.allowed_for, principal)

    def why_not(self, principal: Principal, agent: str | None, source: ToolSource) -> str | None:
        """Return what stands against a call of it by this caller; None where nothing does."""
        return why_not(self.name, self.allowed_for, principal, agent, source)


class ToolTable:
    """Every tool by name; never changed: a refresh makes a new one."""

    def __init__(self, tools: Mapping[str, Tool] | None = None) -> None:
        self._tools = MappingProxyType(dict(tools or {}))

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools.values())

    def find(self, name: str) -> Tool | None:
        """Return the tool of this name, if there is one."""
        return self._tools.get(name)

    def list_permitted(self, principal: Principal, source: ToolSource, agent: str | None = None) -> list[Tool]:
        """Return the tools that this caller may call and that can be called now, in the order of `tools.yaml`."""
        return [tool for tool in self if tool.problem is None and tool.why_not(principal, agent, source) is None]
