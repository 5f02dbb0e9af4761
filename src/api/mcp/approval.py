"""GET /tools/mcp/{server} and POST …/approve: what an MCP server's tools became, for an admin to accept."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec
from msgspec import Struct

from api.dependencies import read_body
from api.routing import Request, Response
from gateway.errors import Conflict, InvalidRequest, NotFound

if TYPE_CHECKING:  # it imports `mcp`
    from gateway.tools.mcp.provider import McpProvider

_HEADERS = ((b"cache-control", b"private, no-cache"),)


class ApproveRequest(Struct, forbid_unknown_fields=True):
    """The body of an approval: the server's own names of the tools, or ``all`` that wait.

    ``digests`` are those of the definitions that somebody has seen, by tool: nothing is accepted if one has changed.
    """

    tools: tuple[str, ...] = ()
    all: bool = False
    digests: dict[str, str] = {}


async def review_tools(request: Request) -> Response:
    """Show the tools that wait, each with the definition that was accepted and the one that is listed now."""
    provider = _provider(request)
    health = provider.health()
    body = {"server": provider.entry, "status": health.status, "detail": health.detail, "waiting": provider.review()}
    return Response(msgspec.json.encode(body), headers=_HEADERS)


async def approve_tools(request: Request) -> Response:
    """Accept tools as they are listed now, in every worker."""
    provider = _provider(request)
    try:
        asked = msgspec.json.decode(await read_body(request) or b"{}", type=ApproveRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f'The body is not of the form {{"tools": ["name"]}}: {str(error)[:200]}.') from error
    if bool(asked.tools) == asked.all:
        raise InvalidRequest('Say which tools: {"tools": ["name"]}, or {"all": true} for all that wait.')
    waiting = {item["tool"]: item["digest"] for item in provider.review()}
    unknown = [name for name in asked.tools if name not in waiting]
    if unknown:
        raise InvalidRequest(
            f"No tool '{unknown[0][:64]}' of '{provider.entry}' waits for approval. GET /tools/mcp/{provider.entry} "
            "lists those that do.",
            param="tools",
        )
    other = [name for name, digest in asked.digests.items() if waiting.get(name, digest) != digest]
    if other:
        raise Conflict(
            f"The tool '{other[0][:64]}' of '{provider.entry}' has changed again since it was looked at. Look at GET "
            f"/tools/mcp/{provider.entry} once more."
        )
    approved = await provider.approve(
        None if asked.all else asked.tools, by=request.caller.key_id, digests=asked.digests
    )
    await request.gateway.refresher.refresh("tools")
    return Response(msgspec.json.encode({"server": provider.entry, "approved": approved}), headers=_HEADERS)


def _provider(request: Request) -> McpProvider:
    name = request.path_params["server"]
    provider = request.gateway.tools.find_provider(name)
    if provider is None or provider.kind != "mcp":
        raise NotFound(f"tools.yaml has no MCP server '{name[:64]}'.")
    return cast("McpProvider", provider)
