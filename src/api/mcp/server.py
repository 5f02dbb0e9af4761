"""One MCP message answered: the caller's tools and agents, listed and called. Imports `mcp`; loaded at the first use.

Each request has a server of its own, which knows its caller: nothing is shared, nothing is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Iterator
from typing import Any, cast

import mcp_types as types
import msgspec
from mcp import MCPError
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from api.dependencies import end_user
from api.errors import public
from api.mcp.routes import session_of
from api.routing import Receive, Request, Send
from api.tools import find_tool
from gateway.admission import Call, accept_caller_context, admit
from gateway.chat import decode_body
from gateway.errors import GatewayError, InvalidToolArguments, ModelNotFound, NotFound, PermissionDenied
from gateway.events import AgentSwitched, RefusalDelta, RunEvent, TextDelta, ToolStarted
from gateway.observability.logs import log_event
from gateway.registry.entry import AgentEntry
from gateway.reserving import reserve
from gateway.tools.port import ToolPart, ToolResult
from gateway.tools.table import Tool, ToolCaller

_log = logging.getLogger("api.mcp")

_UNFIT = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_NAME = 64
_TOLD_EVERY_S = 0.25
_FORBIDDEN, _LIMITED, _CANCELLED = -32_003, -32_029, -32_800

_INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string", "minLength": 1, "description": "What to ask the agent, or tell it."}},
    "required": ["input"],
    "additionalProperties": False,
}


async def serve(request: Request, receive: Receive, send: Send) -> None:
    """Answer one message, as JSON or as a stream, as its revision of the protocol demands."""
    face = _Face(request)
    settings = request.gateway.settings
    server: Server[Any] = Server(
        settings.project_name,
        instructions="Tools and agents of an Agent Gateway. An agent takes one 'input' and answers with a text.",
        on_list_tools=face.list_tools,
        on_call_tool=face.call_tool,
    )
    manager = StreamableHTTPSessionManager(server, stateless=True, max_request_body_size=settings.body_limit_bytes)
    async with manager.run():
        await manager.handle_request(request.scope, receive, cast(Any, send))


def agent_tool_names(entries: list[AgentEntry], taken: set[str]) -> dict[str, AgentEntry]:
    """Return agents by the names of their tools: ``namespace__slug``; one that is taken or too long ends in a hash."""
    named: dict[str, AgentEntry] = {}
    for entry in entries:
        name = _UNFIT.sub("_", entry.id.replace("/", "__"))
        if len(name) > _LONGEST_NAME or name in taken or name in named:
            digest = hashlib.sha256(entry.id.encode()).hexdigest()[:8]
            name = f"{name[: _LONGEST_NAME - 9]}_{digest}"
        named[name] = entry
    return named


class _Face:
    """What one request's caller may list and call."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._gateway = request.gateway
        self._principal = request.caller

    async def list_tools(self, ctx: Any, params: Any) -> types.ListToolsResult:
        """List the caller's tools, then its agents."""
        tools = self._tools()
        agents = await self._agents(set(tools))
        listed = [_tool(tool) for tool in tools.values()]
        return types.ListToolsResult(tools=[*listed, *(_agent(name, entry) for name, entry in agents.items())])

    async def call_tool(self, ctx: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        """Call one of them; a notification of the client, or its leave, ends the call."""
        work = asyncio.ensure_future(self._call(ctx, params.name, params.arguments or {}))
        call_id = (self._principal.key_id, session_of(self._request), ctx.request_id)
        try:
            with self._gateway.mcp_calls.running(call_id, work):
                await asyncio.wait((work,))
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
        if work.cancelled():
            raise MCPError(_CANCELLED, "The call was cancelled.")
        return work.result()

    def _tools(self) -> dict[str, Tool]:
        table = self._gateway.tools.table
        return {tool.name: tool for tool in table.list_permitted(self._principal, "mcp")}

    async def _agents(self, taken: set[str]) -> dict[str, AgentEntry]:
        await self._gateway.loaded.wait()
        snapshot = self._gateway.holder.current
        allowed = [
            entry
            for entry in snapshot.registry.list_entries()
            if entry.executor is not None and entry.options.expose and snapshot.access.allows(self._principal, entry.id)
        ]
        return agent_tool_names(allowed, taken)

    async def _call(self, ctx: Any, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        try:
            tools = self._tools()
            agent = None if name in tools else (await self._agents(set(tools))).get(name)
            if agent is None:
                return await self._call_gateway_tool(ctx, name, arguments)
            return await self._run_agent(ctx, agent, arguments)
        except Exception as error:
            shown = public(error)
            self._gateway.metrics.error(shown.domain, shown.code or shown.type)
            if not isinstance(error, GatewayError):
                log_event(_log, "http.request.crashed", level=logging.ERROR, exc_info=error)
            if _is_protocol_error(shown):
                raise _as_mcp(shown) from error
            return types.CallToolResult(content=[types.TextContent(text=shown.message)], is_error=True)

    async def _call_gateway_tool(self, ctx: Any, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        request = self._request
        find_tool(request, name)
        caller = ToolCaller(
            principal=self._principal,
            request_id=request.request_id,
            source="mcp",
            headers=_seen_headers(request),
            caller=accept_caller_context(request.headers, self._principal, self._gateway.metrics),
            progress=ctx.session.report_progress,
        )
        return _result(await self._gateway.tools.call(name, arguments, caller))

    async def _run_agent(self, ctx: Any, entry: AgentEntry, arguments: dict[str, Any]) -> types.CallToolResult:
        text = arguments.get("input")
        if not isinstance(text, str) or not text or len(arguments) > 1:
            raise InvalidToolArguments("An agent takes one argument: 'input', a text.", param="input")
        request, gateway = self._request, self._gateway
        wants_progress = _progress_token(ctx) is not None
        question = {"model": entry.id, "messages": [{"role": "user", "content": text}], "stream": wants_progress}
        body = msgspec.json.encode(question)
        call = Call(
            principal=self._principal,
            request_id=request.request_id,
            body=body,
            fields=decode_body(body),
            headers=request.headers,
            end_user=end_user(request),
        )
        snapshot = gateway.holder.current
        run, executor = admit(call, snapshot, gateway.settings)
        if run.principal.allowance is not None:
            run = await reserve(run, len(body), gateway.limiter, snapshot, gateway.settings)
        answer = _Answer(ctx if wants_progress else None)
        await gateway.engine.execute(run, executor, answer.add)
        return types.CallToolResult(content=[types.TextContent(text=answer.text)])


class _Answer:
    """Gathers an agent's answer, and tells how it goes on."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self._texts: list[str] = []
        self._untold: list[str] = []
        self._told = 0
        self._last = 0.0

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self._texts)

    async def add(self, event: RunEvent) -> None:
        """Take one event of the run."""
        match event:
            case TextDelta(text) | RefusalDelta(text):
                self._texts.append(text)
                self._untold.append(text)
                if asyncio.get_running_loop().time() - self._last >= _TOLD_EVERY_S:
                    await self._tell("".join(self._untold))
                    self._untold.clear()
            case ToolStarted():
                await self._tell(f"{event.agent}: tool {event.name}")
            case AgentSwitched():
                await self._tell(f"{event.agent} goes on")
            case _:
                pass

    async def _tell(self, message: str) -> None:
        if self._ctx is not None:
            self._told += 1
            self._last = asyncio.get_running_loop().time()
            await self._ctx.session.report_progress(self._told, None, message)


def _tool(tool: Tool) -> types.Tool:
    schema = tool.spec.output_schema
    return types.Tool(
        name=tool.name,
        title=tool.spec.title,
        description=tool.description,
        input_schema=dict(tool.parameters),
        output_schema=dict(schema) if schema is not None else None,
        annotations=types.ToolAnnotations(read_only_hint=tool.read_only, idempotent_hint=tool.idempotent),
    )


def _agent(name: str, entry: AgentEntry) -> types.Tool:
    description = entry.description or f"Ask the agent {entry.display_name}."
    return types.Tool(name=name, title=entry.display_name, description=description, input_schema=_INPUT)


def _result(result: ToolResult) -> types.CallToolResult:
    content: list[types.ContentBlock] = []
    if result.text or not result.parts:
        content.append(types.TextContent(text=result.text))
    content.extend(_parts(result.parts))
    structured = result.structured if isinstance(result.structured, dict) else None
    return types.CallToolResult(content=content, structured_content=structured, is_error=result.is_error)


def _parts(parts: tuple[ToolPart, ...]) -> Iterator[types.ContentBlock]:
    for number, part in enumerate(parts):
        if part.kind == "image" and part.data is not None:
            yield types.ImageContent(data=part.data, mime_type=part.media_type)
        elif part.kind == "audio" and part.data is not None:
            yield types.AudioContent(data=part.data, mime_type=part.media_type)
        elif part.data is not None:
            blob = types.BlobResourceContents(
                uri=part.uri or f"gateway://part/{number}", mime_type=part.media_type, blob=part.data
            )
            yield types.EmbeddedResource(resource=blob)
        elif part.uri is not None:
            yield types.ResourceLink(name=part.uri, uri=part.uri, mime_type=part.media_type or None)


def _seen_headers(request: Request) -> dict[str, str]:
    allowed = request.gateway.settings.header_allowlist
    return {name: request.headers[name] for name in allowed if name in request.headers}


def _progress_token(ctx: Any) -> str | int | None:
    token: str | int | None = (ctx.meta or {}).get("progress_token")
    return token


def _is_protocol_error(error: GatewayError) -> bool:
    """Whether the request is at fault, not the call: a model that reads a failed call may still do better."""
    return error.status < 500 and not isinstance(error, InvalidToolArguments)


def _as_mcp(error: GatewayError) -> MCPError:
    code = types.INVALID_PARAMS
    if isinstance(error, PermissionDenied):
        code = _FORBIDDEN
    elif error.status == 429:
        code = _LIMITED
    elif not isinstance(error, NotFound | ModelNotFound) and error.status not in (400, 409, 413, 422):
        code = types.INTERNAL_ERROR
    data = {"type": error.type, "code": error.code, "param": error.param, "retry_after_s": error.retry_after_s}
    return MCPError(code, error.message, {name: value for name, value in data.items() if value is not None})
