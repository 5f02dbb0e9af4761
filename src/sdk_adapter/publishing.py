"""From built agents to a generation that serves: prepare each, judge it by the current upstreams, write its rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agents import Agent

from gateway.errors import ConfigError
from gateway.model_settings import CHAT_ALONE
from gateway.registry.entry import AgentEntry, AgentOptions, Diagnostic, ModelConfig
from gateway.registry.loading import Declaration, DropIn, LoadedGeneration, LoadFailed
from gateway.registry.policy import ModulePolicy
from gateway.registry.registry import slugify
from gateway.routing.routed import RoutedUpstream
from gateway.routing.targets import Binding, ModelTable
from gateway.tools.table import ToolTable
from gateway.upstreams.table import UnknownUpstream
from sdk_adapter.building import Built, build, check_policy
from sdk_adapter.cloning import as_configured
from sdk_adapter.declarative import build_declared
from sdk_adapter.diagnosis import diagnose
from sdk_adapter.executor import PreparedAgent, prepare_agent
from sdk_adapter.exports import Export, Outline
from sdk_adapter.instrument import AS_WRITTEN
from sdk_adapter.mcp_servers import load_pool
from sdk_adapter.model_choice import ChosenModel, bind_model, changes_model
from sdk_adapter.modules import DropInFinder
from sdk_adapter.runner import install
from sdk_adapter.services import AdapterServices

__all__ = ["install", "publish_declared", "publish_dropin"]

_NOTHING: Mapping[int, str] = {}


@dataclass(frozen=True, slots=True)
class Published:
    """One agent under its id, with what serves it and what it was made from."""

    id: str
    slug: str
    options: AgentOptions
    agent: Agent[Any]
    prepared: PreparedAgent
    attribute: str | None = None
    config: ModelConfig | None = None


async def publish_dropin(
    dropin: DropIn,
    number: int,
    finder: DropInFinder,
    services: AdapterServices,
    *,
    policy: Callable[[], ModulePolicy],
    expected: Mapping[Path, str],
    warnings: tuple[Diagnostic, ...],
    on_release: Callable[[], None],
    declaration: Declaration | None = None,
) -> LoadedGeneration:
    """Import a drop-in that passed the pre-flight, and make its agents ready; raise `LoadFailed` or `SourceChanged`."""
    settings = services.settings
    built = await build(
        dropin,
        number,
        finder,
        names=settings.agent_exports,
        policy=policy(),
        timeout_s=settings.agent_import_timeout_s,
        expected=expected,
    )
    opened: list[Published] = []

    async def release() -> None:
        try:
            await _close(opened)
        finally:
            built.generation.release()
            opened.clear()
            on_release()

    try:
        named = [_named(export, agent, dropin, built, declaration) for export, agent in built.agents]
        published = {id(item.agent): item.id for item in named}
        configured = _configured(named)
        for item in named:
            ready = await _publish(item, dropin, services, published, configured)
            opened.append(ready)
        files = {**expected, **built.generation.files}
        found = (*warnings, *(item for item in built.warnings if item.code not in {w.code for w in warnings}))
        rows = _describer(tuple(opened), dropin, number, services, found, declaration)
        judged = built.generation.policy

        def describe() -> Sequence[AgentEntry]:
            nonlocal judged
            current = policy()
            if current != judged:
                check_policy(built.generation, current)
                judged = current
            return rows()

        describe()
    except BaseException as error:
        await release()
        if isinstance(error, LoadFailed):
            raise LoadFailed(*error.diagnostics, files={**expected, **built.generation.files}) from error
        raise
    return LoadedGeneration(number, describe, release, files, found)


async def publish_declared(declaration: Declaration, number: int, services: AdapterServices) -> LoadedGeneration:
    """Make a declarative agent ready; raise `LoadFailed`."""
    stand_in = _stand_in(declaration)
    agent = build_declared(declaration)
    named = _Named(declaration.id, declaration.slug, declaration.options, agent, None, config=declaration.model_config)
    published = await _publish(named, stand_in, services, configured=_configured((named,)))
    describe = _describer((published,), stand_in, number, services, (), declaration)
    opened = [published]

    async def release() -> None:
        await _close(opened)

    try:
        describe()
    except BaseException:
        await release()
        raise
    return LoadedGeneration(number, describe, release)


@dataclass(frozen=True, slots=True)
class _Named:
    id: str
    slug: str
    options: AgentOptions
    agent: Agent[Any]
    attribute: str | None
    config: ModelConfig | None = None


def _configured(named: Sequence[_Named]) -> Mapping[int, Agent[Any]]:
    return {
        id(item.agent): as_configured(item.agent, item.options, item.config)
        for item in named
        if item.config is not None
    }


def _named(export: Export, agent: Agent[Any], dropin: DropIn, built: Built, declaration: Declaration | None) -> _Named:
    if declaration is not None:
        config = declaration.model_config
        return _Named(declaration.id, declaration.slug, declaration.options, agent, export.attribute, config)
    options = built.options
    if options.upstream is None and dropin.default_upstream is not None:
        options = replace(options, upstream=dropin.default_upstream)
    if options.model is None and agent.model is None and dropin.default_model is not None:
        options = replace(options, model=dropin.default_model)
    slug = dropin.slug if export.suffix is None else f"{dropin.slug}-{slugify(export.suffix) or 'agent'}"
    agent_id = f"{options.namespace or dropin.namespace}/{slug}"
    return _Named(agent_id, slug, options, agent, export.attribute, dict(dropin.model_config).get(agent_id))


async def _publish(
    named: _Named,
    dropin: DropIn,
    services: AdapterServices,
    published: Mapping[int, str] = _NOTHING,
    configured: Mapping[int, Agent[Any]] = AS_WRITTEN,
) -> Published:
    try:
        await load_pool(named.agent)
        prepared = prepare_agent(
            named.agent,
            agent_id=named.id,
            options=named.options,
            services=services,
            published=published,
            configured=configured,
        )
        await prepared.executor.open()
    except Exception as error:
        raise LoadFailed(
            diagnose(
                dropin,
                "wrong_type",
                f"The agent '{named.agent.name}' cannot be prepared: {type(error).__name__}: {error}",
                "Check the types of its tools, handoffs and model.",
                line=Outline(dropin).line_of(named.attribute) if named.attribute else None,
            )
        ) from error
    return Published(named.id, named.slug, named.options, named.agent, prepared, named.attribute, named.config)


async def _close(opened: Sequence[Published]) -> None:
    """Wait for the last run of each agent, then close what it holds; one that fails does not spare the others."""
    results = await asyncio.gather(*(item.prepared.executor.aclose() for item in opened), return_exceptions=True)
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise errors[0]


def _describer(
    agents: tuple[Published, ...],
    dropin: DropIn,
    number: int,
    services: AdapterServices,
    warnings: tuple[Diagnostic, ...],
    declaration: Declaration | None,
) -> Callable[[], Sequence[AgentEntry]]:
    def describe() -> Sequence[AgentEntry]:
        table = services.upstreams()
        problems = [problem for item in agents for problem in _problems(item, dropin, table, services)]
        if any(problem.severity == "error" for problem in problems):
            raise LoadFailed(*problems)
        return [_row(item, dropin, number, table, services, (*problems, *warnings), declaration) for item in agents]

    return describe


def _row(
    item: Published,
    dropin: DropIn,
    number: int,
    table: ModelTable,
    services: AdapterServices,
    diagnostics: tuple[Diagnostic, ...],
    declaration: Declaration | None,
) -> AgentEntry:
    namespace = item.id.partition("/")[0]
    has_own = item.agent.name in item.prepared.brings_own_model
    upstream, model = _shown(None if has_own else _bind(item, item.prepared.model, table, services))
    row = AgentEntry(
        id=item.id,
        namespace=namespace,
        name=item.slug,
        display_name=item.options.display_name or item.agent.name,
        kind="sdk",
        source="file",
        created=_modified(dropin.file),
        executor=item.prepared.executor,
        upstream=upstream,
        model=model,
        description=item.options.description or item.agent.handoff_description,
        tools=item.prepared.tools,
        aliases=_aliases(item.agent.name, namespace, item.slug),
        options=item.options,
        model_config=item.config,
        generation=number,
        file=dropin.label,
        diagnostics=diagnostics,
        watch=lambda: tuple(_mcp_troubles(item, dropin)),
    )
    if declaration is None:
        return row
    return replace(
        row,
        kind="sdk" if declaration.dropin is not None else "declarative",
        source="yaml",
        created=declaration.created,
        owned_by=declaration.owned_by or row.owned_by,
        file=declaration.label,
    )


def _aliases(name: str, namespace: str, slug: str) -> tuple[str, ...]:
    """Return the names that the agent's own name gives: 'Weather Agent' → weather-agent, weatheragent, ns/… of both."""
    own = slugify(name)
    spellings = [s for s in dict.fromkeys((own, own.replace("-", ""))) if s and s != slug]
    return (*spellings, *(f"{namespace}/{spelling}" for spelling in spellings))


def _problems(item: Published, dropin: DropIn, table: ModelTable, services: AdapterServices) -> Iterator[Diagnostic]:
    """Yield what keeps an agent from running on the current upstreams, and warnings."""
    outline = Outline(dropin)
    at = outline.line_of(item.attribute) if item.attribute else None
    for agent, tool in item.prepared.duplicate_tools:
        yield diagnose(
            dropin,
            "duplicate_tool",
            f"The agent '{agent}' has two tools called '{tool}', so a call of one cannot be told from the other.",
            "Rename one: @function_tool(name_override=...), as_tool(tool_name=...) or handoff(tool_name_override=...).",
            line=at,
        )
    known = services.tools.table if services.tools is not None else ToolTable()
    for agent, tool in item.prepared.gateway_tools:
        if known.find(tool) is None:
            yield diagnose(
                dropin,
                "gateway_tool_missing",
                f"The agent '{agent}' uses the gateway tool '{tool}', which tools.yaml does not have.",
                "Add it there, or correct the name in gateway_tool(...); GET /tools lists those there are.",
                line=outline.line_of_text(tool) or at,
                is_warning=True,
            )
    bindings: dict[str, Binding] = {}
    for agent, model in item.prepared.models:
        try:
            bindings[agent] = _bind(item, model, table, services)
        except ConfigError as error:
            code = "unknown_upstream" if isinstance(error, UnknownUpstream) else "unknown_model"
            message, _, fix = error.message.rpartition(". ")
            if isinstance(model, ChosenModel):
                if model is item.prepared.model:  # another agent's is told of that one
                    yield _misconfigured(item, dropin, code, f"{message}.", fix)
                continue
            line = outline.line_of_option("upstream") if code == "unknown_upstream" else outline.line_of_text(model)
            yield diagnose(dropin, code, f"Agent '{agent}': {message}.", fix, line=line or at)
            if code == "unknown_upstream":
                return
    if item.config is not None and changes_model(item.config) and item.prepared.model is None:
        yield _misconfigured(
            item,
            dropin,
            "own_model",
            f"The agent '{item.agent.name}' brings a model object of its own, without upstream and fallbacks.",
            "Add model, which takes its place, or leave these keys out.",
        )
    yield from _unsupported_settings(item, dropin, bindings)
    for agent, kind in item.prepared.hosted_tools:
        binding = bindings.get(agent)
        if binding is None or _serves_hosted(binding, kind):
            continue
        yield diagnose(
            dropin,
            "hosted_tool_unsupported",
            f"The agent '{agent}' uses the hosted tool '{kind}', which the upstream '{binding.upstream.name}' does not "
            "have.",
            f"Use an upstream with api: responses that lists '{kind}' under hosted_tools in upstreams.yaml (provider "
            "openai has them all), or a function tool instead.",
            line=at,
        )
    for agent, kind in item.prepared.host_tools:
        yield diagnose(
            dropin,
            "host_tool",
            f"The agent '{agent}' uses the tool '{kind}', which acts on the gateway's own machine.",
            "Be sure that whoever reaches this agent may do that; limit it with allow_agents.",
            kind="security",
            line=at,
            is_warning=True,
        )
    for agent, problem in item.prepared.problems:
        yield diagnose(
            dropin,
            "agent_setup",
            f"Every run that reaches the agent '{agent}' will fail: {problem}.",
            f"Change it where '{agent}' is made.",
            line=at,
            is_warning=True,
        )
    for agent in item.prepared.brings_own_model:
        yield diagnose(
            dropin,
            "own_model",
            f"The agent '{agent}' brings a model object of its own: its calls pass by the gateway's upstreams.",
            'Name the model instead: Agent(model="name"), and configure it in upstreams.yaml.',
            line=at,
            is_warning=True,
        )


def _misconfigured(
    item: Published, dropin: DropIn, code: str, message: str, fix: str, *, is_warning: bool = False
) -> Diagnostic:
    """Return a diagnostic about what the operator says of an agent's model."""
    words = f"model_config of '{item.id}': {message}"
    return diagnose(dropin, code, words, fix, file="agents.yaml", is_warning=is_warning)


def _unsupported_settings(item: Published, dropin: DropIn, bindings: Mapping[str, Binding]) -> Iterator[Diagnostic]:
    """Yield a warning where the operator's settings have no place in the API that the agent's upstream speaks."""
    binding = bindings.get(item.agent.name)
    if item.config is None or binding is None or binding.upstream.api != "responses":
        return
    lost = [name for name in CHAT_ALONE if name in item.config.given()]
    if lost:
        yield _misconfigured(
            item,
            dropin,
            "setting_unsupported",
            f"The upstream '{binding.upstream.name}' speaks the Responses API, which has no {' and no '.join(lost)}.",
            "Leave it out, or have the upstream's api set to chat.",
            is_warning=True,
        )


def _mcp_troubles(item: Published, dropin: DropIn) -> Iterator[Diagnostic]:
    """Yield the MCP servers that cannot be reached now; the next run that needs one tries again."""
    for server, why in item.prepared.executor.mcp_failures().items():
        yield diagnose(
            dropin,
            "mcp_unreachable",
            f"The MCP server '{server}' of the agent '{item.agent.name}' cannot be reached ({why}).",
            "Start it, or correct its command or address; the next run that needs it connects again.",
            kind="dependency",
            is_warning=True,
        )


def _bind(item: Published, model: str | None, table: ModelTable, services: AdapterServices) -> Binding:
    """Resolve a model name as a run of the agent would."""
    default = item.options.model or services.settings.default_model
    return bind_model(table, model, upstream=item.options.upstream, default_model=default)


def _shown(binding: Binding | None) -> tuple[str | None, str | None]:
    """Return upstream and model as people see them: a name with several upstreams behind it has none of its own."""
    if binding is None:
        return None, None
    if isinstance(binding.upstream, RoutedUpstream):
        route = binding.upstream.route
        if route.name != route.candidates[0].id:
            return None, route.name
    return binding.upstream.name, binding.model


def _serves_hosted(binding: Binding, kind: str) -> bool:
    config = binding.upstream.config
    if binding.upstream.api != "responses":
        return False
    return config.provider == "openai" if config.hosted_tools is None else kind in config.hosted_tools


def _stand_in(declaration: Declaration) -> DropIn:
    """Return what diagnostics of a declarative agent speak of: the YAML file."""
    path = Path(declaration.label)
    return DropIn(declaration.namespace, declaration.slug, path, path, path, declaration.label)


def _modified(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0
