"""Admission: the one door into a run. Name → entry, then the caller's right; the first refusal wins."""

from __future__ import annotations

import difflib
import logging
import time
import uuid
from collections.abc import Mapping
from functools import partial
from itertools import chain
from types import MappingProxyType

from msgspec import Raw, Struct

from gateway.caching.cache import CacheTable
from gateway.caching.directives import read_cache_control
from gateway.caller_context import NOTHING, CallerContext, read_caller_context
from gateway.chat import (
    CHAT_PATH,
    STREAMED_PATHS,
    ChatRequest,
    RelayRequest,
    decode_chat,
    decode_model,
    decode_relay,
    decode_value,
)
from gateway.config import Settings
from gateway.errors import (
    AgentMisconfigured,
    ConfigError,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    PermissionDenied,
    UnsupportedValue,
)
from gateway.observability.logs import keep_out, log_event
from gateway.observability.metrics import Metrics
from gateway.principal import Principal
from gateway.registry.entry import AgentEntry
from gateway.routing.bodies import with_settings
from gateway.routing.routed import RoutedBinding
from gateway.routing.targets import Binding
from gateway.run import Executor, Run
from gateway.runs.cached import CachedExecutor
from gateway.runs.relay import RelayExecutor
from gateway.snapshot import Snapshot
from gateway.upstreams.presets import PRESETS

_log = logging.getLogger("gateway.security")


_FURTHER_MODELS = frozenset(preset.further_models for preset in PRESETS.values() if preset.further_models is not None)
_MOST_FURTHER = 100
_LONGEST_USER = 256
_MOST_REACHED = 4_096
_NONE: Mapping[str, str] = MappingProxyType({})


class Call(Struct, frozen=True):
    """One request at the door: who, what, and its headers, of which an agent sees those on the list.

    ``body`` is the JSON text that ``fields`` was cut from, ``path`` the surface, without ``/v1``.
    ``upstream`` is the one the caller wants, instead of what routing would choose, ``end_user`` whom a header names.
    ``run_id`` None: a new one.
    """

    principal: Principal
    request_id: str
    body: bytes
    fields: dict[str, Raw]
    headers: Mapping[str, str]
    session_id: str | None = None
    path: str = CHAT_PATH
    upstream: str | None = None
    cache_control: str | None = None
    end_user: str | None = None
    run_id: uuid.UUID | None = None


def admit(call: Call, snapshot: Snapshot, settings: Settings) -> tuple[Run, Executor]:
    """Return the run and what will execute it.

    Raises `ModelNotFound`, `ModelNotAllowed` (or `ModelNotFound` with the same words where the key may not know
    what exists), `AgentMisconfigured` for an agent that never loaded, `InvalidRequest` for its fields.
    """
    name = decode_model(call.fields)
    target = authorize_model(name, call.principal, snapshot, upstream=call.upstream)
    request: ChatRequest | RelayRequest
    executor: Executor
    metadata = headers = _NONE
    caller = NOTHING
    if isinstance(target, AgentEntry):
        if call.path != CHAT_PATH:
            raise agents_chat_only(target)
        if target.executor is None:
            raise AgentMisconfigured(
                f"The agent '{target.id}' did not load, so it cannot answer. Its author finds the reason, with file "
                "and line, in GET /agents/errors."
            )
        request = decode_chat(call.body, call.fields)
        model, executor, streamed = target.id, target.executor, bool(request.stream)
        deadline_s = min(target.options.timeout_s or settings.run_timeout_s, settings.run_timeout_s)
        metadata = request.metadata or {}
        headers = {name: call.headers[name] for name in settings.header_allowlist if name in call.headers}
        caller = accept_caller_context(call.headers, call.principal, snapshot.metrics)
    else:
        if not _FURTHER_MODELS.isdisjoint(call.fields):
            _authorize_further(call, target, snapshot)
        if sent := lent_keys(call.headers, call.principal, snapshot):
            target = target._replace(upstream=target.upstream.for_caller(sent))
        request = decode_relay(name, _filled(call, target), call.path)
        model, executor, streamed = name, RelayExecutor(target, meter=snapshot.meter), request.stream
        if snapshot.cache is not None:
            executor = _cached(executor, target, name, call, snapshot.cache)
        deadline_s = settings.run_timeout_s
    run = Run(
        id=call.run_id or uuid.uuid4(),
        request_id=call.request_id,
        principal=call.principal,
        model=model,
        request=request,
        streamed=streamed,
        created=int(time.time()),
        deadline_s=deadline_s,
        session_id=call.session_id,
        metadata=metadata,
        headers=headers,
        upstream=call.upstream,
        end_user=call.end_user or end_user_of(call.fields),
        binding=None if isinstance(target, AgentEntry) else target,
        caller=caller,
    )
    return run, executor


def _filled(call: Call, target: RoutedBinding) -> dict[str, Raw]:
    """Return the fields of a request, with the operator's settings of that model where it has none."""
    settings = target.upstream.route.settings
    return call.fields if settings is None or call.path not in STREAMED_PATHS else with_settings(call.fields, settings)


def accept_caller_context(headers: Mapping[str, str], principal: Principal, metrics: Metrics) -> CallerContext:
    """Return what a caller sent along for agents and tools, and keep its secrets out of every line of the log.

    Raises `InvalidRequest` for a header that makes no sense. One that would be an address is left out, and logged.
    """
    caller = read_caller_context(headers)
    if caller.sent:
        metrics.credential_used("received", len(caller.sent))
    if caller.secrets:
        keep_out(caller.secrets)
    if caller.refused:
        metrics.credential_used("refused", len(caller.refused))
        log_event(
            _log,
            "network.access.denied",
            level=logging.WARNING,
            message="Headers of credentials that name an address are left out: a caller does not choose where to.",
            key_id=principal.key_id,
            headers=list(caller.refused),
        )
    return caller


def lent_keys(headers: Mapping[str, str], principal: Principal, snapshot: Snapshot) -> Mapping[str, str]:
    """Return the headers of credentials of a relayed call, where an upstream takes keys of callers; else nothing."""
    if not snapshot.upstreams.takes_lent_keys:
        return _NONE
    return accept_caller_context(headers, principal, snapshot.metrics).sent


def end_user_of(fields: Mapping[str, Raw]) -> str | None:
    """Return whom a request is for: its field ``user``, or the ``id`` of it where that is an object."""
    raw = fields.get("user")
    if raw is None:
        return None
    value = decode_value(raw, "user")
    if isinstance(value, dict):
        value = value.get("id")
    return value[:_LONGEST_USER] if isinstance(value, str) and value else None


def authorize_model(
    name: str, principal: Principal, snapshot: Snapshot, *, upstream: str | None = None
) -> AgentEntry | RoutedBinding:
    """Resolve a model name and check the caller's right to it; the right is judged on the canonical id.

    ``upstream`` is the caller's own choice; `PermissionDenied` for a key that does not reach all of that upstream.
    """
    if upstream is not None:
        _authorize_choice(upstream, principal, snapshot)
    else:
        known = snapshot.reached.get((principal.key_id, name))
        if known is not None and known[0] is principal:
            snapshot.metrics.access_decided("model", True)
            return RoutedBinding.of(known[1])
    if principal.is_drop_in:
        try:
            return snapshot.routes.resolve(name, upstream=upstream)
        except ConfigError as error:
            raise ModelNotFound(error.message, param="model") from error
    canonical, target = find_target(name, principal, snapshot, upstream=upstream)
    if target is None:
        raise ModelNotFound(_not_found(name, principal, snapshot), param="model")
    _authorize_canonical(name, canonical, principal, snapshot)
    if isinstance(target, AgentEntry):
        return target
    if upstream is not None and canonical == name:
        return snapshot.routes.find_model(name, upstream=upstream) or target
    if upstream is None and not snapshot.access.overrides and not _log.isEnabledFor(logging.DEBUG):
        if len(snapshot.reached) >= _MOST_REACHED:
            snapshot.reached.clear()
        snapshot.reached[principal.key_id, name] = principal, target.upstream.route
    return target


def _authorize_canonical(
    name: str, canonical: str, principal: Principal, snapshot: Snapshot, *, param: str = "model"
) -> None:
    allowed = _decide(principal, canonical, snapshot)
    snapshot.metrics.access_decided("model", allowed)
    if allowed:
        return
    if snapshot.keyring.hide_foreign_models:
        raise ModelNotFound(_not_found(name, principal, snapshot), param=param)
    raise ModelNotAllowed(
        f"The key '{principal.key_id}' does not reach the model '{canonical}'. Ask its owner to add a pattern that "
        "matches it to allow_agents, or use a model from GET /v1/models.",
        param=param,
    )


def _authorize_further(call: Call, target: RoutedBinding, snapshot: Snapshot) -> None:
    """Judge the models that a request names beside its own, for an upstream that may answer with them instead."""
    if call.principal.is_drop_in:
        return
    route = target.upstream.route
    for item in chain(route.candidates, *(route.fallbacks or {}).values()):
        field = PRESETS[item.target.config.provider].further_models
        if field is None or field not in call.fields:
            continue
        names = decode_value(call.fields[field], field)
        if names is None:
            continue
        if not isinstance(names, list) or len(names) > _MOST_FURTHER or not all(isinstance(n, str) for n in names):
            raise InvalidRequest(f"'{field}' must be a list of up to {_MOST_FURTHER} names of models.", param=field)
        for name in names:
            canonical = f"{item.target.name}/{name}"
            _authorize_canonical(canonical, canonical, call.principal, snapshot, param=field)


def find_target(
    name: str, principal: Principal, snapshot: Snapshot, *, upstream: str | None = None
) -> tuple[str, AgentEntry | RoutedBinding | None]:
    """Return what a name means to a caller, by the canonical id that its right is judged on; None for nothing.

    An id and an ``upstream/model`` mean one thing to everybody. A shorter name is looked for among what the caller
    reaches; only where that has none is it another's, which is then refused.
    """
    routes, reaches = snapshot.routes, partial(snapshot.access.allows, principal)
    entry = snapshot.registry.find_reached(name, reaches)
    if entry is not None:
        return entry.id, entry
    raw = routes.find_model(name)
    if raw is not None and reaches(name):
        return name, raw
    # A plain name: whoever lists the model serves it, as far as the key reaches ``upstream/model``.
    shared = routes.find_shared(name, reaches, upstream=upstream) if raw is None else None
    if shared is not None:
        return shared.upstream.route.candidates[0].id, shared
    foreign = snapshot.registry.find(name)
    return (name, raw) if foreign is None else (foreign.id, foreign)


def _cached(executor: Executor, target: Binding, name: str, call: Call, table: CacheTable) -> Executor:
    rule = table.rules.find(name)
    if rule is None:
        return executor
    return CachedExecutor(executor, target, table.cache, rule, read_cache_control(call.cache_control))


def _authorize_choice(upstream: str, principal: Principal, snapshot: Snapshot) -> None:
    allowed = principal.is_admin or snapshot.access.allows_all(principal, f"{upstream}/")
    snapshot.metrics.access_decided("upstream", allowed)
    if not allowed:
        raise PermissionDenied(
            f"The key '{principal.key_id}' may not choose an upstream: x-gateway-upstream is for admin keys and for "
            f"keys that reach all of '{upstream[:64]}/*'. Leave the header out."
        )


def agents_chat_only(entry: AgentEntry) -> UnsupportedValue:
    """Return the refusal of an agent's id on a surface that only raw models have."""
    return UnsupportedValue(
        f"The model '{entry.id}' is an agent, and agents answer on /v1/chat/completions. Name a raw model here: one "
        "that GET /v1/models lists with the kind 'upstream'.",
        param="model",
    )


def _decide(principal: Principal, model_id: str, snapshot: Snapshot) -> bool:
    """Return whether the principal reaches a model that exists, and log the decision: a denial, or a grant by override.

    A grant by the key itself is logged at the level DEBUG; the run's own line names key and model in any case.
    """
    access = snapshot.access
    if not access.overrides and access.allows(principal, model_id) and not _log.isEnabledFor(logging.DEBUG):
        return True
    decision = access.decide(principal, model_id)
    usual = decision.source in ("api_key", "namespace_default")
    log_event(
        _log,
        "agent.security.decision",
        level=logging.DEBUG if usual else logging.INFO,
        key_id=principal.key_id,
        agent=model_id,
        namespace=model_id.partition("/")[0],
        decision="allow" if decision.allowed else "deny",
        source=decision.source,
        pattern=decision.pattern,
        override_id=decision.override.id if decision.override else None,
    )
    return decision.allowed


def _not_found(name: str, principal: Principal, snapshot: Snapshot) -> str:
    """Name the nearest model that *this* caller may know of; never another."""
    known = [entry.id for entry in snapshot.registry.list_entries() if snapshot.access.allows(principal, entry.id)]
    near = difflib.get_close_matches(name.lower(), known, 1, 0.6)
    hint = f" Did you mean '{near[0]}'?" if near else " GET /v1/models lists what your key reaches."
    return f"The model '{name[:128]}' does not exist or you do not have access to it.{hint}"
