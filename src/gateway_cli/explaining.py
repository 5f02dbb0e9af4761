"""`gateway explain`: what a model name means here, from the configuration and the folder of agents alone."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.observability.logs import clean_text
from gateway.observability.metrics import Metrics
from gateway.registry.entry import ModelConfig
from gateway.routing.call import Route
from gateway.routing.config import load_routing
from gateway.routing.strategies import Candidate
from gateway.routing.table import Router, RouteTable
from gateway.upstreams.config import UpstreamConfig, load_upstreams
from gateway.upstreams.table import open_upstreams
from gateway_cli.errors import CliError
from gateway_cli.offline import Inspected, inspect_folder
from gateway_cli.settings import read_settings

_KINDS = {
    "agent": "an agent",
    "virtual": "a virtual model of routing.yaml",
    "alias": "an alias of upstreams.yaml",
    "raw": "a raw model of one upstream",
    "shared": "a model name that every upstream listing it serves, in order of priority",
}


@dataclass(frozen=True, slots=True)
class Explained:
    """What a name means. ``kind`` is ``agent``, ``virtual``, ``alias``, ``raw`` or ``shared`` (a plain name)."""

    name: str
    kind: str
    agent: str | None
    strategy: str
    candidates: tuple[dict[str, Any], ...]
    fallbacks: dict[str, tuple[str, ...]]
    retry: dict[str, Any]
    hedge: dict[str, float | None] | None
    settings: dict[str, float | int]


def run(arguments: argparse.Namespace) -> int:
    """Print what a model name means, or where each setting comes from."""
    settings = read_settings(arguments.path)
    if arguments.settings:
        print(render_settings(settings))
    if arguments.model is None:
        if not arguments.settings:
            raise CliError("Name a model to explain, or ask for --settings.", status=2)
        return 0
    explained = explain(arguments.model, settings, inspect_folder(settings))
    print(json.dumps(asdict(explained), indent=2) if arguments.json else render(explained))
    return 0


def explain(name: str, settings: Settings, agents: Sequence[Inspected]) -> Explained:
    """Resolve a name as a request of an unlimited key would; raise `CliError` for one that nobody serves."""
    return asyncio.run(_explain(name, settings, agents))


def render(explained: Explained) -> str:
    """Return the explanation as text."""
    lines = [f"{explained.name} is {_KINDS[explained.kind]}."]
    if explained.agent is not None:
        lines.append(f"  its model calls go to: {explained.agent}")
    lines.append(f"  strategy: {explained.strategy}")
    for number, row in enumerate(explained.candidates, 1):
        times = ", ".join(f"{key} {value:g}" for key, value in row["timeouts"].items())
        lines.append(f"  {number}. {row['model']}  (weight {row['weight']:g}; {times})")
        if row["lent_key_header"] is not None:
            rest = "without one it is left out" if row["allow_server_credentials"] == "never" else "else the gateway's"
            lines.append(f"     with the key that a caller sends in {row['lent_key_header']}, {rest}")
    lines += [f"  fallbacks ({kind}): {', '.join(ids)}" for kind, ids in explained.fallbacks.items()]
    tries = ", ".join(f"{kind} {rule['attempts']}" for kind, rule in explained.retry.items())
    lines.append(f"  tries at one target: {tries}")
    if explained.hedge is not None:
        lines.append(f"  a second target is asked {_hedge_words(explained.hedge)}")
    given = ", ".join(f"{name} {value:g}" for name, value in explained.settings.items())
    if given:
        lines.append(f"  settings of the operator: {given}")
    return "\n".join(lines)


def render_settings(settings: Settings) -> str:
    """Return every setting with where its value comes from; values that are secret are not shown."""
    lines = []
    for item in fields(Settings):
        names = (item.metadata["env"], *item.metadata["aliases"])
        source = next((name for name in names if os.environ.get(name, "").strip()), "default")
        value = getattr(settings, item.name)
        shown = _outline(value) if item.metadata["secret"] and value else value
        lines.append(f"  {names[0]} = {clean_text(str(shown))}  ({source})")
    return "\n".join(["Settings:", *lines])


def _outline(secret: str) -> str:
    """Return what may be seen of a secret: of an address, where it leads; else that it is there."""
    try:
        parts = urlsplit(secret)
        return f"{parts.scheme}://{parts.hostname}/***" if parts.scheme and parts.hostname else "***"
    except ValueError:
        return "***"


async def _explain(name: str, settings: Settings, agents: Sequence[Inspected]) -> Explained:
    config = load_upstreams(settings)
    rules = load_routing(settings, [upstream.name for upstream in config.upstreams])
    async with open_upstreams(config) as upstreams:
        routes = Router(Metrics()).build(upstreams.table, rules)
        agent = next((item for item in agents if name.lower() in (item.name, item.name.partition("/")[2])), None)
        if agent is not None:
            return _of_agent(agent, routes, {item.name: item for item in config.upstreams})
        found, kind = routes.find_model(name), "raw"
        if found is None:
            found, kind = routes.find_shared(name, lambda model_id: True), "shared"
        elif name in rules.models and rules.models[name].targets:
            kind = "virtual"
        elif name in config.aliases:
            kind = "alias"
        if found is None:
            raise CliError(
                f"Nobody serves '{name}': it is no agent of {settings.agents_root()}, no virtual model of routing.yaml "
                "and no model of an upstream. `gateway list` names the agents."
            )
        return _explained(name, kind, None, found.upstream.route, {item.name: item for item in config.upstreams})


def _of_agent(agent: Inspected, routes: RouteTable, upstreams: dict[str, UpstreamConfig]) -> Explained:
    if agent.model is None:
        problem = next((f"{d.message} {d.fix}" for d in agent.diagnostics if d.severity == "error"), "")
        raise CliError(f"'{agent.name}' is an agent without a model of the gateway. {problem}".rstrip())
    asked = agent.model if agent.upstream is None else f"{agent.upstream}/{agent.model}"
    config = agent.model_config or ModelConfig()
    try:
        route = routes.resolve(asked, fallbacks=config.fallbacks).upstream.route
    except ConfigError as error:
        raise CliError(error.message) from error
    explained = _explained(agent.name, "agent", asked, route, upstreams)
    return replace(explained, settings=explained.settings | config.given())


def _explained(
    name: str, kind: str, agent: str | None, route: Route, upstreams: dict[str, UpstreamConfig]
) -> Explained:
    def row(candidate: Candidate) -> dict[str, Any]:
        config = upstreams[candidate.target.name]
        timeouts = config.timeouts
        return {
            "model": candidate.id,
            "weight": candidate.weight,
            "timeouts": {key: getattr(timeouts, key) for key in timeouts.__struct_fields__},
            "allow_server_credentials": config.allow_server_credentials,
            "lent_key_header": config.lent_key_header,
        }

    return Explained(
        name=name,
        kind=kind,
        agent=agent,
        strategy=route.strategy,
        candidates=tuple(map(row, route.candidates)),
        fallbacks={k: tuple(item.id for item in found) for k, found in (route.fallbacks or {}).items()},
        retry={
            key: {"attempts": rule.attempts, "backoff_s": rule.backoff_s}
            for key in route.retry.__struct_fields__
            for rule in (getattr(route.retry, key),)
        },
        settings={} if route.settings is None else route.settings.given(),
        hedge=None if route.hedge is None else {"after_s": route.hedge.after_s, "percentile": route.hedge.percentile},
    )


def _hedge_words(hedge: dict[str, float | None]) -> str:
    after_s, percentile = hedge["after_s"], hedge["percentile"]
    usual = "" if percentile is None else f"percentile {percentile:g} of the latest first-byte times"
    if after_s is None:
        return f"after {usual}"
    return f"after {after_s:g} s" + (f", or {usual} where that is longer" if usual else "")
