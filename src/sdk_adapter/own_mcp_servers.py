"""MCP servers that are classes of the author's own: connected with the load of the agent, closed after its last run.

There is no transport that a pool could use, so the object itself is kept: one task owns ``connect`` and ``cleanup``
(some transports insist on one task for both), and the object's ``list_tools`` and ``call_tool`` are replaced, on the
object, by ones that wait for that task and ask it for a new connection when the old one is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

from agents import UserError
from agents.mcp import MCPServer

from gateway.errors import UpstreamError
from gateway.observability.logs import log_event
from sdk_adapter.scope import count_tool_call, current_level

_log = logging.getLogger("gateway.mcp")

_CONNECT_S = 30.0
_CLOSE_S = 10.0
_NEVER_SENT = ("HTTP error 404", "Connection lost", "Session terminated", "Session not found")
"""The SDK's words for a call that did not reach the server: a refused connection, a session it no longer knows."""


class OwnServer:
    """Owns one server's connection. ``failure`` is why there is none, as shown to callers."""

    def __init__(self, server: MCPServer, name: str, agent_id: str) -> None:
        self.name = name
        self.failure: str | None = None
        self.tool_names: tuple[str, ...] = ()
        self._server = server
        self._agent_id = agent_id
        self._list: Callable[..., Awaitable[list[Any]]] = server.list_tools
        self._call: Callable[..., Awaitable[Any]] = server.call_tool
        self._connection = 0
        self._ready: asyncio.Future[None] | None = None
        self._broken: asyncio.Event | None = None
        self._owner: asyncio.Task[None] | None = None
        # On the object, not a proxy of it: the SDK reads many more attributes than these two.
        instance: Any = server
        instance.list_tools = self.list_tools
        instance.call_tool = self.call_tool

    def start(self) -> None:
        """Begin to connect, unless connected or at it."""
        if self._owner is not None and not self._owner.done():
            return
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_look_at)
        self._broken = asyncio.Event()
        # An empty context: the task outlives the run that may have started it.
        self._owner = asyncio.get_running_loop().create_task(
            self._own(self._ready, self._broken), name=f"mcp:{self.name}", context=Context()
        )

    async def aclose(self) -> None:
        """Disconnect and wait for it."""
        owner = self._owner
        if owner is None:
            return
        if self._broken is not None:
            self._broken.set()
        if self._ready is not None and not self._ready.done():
            owner.cancel()
        await asyncio.wait((owner,), timeout=_CLOSE_S + 1)

    async def list_tools(self, run_context: Any = None, agent: Any = None) -> list[Any]:
        """List the server's tools, over a new connection if the old one is dead.

        Raises `UpstreamError` naming the server when it cannot be reached.
        """
        connection = await self._connected()
        try:
            tools = await _unless_dead(self._list(run_context, agent))
        except Exception:  # noqa: BLE001 -- whatever it was, a new connection is the remedy; it fails again or not
            await self._disconnected(connection)
            await self._connected()
            try:
                tools = await _unless_dead(self._list(run_context, agent))
            except Exception as error:
                raise unreachable(self.name) from error
        listed: list[Any] = list(tools)
        self.tool_names = tuple(tool.name for tool in listed)
        return listed

    async def call_tool(self, tool_name: str, arguments: dict[str, Any] | None, meta: Any = None) -> Any:
        """Call a tool; a failed call is repeated only when it cannot have reached the server."""
        count_tool_call()
        started = time.perf_counter()
        failed = True
        try:
            result = await self._called(tool_name, arguments, {} if meta is None else {"meta": meta})
            failed = bool(getattr(result, "isError", False) or getattr(result, "is_error", False))
            return result
        finally:
            level = current_level()
            if level is not None:
                seconds = time.perf_counter() - started
                level.scope.observe(tool_name, "mcp", self.name, "error" if failed else "success", seconds)

    async def _called(self, tool_name: str, arguments: dict[str, Any] | None, meta: dict[str, Any]) -> Any:
        connection = await self._connected()
        try:
            return await _unless_dead(self._call(tool_name, arguments, **meta))
        except Exception as error:
            if not await self._is_dead():
                raise
            await self._disconnected(connection)
            if not any(words in str(error) for words in _NEVER_SENT):
                raise
        await self._connected()
        return await _unless_dead(self._call(tool_name, arguments, **meta))

    async def _is_dead(self) -> bool:
        """Ask the server for its tools, past the SDK's cache."""
        session = getattr(self._server, "session", None)
        if session is None:
            return hasattr(self._server, "session")
        try:
            async with asyncio.timeout(_CLOSE_S):
                await _unless_dead(session.list_tools())
        except Exception:  # noqa: BLE001 -- a transport's errors have no common class
            return True
        return False

    async def _connected(self) -> int:
        self.start()
        assert self._ready is not None
        try:
            await asyncio.shield(self._ready)
        except asyncio.CancelledError as error:
            if not self._ready.cancelled():
                raise
            raise unreachable(self.name) from error
        except Exception as error:
            raise unreachable(self.name) from error
        return self._connection

    async def _disconnected(self, connection: int) -> None:
        """Put the dead connection away, unless somebody else has already."""
        if connection == self._connection and self._broken is not None and self._owner is not None:
            self._broken.set()
            await asyncio.wait((self._owner,), timeout=_CLOSE_S)

    async def _own(self, ready: asyncio.Future[None], broken: asyncio.Event) -> None:
        server: Any = self._server
        try:
            if getattr(server, "session", None) is None:
                async with asyncio.timeout(_CONNECT_S):
                    await _unless_dead(server.connect())
        except BaseException as error:
            await self._clean_up()
            cancelled = isinstance(error, asyncio.CancelledError)
            if not ready.done():
                if cancelled:
                    ready.cancel()
                else:
                    ready.set_exception(error)
            if cancelled:
                raise
            self.failure = f"{type(error).__name__}: it cannot be connected"
            log_event(
                _log,
                "mcp.server.unreachable",
                level=logging.WARNING,
                server=self.name,
                agent_id=self._agent_id,
                exc_info=error,
            )
            if not isinstance(error, Exception):
                raise
            return
        self._connection += 1
        self.failure = None
        log_event(_log, "mcp.server.connected", server=self.name, agent_id=self._agent_id)
        ready.set_result(None)
        try:
            await broken.wait()
        finally:
            await self._clean_up()

    async def _clean_up(self) -> None:
        server: Any = self._server
        try:
            async with asyncio.timeout(_CLOSE_S):
                await server.cleanup()
        except Exception as error:  # noqa: BLE001 -- a border: the author's server object
            log_event(
                _log, "mcp.server.close_failed", level=logging.WARNING, server=self.name, error=type(error).__name__
            )


def unreachable(name: str) -> UpstreamError:
    """Return what a run is told whose server cannot be reached."""
    return UpstreamError(
        f"The agent's MCP server '{name}' cannot be reached, and the agent does not run without its tools. Whoever "
        "runs the gateway finds the reason in its log.",
        code="mcp_server_unreachable",
    )


async def _unless_dead(call: Awaitable[Any]) -> Any:
    """Await a call of the MCP client; its CancelledError on a dead session is an error, not our cancellation."""
    try:
        return await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise UserError("The MCP session was closed. Connection lost.") from error


def _look_at(future: asyncio.Future[None]) -> None:
    """Take note of a failure that no run waits for: it is logged where it happens."""
    with suppress(asyncio.CancelledError):
        future.exception()
