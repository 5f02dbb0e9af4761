"""The pool of one MCP server: its sessions, one per credential, and which of its tools are offered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mcp_types as types

from gateway.errors import ConfigError, StoreUnavailable, ToolFailed, ToolTimedOut, ToolUnavailable
from gateway.observability.logs import log_event
from gateway.tools.mcp.listing import ListedTool, RefusedTool, read_listing
from gateway.tools.mcp.pins import Pin, Pinning, PinStore, Quarantine, accepted, judge
from gateway.tools.mcp.session import Listing, McpSession, SessionLimits, SessionWatcher
from gateway.tools.mcp.wire import Dial
from gateway.tools.port import Progress
from gateway.tools.schemas import ResultSchema

_log = logging.getLogger("gateway.mcp")

Credential = tuple[tuple[str, str], ...]
"""Headers that one caller's calls carry besides the server's own, sorted; empty for the server's own alone."""

_MOST_SESSIONS = 200
_IDLE_S = 300.0


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known of a server's tools. ``problem`` says why tools are missing that belong to no single one."""

    offered: Mapping[str, ListedTool] = field(default_factory=dict)
    quarantined: Mapping[str, Quarantine] = field(default_factory=dict)
    refused: Sequence[RefusedTool] = ()
    problem: str | None = None


@dataclass(slots=True)
class _Member:
    session: McpSession
    tools: Mapping[str, ListedTool] = field(default_factory=dict)


class McpPool:
    """Sessions with one server. `start` connects with the server's own credential; `aclose` ends everything.

    ``key`` names the server's pins. ``dial`` makes the transport of a credential.
    """

    def __init__(
        self,
        name: str,
        *,
        key: str,
        dial: Callable[[Credential], Dial],
        limits: SessionLimits,
        pins: PinStore,
        pinning: Pinning = "first_use",
        on_change: Callable[[], None] = lambda: None,
        watcher: SessionWatcher | None = None,
        log_fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.judged = Judged()
        self._key = key
        self._dial = dial
        self._limits = limits
        self._pins = pins
        self._pinning = pinning
        self._on_change = on_change
        self._watcher = watcher
        self._log_fields = dict(log_fields or {})
        self._known: Mapping[str, Pin] = {}
        self._judging = asyncio.Lock()
        self._members: dict[Credential, _Member] = {}
        self._results: dict[str, ResultSchema | None] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        _quiet()

    @property
    def failure(self) -> str | None:
        """Why the server's own session is not connected, as shown to callers."""
        member = self._members.get(())
        return member.session.failure if member else None

    @property
    def connected(self) -> bool:
        """Whether any session is connected."""
        return any(member.session.connected for member in self._members.values())

    def start(self) -> None:
        """Connect with the server's own credential, in the background."""
        self._member(()).session.start()

    async def aclose(self) -> None:
        """Close every session, and wait for it."""
        members, self._members = list(self._members.values()), {}
        await asyncio.gather(*(member.session.aclose() for member in members), *self._leaving)

    async def offered(self, credential: Credential = ()) -> dict[str, ListedTool]:
        """Return the tools offered to a credential, connecting first if need be; raise `ToolUnavailable`."""
        member = self._member(credential)
        await member.session.wait_listed()
        return {
            name: tool
            for name, tool in self.judged.offered.items()
            if name in member.tools and member.tools[name].digest == tool.digest
        }

    async def refresh(self) -> None:
        """Ask the server for its tools again; raise `ToolError`."""
        await self._member(()).session.refresh()

    async def call(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        credential: Credential = (),
        timeout_s: float,
        progress: Progress | None = None,
        repeatable: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> types.CallToolResult:
        """Call a tool that is offered; see `McpSession.call`. Raises `ToolUnavailable` for one that is not."""
        member = self._member(credential)
        ends = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(ends):
                offered = await self.offered(credential)
        except TimeoutError as error:
            raise ToolTimedOut(f"The MCP server '{self.name}' did not answer within {timeout_s:g} s.") from error
        if tool not in offered:
            raise self._not_offered(tool)
        result = await member.session.call(
            tool,
            arguments,
            timeout_s=ends - asyncio.get_running_loop().time(),
            progress=progress,
            repeatable=repeatable,
            meta=meta,
        )
        self._check(offered[tool], result)
        return result

    async def approve(
        self, names: Sequence[str] | None, *, by: str, digests: Mapping[str, str] | None = None
    ) -> list[str]:
        """Accept quarantined tools as they are listed now (None: all of them), and return their names.

        A tool whose hash is another than ``digests`` has for it is left out. Raises `StoreUnavailable`.
        """
        async with self._judging:
            waiting = self.judged.quarantined
            seen = digests or {}
            chosen = [
                item.tool
                for name, item in waiting.items()
                if (names is None or name in names) and seen.get(name, item.tool.digest) == item.tool.digest
            ]
            await self._pins.save(self._key, accepted(chosen, by))
            await self._judge()
        for tool in chosen:
            log_event(_log, "mcp.tool.approved", server=self.name, tool_name=tool.name, key_id=by, **self._log_fields)
        return [tool.name for tool in chosen]

    def pinned(self, tool: str) -> Pin | None:
        """Return the accepted definition of a tool."""
        return self._known.get(tool)

    def _check(self, tool: ListedTool, result: types.CallToolResult) -> None:
        """Raise `ToolFailed` for a result that is not what the tool's accepted definition says."""
        if tool.output_schema is None or result.is_error:
            return
        if tool.digest not in self._results:
            if len(self._results) > self._limits.max_tools:
                self._results.clear()
            self._results[tool.digest] = _result_schema(tool.output_schema)
        schema = self._results[tool.digest]
        if schema is None:
            return
        problem = "result: is missing"
        if result.structured_content is not None or "structured_content" in result.model_fields_set:
            problem = schema.find_mismatch(result.structured_content) or ""
        if problem:
            raise ToolFailed(
                f"The tool '{tool.name}' of the MCP server '{self.name}' did not keep to its own output schema: "
                f"{problem}."
            )

    def _not_offered(self, tool: str) -> ToolUnavailable:
        waiting = self.judged.quarantined.get(tool)
        if waiting is not None:
            return ToolUnavailable(
                f"The tool '{tool}' of the MCP server '{self.name}' is {_words(waiting)} and waits for an admin's "
                f"approval: POST /tools/mcp/{self.name}/approve.",
                code="tool_quarantined",
                should_retry=False,
            )
        return ToolUnavailable(f"The MCP server '{self.name}' offers no tool '{tool[:64]}' now.", should_retry=False)

    def _member(self, credential: Credential) -> _Member:
        member = self._members.get(credential)
        if member is None:
            self._make_room()
            member = self._members[credential] = self._new_member(credential)
        return member

    def _new_member(self, credential: Credential) -> _Member:
        limits = self._limits if not credential else replace(self._limits, idle_s=_IDLE_S)

        async def take(listing: Listing) -> None:
            await self._take(member, listing)

        session = McpSession(
            self.name,
            self._dial(credential),
            limits,
            on_listing=take,
            watcher=None if credential else self._watcher,
            log_fields=self._log_fields,
        )
        member = _Member(session)
        return member

    def _make_room(self) -> None:
        """Forget credentials nobody used for long; refuse a new one where all are in use."""
        now = asyncio.get_running_loop().time()
        for credential, member in list(self._members.items()):
            if credential and not member.session.connected and now - member.session.last_used > _IDLE_S:
                self._members.pop(credential)
                task = asyncio.ensure_future(member.session.aclose())
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        if len(self._members) > _MOST_SESSIONS:
            raise ToolUnavailable(
                f"The MCP server '{self.name}' is used with {_MOST_SESSIONS} credentials at this moment; try again "
                "later.",
                retry_after_s=30,
            )

    async def _take(self, member: _Member, listing: Listing) -> None:
        listed, refused = read_listing(listing.tools)
        async with self._judging:
            member.tools = {tool.name: tool for tool in listed}
            before = self.judged
            problem = (
                f"it lists more than {self._limits.max_tools} tools, and the rest is left out"
                if listing.overflowed
                else None
            )
            try:
                if self._pinning == "first_use" and listed:
                    await self._pins.save(self._key, accepted(listed, "first use"), only_first=True)
                await self._judge(refused=refused, problem=problem)
            except StoreUnavailable:
                if not self._known:
                    self.judged = Judged(problem="the gateway's database, where accepted tools are kept, is down")
        self._report(before)

    async def _judge(self, *, refused: Sequence[RefusedTool] | None = None, problem: str | None = None) -> None:
        self._known = await self._pins.load(self._key)
        latest: dict[str, ListedTool] = {}
        for credential in sorted(self._members, reverse=True):  # what the server's own credential sees counts most
            latest.update(self._members[credential].tools)
        offered, waiting = judge(list(latest.values()), self._known)
        before = self.judged
        self.judged = Judged(
            {tool.name: tool for tool in offered},
            {item.tool.name: item for item in waiting},
            before.refused if refused is None else refused,
            before.problem if refused is None else problem,
        )
        if self.judged != before:
            self._on_change()

    def _report(self, before: Judged) -> None:
        for name, item in self.judged.quarantined.items():
            if before.quarantined.get(name) != item:
                log_event(
                    _log,
                    "mcp.tool.quarantined",
                    level=logging.WARNING,
                    server=self.name,
                    tool_name=name,
                    reason=item.why,
                    **self._log_fields,
                )
        if self.judged.refused and self.judged.refused != before.refused:
            log_event(
                _log,
                "mcp.tools.refused",
                level=logging.WARNING,
                server=self.name,
                tools={item.name: item.why for item in self.judged.refused[:20]},
                **self._log_fields,
            )


def _result_schema(schema: Mapping[str, Any]) -> ResultSchema | None:
    """Return a schema that can be held to, if this is one: what the server says of results binds nobody but itself."""
    try:
        return ResultSchema(schema)
    except ConfigError:
        return None


def _words(item: Quarantine) -> str:
    return "new" if item.why == "new" else "not the one that was accepted: its description or schema changed"


def _quiet() -> None:
    """`mcp` logs what it cannot parse, which may be anybody's data."""
    for name in ("mcp", "client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
