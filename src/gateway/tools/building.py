"""From an entry of `tools.yaml` to its provider, and from a spec to a tool that can be called.

The only module here that imports what providers need (JSON Schema, HTTP): it is loaded when there is an entry.
"""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Struct

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.tools.builtin.files import FileOpsProvider
from gateway.tools.builtin.research import ResearchProvider
from gateway.tools.builtin.shell import ShellProvider
from gateway.tools.config import (
    FILE,
    AllowedFor,
    AnyTool,
    FileOpsTool,
    HttpTool,
    LocalTool,
    McpTools,
    OpenApiTools,
    ResearchTool,
    ShellTool,
    ToolDefaults,
    ToolsConfig,
    ToolSettings,
)
from gateway.tools.http import HttpProvider
from gateway.tools.judging import ArgumentJudge
from gateway.tools.local import LocalProvider, ToolModules, ToolThreads
from gateway.tools.openapi import OpenApiProvider
from gateway.tools.port import OnChange, ToolProvider, ToolSpec
from gateway.tools.schemas import ArgumentSchema
from gateway.tools.secrets import secrets_of
from gateway.tools.table import OpenMcp, ProviderLease, Tool

_EVERYBODY = AllowedFor()


class Surroundings(Struct, frozen=True, kw_only=True):
    """What providers are made with, besides their entry."""

    settings: Settings
    defaults: ToolDefaults
    threads: ToolThreads
    modules: ToolModules
    local_allowlist: tuple[str, ...]
    open_mcp: OpenMcp


def make_provider(entry: AnyTool, around: Surroundings, on_change: OnChange) -> ToolProvider:
    """Return the provider of an entry; `ConfigError` for what can be seen to be wrong without asking anybody."""
    check_rules(entry)
    try:
        return _made(entry, around, on_change)
    except ConfigError as error:
        if error.message.startswith(FILE):
            raise
        raise ConfigError(f"{FILE}: {entry.name}: {error.message}") from error


def _made(entry: AnyTool, around: Surroundings, on_change: OnChange) -> ToolProvider:
    concurrency = entry.max_concurrency or around.defaults.max_concurrency
    match entry:
        case LocalTool():
            return LocalProvider(
                entry,
                threads=around.threads,
                modules=around.modules,
                max_threads=concurrency,
                allowlist=around.local_allowlist,
                import_timeout_s=around.settings.agent_import_timeout_s,
            )
        case HttpTool():
            return HttpProvider(entry, max_connections=concurrency)
        case OpenApiTools():
            return OpenApiProvider(entry, max_connections=concurrency)
        case McpTools():
            return around.open_mcp(entry, on_change)
        case ShellTool():
            return ShellProvider(entry, around.settings)
        case FileOpsTool():
            return FileOpsProvider(entry, around.settings)
        case ResearchTool():
            return ResearchProvider(entry, max_connections=concurrency)


def check_rules(entry: AnyTool) -> None:
    """Raise `ConfigError` for argument rules that bound nothing."""
    overrides: dict[str, ToolSettings] = getattr(entry, "overrides", {})
    for settings in (entry, *overrides.values()):
        try:
            ArgumentJudge(settings.rules or ())
        except ConfigError as error:
            raise ConfigError(f"{FILE}: {entry.name}: {error.message}") from error
    if isinstance(entry, LocalTool | HttpTool) and entry.schema is not None:
        try:
            ArgumentSchema(entry.schema)
        except ConfigError as error:
            raise ConfigError(f"{FILE}: {entry.name}: {error.message}") from error


async def check_entries(config: ToolsConfig, settings: Settings) -> None:
    """Raise `ConfigError` for what can be seen to be wrong with entries without asking a server or importing a tool."""
    around = Surroundings(
        settings=settings,
        defaults=config.defaults,
        threads=ToolThreads(),
        modules=ToolModules(),
        local_allowlist=(),
        open_mcp=_not_here,
    )
    for entry in config.tools:
        if isinstance(entry, McpTools):
            check_rules(entry)
            missing = [name for name, value in secrets_of(entry).items() if value is None]
            if missing:
                raise ConfigError(f"{FILE}: {entry.name}: {missing[0]}: the secret it refers to is not there.")
            continue
        provider = make_provider(entry, around, lambda: None)
        try:
            if isinstance(entry, OpenApiTools) and "://" not in entry.document:
                await provider.open()
        finally:
            await provider.aclose()


def _not_here(entry: McpTools, on_change: OnChange) -> ToolProvider:
    raise AssertionError("entries of MCP servers are checked without a provider")


def make_tool(spec: ToolSpec, entry: AnyTool, lease: ProviderLease, defaults: ToolDefaults) -> Tool:
    """Return a tool under the rules that `tools.yaml` sets for it; one that cannot be used says so."""
    overrides: dict[str, ToolSettings] = getattr(entry, "overrides", {})
    levels = (overrides[spec.remote_name], entry) if spec.remote_name in overrides else (entry,)

    def settled(name: str, default: Any) -> Any:
        found = (getattr(level, name) for level in levels)
        return next((value for value in found if value is not None), default)

    problem = spec.quarantined
    schema = None
    try:
        schema = ArgumentSchema(spec.parameters, foreign=isinstance(entry, McpTools | OpenApiTools))
    except ConfigError as error:
        problem = problem or f"Its {error.message}"
    own_description = levels[0].description if len(levels) > 1 else None
    return Tool(
        spec=spec,
        lease=lease,
        description=own_description or spec.description,
        schema=schema,
        rules=ArgumentJudge(settled("rules", ())),
        problem=problem,
        allowed_for=settled("allowed_for", _EVERYBODY),
        timeout_s=settled("timeout", defaults.timeout),
        max_concurrency=settled("max_concurrency", defaults.max_concurrency),
        max_result_bytes=settled("max_result_bytes", defaults.max_result_bytes),
        on_denied=settled("on_denied", defaults.on_denied),
        idempotent=settled("idempotent", spec.idempotent),
        read_only=settled("read_only", spec.read_only),
        gate=asyncio.Semaphore(settled("max_concurrency", defaults.max_concurrency)),
    )
