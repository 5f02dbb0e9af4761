"""An MCP server that an author put on an agent, served by a pool of our own.

Imported with the first agent that has one (`sdk_adapter.mcp_servers`): what judges tools and speaks HTTP takes a tenth
of a second, and most agents have no MCP server.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.request import getproxies

import mcp_types as types
from agents import Agent
from agents.mcp import MCPServerSse, MCPServerStdio, MCPServerStreamableHttp
from mcp import ClientSession

from gateway.errors import ToolError, ToolUnavailable
from gateway.observability.logs import log_event
from gateway.tools.mcp.http import HttpTarget, http_streams
from gateway.tools.mcp.listing import ListedTool
from gateway.tools.mcp.pins import MemoryPins, pin_key
from gateway.tools.mcp.pool import McpPool
from gateway.tools.mcp.session import SessionLimits
from gateway.tools.mcp.stdio import StdioTarget, stdio_streams
from gateway.tools.mcp.wire import Dial, Streams
from sdk_adapter.instrument import filtered_mcp_tools, own_tool_names
from sdk_adapter.own_mcp_servers import unreachable
from sdk_adapter.scope import count_tool_call, current_level

_log = logging.getLogger("gateway.mcp")

_MESSAGE_BYTES = 4 * 1024 * 1024
_LONGEST_CALL_S = 3_600.0


class PooledServer:
    """An SDK server object whose calls go through a pool."""

    def __init__(
        self, server: MCPServerStdio | MCPServerSse | MCPServerStreamableHttp, name: str, agent_id: str
    ) -> None:
        self.name = name
        self.tool_names: tuple[str, ...] = ()
        self._server = server
        self._refreshing: asyncio.Task[None] | None = None
        dial, identity = _dial_of(server)
        self._pool = McpPool(
            self.name,
            key=pin_key(self.name, identity),
            dial=lambda credential: dial,
            limits=SessionLimits(),
            pins=MemoryPins(),
            watcher=self,
            log_fields={"agent_id": agent_id},
        )
        # On the object, not a proxy of it: the SDK reads many more attributes than these two.
        instance: Any = server
        instance.list_tools = self.list_tools
        instance.call_tool = self.call_tool

    @property
    def failure(self) -> str | None:
        """Why it is not connected, or what it withholds."""
        judged = self._pool.judged
        if self._pool.failure is not None:
            return self._pool.failure
        if judged.quarantined:
            names = ", ".join(list(judged.quarantined)[:10])
            return f"tools that changed since the agent was loaded are withheld: {names}"
        if judged.refused:
            return "; ".join(f"{item.name}: {item.why}" for item in judged.refused[:10])
        return judged.problem

    def start(self) -> None:
        """Begin to connect."""
        self._pool.start()

    async def aclose(self) -> None:
        """Disconnect and wait for it."""
        await self._pool.aclose()
        if self._server.session is not None:
            cleanup: Callable[[], Awaitable[None]] = self._server.cleanup
            await cleanup()  # the author connected it as well

    def client_changed(self, client: ClientSession | None) -> None:
        """Lend the session to what the SDK offers besides tools: prompts and resources."""
        self._server.session = client

    async def heard(self, message: Any) -> None:
        """Pass on what the author wanted to hear."""
        if self._server.message_handler is not None:
            await self._server.message_handler(message)

    async def list_tools(self, run_context: Any = None, agent: Any = None) -> list[types.Tool]:
        """List the tools that are offered; anew each time unless the author set ``cache_tools_list``.

        Raises `UpstreamError` naming the server when it cannot be reached.
        """
        try:
            listed_before = self._pool.connected
            offered = await self._pool.offered()
            if listed_before and not self._server.cache_tools_list:
                await self._refresh()
                offered = await self._pool.offered()
        except ToolError as error:
            raise unreachable(self.name) from error
        own = _own_names(agent)
        tools = [_tool(tool) for name, tool in offered.items() if name not in own]
        tools = await filtered_mcp_tools(self._server, tools, run_context, agent)
        self.tool_names = tuple(tool.name for tool in tools)
        return tools

    async def call_tool(
        self, tool_name: str, arguments: dict[str, Any] | None, meta: dict[str, Any] | None = None
    ) -> types.CallToolResult:
        """Call a tool; tried again only where it cannot have reached the server, or as often as the author said."""
        count_tool_call()
        started = time.perf_counter()
        failed = True
        try:
            result = await self._called(tool_name, arguments or {}, meta)
            failed = bool(result.is_error)
            return result
        finally:
            level = current_level()
            if level is not None:
                seconds = time.perf_counter() - started
                level.scope.observe(tool_name, "mcp", self.name, "error" if failed else "success", seconds)

    async def _called(self, tool: str, arguments: dict[str, Any], meta: dict[str, Any] | None) -> types.CallToolResult:
        server = self._server
        failures = 0
        while True:
            try:
                return await self._pool.call(
                    tool, arguments, timeout_s=server.client_session_timeout_seconds or _LONGEST_CALL_S, meta=meta
                )
            except ToolError as error:
                failures += 1
                never = isinstance(error, ToolUnavailable) and error.should_retry is False
                if never or (server.max_retry_attempts != -1 and failures > server.max_retry_attempts):
                    raise
            pause = server.retry_backoff_seconds_base * 2 ** min(failures - 1, 16)
            most = server.retry_backoff_seconds_max
            await asyncio.sleep((pause if most is None else min(pause, most)) * random.uniform(0.9, 1.1))

    async def _refresh(self) -> None:
        """Ask for the tools again; runs that ask meanwhile share the answer."""
        if self._refreshing is None:
            self._refreshing = asyncio.ensure_future(self._pool.refresh())
            self._refreshing.add_done_callback(self._refreshed)
        await asyncio.shield(self._refreshing)

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        if not task.cancelled() and task.exception() is not None:
            log_event(_log, "mcp.server.unlisted", level=logging.WARNING, server=self.name)


def _own_names(agent: Any) -> set[str]:
    """Return the names no server may take: those of the agent's own tools, not of those its client sent."""
    level = current_level()
    sent = level.client_tools if level is not None else frozenset()
    return set(own_tool_names(agent)) - sent if isinstance(agent, Agent) else set()


def _tool(tool: ListedTool) -> types.Tool:
    made = types.Tool.model_validate_json(tool.definition)
    made.description = tool.description
    return made


def _dial_of(server: MCPServerStdio | MCPServerSse | MCPServerStreamableHttp) -> tuple[Dial, tuple[str, ...]]:
    """Return how to connect as the author said, with our transports where nothing of the author's is in them."""
    if isinstance(server, MCPServerStdio):
        params = server.params
        if params.encoding.lower().replace("-", "") == "utf8":
            target = StdioTarget(
                (params.command, *params.args), params.env or {}, str(params.cwd) if params.cwd else None
            )
            return lambda: stdio_streams(target, message_limit=_MESSAGE_BYTES), (target.identity,)
        return lambda: _own_streams(server), ("stdio", params.command, *params.args)
    given: Any = server.params
    kind = "sse" if isinstance(server, MCPServerSse) else "http"
    if given.get("httpx_client_factory") is None and given.get("auth") is None and not getproxies():
        at = HttpTarget(given["url"], "sse" if kind == "sse" else "http", dict(given.get("headers") or {}))
        return lambda: http_streams(at, message_limit=_MESSAGE_BYTES), (at.identity,)
    return lambda: _own_streams(server), (kind, hashlib.sha256(given["url"].encode()).hexdigest())


@asynccontextmanager
async def _own_streams(server: MCPServerStdio | MCPServerSse | MCPServerStreamableHttp) -> AsyncIterator[Streams]:
    async with server.create_streams() as streams:
        yield streams[0], streams[1]
