"""Everything that touches private fields of the SDK, each under a contract test: reach, wrap and recognise its objects.

Instrumentation is done once per load, in place, on the gateway's own copy of the author's module: `as_tool()` closes
over the agent it was made from, so that only what is changed in place is seen by every run.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agents import (
    Agent,
    AgentOutputSchema,
    AgentOutputSchemaBase,
    ApplyPatchTool,
    CodeInterpreterTool,
    ComputerTool,
    FileSearchTool,
    FunctionTool,
    Handoff,
    HostedMCPTool,
    ImageGenerationTool,
    LocalShellTool,
    Model,
    MultiProvider,
    OpenAIProvider,
    ShellTool,
    UserError,
    WebSearchTool,
)
from agents.mcp import MCPServer
from agents.tool import CustomTool, ProgrammaticToolCallingTool, Tool, ToolSearchTool

from gateway.observability.logs import bind_tool
from sdk_adapter.gateway_tools import gateway_tool_names, is_gateway_tool
from sdk_adapter.guarding import judged_off_the_loop
from sdk_adapter.scope import ToolStatus, count_tool_call, current_level

_HOSTED: tuple[tuple[type[Any], str], ...] = (
    (WebSearchTool, "web_search"),
    (FileSearchTool, "file_search"),
    (CodeInterpreterTool, "code_interpreter"),
    (ImageGenerationTool, "image_generation"),
    (HostedMCPTool, "mcp"),
    (ToolSearchTool, "tool_search"),
    (ProgrammaticToolCallingTool, "programmatic_tool_calling"),
    (CustomTool, "custom"),
)
_HOST: tuple[tuple[type[Any], str], ...] = (
    (LocalShellTool, "local_shell"),
    (ApplyPatchTool, "apply_patch"),
    (ComputerTool, "computer"),
)
_MARK = "__gateway_observed__"
AS_WRITTEN: Mapping[int, Agent[Any]] = {}
"""No agent that the operator says something of."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What an agent and everything it reaches is made of.

    ``hosted_tools`` need an upstream that runs them (`agent.prompt` counts as ``prompt``); ``host_tools`` would act
    on the gateway's own machine. ``problems`` are mistakes that would fail every run. Pairs start with the agent's
    name, which need not be unique.
    """

    agents: tuple[Agent[Any], ...]
    models: tuple[tuple[str, str | None], ...]
    brings_own_model: tuple[str, ...]
    hosted_tools: tuple[tuple[str, str], ...]
    host_tools: tuple[tuple[str, str], ...]
    duplicate_tools: tuple[tuple[str, str], ...]
    gateway_tools: tuple[tuple[str, str], ...]
    mcp_servers: tuple[MCPServer, ...]
    output_guardrails: bool
    problems: tuple[tuple[str, str], ...]


def reachable_agents(entry: Agent[Any]) -> tuple[Agent[Any], ...]:
    """Return the entry agent and all it reaches by handoff or as a tool, each once, cycles included."""
    found: dict[int, Agent[Any]] = {}
    waiting = [entry]
    while waiting:
        agent = waiting.pop()
        if id(agent) in found:
            continue
        found[id(agent)] = agent
        waiting.extend(reversed([*_handoff_targets(agent), *_agents_used_as_tools(agent)]))
    return tuple(found.values())


def survey(entry: Agent[Any], configured: Mapping[int, Agent[Any]] = AS_WRITTEN) -> Survey:
    """Look at an agent and everything it reaches; change nothing. ``configured`` run instead of others, by their id."""
    agents = reachable_agents(entry)
    run = [configured.get(id(agent), agent) for agent in agents]
    servers = {id(server): server for agent in agents for server in agent.mcp_servers}
    return Survey(
        agents=agents,
        models=tuple((a.name, a.model) for a in run if a.model is None or isinstance(a.model, str)),
        brings_own_model=tuple(a.name for a in run if isinstance(a.model, Model)),
        hosted_tools=tuple((a.name, kind) for a in agents for kind in _hosted_kinds(a)),
        host_tools=tuple((a.name, kind) for a in agents for tool in a.tools if (kind := _host_kind(tool))),
        duplicate_tools=tuple((a.name, name) for a in agents for name in _duplicates(own_tool_names(a))),
        gateway_tools=tuple((a.name, name) for a in agents for name in gateway_tool_names(a)),
        mcp_servers=tuple(servers.values()),
        output_guardrails=any(a.output_guardrails for a in agents),
        problems=tuple((a.name, problem) for a in agents for problem in _problems(a)),
    )


def own_tool_names(agent: Agent[Any]) -> list[str]:
    """Return the names an agent's own tools and handoffs have towards the model, duplicates included."""
    return [*(tool.name for tool in agent.tools), *(_handoff_name(item) for item in agent.handoffs)]


def observe_tools(agent: Agent[Any]) -> None:
    """Report every call of the agent's function tools to the run it belongs to, from now on; done once per tool.

    Plain functions that guard a tool leave the event loop with it, as the tool's own does.

    The run is looked up at the call: tools of an installed package are shared by agents and outlive their loads.
    """
    for tool in agent.tools:
        if not isinstance(tool, FunctionTool):
            continue
        if tool.tool_input_guardrails:
            tool.tool_input_guardrails = [judged_off_the_loop(item) for item in tool.tool_input_guardrails]
        if tool.tool_output_guardrails:
            tool.tool_output_guardrails = [judged_off_the_loop(item) for item in tool.tool_output_guardrails]
        if is_gateway_tool(tool):
            continue  # the tool manager reports it
        invoker: Any = tool.on_invoke_tool
        inner = getattr(invoker, "_invoke_tool_impl", None)
        call = inner if inner is not None else invoker
        if hasattr(call, _MARK):
            continue
        observed = _observed(call, tool)
        if inner is not None:
            # Inside the SDK's failure handling, which turns an exception into text for the model.
            invoker._invoke_tool_impl = observed
        else:
            tool.on_invoke_tool = observed


def rebound_handoff(item: Handoff[Any, Any], invoke: Callable[[Any, str], Awaitable[Any]]) -> Handoff[Any, Any]:
    """Return a copy of a handoff that is invoked by ``invoke`` and no longer refers to its original target.

    The SDK would otherwise enter that target, shared by all runs, into its global table with every handoff.
    """
    bound = copy.copy(item)
    bound.on_invoke_handoff = invoke
    bound._agent_ref = None
    return bound


def is_agent_tool(tool: FunctionTool) -> bool:
    """Return whether the tool was made by ``Agent.as_tool``."""
    return bool(tool._is_agent_tool)


async def filtered_mcp_tools(server: Any, tools: list[Any], run_context: Any, agent: Any) -> list[Any]:
    """Return the tools of an SDK server object that its author's filter lets through for this run."""
    if server.tool_filter is None:
        return tools
    return list(await server._apply_tool_filter(tools, run_context, agent))


def is_default_provider(provider: object) -> bool:
    """Return whether a run configuration's provider is what the SDK fills in when its author names none."""
    if type(provider) is MultiProvider:
        return provider.provider_map is None and is_default_provider(provider.openai_provider)
    if type(provider) is not OpenAIProvider:
        return False
    given = ("_client", "_stored_api_key", "_stored_base_url", "_stored_organization", "_stored_project")
    return all(getattr(provider, name, None) is None for name in given)


def _observed(call: Callable[..., Awaitable[Any]], tool: FunctionTool) -> Callable[..., Awaitable[Any]]:
    provider = "agent" if is_agent_tool(tool) else "native"

    # `wraps` also carries the SDK's own marks on the function (argument preparation, the wrapped callable).
    @functools.wraps(call)
    async def observed(context: Any, arguments: str) -> Any:
        started = time.perf_counter()
        status: ToolStatus | None = "error"
        count_tool_call()
        try:
            with bind_tool(tool.name) as line:  # noqa: F841 - where `looplag` finds out whose tool blocks
                result = await call(context, arguments)
            status = "success"
            return result
        except asyncio.CancelledError:
            limit = tool.timeout_seconds
            timed_out = limit is not None and time.perf_counter() - started >= limit
            status = "timeout" if timed_out else None
            raise
        finally:
            level = current_level()
            if level is not None and status is not None:
                agent = getattr(getattr(context, "agent", None), "name", "")
                level.scope.observe(tool.name, provider, agent, status, time.perf_counter() - started)

    setattr(observed, _MARK, True)
    return observed


def _handoff_targets(agent: Agent[Any]) -> Iterator[Agent[Any]]:
    for item in agent.handoffs:
        target = item if isinstance(item, Agent) else (item._agent_ref() if item._agent_ref is not None else None)
        if isinstance(target, Agent):
            yield target


def _agents_used_as_tools(agent: Agent[Any]) -> Iterator[Agent[Any]]:
    for tool in agent.tools:
        if isinstance(tool, FunctionTool) and isinstance(tool._agent_instance, Agent):
            yield tool._agent_instance


def _handoff_name(item: Agent[Any] | Handoff[Any, Any]) -> str:
    return item.tool_name if isinstance(item, Handoff) else Handoff.default_tool_name(item)


def _hosted_kinds(agent: Agent[Any]) -> Iterator[str]:
    for tool in agent.tools:
        yield from (kind for type_, kind in _HOSTED if isinstance(tool, type_))
        if isinstance(tool, ShellTool) and not _is_local_shell(tool):
            yield "shell"
    if agent.prompt is not None:
        yield "prompt"


def _host_kind(tool: Tool) -> str | None:
    if isinstance(tool, ShellTool):
        return "shell" if _is_local_shell(tool) else None
    return next((kind for type_, kind in _HOST if isinstance(tool, type_)), None)


def _is_local_shell(tool: ShellTool) -> bool:
    return (tool.environment or {"type": "local"}).get("type") == "local"


def _problems(agent: Agent[Any]) -> Iterator[str]:
    if agent.output_type is None or isinstance(agent.output_type, AgentOutputSchemaBase):
        return
    try:
        AgentOutputSchema(agent.output_type)
    except UserError:
        yield "its output_type has no strict JSON schema; use AgentOutputSchema(..., strict_json_schema=False)"


def _duplicates(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
