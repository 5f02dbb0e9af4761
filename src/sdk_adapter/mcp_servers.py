"""The MCP servers an author put on an agent: moved onto pools of our own with the load of the agent.

The SDK's server objects stay what the SDK reads (name, filter, approval, error handling …); only their ``list_tools``
and ``call_tool`` are replaced, on the object, by ones over a pool, which connects again, shares a session between
calls, pins the tools and ends what it started.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from agents import Agent
from agents.mcp import MCPServer, MCPServerSse, MCPServerStdio, MCPServerStreamableHttp

from sdk_adapter.instrument import reachable_agents
from sdk_adapter.own_mcp_servers import OwnServer
from sdk_adapter.threads import run_in_thread

_MARK = "__gateway_pool__"
_DEFAULT_NAMES = ("stdio: ", "sse: ", "streamable_http: ")
"""The SDK names a server after its command or address, which callers are not to read."""

_POOLED = "sdk_adapter.pooled_mcp_server"
_POOLED_KINDS = (MCPServerStdio, MCPServerSse, MCPServerStreamableHttp)


class _Held(Protocol):
    """A server as this module keeps it, on the pool or not."""

    @property
    def name(self) -> str: ...

    @property
    def failure(self) -> str | None: ...

    @property
    def tool_names(self) -> tuple[str, ...]: ...

    def start(self) -> None: ...

    async def aclose(self) -> None: ...


class McpServers:
    """The servers of one load of one agent."""

    def __init__(self, servers: Sequence[MCPServer], *, agent_id: str) -> None:
        self._held = [_holder_of(server, agent_id) for server in servers]
        for holder in self._held:
            holder.count += 1

    async def open(self) -> None:
        """Start connecting; return at once. A server that cannot be reached is logged and tried again when needed."""
        for holder in self._held:
            holder.server.start()

    async def aclose(self) -> None:
        """Disconnect the servers that no other load uses, and wait until they are gone."""
        held, self._held = self._held, []
        for holder in held:
            holder.count -= 1
        await asyncio.gather(*(holder.server.aclose() for holder in held if holder.count == 0))

    def failures(self) -> dict[str, str]:
        """Return why servers are not connected, or withhold tools, by name."""
        found = ((holder.server.name, holder.server.failure) for holder in self._held)
        return {name: failure for name, failure in found if failure is not None}


async def load_pool(agent: Agent[Any]) -> None:
    """Import what the agent's servers need, in a thread; without, the first `McpServers` with any does it itself."""
    if any(isinstance(server, _POOLED_KINDS) for reached in reachable_agents(agent) for server in reached.mcp_servers):
        await run_in_thread(lambda: importlib.import_module(_POOLED), name="import of the MCP client")


def known_tool_names(agent: Agent[Any]) -> set[str]:
    """Return the names of the agent's MCP tools as of their latest listing."""
    holders = (getattr(server, _MARK, None) for server in agent.mcp_servers)
    return {name for holder in holders if holder is not None for name in holder.server.tool_names}


def shown_name(server: MCPServer) -> str:
    """Return the name an author gave the server, or only its kind."""
    kind = next((prefix for prefix in _DEFAULT_NAMES if server.name.startswith(prefix)), None)
    return kind.removesuffix(": ") if kind else server.name


class _Holder:
    """One server, and how many loads use it: agents of one module may share a server."""

    def __init__(self, server: _Held) -> None:
        self.server = server
        self.count = 0


def _holder_of(server: MCPServer, agent_id: str) -> _Holder:
    found: _Holder | None = getattr(server, _MARK, None)
    if found is None:
        is_pooled = isinstance(server, _POOLED_KINDS)
        kind: Any = importlib.import_module(_POOLED).PooledServer if is_pooled else OwnServer
        found = _Holder(kind(server, shown_name(server), agent_id))
        setattr(server, _MARK, found)
    return found
