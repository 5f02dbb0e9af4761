"""The MCP servers an author put on an agent: connected with the load of the agent, closed with it."""

from __future__ import annotations

from collections.abc import Sequence

from agents import Agent
from agents.mcp import MCPServer

from sdk_adapter.instrument import Observe


class McpServers:
    """Owns the servers of one load of one agent."""

    def __init__(self, servers: Sequence[MCPServer], *, agent_id: str, observe: Observe) -> None:
        self._servers = tuple(servers)
        self._agent_id = agent_id
        self._observe = observe

    async def open(self) -> None:
        """Connect."""
        for server in self._servers:
            await server.connect()

    async def aclose(self) -> None:
        """Disconnect."""
        for server in self._servers:
            await server.cleanup()

    def tool_names(self, agent: Agent[object]) -> list[str]:
        """Return the names of the agent's MCP tools, as far as they are known."""
        return [tool.name for server in agent.mcp_servers for tool in server.cached_tools or []]
