"""McpProvider: one `mcp` entry of `tools.yaml` as a tool provider, over a pool of sessions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from gateway.errors import ConfigError, ToolError
from gateway.tools.config import McpTools
from gateway.tools.lending import check_caller_headers, lent_headers
from gateway.tools.mcp.http import HttpTarget, http_streams
from gateway.tools.mcp.listing import NAME, ListedTool, RefusedTool
from gateway.tools.mcp.pins import PinStore, Quarantine, pin_key
from gateway.tools.mcp.pool import Credential, McpPool
from gateway.tools.mcp.results import result_of
from gateway.tools.mcp.session import SessionLimits
from gateway.tools.mcp.stdio import StdioTarget, stdio_streams
from gateway.tools.mcp.wire import Dial
from gateway.tools.port import ProviderHealth, ProviderKind, ToolContext, ToolResult, ToolSpec
from gateway.tools.secrets import resolve_headers, resolve_secret

_SMALLEST_MESSAGE = 4 * 1_048_576


def message_limit(max_result_bytes: int) -> int:
    """Return how many bytes one message of a server may have: room for JSON, base64 and a list of tools."""
    return max(_SMALLEST_MESSAGE, 4 * max_result_bytes)


class McpProvider:
    """See `gateway.tools.port.ToolProvider`.

    Raises `ConfigError` for an entry that makes no sense, or whose secrets are missing.
    """

    kind: ProviderKind = "mcp"

    def __init__(
        self, config: McpTools, *, max_result_bytes: int, pins: PinStore, on_change: Callable[[], None]
    ) -> None:
        self.entry = config.name
        self._config = config
        self._target = _target(config)
        self._limit = message_limit(max_result_bytes)
        self._by_key = [
            (pattern, _credential(resolve_headers(headers, where=f"{config.name}: key_headers: {pattern}")))
            for pattern, headers in config.key_headers.items()
        ]
        self._pool = McpPool(
            config.name,
            key=pin_key(config.name, (self._target.identity,)),
            dial=self._dial,
            limits=SessionLimits(connect_s=config.connect_timeout, max_tools=config.max_tools),
            pins=pins,
            pinning=config.pinning,
            on_change=on_change,
        )

    async def open(self) -> None:
        """Start connecting."""
        self._pool.start()

    async def aclose(self) -> None:
        """Close every session, and with it every process."""
        await self._pool.aclose()

    def list_tools(self) -> Sequence[ToolSpec]:
        """Return the tools, those that wait for approval with the reason."""
        judged = self._pool.judged
        offered = [self._spec(tool) for tool in judged.offered.values() if self._wants(tool.name)]
        waiting = [self._spec(item.tool, item) for item in judged.quarantined.values() if self._wants(item.tool.name)]
        return [spec for spec in (*offered, *waiting) if NAME.fullmatch(spec.name)]

    async def refresh(self) -> None:
        """List the server's tools again; a failure shows in `health`."""
        try:
            await self._pool.refresh()
        except ToolError:
            return

    async def call(self, tool: ToolSpec, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """Run one call with the caller's credential."""
        answer = await self._pool.call(
            tool.remote_name,
            arguments,
            credential=self._credential_of(context),
            timeout_s=max(context.seconds_left(), 0.001),
            progress=context.progress if self._config.stream else None,
            repeatable=tool.idempotent or tool.read_only,
        )
        return result_of(answer)

    def health(self) -> ProviderHealth:
        """Return whether the server is connected, and what is wrong with its tools."""
        now = time.time()
        troubles = [self._pool.judged.problem] if self._pool.judged.problem else []
        troubles += [f"{item.name}: {item.why}" for item in self._refused()[:20]]
        waiting = [name for name in self._pool.judged.quarantined if self._wants(name)]
        if waiting:
            troubles.append(f"waiting for approval: {', '.join(waiting[:20])}")
        detail = "; ".join(troubles) or None
        if self._pool.connected:
            return ProviderHealth(status="degraded" if troubles else "ok", detail=detail, checked_at=now)
        if self._pool.failure is not None:
            return ProviderHealth(status="down", detail=self._pool.failure, checked_at=now)
        return ProviderHealth(detail=detail)

    async def approve(
        self, names: Sequence[str] | None, *, by: str, digests: Mapping[str, str] | None = None
    ) -> list[str]:
        """Accept tools that wait, by the server's names for them (None: all); return those that were accepted.

        ``digests`` are the hashes that somebody has seen: a tool with another one is left out.
        """
        return await self._pool.approve(names, by=by, digests=digests)

    def review(self) -> list[dict[str, str | None]]:
        """Return, for an admin, what waits: its name, why, the accepted definition and the present one."""
        return [
            {
                "tool": name,
                "reason": item.why,
                "accepted": pin.definition if (pin := self._pool.pinned(name)) else None,
                "listed": item.tool.definition,
                "digest": item.tool.digest,
            }
            for name, item in self._pool.judged.quarantined.items()
            if self._wants(name)
        ]

    def _dial(self, credential: Credential) -> Dial:
        target = self._target
        if isinstance(target, StdioTarget):
            return lambda: stdio_streams(target, message_limit=self._limit)
        chosen = target.with_headers(dict(credential))
        return lambda: http_streams(chosen, message_limit=self._limit)

    def _credential_of(self, context: ToolContext) -> Credential:
        key_id = context.principal.key_id
        headers = dict(next((found for pattern, found in self._by_key if fnmatchcase(key_id, pattern)), ()))
        headers |= lent_headers(self._config.caller_headers, context, f"The MCP server '{self.entry}'")
        return _credential(headers)

    def _wants(self, name: str) -> bool:
        config = self._config
        if config.tool is not None:
            return name == config.tool
        return any(fnmatchcase(name, p) for p in config.include) and not any(
            fnmatchcase(name, p) for p in config.exclude
        )

    def _spec(self, tool: ListedTool, waiting: Quarantine | None = None) -> ToolSpec:
        # The server's own hints are not believed: a call that is repeated has its effects twice.
        own = self._config.overrides.get(tool.name, self._config)
        return ToolSpec(
            name=self._public_name(tool.name),
            entry=self.entry,
            provider="mcp",
            description=tool.description,
            parameters=tool.parameters,
            remote_name=tool.name,
            title=tool.title,
            output_schema=tool.output_schema,
            idempotent=bool(self._config.idempotent if own.idempotent is None else own.idempotent),
            read_only=bool(self._config.read_only if own.read_only is None else own.read_only),
            digest=tool.digest,
            quarantined=None if waiting is None else _WAITING[waiting.why],
        )

    def _public_name(self, tool: str) -> str:
        return self.entry if self._config.tool is not None else f"{self.entry}__{tool}"

    def _refused(self) -> list[RefusedTool]:
        long = [
            RefusedTool(name, "its name after the entry's has more than 64 characters: give the entry a shorter one")
            for name in (*self._pool.judged.offered, *self._pool.judged.quarantined)
            if self._wants(name) and not NAME.fullmatch(self._public_name(name))
        ]
        return [*self._pool.judged.refused, *long]


_WAITING = {
    "new": "it is new, and waits for an admin's approval",
    "changed": "its description or schema changed, and it waits for an admin's approval",
}


def _target(config: McpTools) -> StdioTarget | HttpTarget:
    where = config.name
    if bool(config.command) == bool(config.url):
        raise ConfigError(f"tools.yaml: {where}: give either 'command' (a server to run) or 'url' (one that runs).")
    if config.command:
        if config.transport not in (None, "stdio"):
            raise ConfigError(f"tools.yaml: {where}: transport {config.transport} goes with 'url', not with 'command'.")
        for key in ("headers", "key_headers", "caller_headers"):
            if getattr(config, key):
                raise ConfigError(f"tools.yaml: {where}: a server that is run gets no {key}; give it 'env'.")
        env = {name: resolve_secret(text, where=f"{where}: env: {name}") for name, text in config.env.items()}
        return StdioTarget(config.command, env, config.cwd)
    assert config.url is not None
    if config.transport == "stdio":
        raise ConfigError(f"tools.yaml: {where}: transport stdio goes with 'command', not with 'url'.")
    for key in ("env", "cwd"):
        if getattr(config, key):
            raise ConfigError(f"tools.yaml: {where}: {key} goes with 'command', not with 'url'.")
    parts = urlsplit(config.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"tools.yaml: {where}: url must be an http:// or https:// address.")
    check_caller_headers(config.caller_headers, f"tools.yaml: {where}")
    return HttpTarget(
        config.url,
        "sse" if config.transport == "sse" else "http",
        resolve_headers(config.headers, where=where),
        config.network,
    )


def _credential(headers: Mapping[str, str]) -> Credential:
    return tuple(sorted(headers.items()))
