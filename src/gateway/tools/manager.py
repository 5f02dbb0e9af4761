"""ToolManager: the one way to a tool, whoever calls it; owns the providers, and swaps the table when they change."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec

from gateway.config import Settings
from gateway.errors import (
    ConfigError,
    GatewayError,
    InvalidToolArguments,
    ToolDenied,
    ToolError,
    ToolFailed,
    ToolNotFound,
    ToolResultTooLarge,
    ToolTimedOut,
    ToolUnavailable,
)
from gateway.observability.logs import bind_tool, log_event
from gateway.observability.metrics import Metrics
from gateway.tools.config import AnyTool, Registration, ToolsConfig, load_tools
from gateway.tools.lending import find_missing
from gateway.tools.port import ToolContext, ToolProvider, ToolResult
from gateway.tools.registered import Registrable, find_problem, with_network
from gateway.tools.secrets import files_of, secrets_of
from gateway.tools.spans import tool_span
from gateway.tools.table import OpenMcp, ProviderLease, Tool, ToolCaller, ToolTable

if TYPE_CHECKING:
    from gateway.tools import building

_log = logging.getLogger("gateway.tools")

_GRACE_S = 1.0
"""How long a call that was cancelled may take to end before it is left behind."""

_RETIRE_S = 600.0
_VIOLATIONS = 200
_CLOSE_S = 5.0
LARGEST_ARGUMENTS = 1024 * 1024
"""Bytes of the arguments of one call as JSON."""

UNKNOWN = "(unknown)"
"""Stands in metrics for a name that is no tool."""


@dataclass(frozen=True, slots=True)
class _Entry:
    config: AnyTool
    fingerprint: bytes
    lease: ProviderLease
    is_registered: bool = False


@dataclass(frozen=True, slots=True)
class Violation:
    """A local tool that ``local_tools_allowlist`` does not allow; ``occurred_at`` is epoch seconds."""

    tool: str
    module: str
    message: str
    occurred_at: float


class ToolManager:
    """Loads `tools.yaml`, keeps its providers, and calls their tools.

    ``publish`` is given each new table. ``local_allowlist`` returns the patterns of `security.yaml` at the time of a
    reload.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        publish: Callable[[ToolTable], None],
        local_allowlist: Callable[[], Sequence[str]],
        open_mcp: OpenMcp,
    ) -> None:
        self._settings, self._metrics = settings, metrics
        self._publish, self._local_allowlist, self._open_mcp = publish, local_allowlist, open_mcp
        self._config = ToolsConfig()
        self._registered: tuple[Registrable, ...] = ()
        self._entries: dict[str, _Entry] = {}
        self._table = ToolTable()
        self._built_with = self._config.defaults
        self._lock = asyncio.Lock()
        self._left_behind: set[asyncio.Task[Any]] = set()
        self._retiring: set[ProviderLease] = set()
        self._around: building.Surroundings | None = None
        self._building: Any = None
        self.violations: deque[Violation] = deque(maxlen=_VIOLATIONS)
        """Local callables that `security.yaml` did not allow, the latest first."""
        self.unserved: dict[str, str] = {}
        """Registered entries that are not served now, and why."""

    @property
    def table(self) -> ToolTable:
        """The tools as they are now: what a call is made with, whichever table its run began with."""
        return self._table

    async def __aenter__(self) -> Self:
        await self.reload()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._left_behind:
            task.cancel()
        leases = [*(entry.lease for entry in self._entries.values()), *self._retiring]
        self._entries = {}
        await asyncio.gather(*(self._close(lease) for lease in leases))
        if self._left_behind:
            await asyncio.wait(self._left_behind, timeout=_CLOSE_S)

    @property
    def providers(self) -> list[ToolProvider]:
        """The providers, one for each entry of `tools.yaml`."""
        return [entry.lease.provider for entry in self._entries.values()]

    @property
    def registration(self) -> Registration:
        """What `tools.yaml` allows registered entries."""
        return self._config.registration

    def find_config(self, entry: str) -> AnyTool | None:
        """Return an entry of `tools.yaml`, enabled or not."""
        return next((item for item in self._config.tools if item.name == entry), None)

    def is_registered(self, entry: str) -> bool:
        """Return whether an entry that is served was registered, and does not stand in `tools.yaml`."""
        found = self._entries.get(entry)
        return found is not None and found.is_registered

    def find_provider(self, entry: str) -> ToolProvider | None:
        """Return the provider of an entry, if there is one."""
        found = self._entries.get(entry)
        return found.lease.provider if found is not None else None

    def referred_files(self) -> set[Path]:
        """Return the files that entries of `tools.yaml` name: documents and secrets."""
        return {file for entry in self._config.tools if entry.enabled for file in files_of(entry)}

    async def reload(self) -> None:
        """Read `tools.yaml` again and swap the table; `ConfigError`, and nothing changed, where it is wrong.

        Callables are imported anew, documents read anew. An MCP server whose entry is the same keeps its sessions.
        """
        async with self._lock:
            config = load_tools(self._settings)
            fresh = await self._open_entries(config)
            await self._open_registered(config, fresh, anew=True)
            old, self._entries, self._config = self._entries, fresh, config
            self._rebuild()
        for tool in self._table:
            if tool.spec.provider == "local" and tool.spec.quarantined is not None:
                self._metrics.dropin_failure("tool_violation")
                self.violations.appendleft(
                    Violation(tool.name, tool.spec.remote_name, tool.spec.quarantined, time.time())
                )
        self._retire_others(old, fresh)

    async def follow(self, registered: Sequence[Registrable]) -> None:
        """Serve these entries beside those of `tools.yaml`, which are left as they are.

        One that cannot be served is logged and stands in `unserved`; it takes no other with it.
        """
        async with self._lock:
            self._registered = tuple(registered)
            fresh = {name: entry for name, entry in self._entries.items() if not entry.is_registered}
            await self._open_registered(self._config, fresh, anew=False)
            old, self._entries = self._entries, fresh
            self._rebuild()
        self._retire_others(old, fresh)

    async def check(self, entry: Registrable) -> None:
        """Raise `ConfigError` for an entry that could not be served: of OpenAPI, the document is fetched and read."""
        await self._load_for((entry,))
        around = self._around or self._surroundings(self._config)
        made = with_network(entry, self.registration)
        lease = ProviderLease(self._building.make_provider(made, around, lambda: None))
        try:
            if lease.provider.kind == "openapi":
                await lease.provider.open()
                health = lease.provider.health()
                if health.status == "down":
                    raise ConfigError(f"{entry.name}: {health.detail}")
        finally:
            await self._close(lease)

    async def refresh(self) -> None:
        """Reload, and ask every server for its tools again."""
        await self.reload()
        providers = [entry.lease.provider for entry in self._entries.values()]
        results = await asyncio.gather(*(provider.refresh() for provider in providers), return_exceptions=True)
        for provider, result in zip(providers, results, strict=True):
            if isinstance(result, Exception):
                log_event(
                    _log, "tool.refresh.failed", level=logging.WARNING, entry=provider.entry, error=str(result)[:200]
                )
        self._rebuild()

    async def call(self, name: str, arguments: Mapping[str, Any] | str | bytes, caller: ToolCaller) -> ToolResult:
        """Call a tool for somebody, and return its result.

        ``arguments`` may be the JSON text a model wrote. Judged in this order, and nothing runs before all of it has
        passed: the caller's right, whether the tool can be called, its schema, its argument rules. Raises
        `ToolNotFound`, `ToolDenied`, `InvalidToolArguments`, `ToolUnavailable`, `ToolTimedOut`, `ToolFailed`.
        """
        started = time.perf_counter()
        tool = self._table.find(name)
        status, error_code, size = "cancelled", None, None
        try:
            if tool is None:
                raise ToolNotFound(f"There is no tool '{name[:64]}'. GET /tools lists those your key reaches.")
            given = self._judged(tool, arguments, caller)
            with bind_tool(tool.name), tool_span(tool.name, caller.source, given):
                result = await self._run(tool, given, caller)
            size = _size(result)
            if size > tool.max_result_bytes:
                raise ToolResultTooLarge(
                    f"The result of '{tool.name}' has {size:,} bytes; {tool.max_result_bytes:,} are allowed. Ask for "
                    "less, or raise max_result_bytes in tools.yaml."
                )
            status = "error" if result.is_error else "success"
            return result
        except GatewayError as error:
            status, error_code = _status(error), error.code
            raise
        finally:
            self._record(tool, caller, status, error_code, size, time.perf_counter() - started)

    def _judged(self, tool: Tool, arguments: Mapping[str, Any] | str | bytes, caller: ToolCaller) -> Mapping[str, Any]:
        """Return the arguments of a call that may be made."""
        refusal = tool.why_not(caller.principal, caller.agent, caller.source)
        self._metrics.access_decided("tool", refusal is None)
        if refusal is not None:
            raise ToolDenied(refusal)
        if tool.spec.quarantined is not None:
            raise ToolDenied(f"The tool '{tool.name}' is not offered now: {tool.spec.quarantined}")
        if tool.problem is not None or tool.schema is None:
            raise ToolUnavailable(f"The tool '{tool.name}' cannot be used: {tool.problem}")
        given = tool.schema.reduced(_decoded(arguments))
        tool.schema.validate(given)
        tool.rules.judge(given)
        return given

    async def _run(self, tool: Tool, arguments: Mapping[str, Any], caller: ToolCaller) -> ToolResult:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + tool.timeout_s
        if caller.deadline is not None:
            deadline = min(deadline, caller.deadline)
        context = ToolContext(
            principal=caller.principal,
            request_id=caller.request_id,
            source=caller.source,
            deadline=deadline,
            max_result_bytes=tool.max_result_bytes,
            call_id=caller.call_id or uuid.uuid4().hex,
            agent=caller.agent,
            agent_name=caller.agent_name,
            run_id=caller.run_id,
            session_id=caller.session_id,
            user=caller.user,
            headers=caller.headers,
            caller=caller.caller,
            progress=caller.progress,
        )
        try:
            async with asyncio.timeout_at(deadline):
                await tool.gate.acquire()
        except TimeoutError as error:
            raise ToolUnavailable(f"The tool '{tool.name}' is busy: all its calls at once are taken.") from error
        self._count_lending(tool, caller)
        tool.lease.enter()
        task = loop.create_task(tool.lease.provider.call(tool.spec, arguments, context), name=f"tool:{tool.name}")
        task.add_done_callback(lambda ended: _ended(ended, tool))
        try:
            await asyncio.wait((task,), timeout=max(0.0, deadline - loop.time()))
            if not task.done():
                raise ToolTimedOut(f"The tool '{tool.name}' took longer than its timeout of {tool.timeout_s:g} s.")
            return _outcome(task, tool)
        finally:
            if not task.done():
                await self._stop(task, tool)

    def _count_lending(self, tool: Tool, caller: ToolCaller) -> None:
        entry = self._entries.get(tool.lease.provider.entry)
        wanted: Mapping[str, str] = getattr(entry.config, "caller_headers", {}) if entry is not None else {}
        if wanted:
            missing = find_missing(wanted, caller.caller, caller.headers)
            self._metrics.credential_used("lent" if missing is None else "missing")

    async def _stop(self, task: asyncio.Task[Any], tool: Tool) -> None:
        """Cancel a call, and leave it behind if it does not end; its place in the tool's gate stays taken."""
        self._keep(task)
        task.cancel()
        await asyncio.wait((task,), timeout=_GRACE_S)
        if not task.done():
            log_event(_log, "tool.call.stuck", level=logging.WARNING, tool_name=tool.name)

    async def _open_entries(self, config: ToolsConfig) -> dict[str, _Entry]:
        """Make and open what is new; `ConfigError`, and nothing left open, where one entry cannot be."""
        wanted = [entry for entry in config.tools if entry.enabled]
        await self._load_for(wanted)
        fresh: dict[str, _Entry] = {}
        made: list[ProviderLease] = []
        try:
            around = self._surroundings(config) if wanted else None
            for item in wanted:
                fingerprint = _fingerprint(item)
                old = self._entries.get(item.name)
                if item.__struct_config__.tag == "mcp" and old is not None and old.fingerprint == fingerprint:
                    fresh[item.name] = old
                    continue
                lease = ProviderLease(self._building.make_provider(item, around, self._rebuild))
                made.append(lease)
                fresh[item.name] = _Entry(item, fingerprint, lease)
            await asyncio.gather(*(lease.provider.open() for lease in made))
        except BaseException:
            await asyncio.gather(*(self._close(lease) for lease in made))
            raise
        return fresh

    async def _open_registered(self, config: ToolsConfig, fresh: dict[str, _Entry], *, anew: bool) -> None:
        """Add registered entries to ``fresh``; ``anew``: those that read something from elsewhere read it again."""
        unserved: dict[str, str] = {}
        opening: dict[str, _Entry] = {}
        wanted = [entry for entry in self._registered if entry.enabled]
        await self._load_for(wanted)
        for item in wanted:
            entry = with_network(item, config.registration)
            problem = find_problem(entry, config.registration)
            if any(other.name == entry.name for other in config.tools):
                problem = "an entry of tools.yaml has the same name"
            if problem is not None:
                unserved[entry.name] = problem
                continue
            old = self._entries.get(entry.name)
            fingerprint = _fingerprint(entry)
            if old is not None and old.is_registered and old.fingerprint == fingerprint and _stays(entry, anew):
                fresh[entry.name] = old
                continue
            try:
                lease = ProviderLease(
                    self._building.make_provider(entry, self._around or self._surroundings(config), self._rebuild)
                )
            except ConfigError as error:
                unserved[entry.name] = error.message
            else:
                opening[entry.name] = _Entry(entry, fingerprint, lease, is_registered=True)
        results = await asyncio.gather(
            *(entry.lease.provider.open() for entry in opening.values()), return_exceptions=True
        )
        for made, result in zip(opening.values(), results, strict=True):
            if isinstance(result, BaseException):
                unserved[made.config.name] = result.message if isinstance(result, ConfigError) else repr(result)
                await self._close(made.lease)
            else:
                fresh[made.config.name] = made
        for name, why in unserved.items():
            if self.unserved.get(name) != why:
                log_event(_log, "tool.entry.unserved", level=logging.WARNING, entry=name, message=why)
        self.unserved = unserved

    async def _load_for(self, entries: Sequence[AnyTool]) -> None:
        """Import what the entries need."""
        if entries and self._building is None:
            # Late on purpose: JSON Schema and HTTP cost 0.3 s and 20 MB, and a gateway without tools needs neither.
            self._building = await asyncio.to_thread(importlib.import_module, "gateway.tools.building")
        if any(entry.__struct_config__.tag == "mcp" for entry in entries):
            await asyncio.to_thread(importlib.import_module, "gateway.tools.mcp.provider")  # and MCP a second

    def _retire_others(self, old: Mapping[str, _Entry], fresh: Mapping[str, _Entry]) -> None:
        """Let go of the providers that are not served any more."""
        for name, entry in old.items():
            if fresh.get(name) is not entry:
                self._retiring.add(entry.lease)
                self._keep(asyncio.create_task(self._retire(entry.lease)))

    def _surroundings(self, config: ToolsConfig) -> building.Surroundings:
        threads = self._around.threads if self._around is not None else self._building.ToolThreads()
        self._around = self._building.Surroundings(
            settings=self._settings,
            defaults=config.defaults,
            threads=threads,
            modules=self._building.ToolModules(),
            local_allowlist=tuple(self._local_allowlist()),
            open_mcp=self._open_mcp,
        )
        return cast("building.Surroundings", self._around)

    def _rebuild(self) -> None:
        """Make the table of what the providers list now, and publish it; what did not change is kept as it is."""
        tools: dict[str, Tool] = {}
        same, self._built_with = self._built_with == self._config.defaults, self._config.defaults
        for entry in self._entries.values():
            for spec in entry.lease.provider.list_tools():
                if spec.name in tools:
                    log_event(
                        _log,
                        "tool.name.taken",
                        level=logging.WARNING,
                        tool_name=spec.name,
                        entry=spec.entry,
                        message=f"'{spec.name}' is a tool of '{tools[spec.name].spec.entry}' already; rename an entry.",
                    )
                    continue
                known = self._table.find(spec.name)
                if same and known is not None and known.lease is entry.lease and known.spec == spec:
                    tools[spec.name] = known
                else:
                    tools[spec.name] = self._building.make_tool(spec, entry.config, entry.lease, self._config.defaults)
        self._table = ToolTable(tools)
        self._publish(self._table)

    async def _retire(self, lease: ProviderLease) -> None:
        """Close a provider that a reload replaced, once its last call is done."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETIRE_S):
                await lease.wait_idle()
        self._retiring.discard(lease)
        await self._close(lease)

    async def _close(self, lease: ProviderLease) -> None:
        try:
            async with asyncio.timeout(_CLOSE_S):
                await lease.provider.aclose()
        except Exception as error:  # noqa: BLE001 - a border: one provider does not spare the others
            log_event(
                _log, "tool.provider.close_failed", level=logging.WARNING, entry=lease.provider.entry, exc_info=error
            )

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._left_behind.add(task)
        task.add_done_callback(self._left_behind.discard)

    def _record(
        self,
        tool: Tool | None,
        caller: ToolCaller,
        status: str,
        error_code: str | None,
        result_bytes: int | None,
        seconds: float,
    ) -> None:
        name = tool.name if tool is not None else UNKNOWN
        provider = tool.spec.provider if tool is not None else "none"
        self._metrics.tool_invoked(name, provider, caller.source, status, seconds)
        log_event(
            _log,
            "tool.invoke",
            level=logging.INFO if status in ("success", "cancelled") else logging.WARNING,
            tool_name=name,
            source=caller.source,
            provider=provider,
            status=status,
            error_code=error_code,
            agent=caller.agent_name,
            agent_id=caller.agent,
            run_id=caller.run_id,
            key_id=caller.principal.key_id,
            result_bytes=result_bytes,
            duration_ms=round(seconds * 1000, 2),
        )


def _decoded(arguments: Mapping[str, Any] | str | bytes) -> Mapping[str, Any]:
    if isinstance(arguments, str | bytes):
        if len(arguments) > LARGEST_ARGUMENTS:
            raise InvalidToolArguments(f"arguments: more than {LARGEST_ARGUMENTS:,} bytes.", param="arguments")
        try:
            decoded = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidToolArguments("arguments: they are not JSON.", param="arguments") from error
        arguments = {} if decoded is None else decoded
    if not isinstance(arguments, Mapping):
        raise InvalidToolArguments("arguments: must be of type object.", param="arguments")
    return arguments


def _outcome(task: asyncio.Task[ToolResult], tool: Tool) -> ToolResult:
    try:
        return task.result()
    except asyncio.CancelledError as error:
        raise ToolFailed(f"The tool '{tool.name}' was cancelled from inside.") from error
    except GatewayError:
        raise
    except Exception as error:
        log_event(_log, "tool.call.crashed", level=logging.ERROR, tool_name=tool.name, exc_info=error)
        raise ToolFailed(f"The tool '{tool.name}' failed: {type(error).__name__}.") from error


def _ended(task: asyncio.Task[ToolResult], tool: Tool) -> None:
    tool.gate.release()
    tool.lease.leave()
    if not task.cancelled():
        task.exception()  # looked at, so that one left behind is no complaint of the loop's


def _size(result: ToolResult) -> int:
    return len(result.text.encode("utf-8", "replace")) + sum(len(part.data or "") for part in result.parts)


def _status(error: GatewayError) -> str:
    match error:
        case ToolDenied():
            return "denied"
        case InvalidToolArguments():
            return "invalid"
        case ToolTimedOut():
            return "timeout"
        case ToolNotFound():
            return "missing"
        case ToolUnavailable():
            return "unavailable"
        case ToolError():
            return "error"
    return "error"


def _stays(entry: AnyTool, anew: bool) -> bool:
    """Whether the provider of an entry that did not change is kept; an MCP server keeps its sessions in any case."""
    return not anew or entry.__struct_config__.tag == "mcp"


def _fingerprint(entry: AnyTool) -> bytes:
    """Return what an entry amounts to, its secrets included."""
    text = msgspec.json.encode((msgspec.to_builtins(entry), secrets_of(entry)), order="deterministic")
    return hashlib.sha256(text).digest()
