"""GET /tools and /tools/search, POST /tools/refresh and /tools/{name}/invoke: the tools as a key reaches them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Struct

from api.dependencies import read_body, session_id
from api.routing import Request, Response
from gateway.admission import accept_caller_context
from gateway.errors import BodyTooLarge, ConfigError, InvalidRequest, ToolNotFound
from gateway.tools.manager import LARGEST_ARGUMENTS
from gateway.tools.port import ProviderHealth, ToolResult
from gateway.tools.table import Tool, ToolCaller

_MOST_FOUND = 100
_WORD = re.compile(r"[^\W_]+")
_HEADERS = ((b"cache-control", b"private, no-cache"),)


class InvokeRequest(Struct, forbid_unknown_fields=True):
    """The body of a direct call: the tool's arguments, and who they are for (``user``), if that is known."""

    arguments: dict[str, Any] = {}
    user: str | None = None


async def list_tools(request: Request) -> Response:
    """List the tools that the key reaches, with schema and health; an admin sees all, and what is wrong with them."""
    return _listed(request)


async def get_tool(request: Request) -> Response:
    """Show one tool that the key reaches."""
    tool = find_tool(request, request.path_params["name"])
    principal = request.caller
    if not principal.is_admin and not tool.is_reached_by(principal):
        raise _not_found(tool.name)
    return Response(msgspec.json.encode(_record(tool, admin=principal.is_admin)), headers=_HEADERS)


async def search_tools(request: Request) -> Response:
    """List the tools that the key reaches and whose name, title or description has words of the query, the best first.

    ``query`` is required; ``max_results`` is 10, and 100 at the most.
    """
    given = dict(parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True))
    unknown = sorted(given.keys() - {"query", "max_results"})
    if unknown:
        raise InvalidRequest(f"'{unknown[0][:64]}' is no parameter; there are query and max_results.")
    words = frozenset(_WORD.findall(given.get("query", "").lower()))
    if not words:
        raise InvalidRequest("'query' is missing: words that the tool's name or description has.", param="query")
    asked = given.get("max_results", "10")
    most = int(asked) if asked.isdecimal() and len(asked) <= len(str(_MOST_FOUND)) else 0
    if not 1 <= most <= _MOST_FOUND:
        raise InvalidRequest(f"'max_results' takes a number from 1 to {_MOST_FOUND}.", param="max_results")
    principal = request.caller
    reached = [t for t in request.gateway.tools.table if principal.is_admin or t.is_reached_by(principal)]
    ranked = sorted(((-_score(tool, words), tool.name, tool) for tool in reached), key=lambda item: item[:2])
    data = [_record(tool, admin=principal.is_admin) for score, _, tool in ranked[:most] if score]
    return Response(msgspec.json.encode({"object": "list", "data": data}), headers=_HEADERS)


async def refresh_tools(request: Request) -> Response:
    """Read `tools.yaml` again in every worker, ask every server for its tools, and list them."""
    try:
        outcome = await request.gateway.refresher.refresh("tools")
    except ConfigError as error:
        raise InvalidRequest(f"Nothing was changed. {error.message}", code="configuration_error") from error
    return _listed(
        request,
        (b"x-gateway-content-hash", outcome.content_hash.encode()),
        (b"x-gateway-workers", str(outcome.workers).encode()),
    )


async def invoke_tool(request: Request) -> Response | None:
    """Call one tool; what it reports itself is ``error``, what keeps it from being called an error status."""
    name = request.path_params["name"]
    body = await read_body(request)
    if len(body) > LARGEST_ARGUMENTS:
        raise BodyTooLarge(f"The arguments of a tool have {LARGEST_ARGUMENTS:,} bytes at the most.")
    try:
        asked = msgspec.json.decode(body or b"{}", type=InvokeRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f'The body is not of the form {{"arguments": {{…}}}}: {str(error)[:200]}.') from error
    tool = find_tool(request, name)
    caller = ToolCaller(
        principal=request.caller,
        request_id=request.request_id,
        source="api",
        session_id=session_id(request.headers),
        user=asked.user,
        headers=_allowed_headers(request),
        caller=accept_caller_context(request.headers, request.caller, request.gateway.metrics),
    )
    work = request.gateway.tools.call(name, asked.arguments, caller)
    result = await (_while_connected(request, work) if tool.read_only else work)
    return None if result is None else Response(msgspec.json.encode(_shown(tool, result)))


def find_tool(request: Request, name: str) -> Tool:
    """Return the tool of a name; `ToolNotFound`, also for one that the caller may not know of."""
    gateway, principal = request.gateway, request.caller
    tool = gateway.tools.table.find(name)
    hidden = gateway.holder.current.keyring.hide_foreign_models and not principal.is_admin
    if tool is None or (hidden and not tool.is_reached_by(principal)):
        raise _not_found(name)
    return tool


def _not_found(name: str) -> ToolNotFound:
    return ToolNotFound(f"There is no tool '{name[:64]}'. GET /tools lists those your key reaches.", param="name")


def _score(tool: Tool, words: frozenset[str]) -> int:
    """Say how well a tool answers words: one that is in its name counts most, one that is part of a word least."""
    name, text = tool.name.lower(), f"{tool.spec.title or ''} {tool.description}".lower()
    names, texts = set(_WORD.findall(name)), set(_WORD.findall(text))
    return sum(8 * (word in names) + 4 * (word in name) + 2 * (word in texts) + (word in text) for word in words)


def _listed(request: Request, *headers: tuple[bytes, bytes]) -> Response:
    principal = request.caller
    tools = [
        _record(tool, admin=principal.is_admin)
        for tool in request.gateway.tools.table
        if principal.is_admin or tool.is_reached_by(principal)
    ]
    body: dict[str, Any] = {"object": "list", "data": tools}
    if principal.is_admin:  # a server that is down may have no tool that could say so
        tools_of = request.gateway.tools
        body["entries"] = [
            {
                "entry": provider.entry,
                "provider": provider.kind,
                "source": "store" if tools_of.is_registered(provider.entry) else "configuration",
                "health": _health(provider.health(), admin=True),
            }
            for provider in tools_of.providers
        ]
        body["entries"] += [
            {"entry": name, "provider": None, "source": "store", "health": {"status": "down", "detail": why}}
            for name, why in tools_of.unserved.items()
        ]
    return Response(msgspec.json.encode(body), headers=(*_HEADERS, *headers))


def _record(tool: Tool, *, admin: bool) -> dict[str, Any]:
    """Describe one tool; where it leads to, and who may call it, is for admins."""
    spec, health = tool.spec, tool.lease.provider.health()
    return {
        "name": tool.name,
        "provider": spec.provider,
        "entry": spec.entry,
        "module": spec.remote_name if admin and spec.provider == "local" else None,
        "url": spec.address if admin else None,
        "method": spec.method,
        "title": spec.title,
        "description": tool.description,
        "schema": spec.parameters,
        "digest": tool.digest,
        "timeout": tool.timeout_s,
        "max_concurrency": tool.max_concurrency,
        "max_result_bytes": tool.max_result_bytes,
        "idempotent": tool.idempotent,
        "read_only": tool.read_only,
        "allowed_for": tool.allowed_for if admin else None,
        "status": "unavailable" if tool.problem is not None or health.status == "down" else "ready",
        "problem": (tool.problem or health.detail) if admin else None,
        "health": _health(health, admin=admin),
    }


def _health(health: ProviderHealth, *, admin: bool) -> dict[str, Any]:
    moment = health.checked_at
    return {
        "status": health.status,
        "detail": health.detail if admin else None,
        "checked_at": datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds") if moment else None,
    }


def _shown(tool: Tool, result: ToolResult) -> dict[str, Any]:
    return {
        "tool_name": tool.name,
        "result": None if result.is_error else (result.text if result.structured is None else result.structured),
        "parts": result.parts,
        "error": result.text if result.is_error else None,
    }


def _allowed_headers(request: Request) -> dict[str, str]:
    allowed = request.gateway.settings.header_allowlist
    return {name: request.headers[name] for name in allowed if name in request.headers}


async def _while_connected(request: Request, work: Coroutine[Any, Any, ToolResult]) -> ToolResult | None:
    """Return the result of ``work``; None, and ``work`` cancelled, once the client has left."""
    call = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((call, left), return_when=asyncio.FIRST_COMPLETED)
        return await call if call.done() else None
    finally:
        for task in (call, left):
            task.cancel()
        await asyncio.wait((call, left))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
