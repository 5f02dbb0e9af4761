"""POST /tools, DELETE /tools/{name}, /tools/servers: entries of tools made while the gateway runs, and MCP servers.

The entries of `tools.yaml` are shown here and never changed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from api.dependencies import read_body
from api.routing import Request, Response
from gateway.errors import ConfigError, Conflict, InvalidRequest, NotFound, PermissionDenied
from gateway.tools.config import AnyTool, HttpTool, McpTools, OpenApiTools
from gateway.tools.port import ProviderHealth
from gateway.tools.registered import read_entry

_HEADERS = ((b"cache-control", b"no-store"),)


async def register_tool(request: Request) -> Response:
    """Make an entry of the provider that the body names, with the keys of `tools.yaml`."""
    return await _register(request, await _fields(request))


async def register_server(request: Request) -> Response:
    """Make an entry of an MCP server."""
    fields = await _fields(request)
    if fields.setdefault("provider", "mcp") != "mcp":
        raise InvalidRequest("provider: MCP servers are made here; POST /tools makes the others.", param="provider")
    return await _register(request, fields)


async def delete_tool(request: Request) -> Response:
    """Forget an entry that was made at run time; calls of its tools that are under way end in peace."""
    return await _delete(request, request.path_params["name"])


async def list_servers(request: Request) -> Response:
    """List the MCP servers, those of `tools.yaml` too, with health and the names of their tools."""
    tools = request.gateway.tools
    names = [provider.entry for provider in tools.providers if provider.kind == "mcp"]
    names += [item.entry.name for item in request.gateway.tool_entries.entries if isinstance(item.entry, McpTools)]
    data = [_record(request, name) for name in dict.fromkeys(names)]
    return Response(msgspec.json.encode({"object": "list", "data": data}), headers=_HEADERS)


async def get_server(request: Request) -> Response:
    """Show one MCP server."""
    return Response(msgspec.json.encode(_record(request, _server(request))), headers=_HEADERS)


async def delete_server(request: Request) -> Response:
    """Forget an MCP server that was registered at run time."""
    return await _delete(request, _server(request))


async def _register(request: Request, fields: dict[str, Any]) -> Response:
    gateway = request.gateway
    if not gateway.tools.registration.enabled:
        raise PermissionDenied(
            "Tools cannot be registered here: tools.yaml says registration: {enabled: false}. Its operator can change "
            "that, or add the entry there."
        )
    entry = read_entry(fields, gateway.tools.registration)
    if gateway.tools.find_config(entry.name) is not None:
        raise Conflict(f"An entry of tools.yaml is called '{entry.name}'; take another name.", param="name")
    taken = gateway.tools.table.find(entry.name)
    if taken is not None and taken.spec.entry != entry.name:
        raise Conflict(f"'{entry.name}' is a tool of the entry '{taken.spec.entry}'; take another name.", param="name")
    try:
        await gateway.tools.check(entry)
    except ConfigError as error:
        raise InvalidRequest(f"Nothing was registered. {error.message.removeprefix('tools.yaml: ')}") from error
    await gateway.tool_entries.add(entry, by=request.caller.key_id)
    location = f"/tools/servers/{entry.name}" if isinstance(entry, McpTools) else f"/tools/{entry.name}"
    return Response(
        msgspec.json.encode(_record(request, entry.name)), 201, headers=(*_HEADERS, (b"location", location.encode()))
    )


async def _delete(request: Request, name: str) -> Response:
    gateway = request.gateway
    if gateway.tool_entries.find(name) is None:
        if gateway.tools.find_config(name) is not None:
            raise Conflict(f"'{name}' stands in tools.yaml; take it out there.", param="name")
        tool = gateway.tools.table.find(name)
        if tool is not None:
            raise Conflict(f"'{name}' is one of the tools of '{tool.spec.entry}'; delete that.", param="name")
    await gateway.tool_entries.remove(name, by=request.caller.key_id)
    return Response(
        msgspec.json.encode({"name": name, "object": "tool_entry.deleted", "deleted": True}), 200, headers=_HEADERS
    )


def _server(request: Request) -> str:
    name = request.path_params["server"]
    tools = request.gateway.tools
    provider, kept = tools.find_provider(name), request.gateway.tool_entries.find(name)
    if (provider is None or provider.kind != "mcp") and (kept is None or not isinstance(kept.entry, McpTools)):
        raise NotFound(f"There is no MCP server '{name[:64]}'. GET /tools/servers lists them.", param="server")
    return name


def _record(request: Request, name: str) -> dict[str, Any]:
    """Describe an entry: never its headers' values."""
    tools, kept = request.gateway.tools, request.gateway.tool_entries.find(name)
    listed = tools.find_config(name)
    entry: AnyTool | None = listed if listed is not None else kept.entry if kept is not None else None
    assert entry is not None
    provider = tools.find_provider(name)
    health = (
        provider.health() if provider is not None else ProviderHealth(status="down", detail=tools.unserved.get(name))
    )
    own = [tool for tool in tools.table if tool.spec.entry == name]
    made = kept if listed is None else None
    return {
        "name": name,
        "object": "tool_entry",
        "provider": entry.__struct_config__.tag,
        "source": "configuration" if made is None else "store",
        "url": _address(entry),
        "headers": sorted(getattr(entry, "headers", ())),
        "description": entry.description,
        "tools": [tool.name for tool in own],
        "problems": {tool.name: tool.problem for tool in own if tool.problem is not None},
        "health": {"status": health.status, "detail": health.detail},
        "created_at": None if made is None else _moment(made.created_at),
        "created_by": None if made is None else made.created_by,
    }


def _address(entry: AnyTool) -> str | None:
    """Return where an entry leads, without what may be secret in an address; None for a program or a callable."""
    match entry:
        case HttpTool():
            url: str | None = entry.url
        case OpenApiTools():
            url = entry.document
        case McpTools():
            url = entry.url
        case _:
            return None
    if url is None or "://" not in url:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


async def _fields(request: Request) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(await read_body(request))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("The body is not JSON.") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("The body is not an object: the keys of an entry of tools.yaml.")
    return fields
