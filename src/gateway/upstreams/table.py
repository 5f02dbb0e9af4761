"""Which upstream serves a model name: the frozen table of a snapshot, and the owner that opens and refreshes it."""

from __future__ import annotations

import difflib
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType, TracebackType
from typing import Self

from gateway.errors import ConfigError
from gateway.upstreams.client import HttpUpstream, Upstream, UpstreamMetrics
from gateway.upstreams.config import UpstreamConfig, UpstreamsConfig, is_pattern
from gateway.upstreams.demo import DemoUpstream


@dataclass(frozen=True, slots=True)
class ModelBinding:
    """A model by the name its upstream knows it by."""

    upstream: Upstream
    model: str


@dataclass(frozen=True, slots=True)
class UpstreamModel:
    """A model that clients may call: ``id`` is ``upstream/model`` or an alias, ``created`` epoch seconds.

    ``name`` is what it is called at its upstream, or the alias itself.
    """

    id: str
    owned_by: str
    created: int
    name: str


class UnknownUpstream(ConfigError):
    """An agent or a setting names an upstream that is not configured."""


class UnknownModel(ConfigError):
    """No configured upstream serves a model name."""


@dataclass(frozen=True, slots=True)
class UpstreamTable:
    """The upstreams of one snapshot, in order of priority. ``default`` serves agents that name none.

    ``discovered`` holds what upstreams have listed themselves. It is only ever shown: whether a name is served follows
    from the configuration alone, so that no answer depends on when a list was fetched. ``takes_lent_keys``: callers may
    lend a key of their own to one of them at least.
    """

    upstreams: Mapping[str, Upstream]
    default: Upstream
    aliases: Mapping[str, str]
    default_model: str | None
    created: int
    discovered: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    takes_lent_keys: bool = False

    def resolve(
        self, name: str | None, *, upstream: str | None = None, default_model: str | None = None
    ) -> ModelBinding:
        """Bind the model name of an agent.

        ``None`` is ``default_model``, else the default model of ``upstream`` (or of the default upstream). A name is
        looked for as an exact alias, as ``upstream/model``, literally in ``models``, as an alias pattern, as a pattern
        in ``models``. The demo upstream takes any name. Raises `UnknownUpstream` or `UnknownModel`.
        """
        chosen = self._get(upstream) if upstream is not None else None
        if name is None:
            asked = default_model or (self.default_model if chosen is None else None)
            if asked is None:
                return self._default_of(chosen or self.default)
            name = asked
        found = self._find(name, chosen)
        if found is None and name.startswith("openai/") and "openai" not in self.upstreams:
            # The SDK's own spelling of "this model, on OpenAI".
            found = self._find(name.removeprefix("openai/"), chosen)
        if found is not None:
            return found
        for candidate in (chosen,) if chosen is not None else self.upstreams.values():
            if candidate.config.provider == "demo":
                return ModelBinding(candidate, name)
        raise UnknownModel(self._advice(name, chosen))

    def find_model(self, model_id: str) -> ModelBinding | None:
        """Bind the id of a raw model, or None: an alias that is a name (not a pattern), or ``upstream/model``."""
        target = self.aliases.get(model_id)
        if target is not None and not is_pattern(model_id):
            return self._aliased(target, model_id, None)
        prefix, slash, model = model_id.partition("/")
        upstream = self.upstreams.get(prefix)
        if not slash or not model or upstream is None or not upstream.config.serves(model):
            return None
        return ModelBinding(upstream, model)

    def list_models(self) -> Sequence[UpstreamModel]:
        """Return the models that have a name: configured, discovered and served, then aliases; in order of priority."""
        models = [
            UpstreamModel(f"{upstream.name}/{model}", upstream.name, self.created, model)
            for upstream in self.upstreams.values()
            for model in self._names_of(upstream)
        ]
        taken = {model.id for model in models}
        models += [
            UpstreamModel(alias, target.partition("/")[0], self.created, alias)
            for alias, target in self.aliases.items()
            if not is_pattern(alias) and alias not in taken
        ]
        return models

    def find_pattern(self, name: str) -> str | None:
        """Return the pattern that lets a model through which is not listed (``openai/*``, ``gpt-*``), or None."""
        prefix, _, model = name.partition("/")
        upstream = self.upstreams.get(prefix)
        if upstream is not None:
            found = _pattern_of(upstream, model)
            return f"{prefix}/{found}" if found is not None else None
        patterns = [alias for alias in self.aliases if is_pattern(alias)]
        patterns += [
            item for server in self.upstreams.values() if server.config.models for item in server.config.patterns
        ]
        return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)

    def _names_of(self, upstream: Upstream) -> list[str]:
        names = _literal_models(upstream)
        names += [model for model in self.discovered.get(upstream.name, ()) if upstream.config.serves(model)]
        return list(dict.fromkeys(names))

    def _get(self, name: str) -> Upstream:
        upstream = self.upstreams.get(name)
        if upstream is None:
            near = difflib.get_close_matches(name, self.upstreams, 1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise UnknownUpstream(
                f"There is no upstream '{name}'. {hint}Configured: {', '.join(self.upstreams)}. Correct the name, or "
                "add it under upstreams in upstreams.yaml."
            )
        return upstream

    def _default_of(self, upstream: Upstream) -> ModelBinding:
        literal = _literal_models(upstream)
        if upstream.config.default_model is None and len(literal) != 1:
            raise UnknownModel(
                f"The agent names no model, and the upstream '{upstream.name}' has no default one. Set default_model "
                f"of '{upstream.name}' in upstreams.yaml, or GATEWAY_DEFAULT_MODEL, or the agent's own model."
            )
        return ModelBinding(upstream, literal[0])

    def _find(self, name: str, chosen: Upstream | None) -> ModelBinding | None:
        target = self.aliases.get(name)
        if target is not None and (bound := self._aliased(target, name, chosen)) is not None:
            return bound
        prefix, slash, rest = name.partition("/")
        named = self.upstreams.get(prefix) if slash and rest else None
        if named is not None and chosen in (None, named) and named.config.serves(rest):
            return ModelBinding(named, rest)
        candidates = (chosen,) if chosen is not None else tuple(self.upstreams.values())
        for upstream in candidates:
            if name in upstream.config.named:
                return ModelBinding(upstream, name)
        for pattern, target in self.aliases.items():
            if fnmatchcase(name, pattern) and (bound := self._aliased(target, name, chosen)) is not None:
                return bound
        for upstream in candidates:
            if upstream.config.models is not None and upstream.config.serves(name):
                return ModelBinding(upstream, name)
        if chosen is not None and chosen.config.models is None:
            return ModelBinding(chosen, name)
        return None

    def _aliased(self, target: str, name: str, chosen: Upstream | None) -> ModelBinding | None:
        prefix, _, model = target.partition("/")
        upstream = self.upstreams.get(prefix)
        if upstream is None or chosen not in (None, upstream):
            return None
        return ModelBinding(upstream, name if model == "*" else model)

    def _advice(self, name: str, chosen: Upstream | None) -> str:
        where = f"the upstream '{chosen.name}'" if chosen is not None else "any configured upstream"
        target = chosen or self.default
        example = next(iter(_literal_models(target)), "MODEL")
        known = [model.id for model in self.list_models()]
        near = difflib.get_close_matches(name, [*known, *(m.partition("/")[2] for m in known)], 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return (
            f"The model '{name[:128]}' is not served by {where}.{hint} In upstreams.yaml, either add it to models of "
            f"'{target.name}', or say what it means here under aliases: \"{name[:128]}\": {target.name}/{example}; "
            "or give it targets under models in routing.yaml."
        )


class OpenUpstreams:
    """Owns the transports. ``async with`` it; `table` is current, `refresh` replaces it.

    An upstream whose configuration did not change is the same object in the next table. One that changed or went is
    retired: runs that hold it finish on it, and its sockets close with their last answer.
    """

    def __init__(self, config: UpstreamsConfig, metrics: UpstreamMetrics | None = None) -> None:
        self._config = config
        self._metrics = metrics
        self._retired: weakref.WeakSet[Upstream] = weakref.WeakSet()
        self._table: UpstreamTable | None = None

    @property
    def table(self) -> UpstreamTable:
        """The current table; only inside ``async with``."""
        assert self._table is not None, "the upstreams are not open"
        return self._table

    async def __aenter__(self) -> Self:
        self._table = self._build(self._config, {})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for upstream in (*self.table.upstreams.values(), *self._retired):
            await upstream.aclose()

    def list_discovered(self, upstream: Upstream, models: tuple[str, ...]) -> UpstreamTable | None:
        """Note the list of one upstream; return the new table, or None where nothing changed (or it is not served)."""
        table = self.table
        if table.upstreams.get(upstream.name) is not upstream or table.discovered.get(upstream.name) == models:
            return None
        discovered = MappingProxyType({**table.discovered, upstream.name: models})
        self._table = replace(table, discovered=discovered)
        return self._table

    async def refresh(self, config: UpstreamsConfig) -> UpstreamTable:
        """Return the table of a new configuration; raise `ConfigError` and keep the old one if it is wrong."""
        old = self.table.upstreams
        table = self._build(config, old)
        for name, upstream in old.items():
            if table.upstreams.get(name) is not upstream:
                upstream.retire()
                self._retired.add(upstream)
        self._config, self._table = config, table
        return table

    def _build(self, config: UpstreamsConfig, old: Mapping[str, Upstream]) -> UpstreamTable:
        if not config.upstreams:
            raise ConfigError("upstreams.yaml: there is no upstream; add one, or provider: demo.")
        upstreams = {item.name: self._open(item, old.get(item.name)) for item in config.upstreams}
        first = next(iter(upstreams.values()))
        return UpstreamTable(
            upstreams=MappingProxyType(upstreams),
            default=upstreams[config.default_upstream] if config.default_upstream else first,
            aliases=MappingProxyType(dict(config.aliases)),
            default_model=config.default_model,
            created=int(time.time()),
            takes_lent_keys=any(item.lent_key_header is not None for item in config.upstreams),
            discovered=MappingProxyType(
                {
                    name: models
                    for name, models in (self._table.discovered.items() if self._table is not None else ())
                    if name in upstreams and _same_server(upstreams[name], old[name])
                }
            ),
        )

    def _open(self, config: UpstreamConfig, old: Upstream | None) -> Upstream:
        if old is not None and old.config == config:
            return old
        if config.provider == "demo":
            return DemoUpstream(config, self._metrics)
        return HttpUpstream(config, self._metrics)


def open_upstreams(config: UpstreamsConfig, metrics: UpstreamMetrics | None = None) -> OpenUpstreams:
    """Return the owner of the upstreams' connections: ``async with open_upstreams(config) as upstreams: …``."""
    return OpenUpstreams(config, metrics)


def _same_server(new: Upstream, old: Upstream) -> bool:
    return bool(new.config.discover) and new.base_url == old.base_url


def _literal_models(upstream: Upstream) -> list[str]:
    names = [upstream.config.default_model] if upstream.config.default_model else []
    names += [model for model in upstream.config.models or () if not is_pattern(model)]
    return list(dict.fromkeys(names))


def _pattern_of(upstream: Upstream, model: str) -> str | None:
    return next((pattern for pattern in upstream.config.patterns if fnmatchcase(model, pattern)), None)
