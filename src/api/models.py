"""GET /v1/models and /v1/models/{id}: the agents and raw upstream models that a key reaches.

Answered from the snapshot alone: nothing is imported, and no disk or upstream is asked.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from api.routing import Request, Response
from gateway.admission import authorize_model
from gateway.errors import ModelNotFound
from gateway.principal import Principal
from gateway.registry.entry import AgentEntry
from gateway.routing.targets import Binding, ListedModel
from gateway.snapshot import Snapshot
from gateway.upstreams.table import UpstreamModel

_HEADERS = ((b"cache-control", b"private, no-cache"),)


async def list_models(request: Request) -> Response:
    """List what the caller reaches, by id; one body per access list and snapshot."""
    principal, snapshot = request.caller, request.gateway.holder.current
    access = snapshot.access
    one = principal.key_id if access.overrides else None  # an override may hold for one key alone
    key = ("models", principal.allow, principal.allow_by_namespace, one, principal.is_admin)
    body = snapshot.derived.get(key)
    if body is None:
        body = snapshot.derived[key] = _encode_list(principal, snapshot)
    return Response(body, headers=_HEADERS)


async def get_model(request: Request) -> Response:
    """Describe one model by its id, alias or unique bare name; the answer holds the canonical id."""
    name, principal = request.path_params["model"], request.caller
    target, snapshot = await _resolve(request, name)
    if isinstance(target, AgentEntry):
        if target.executor is None:
            raise ModelNotFound(
                f"The agent '{target.id}' did not load, so it is not a model now. Its author finds the reason, with "
                "file and line, in GET /agents/errors.",
                param="model",
            )
        found = _agent(target, admin=principal.is_admin)
    else:
        listed = next((model for model in snapshot.routes.list_models() if model.id == name), None)
        found = _upstream(listed or UpstreamModel(name, target.upstream.name, 0, target.model))
    return Response(msgspec.json.encode(found), headers=_HEADERS)


async def _resolve(request: Request, name: str) -> tuple[AgentEntry | Binding, Snapshot]:
    """Resolve as chat does; while agents are first loading, an unknown name may only be early."""
    gateway = request.gateway
    while True:
        snapshot = gateway.holder.current
        try:
            return authorize_model(name, request.caller, snapshot), snapshot
        except ModelNotFound:
            if gateway.loaded.is_set():
                raise
        await gateway.wait_for_agents()


def _encode_list(principal: Principal, snapshot: Snapshot) -> bytes:
    access = snapshot.access
    reaches = partial(access.allows, principal)
    data = [
        _agent(entry, admin=principal.is_admin)
        for entry in snapshot.registry.list_entries()
        if entry.executor is not None and entry.options.expose and access.allows(principal, entry.id)
    ]
    data += [
        _upstream(model)
        for model in snapshot.routes.list_models()
        if reaches(model.id) and snapshot.registry.find_reached(model.id, reaches) is None
    ]
    return msgspec.json.encode({"object": "list", "data": data})


def _agent(entry: AgentEntry, *, admin: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "namespace": entry.namespace,
        "display_name": entry.display_name,
        "kind": entry.kind,
    }
    if admin:
        metadata |= {
            "status": entry.status,
            "source_file": entry.file,
            "content_hash": entry.content_hash,
            "generation": entry.generation,
        }
    return _model(entry.id, entry.created, entry.owned_by, entry.display_name, entry.description, metadata)


def _upstream(model: ListedModel) -> dict[str, Any]:
    metadata = {"namespace": model.owned_by, "display_name": model.name, "kind": "upstream"}
    return _model(model.id, model.created, model.owned_by, model.id, None, metadata)


def _model(
    id_: str, created: int, owned_by: str, name: str, description: str | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "model",
        "created": created,
        "owned_by": owned_by,
        "name": name,
        "description": description,
        "metadata": metadata,
    }
