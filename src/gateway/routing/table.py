"""RouteTable: which route a model name takes, in one snapshot; Router: what routing knows beyond snapshots."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gateway.errors import ConfigError, UnsupportedValue
from gateway.observability.logs import log_event
from gateway.routing.budget import RetryBudget
from gateway.routing.call import Fallback, Route, RoutingMetrics
from gateway.routing.config import ModelRouting, RoutingConfig
from gateway.routing.health import BreakerState, TargetHealth
from gateway.routing.routed import RoutedBinding
from gateway.routing.strategies import Candidate
from gateway.routing.targets import ListedModel, Server, ServerTable

K = TypeVar("K")

_LOG = logging.getLogger(__name__)
_MOST = 4_096
"""Routes and health records that are kept; with wildcards, callers choose the names."""

_BREAKER_STATES: dict[BreakerState, int] = {"closed": 0, "half_open": 1, "open": 2}


class Router:
    """Owns breakers, cool-downs, latencies and retry budgets: they outlive a reload of any file."""

    def __init__(
        self,
        metrics: RoutingMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        self.metrics = metrics
        self.chance = chance or random.Random()
        self._clock = clock
        self._config = RoutingConfig()
        self._health: dict[tuple[str, str], tuple[Server, TargetHealth]] = {}

    def build(self, servers: ServerTable, config: RoutingConfig | None = None) -> RouteTable:
        """Return the routes of one snapshot; without ``config``, by the rules of the latest."""
        config = self._config = config or self._config
        for _, health in self._health.values():
            health.configure(config.breaker, config.cooldown, config.retry_budget)
        return RouteTable(servers, config, self)

    def health_of(self, target: Server, model: str, config: RoutingConfig) -> TargetHealth:
        """Return what is known of a model of an upstream; an upstream that was reconfigured starts anew."""
        key = (target.name, model)
        known = self._health.pop(key, None)
        if known is None or known[0] is not target:
            health = TargetHealth(
                target.name,
                model,
                breaker=config.breaker,
                cooldown=config.cooldown,
                budget=RetryBudget(config.retry_budget),
                clock=self._clock,
                watcher=self,
            )
            if known is not None and known[1].is_open:
                self.metrics.routing_breaker(target.name, model, _BREAKER_STATES["closed"])
            known = (target, health)
        self._health[key] = known
        if len(self._health) > _MOST:
            self._health.pop(next(iter(self._health)))
        return known[1]

    def breaker_changed(self, upstream: str, model: str, state: BreakerState) -> None:
        """Note the new state of a breaker."""
        self.metrics.routing_breaker(upstream, model, _BREAKER_STATES[state])
        if state == "open":
            log_event(_LOG, "routing.breaker.opened", level=logging.WARNING, upstream=upstream, upstream_model=model)
        elif state == "closed":
            log_event(_LOG, "routing.breaker.closed", upstream=upstream, upstream_model=model)


@dataclass(frozen=True, slots=True)
class VirtualModel:
    """A row of the model list that `routing.yaml` made."""

    id: str
    owned_by: str
    created: int
    name: str


class RouteTable:
    """The upstream table with routing on top (`ModelTable`)."""

    def __init__(self, servers: ServerTable, config: RoutingConfig, router: Router) -> None:
        self._servers, self._config, self._router = servers, config, router
        self._agent_routes: dict[tuple[str | None, str | None, str | None, tuple[str, ...]], Route] = {}
        self._raw_routes: dict[tuple[str, str | None], Route] = {}
        self._created = int(time.time())
        self._listed: frozenset[str] | None = None

    def resolve(
        self,
        name: str | None,
        *,
        upstream: str | None = None,
        default_model: str | None = None,
        fallbacks: tuple[str, ...] = (),
    ) -> RoutedBinding:
        """Bind the model name of an agent: a virtual model, or what the upstream table makes of it.

        A plain model name, or none, may be served by every upstream that lists it, in order of priority; a name with
        its upstream, an alias or an agent's own ``upstream`` is that upstream's alone. ``fallbacks`` are names, too,
        and stand instead of those that `routing.yaml` gives the model. Raises the table's errors.
        """
        key = (name, upstream, default_model, fallbacks)
        route = self._agent_routes.get(key)
        if route is None:
            route = self._agent_route(name, upstream, default_model)
            if fallbacks:
                kinds = {**(route.fallbacks or {}), "any": self._named_stand_ins(fallbacks, route)}
                route = replace(route, fallbacks=kinds)
            self._agent_routes[_room(self._agent_routes, key)] = route
        return RoutedBinding.of(route)

    def find_model(self, model_id: str, *, upstream: str | None = None) -> RoutedBinding | None:
        """Bind a virtual model or ``upstream/model``, or return None.

        ``upstream`` is the caller's choice: `UnsupportedValue` if the model is not to be had there.
        """
        key = (model_id, upstream)
        route = self._raw_routes.get(key)
        if route is None:
            route = self._raw_route(model_id)
            if route is None:
                return None
            if upstream is not None:
                route = self._pinned(route, upstream)
            self._raw_routes[_room(self._raw_routes, key)] = route
        return RoutedBinding.of(route)

    def find_shared(
        self, name: str, allows: Callable[[str], bool], *, upstream: str | None = None
    ) -> RoutedBinding | None:
        """Bind a plain model name to the upstreams that list it, as far as the caller may reach them, or return None.

        ``allows`` is asked for ``upstream/model``.
        """
        chosen = [
            server
            for server in self._servers.upstreams.values()
            if upstream in (None, server.name) and _lists(server, name) and allows(f"{server.name}/{name}")
        ]
        if not chosen:
            return None
        candidates = [self._candidate(server, name) for server in chosen]
        return RoutedBinding.of(self._route(name, candidates, ModelRouting()))

    def list_models(self) -> Sequence[ListedModel]:
        """Return the virtual models, then those that the upstreams are known to have."""
        virtual = [
            VirtualModel(name, "gateway", self._created, name)
            for name, rules in self._config.models.items()
            if rules.targets
        ]
        names = {model.id for model in virtual}
        return [*virtual, *(model for model in self._servers.list_models() if model.id not in names)]

    def label_of(self, name: str) -> str | None:
        """Return what a model is counted under: its name where it is listed, else the pattern that lets it through.

        A pattern, and an upstream without a list, take whatever a client makes up: that must not make time series.
        """
        if self._listed is None:
            self._listed = frozenset(name for model in self.list_models() for name in (model.id, model.name))
        return name if name in self._listed else self._servers.find_pattern(name)

    @property
    def health_interval_s(self) -> float:
        """Seconds between two health checks."""
        return self._config.health_interval_s

    @property
    def servers(self) -> ServerTable:
        """The upstream table underneath."""
        return self._servers

    def _agent_route(self, name: str | None, upstream: str | None, default_model: str | None) -> Route:
        asked = name or default_model or (self._servers.default_model if upstream is None else None)
        rules = self._config.models.get(asked) if asked is not None else None
        if asked is not None and rules is not None and rules.targets:
            candidates = [item for item in self._targets(rules) if upstream in (None, item.target.name)]
            if candidates:
                return self._route(asked, _of_one_api(candidates), rules, agents=True)
        first = self._servers.resolve(name, upstream=upstream, default_model=default_model)
        servers = [first.upstream]
        if upstream is None and asked in (None, first.model):
            servers += [
                server
                for server in self._servers.upstreams.values()
                if server is not first.upstream and server.api == first.upstream.api and _lists(server, first.model)
            ]
        model_id = f"{first.upstream.name}/{first.model}"
        rules = self._config.models.get(model_id, ModelRouting())
        name = first.model if len(servers) > 1 else model_id
        return self._route(name, [self._candidate(server, first.model) for server in servers], rules, agents=True)

    def _raw_route(self, model_id: str) -> Route | None:
        rules = self._config.models.get(model_id, ModelRouting())
        if rules.targets:
            return self._route(model_id, self._targets(rules), rules)
        found = self._servers.find_model(model_id)
        if found is None:
            return None
        if model_id not in self._config.models:
            rules = self._config.models.get(f"{found.upstream.name}/{found.model}", rules)
        return self._route(model_id, [self._candidate(found.upstream, found.model)], rules)

    def _pinned(self, route: Route, upstream: str) -> Route:
        """Return the part of a route that is on one upstream, without any fallback."""
        mine = tuple(item for item in route.candidates if item.target.name == upstream)
        server = self._servers.upstreams.get(upstream)
        if not mine and server is not None:
            same = self._servers.find_model(f"{upstream}/{route.model}")
            if same is not None:
                mine = (self._candidate(same.upstream, same.model),)
        if not mine:
            raise UnsupportedValue(
                f"'x-gateway-upstream: {upstream[:64]}' cannot be honoured: the model '{route.name}' is not to be had "
                "there. Leave the header out, or name an upstream that serves the model.",
                param=None,
            )
        return replace(route, candidates=mine, fallbacks=None, hedge=None)

    def _targets(self, rules: ModelRouting) -> list[Candidate]:
        return [found for row in rules.targets if (found := self._find(row.model, row.weight)) is not None]

    def _find(self, model_id: str, weight: float = 1.0) -> Candidate | None:
        upstream, _, model = model_id.partition("/")
        server = self._servers.upstreams.get(upstream)
        return self._candidate(server, model, weight) if server is not None else None

    def _candidate(self, server: Server, model: str, weight: float = 1.0) -> Candidate:
        return Candidate(server, model, self._router.health_of(server, model, self._config), weight)

    def _route(self, name: str, candidates: Iterable[Candidate], rules: ModelRouting, *, agents: bool = False) -> Route:
        found = tuple(candidates)
        kinds: dict[Fallback, tuple[str, ...]] = {
            "any": rules.fallbacks,
            "context_length": rules.context_length_fallbacks,
            "content_policy": rules.content_policy_fallbacks,
        }
        fallbacks = {kind: self._stand_ins(names, found[0], agents=agents) for kind, names in kinds.items() if names}
        return Route(
            name,
            found,
            rules.retry or self._config.retry,
            self._router,
            self._router.chance,
            rules.strategy,
            fallbacks or None,
            rules.hedge,
            rules.settings,
        )

    def _named_stand_ins(self, names: Sequence[str], route: Route) -> tuple[Candidate, ...]:
        """Return what stands in for an agent's model, by names as an agent's; each must be of use."""
        api = route.candidates[0].target.api
        found: list[Candidate] = []
        for name in names:
            mine = [item for item in self.resolve(name).upstream.route.candidates if item.target.api == api]
            if not mine:
                raise ConfigError(
                    f"The fallback '{name}' cannot stand in for '{route.name}': its upstream does not speak the same "
                    f"API ({api}). Name a model of an upstream that does."
                )
            found += mine
        return tuple(found)

    def _stand_ins(self, names: Sequence[str], first: Candidate, *, agents: bool) -> tuple[Candidate, ...]:
        found: list[Candidate] = []
        for name in names:
            rules = self._config.models.get(name)
            if rules is not None and rules.targets:
                found += self._targets(rules)
            elif (candidate := self._find(name)) is not None:
                found.append(candidate)
        return tuple(item for item in found if not agents or item.target.api == first.target.api)


def _of_one_api(candidates: list[Candidate]) -> list[Candidate]:
    """Return those that speak the first one's API: an agent's request is written for one."""
    return [item for item in candidates if item.target.api == candidates[0].target.api]


def _lists(server: Server, model: str) -> bool:
    """Whether an upstream is configured to serve a model, rather than to take whatever name it is given."""
    config = server.config
    if config.provider == "demo":
        return False
    return model in config.named or (config.models is not None and config.serves(model))


def _room(routes: dict[K, Route], key: K) -> K:
    if len(routes) >= _MOST:
        routes.clear()
    return key
