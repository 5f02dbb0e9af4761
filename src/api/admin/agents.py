"""GET /agents, POST /agents/refresh, GET /agents/errors: the registry as its operator sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from api import states
from api.admin.moments import iso
from api.admin.refreshing import refresh
from api.shared import recent_failures
from gateway.observability.recent import CAPACITY, ErrorRecord
from gateway.registry.entry import Diagnostic

if TYPE_CHECKING:  # the composition root imports the route table
    from api.bootstrap import Gateway


class AgentRecord(BaseModel):
    """One agent: ready, serving its last good generation (``stale``), or only its error."""

    name: str
    namespace: str
    qualified_name: str = Field(description="The model id that a client sends.")
    display_name: str
    kind: Literal["sdk", "declarative"]
    model: str | None
    upstream: str | None
    description: str | None
    tools: list[str]
    metadata: dict[str, Any] = Field(description="Where it comes from, and its diagnostics with file, line and fix.")
    status: Literal["ready", "stale", "error"]
    error: str | None = Field(description="What is wrong and what mends it; null when nothing is.")


_EVENTS = {"tool_not_allowed": "tool.module.blocked"}
"""The log's own word, where it is not that of a drop-in."""


class ErrorEntry(BaseModel):
    """One failure of discovery or of a run."""

    timestamp: str = Field(description="UTC, ISO 8601.")
    event: str
    message: str
    request_id: str | None
    agent_id: str | None
    module_path: str | None
    error_stage: str | None
    details: dict[str, Any]


async def list_agents(request: Request) -> list[AgentRecord]:
    """List every agent with its status, those that did not load included; where workers differ, the worst."""
    return await _records(_gateway(request))


async def refresh_agents(request: Request, response: Response) -> list[AgentRecord]:
    """Look at the drop-in folders and `agents.yaml` again, load what changed in every worker, and list every agent."""
    gateway = _gateway(request)
    await refresh(gateway, "agents", response)
    return await _records(gateway)


async def list_errors(request: Request) -> list[ErrorEntry]:
    """List the last failures of discovery and of runs, newest first."""
    gateway = _gateway(request)
    drop_ins, runs = await recent_failures(gateway)
    found = [(item.occurred_at, _discovery_error(item)) for item in drop_ins]
    found += [(item.occurred_at, _run_error(item)) for item in runs]
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)][:CAPACITY]


def _gateway(request: Request) -> Gateway:
    return cast("Gateway", request.state.gateway)


async def _records(gateway: Gateway) -> list[AgentRecord]:
    return [_record(found) for found in await states.list_agents(gateway)]


def _record(found: states.SharedAgent) -> AgentRecord:
    entry = found.state
    diagnostics = entry.diagnostics
    first = next((item for item in diagnostics if item.severity == "error"), None)
    metadata: dict[str, Any] = {
        "source": entry.source,
        "file": entry.file,
        "created": entry.created,
        "content_hash": entry.content_hash,
        "generation": entry.generation,
        "aliases": list(entry.aliases),
        "expose": entry.expose,
    }
    if entry.model_config is not None:
        metadata["model_config"] = msgspec.to_builtins(entry.model_config)
    if found.workers:
        metadata |= {"workers": [msgspec.to_builtins(here) for here in found.workers], "workers_agree": found.agree}
    if first is not None:
        metadata |= _diagnostic(first)
    if diagnostics:
        metadata["diagnostics"] = [_diagnostic(item) for item in diagnostics]
    return AgentRecord(
        name=entry.name,
        namespace=entry.namespace,
        qualified_name=entry.id,
        display_name=entry.display_name,
        kind=entry.kind,
        model=entry.model,
        upstream=entry.upstream,
        description=entry.description,
        tools=list(entry.tools),
        metadata=metadata,
        status=entry.status,
        error=f"{first.message} {first.fix}".strip() if first is not None and entry.status != "ready" else None,
    )


def _diagnostic(item: Diagnostic) -> dict[str, Any]:
    return {
        "kind": item.kind,
        "code": item.code,
        "severity": item.severity,
        "message": item.message,
        "fix": item.fix,
        "file": item.file,
        "line": item.line,
        "module": item.module,
        "cause": item.cause,
        "occurred_at": iso(item.occurred_at),
    }


def _discovery_error(item: Diagnostic) -> ErrorEntry:
    return ErrorEntry(
        timestamp=iso(item.occurred_at),
        event=_EVENTS.get(item.code) or ("agent.dropin.blocked" if item.kind == "security" else "agent.dropin.failed"),
        message=item.message,
        request_id=None,
        agent_id=None,
        module_path=item.module or item.file,
        error_stage=item.kind,
        details={
            "code": item.code,
            "severity": item.severity,
            "file": item.file,
            "line": item.line,
            "cause": item.cause,
            "fix": item.fix,
        },
    )


def _run_error(item: ErrorRecord) -> ErrorEntry:
    return ErrorEntry(
        timestamp=iso(item.occurred_at),
        event=item.event,
        message=item.message,
        request_id=item.request_id,
        agent_id=item.agent_id,
        module_path=item.module_path,
        error_stage=item.error_stage,
        details=dict(item.details),
    )
