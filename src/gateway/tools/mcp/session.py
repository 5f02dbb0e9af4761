"""One session with one MCP server and one credential, kept up by one task: connect, list, reconnect, close.

The task owns the client from first to last (its transports insist on that); calls of any other task are multiplexed
on it. A session that ended is made again at the next demand, sooner than later at first, then after a growing, jittered
pause in which calls are refused at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import mcp_types as types
from mcp import Client, ClientSession, MCPError
from mcp.shared.dispatcher import ProgressFnT
from pydantic import TypeAdapter

from gateway.errors import ToolDenied, ToolError, ToolFailed, ToolResultTooLarge, ToolTimedOut, ToolUnavailable
from gateway.observability.logs import log_event
from gateway.tools.mcp.watched import Watched
from gateway.tools.mcp.wire import GATEWAY_ERROR, Dial
from gateway.tools.port import Progress

_log = logging.getLogger("gateway.mcp")
_T = TypeVar("_T")

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 30.0
_CIRCUIT_OPENS_AFTER = 3
_SHORTEST_REFUSAL_S = 0.5
_LIVED_S = 10.0
"""A session that ended sooner than this counts as a failure to connect."""

_DEMAND_S = 300.0
"""A server nobody has asked for so long is not tried again until somebody does."""

_TIMEOUTS_IN_A_ROW = 3
_CLOSE_S = 8.0
_CLOSED = -32_000
_TIMED_OUT = -32_001
_CLIENT = types.Implementation(name="agent-gateway", version="1")

_WHY = {
    "not_sent": "it cannot be reached",
    "lost": "the connection broke",
    "auth": "it refuses the credential",
    "redirect": "it sends its callers elsewhere, where they do not go",
    "malformed": "its answer makes no sense",
    "status": "it answers with an HTTP error",
    "private": "its address lies inside a private network, and network.allow_private does not list it",
    "session": "it has forgotten the session",
    "too_large": "its answer is larger than allowed",
}


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Deadlines in seconds, and how many tools a server may list.

    ``idle_s`` closes a session nobody uses; None keeps it. ``relist_pause_s`` is the least time between two lists that
    the server itself asks for: one that says "changed" after each would be listed without end.
    """

    connect_s: float = 30.0
    list_s: float = 30.0
    max_tools: int = 200
    relist_s: float = 300.0
    relist_pause_s: float = 1.0
    idle_s: float | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a server listed; ``overflowed`` when it had more tools than it may, or more pages than tools."""

    tools: tuple[types.Tool, ...]
    overflowed: bool = False


class SessionWatcher(Protocol):
    """Is told of a session's client as it comes and goes, and of what the server says unasked."""

    def client_changed(self, client: ClientSession | None) -> None:
        """Take note of the client; None while there is none."""
        ...

    async def heard(self, message: Any) -> None:
        """Take a notification of the server, or an error of its transport."""
        ...


class McpSession:
    """Call `start` or `call`; `aclose` ends it. ``failure`` is why there is no connection, as shown to callers."""

    def __init__(
        self,
        name: str,
        dial: Dial,
        limits: SessionLimits,
        *,
        on_listing: Callable[[Listing], Awaitable[None]] | None = None,
        watcher: SessionWatcher | None = None,
        log_fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.failure: str | None = None
        self.listing: Listing | None = None
        self._dial = dial
        self._limits = limits
        self._on_listing = on_listing
        self._watcher = watcher
        self._log_fields = dict(log_fields or {})
        self._client: Client | None = None
        self._broken = asyncio.Event()
        self._relist = asyncio.Event()
        self._wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._refused_until = 0.0
        self._failures = 0
        self._last_used = 0.0
        self._in_flight = 0
        self._timeouts = 0
        self._closed = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether calls go out at once."""
        return self._client is not None and not self._broken.is_set()

    @property
    def last_used(self) -> float:
        """When it was last asked for, on the loop's clock; now, while a call is under way."""
        return asyncio.get_running_loop().time() if self._in_flight else self._last_used

    def start(self) -> None:
        """Connect in the background, unless connected or at it."""
        self._last_used = asyncio.get_running_loop().time()
        self._wanted.set()
        if self._owner is None and not self._closed.is_set():
            # An empty context: the task outlives the run that may have started it.
            self._owner = asyncio.get_running_loop().create_task(
                self._supervise(), name=f"mcp:{self.name}", context=Context()
            )

    async def aclose(self) -> None:
        """Disconnect and wait until it is done, a bounded time; a call still under way fails."""
        self._closed.set()
        owner, self._owner = self._owner, None
        self._notify()
        if owner is None:
            return
        connected = self.connected
        self._broken.set()
        self._wanted.set()
        if not connected:
            owner.cancel()
        done, _ = await asyncio.wait((owner,), timeout=_CLOSE_S)
        if not done:
            owner.cancel()
            await asyncio.wait((owner,), timeout=_CLOSE_S)

    async def wait_listed(self) -> Listing:
        """Return the tools as of the connection there is, connecting first if need be; raise `ToolUnavailable`."""
        await self._ready()
        assert self.listing is not None
        return self.listing

    async def refresh(self) -> Listing:
        """Ask the server for its tools now, and return them; raise `ToolError`."""
        for last in (False, True):
            client = await self._ready()
            try:
                async with asyncio.timeout(self._limits.list_s):
                    await self._list(client)
                break
            except Exception as error:
                if _reason(error) in ("session", "closed"):
                    self._lost(client)
                if last or _reason(error) not in ("session", "closed", "not_sent"):
                    raise self._explained(error, sent=False) from error
        assert self.listing is not None
        return self.listing

    async def call(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        progress: Progress | None = None,
        repeatable: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> types.CallToolResult:
        """Call a tool once; again over a new connection only if the first call cannot have reached it, or may repeat.

        Cancelling the caller cancels the call at the server. Raises `ToolUnavailable` (it never reached the tool),
        `ToolTimedOut`, `ToolResultTooLarge`, `ToolFailed`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                for last in (False, True):
                    client = await self._ready()
                    self._in_flight += 1
                    try:
                        result = await _unless_dead(
                            client.session.send_request(
                                _request(tool, arguments, meta),
                                _RESULT,
                                progress_callback=cast("ProgressFnT | None", progress),
                            )
                        )
                        self._timeouts = 0
                        if isinstance(result, types.InputRequiredResult):
                            raise ToolFailed(
                                f"The tool '{tool}' of the MCP server '{self.name}' asks back for something, and "
                                "nobody here could answer."
                            )
                        return result
                    except Exception as error:
                        reason = _reason(error)
                        if reason in ("session", "closed"):
                            self._lost(client)
                        unsent = reason in ("session", "not_sent")
                        again = unsent or (repeatable and reason in ("closed", "lost"))
                        if last or not again:
                            raise self._explained(error, sent=not unsent) from error
                    finally:
                        self._in_flight -= 1
                        self._last_used = asyncio.get_running_loop().time()
        except TimeoutError as error:
            self._count_timeout()
            raise ToolTimedOut(
                f"The tool '{tool}' of the MCP server '{self.name}' took longer than {timeout_s:g} s."
            ) from error
        raise AssertionError("unreachable")

    def _count_timeout(self) -> None:
        """A server that answers nothing for several calls in a row gets a new connection: it may be a new process."""
        self._timeouts += 1
        if self._timeouts >= _TIMEOUTS_IN_A_ROW and self._client is not None:
            self._timeouts = 0
            self.failure = "it does not answer"
            self._lost(self._client)

    async def _ready(self) -> Client:
        while True:
            if self._closed.is_set():
                raise ToolUnavailable(f"The MCP server '{self.name}' was closed; send the request again.")
            if self._client is not None and not self._broken.is_set():
                return self._client
            wait = self._refused_until - asyncio.get_running_loop().time()
            if wait > 0:
                raise self._unreachable(wait)
            self.start()
            await self._changed.wait()

    def _unreachable(self, wait_s: float | None = None) -> ToolUnavailable:
        again = f" It is tried again in {max(wait_s, 1):.0f} s." if wait_s is not None else ""
        return ToolUnavailable(
            f"The MCP server '{self.name}' is not available: {self.failure or 'it cannot be reached'}.{again} Whoever "
            "runs the gateway finds the reason in its log.",
            code="mcp_server_unreachable",
            retry_after_s=wait_s,
        )

    def _lost(self, client: Client) -> None:
        """Put a dead connection away, unless somebody else has already."""
        if client is self._client:
            self._broken.set()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._closed.is_set():
            self._wanted.clear()
            began = started = loop.time()
            idle = False
            connected = False
            try:
                async with self._connection() as client:
                    began, connected = loop.time(), True
                    idle = await self._keep(client)
                if not idle and not self._closed.is_set():
                    self._note(ConnectionError(), connected=True)
            except Exception as error:  # noqa: BLE001 - a border: transports raise what they like
                self._note(error, connected=connected)
            finally:
                self._client = None
                if self._watcher is not None:
                    self._watcher.client_changed(None)
            if self._closed.is_set():
                return
            if idle or (connected and loop.time() - began >= _LIVED_S):
                self._failures = 0
            else:
                self._failures += 1
            await self._pause(idle=idle, took_s=began - started if connected else loop.time() - started)

    async def _pause(self, *, idle: bool, took_s: float) -> None:
        """Wait before the next attempt; refuse calls meanwhile once there have been several failures.

        A call that comes later wakes it: at once where an attempt is quick, after as long as the last one took where
        it hangs.
        """
        loop = asyncio.get_running_loop()
        pause = min(_FIRST_PAUSE_S * 2 ** max(self._failures - 1, 0), _LONGEST_PAUSE_S) if self._failures else 0.0
        pause *= random.uniform(0.5, 1.5)  # many gateways do not come back at one moment
        refusing = min(pause, max(took_s, _SHORTEST_REFUSAL_S)) if self._failures >= _CIRCUIT_OPENS_AFTER else 0.0
        self._refused_until = loop.time() + refusing
        self._notify()
        await asyncio.sleep(refusing or pause)
        forgotten = idle or loop.time() - self._last_used > _DEMAND_S
        with suppress(TimeoutError):
            async with asyncio.timeout(None if forgotten else pause - (refusing or pause)):
                await self._wanted.wait()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Client]:
        """Connect, list, publish; raise whatever the transport or `mcp` raises."""
        self._broken = asyncio.Event()
        broken = self._broken
        watched = Watched(self._dial(), broken.set, max_tools=self._limits.max_tools)
        client = Client(watched, cache=None, client_info=_CLIENT, message_handler=self._heard)
        deadline = asyncio.timeout(self._limits.connect_s)
        async with deadline, client:
            watched.revision = client.session.protocol_version
            await self._list(client)
            deadline.reschedule(None)
            self._client = client
            if self._watcher is not None:
                self._watcher.client_changed(client.session)
            self._refused_until, self.failure, self._timeouts = 0.0, None, 0
            self._notify()
            log_event(_log, "mcp.server.connected", server=self.name, **self._log_fields)
            yield client

    async def _keep(self, client: Client) -> bool:
        """Wait for the end of the connection, listing now and then; return whether it ended for want of work."""
        loop = asyncio.get_running_loop()
        listed = loop.time()
        broken = asyncio.ensure_future(self._broken.wait())
        relist = asyncio.ensure_future(self._relist.wait())
        try:
            while True:
                until = listed + (self._limits.relist_pause_s if relist.done() else self._limits.relist_s)
                if self._limits.idle_s is not None:
                    until = min(until, self.last_used + self._limits.idle_s)
                waits = (broken,) if relist.done() else (broken, relist)
                await asyncio.wait(waits, timeout=max(until - loop.time(), 0.05), return_when=asyncio.FIRST_COMPLETED)
                if broken.done():
                    return False
                if self._limits.idle_s is not None and loop.time() - self.last_used >= self._limits.idle_s:
                    self._broken.set()
                    return True
                pause = self._limits.relist_pause_s if relist.done() else self._limits.relist_s
                if loop.time() - listed >= pause:
                    self._relist.clear()
                    relist = asyncio.ensure_future(self._relist.wait())
                    async with asyncio.timeout(self._limits.list_s):
                        await self._list(client)
                    listed = loop.time()
        finally:
            broken.cancel()
            relist.cancel()

    async def _list(self, client: Client) -> None:
        tools: list[types.Tool] = []
        cursor: str | None = None
        most = self._limits.max_tools
        for _ in range(most + 1):  # a page of one tool is a page, too; empty ones need not go on for ever
            page = await _unless_dead(
                client.session.list_tools(params=types.PaginatedRequestParams(cursor=cursor) if cursor else None)
            )
            tools += page.tools[: most + 1 - len(tools)]
            cursor = page.next_cursor
            if cursor is None or len(tools) > most:
                break
        self.listing = Listing(tuple(tools[:most]), overflowed=len(tools) > most or cursor is not None)
        if self._on_listing is not None:
            await self._on_listing(self.listing)

    async def _heard(self, message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self._relist.set()
        if self._watcher is not None:
            await self._watcher.heard(message)

    def _note(self, error: Exception, *, connected: bool) -> None:
        reason = _reason(error)
        kept = self.failure if connected else None
        self.failure = (
            kept
            or _WHY.get(reason)
            or (
                f"it did not answer within {self._limits.connect_s:g} s"
                if isinstance(error, TimeoutError)
                else ("the connection broke" if connected else _not_started(_root(error)))
            )
        )
        # Not the error itself: the words of a library, or of the server, may hold what it was sent.
        log_event(
            _log,
            "mcp.server.lost" if connected else "mcp.server.unreachable",
            level=logging.WARNING,
            server=self.name,
            reason=self.failure,
            error=type(_root(error)).__name__,
            failures=self._failures + 1,
            **self._log_fields,
        )

    def _explained(self, error: Exception, *, sent: bool) -> ToolError:
        if isinstance(error, ToolError):
            return error
        reason = _reason(error)
        if not sent or reason in ("auth", "private"):
            self.failure = _WHY.get(reason, self.failure)
            return self._unreachable()
        if reason == "too_large":
            return ToolResultTooLarge(f"The MCP server '{self.name}' sent a result larger than it may.")
        if isinstance(error, MCPError) and reason == "":
            # The server's own refusal: the words are for whoever made the call.
            return ToolFailed(f"The MCP server '{self.name}' refused the call: {error.message[:500]}")
        why = {"closed": "the connection ended before the answer"}.get(reason) or _WHY.get(reason)
        return ToolFailed(f"The call of the MCP server '{self.name}' failed: {why or _WHY['malformed']}.")


def _reason(error: BaseException) -> str:
    """Name what went wrong below JSON-RPC; empty for the server's own error and for anything unknown."""
    error = _root(error)
    if isinstance(error, ToolDenied):
        return "private"
    if isinstance(error, MCPError):
        data = error.error.data
        if error.code == GATEWAY_ERROR and isinstance(data, dict):
            return str(data.get("gateway", ""))
        if error.code == _CLOSED and error.message in _CLOSED_WORDS:
            return "closed"
        if error.message.startswith(_PARSE_WORDS):
            return "too_large" if error.message.endswith("too large") else "malformed"
        return ""
    if isinstance(error, (ValueError, RuntimeError)):
        return "malformed"
    return "" if isinstance(error, TimeoutError) else "closed"


_CLOSED_WORDS = ("Connection closed", "SSE stream ended without a response", "SSE stream failed: lost")
_PARSE_WORDS = ("Failed to parse JSON response", "Failed to parse SSE message", "SSE stream failed")
"""What `mcp` says in the server's place; a contract test holds them."""


def _not_started(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "its command, or the folder to run it in, is not found"
    if isinstance(error, PermissionError):
        return "its command may not be run by the user of the gateway"
    return f"it cannot be connected ({type(error).__name__})"


def _root(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error


_RESULT: TypeAdapter[types.CallToolResult | types.InputRequiredResult] = TypeAdapter(
    types.CallToolResult | types.InputRequiredResult
)


def _request(tool: str, arguments: Mapping[str, Any], meta: Mapping[str, Any] | None) -> types.CallToolRequest:
    """Return the call as `ClientSession.call_tool` makes it.

    That method itself checks the result against the server's own schema, without bounds: a schema of forty `allOf`
    would hold the process. The pool checks it within bounds.
    """
    given: Any = dict(meta) if meta else None
    return types.CallToolRequest(params=types.CallToolRequestParams(name=tool, arguments=dict(arguments), _meta=given))


async def _unless_dead(call: Awaitable[_T]) -> _T:
    """Await a call of the client; its CancelledError on a dead session is an error, not our cancellation."""
    try:
        return await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the session was closed") from error
