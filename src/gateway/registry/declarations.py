"""`agents.yaml` as typed values: agents written in YAML, and agents whose code is imported by module name.

```yaml
version: 1
defaults: {namespace: default, upstream: local, model: qwen3-8b}
agents:
  - name: greeter
    instructions: You greet people.
    metadata: {max_completion_tokens: 200}
  - name: research
    kind: sdk
    module: "acme.agents.research:agent"
model_config:
  default/weather: {model: qwen3-8b, temperature: 0.2}
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from msgspec import Meta, Struct

from gateway.config import Settings, config_text, load_yaml
from gateway.errors import ConfigError
from gateway.registry.discovery import module_folder
from gateway.registry.entry import AgentOptions, ModelConfig
from gateway.registry.loading import Declaration, DropIn
from gateway.registry.registry import slugify

_AGENT_ID = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,63}$")]


class DeclaredDefaults(Struct, frozen=True, kw_only=True):
    """What agents get that do not say, drop-in agents included; ``GATEWAY_DEFAULT_*`` stand behind it."""

    namespace: Name | None = None
    upstream: str | None = None
    model: str | None = None


class DeclaredMetadata(Struct, frozen=True, kw_only=True):
    """Limits of one agent. ``max_tool_hops: 0`` runs no tool; ``max_completion_tokens`` also caps the request's.

    Those from ``max_turns`` on are of a run over all the agents that it reaches.
    """

    max_tool_hops: Annotated[int, Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    tool_choice: str | None = None
    owned_by: str | None = None
    max_turns: Annotated[int, Meta(ge=1)] | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    max_depth: Annotated[int, Meta(ge=0)] | None = None
    max_model_calls: Annotated[int, Meta(ge=1)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=0)] | None = None
    max_total_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_cost_usd: Annotated[float, Meta(gt=0, le=1_000_000)] | None = None


class DeclaredAgent(Struct, frozen=True, kw_only=True):
    """One agent: kind ``declarative`` needs ``instructions``, kind ``sdk`` needs ``module`` (``pkg.mod:attribute``)."""

    name: Name
    namespace: Name | None = None
    display_name: str | None = None
    description: str | None = None
    kind: Literal["declarative", "sdk"] = "declarative"
    upstream: str | None = None
    model: str | None = None
    instructions: str | None = None
    module: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = None
    tools: tuple[str, ...] = ()
    metadata: DeclaredMetadata = DeclaredMetadata()


class AgentsConfig(Struct, frozen=True, kw_only=True):
    """The file. ``model_config`` is by model id, for agents of this file and drop-ins alike."""

    version: Literal[1] = 1
    defaults: DeclaredDefaults = DeclaredDefaults()
    agents: tuple[DeclaredAgent, ...] = ()
    model_config: dict[str, ModelConfig] = {}


class Declared(NamedTuple):
    """What `agents.yaml` says: its agents with defaults applied, the defaults, and the models of agents by id."""

    agents: tuple[Declaration, ...] = ()
    defaults: DeclaredDefaults = DeclaredDefaults()
    model_config: Mapping[str, ModelConfig] = {}


def load_declarations(settings: Settings) -> Declared:
    """Return what `agents.yaml` says; raise `ConfigError`."""
    path = settings.config_file("agents.yaml")
    config = load_yaml(path, AgentsConfig) if path is not None else AgentsConfig()
    defaults = DeclaredDefaults(
        namespace=slugify(config.defaults.namespace or settings.default_namespace),
        upstream=config.defaults.upstream,
        model=config.defaults.model,
    )
    if path is None:
        return Declared((), defaults)
    models = {_agent_id(name, path): config for name, config in config.model_config.items()}
    lines = _lines(path)
    created = int(path.stat().st_mtime) if path.exists() else 0
    declarations: dict[str, Declaration] = {}
    for index, agent in enumerate(config.agents):
        line = lines[index] if index < len(lines) else 1
        found = _declare(agent, defaults, path, line, created)
        found = replace(found, model_config=models.get(found.id))
        twin = declarations.setdefault(found.id, found)
        if twin is not found:
            raise ConfigError(
                f"{path.name}:{line}: the name '{found.id}' is taken by the agent at line {twin.line}; rename one."
            )
    return Declared(tuple(declarations.values()), defaults, models)


def _agent_id(name: str, path: Path) -> str:
    if not _AGENT_ID.fullmatch(name):
        raise ConfigError(
            f"{path.name}: model_config: '{name}' is no id of an agent; write it as GET /agents does: namespace/name."
        )
    return name


def _declare(agent: DeclaredAgent, defaults: DeclaredDefaults, path: Path, line: int, created: int) -> Declaration:
    where = f"{path.name}:{line}: agent '{agent.name}'"
    if agent.kind == "declarative" and not agent.instructions:
        raise ConfigError(f"{where}: instructions are missing; a declarative agent is made of them.")
    if agent.kind == "declarative" and agent.module is not None:
        raise ConfigError(f"{where}: module belongs to kind: sdk; remove it, or write kind: sdk.")
    if agent.kind == "sdk" and agent.module is None:
        raise ConfigError(f'{where}: module is missing; write module: "package.module:attribute".')
    if agent.tools and agent.kind == "sdk":
        raise ConfigError(f"{where}: tools belongs to declarative agents; name them in Python: gateway_tool(...).")
    wrong = next((name for name in agent.tools if not _TOOL_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise ConfigError(f"{where}: tools: {wrong!r} is no name of a tool; tools.yaml and GET /tools have them.")
    slug = slugify(agent.name)
    namespace = slugify(agent.namespace) if agent.namespace else str(defaults.namespace)
    return Declaration(
        namespace=namespace,
        slug=slug,
        name=agent.name,
        line=line,
        label=path.name,
        created=created,
        options=AgentOptions(
            namespace=namespace,
            display_name=agent.display_name,
            description=agent.description,
            model=agent.model or defaults.model,
            upstream=agent.upstream or defaults.upstream,
            max_tool_hops=agent.metadata.max_tool_hops,
            max_completion_tokens=agent.metadata.max_completion_tokens,
            max_turns=agent.metadata.max_turns,
            timeout_s=agent.metadata.timeout_s,
            max_depth=agent.metadata.max_depth,
            max_model_calls=agent.metadata.max_model_calls,
            max_tool_calls=agent.metadata.max_tool_calls,
            max_total_tokens=agent.metadata.max_total_tokens,
            max_cost_usd=agent.metadata.max_cost_usd,
        ),
        instructions=agent.instructions,
        tool_choice=agent.metadata.tool_choice,
        tools=tuple(dict.fromkeys(agent.tools)),
        owned_by=agent.metadata.owned_by,
        dropin=_dropin(agent.module, namespace, slug, path, where) if agent.module is not None else None,
    )


def _dropin(target: str, namespace: str, slug: str, path: Path, where: str) -> DropIn:
    module, _, attribute = target.partition(":")
    found = module_folder(module)
    if found is None:
        raise ConfigError(
            f"{where}: the module '{module}' is not found; it must be importable where the gateway runs (PYTHONPATH)."
        )
    file = found[0] if found[0].suffix == ".py" else found[0] / "__init__.py"
    return DropIn(namespace, slug, file.parent, file.parent, file, f"{module} ({path.name})", module, attribute)


def _lines(path: Path) -> list[int]:
    """Return the line of each agent."""
    tree = yaml.compose(config_text(path), Loader=yaml.SafeLoader)
    for key, value in getattr(tree, "value", ()):
        if key.value == "agents" and isinstance(value, yaml.SequenceNode):
            return [item.start_mark.line + 1 for item in value.value]
    return []
