"""Admission: the one door into a run. Name → entry, then the caller's right; the first refusal wins."""

from __future__ import annotations

import difflib
import time
import uuid
from collections.abc import Mapping

from msgspec import Raw, Struct

from gateway.chat import CHAT_PATH, ChatRequest, RelayRequest, decode_chat, decode_model, decode_relay
from gateway.config import Settings
from gateway.errors import (
    AgentMisconfigured,
    ConfigError,
    ModelNotAllowed,
    ModelNotFound,
    PermissionDenied,
    UnsupportedValue,
)
from gateway.principal import Principal
from gateway.registry.entry import AgentEntry
from gateway.routing.targets import Binding
from gateway.run import Executor, Run
from gateway.runs.relay import RelayExecutor
from gateway.security.acl import allows
from gateway.snapshot import Snapshot


class Call(Struct, frozen=True):
    """One request at the door: who, what, and the headers an agent may see.

    ``body`` is the JSON text that ``fields`` was cut from, ``path`` the surface, without ``/v1``.
    ``upstream`` is the one the caller wants, instead of what routing would choose.
    """

    principal: Principal
    request_id: str
    body: bytes
    fields: dict[str, Raw]
    headers: Mapping[str, str]
    session_id: str | None = None
    path: str = CHAT_PATH
    upstream: str | None = None


def admit(call: Call, snapshot: Snapshot, settings: Settings) -> tuple[Run, Executor]:
    """Return the run and what will execute it.

    Raises `ModelNotFound`, `ModelNotAllowed` (or `ModelNotFound` with the same words where the key may not know
    what exists), `AgentMisconfigured` for an agent that never loaded, `InvalidRequest` for its fields.
    """
    name = decode_model(call.fields)
    target = authorize_model(name, call.principal, snapshot, upstream=call.upstream)
    request: ChatRequest | RelayRequest
    executor: Executor
    metadata: Mapping[str, str] = {}
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
    else:
        request = decode_relay(name, call.fields, call.path)
        model, executor, streamed = name, RelayExecutor(target, meter=snapshot.meter), request.stream
        deadline_s = settings.run_timeout_s
    run = Run(
        id=uuid.uuid4(),
        request_id=call.request_id,
        principal=call.principal,
        model=model,
        request=request,
        streamed=streamed,
        created=int(time.time()),
        deadline_s=deadline_s,
        session_id=call.session_id,
        metadata=metadata,
        headers=call.headers,
        upstream=call.upstream,
    )
    return run, executor


def authorize_model(
    name: str, principal: Principal, snapshot: Snapshot, *, upstream: str | None = None
) -> AgentEntry | Binding:
    """Resolve a model name and check the caller's right to it; the right is judged on the canonical id.

    ``upstream`` is the caller's own choice; `PermissionDenied` for a key that does not reach all of that upstream.
    """
    if upstream is not None:
        _authorize_choice(upstream, principal)
    if principal.is_drop_in:
        try:
            return snapshot.routes.resolve(name, upstream=upstream)
        except ConfigError as error:
            raise ModelNotFound(error.message, param="model") from error
    entry = snapshot.registry.find(name)
    target: AgentEntry | Binding | None = entry or snapshot.routes.find_model(name)
    if target is None:
        # A plain name: whoever lists the model serves it, as far as the key reaches ``upstream/model``.
        shared = snapshot.routes.find_shared(name, lambda model_id: allows(principal, model_id), upstream=upstream)
        if shared is not None:
            return shared
    canonical = entry.id if entry else name
    if target is None:
        raise ModelNotFound(_not_found(name, principal, snapshot), param="model")
    if not allows(principal, canonical):
        if snapshot.keyring.hide_foreign_models:
            raise ModelNotFound(_not_found(name, principal, snapshot), param="model")
        raise ModelNotAllowed(
            f"The key '{principal.key_id}' does not reach the model '{canonical}'. Ask its owner to add a pattern that "
            "matches it to allow_agents, or use a model from GET /v1/models.",
            param="model",
        )
    if entry is None and upstream is not None:
        return snapshot.routes.find_model(name, upstream=upstream) or target
    return target


def _authorize_choice(upstream: str, principal: Principal) -> None:
    if not (principal.is_admin or allows(principal, f"{upstream}/*")):
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


def _not_found(name: str, principal: Principal, snapshot: Snapshot) -> str:
    """Name the nearest model that *this* caller may know of; never another."""
    known = [entry.id for entry in snapshot.registry.list_entries() if allows(principal, entry.id)]
    near = difflib.get_close_matches(name.lower(), known, 1, 0.6)
    hint = f" Did you mean '{near[0]}'?" if near else " GET /v1/models lists what your key reaches."
    return f"The model '{name[:128]}' does not exist or you do not have access to it.{hint}"
