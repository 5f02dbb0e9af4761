"""gateway_tool(): all that the author of an agent imports from us.

```python
from agents import Agent
from sdk_adapter.gateway_tools import gateway_tool

agent = Agent(name="Support", instructions="…", tools=[gateway_tool("search_orders")])
```

The result is an ordinary `agents.FunctionTool`. Nothing is looked up when it is made: each run binds it to the tool of
that name as `tools.yaml` has it then, and every call goes through the gateway's tool manager with the run's caller.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from agents import Agent, FunctionTool, UserError
from agents.tool import Tool, ToolOutputImage, ToolOutputText

from gateway.errors import GatewayError, RequiredToolMissing, ToolDenied
from gateway.principal import Principal
from gateway.tools.manager import ToolManager
from gateway.tools.port import ToolResult
from gateway.tools.table import ToolCaller, ToolTable
from sdk_adapter.scope import Level, current_level

__all__ = ["gateway_tool", "use_gateway_tool"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": True}


def gateway_tool(name: str, *, description: str | None = None, required: bool = False) -> FunctionTool:
    """Return the gateway's tool ``name`` as a tool of the Agents SDK.

    ``description`` replaces the tool's own towards the model. A tool that does not exist, or that the caller may not
    use, is still offered, and a call of it answers the model with the reason; where ``required``, the run is refused
    at its start instead. Raises `ValueError` for what can be no tool's name.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a tool: 1 to 64 letters, digits, '_' and '-'; see GET /tools.")
    return FunctionTool(
        name=name,
        description=description or f"The tool {name} of the gateway.",
        params_json_schema=dict(_ANY),
        on_invoke_tool=GatewayInvoker(name, description, required=required),
        strict_json_schema=False,
    )


def use_gateway_tool(name: str) -> FunctionTool:
    """Return `gateway_tool` of that name, with the tool's own description."""
    return gateway_tool(name)


class GatewayInvoker:
    """What the SDK calls for a gateway tool; by its type such a tool is known."""

    def __init__(self, name: str, description: str | None, *, required: bool) -> None:
        self.name, self.description, self.required = name, description, required

    async def __call__(self, context: Any, arguments: str) -> Any:
        """Call the tool for the caller of the run this code belongs to; refusals and failures become text."""
        level = current_level()
        manager = level.scope.tools if level is not None else None
        if level is None or manager is None:
            raise UserError(
                f"The gateway tool '{self.name}' was called outside of a run of the gateway. It works inside an agent "
                "that the gateway runs; send the agent a chat request, or call POST /tools/{name}/invoke."
            )
        level.scope.budget.count_tool_call()
        try:
            result = await manager.call(self.name, arguments, _caller(level, context))
        except GatewayError as error:
            tool = manager.table.find(self.name)
            if isinstance(error, ToolDenied) and tool is not None and tool.on_denied == "end_run":
                raise
            return json.dumps({"error": {"code": error.code, "message": error.message}}, ensure_ascii=False)
        return _output(result)


def bound_tools(tools: Sequence[Tool], level: Level | None) -> list[Tool]:
    """Return an agent's tools for one run: the gateway's with the description and schema they have now."""
    manager = level.scope.tools if level is not None else None
    if manager is None:
        return list(tools)
    return [_bound(tool, manager.table) for tool in tools]


def gateway_tool_names(agent: Agent[Any]) -> tuple[str, ...]:
    """Return the names of the gateway tools that an agent has."""
    return tuple(invoker.name for invoker in _invokers(agent))


def is_gateway_tool(tool: Tool) -> bool:
    """Return whether a tool was made by `gateway_tool`."""
    return isinstance(tool, FunctionTool) and isinstance(tool.on_invoke_tool, GatewayInvoker)


def require_tools(agents: Iterable[Agent[Any]], manager: ToolManager, principal: Principal, model: str) -> None:
    """Raise where a tool that one of the agents requires does not exist (400) or is not for this caller (403)."""
    names = dict.fromkeys(item.name for agent in agents for item in _invokers(agent) if item.required)
    found = {name: manager.table.find(name) for name in names}
    missing = [name for name, tool in found.items() if tool is None]
    if missing:
        raise RequiredToolMissing(
            f"The agent '{model}' needs tools that do not exist now: {', '.join(missing)}. The gateway's operator "
            "finds what became of them in GET /tools and the log."
        )
    refusals = [tool.problem or tool.why_not(principal, model, "sdk") for tool in found.values() if tool is not None]
    told = [refusal for refusal in refusals if refusal is not None]
    if told:
        raise ToolDenied(f"The agent '{model}' needs tools that are not offered to this key. {' '.join(told)}")


def _invokers(agent: Agent[Any]) -> list[GatewayInvoker]:
    found = (tool.on_invoke_tool for tool in agent.tools if isinstance(tool, FunctionTool))
    return [invoker for invoker in found if isinstance(invoker, GatewayInvoker)]


def _bound(tool: Tool, table: ToolTable) -> Tool:
    if not isinstance(tool, FunctionTool) or not isinstance(tool.on_invoke_tool, GatewayInvoker):
        return tool
    found = table.find(tool.on_invoke_tool.name)
    if found is None:
        return tool
    bound = copy.copy(tool)
    bound.params_json_schema = dict(found.parameters)
    bound.description = tool.on_invoke_tool.description or found.description or tool.description
    return bound


def _caller(level: Level, context: Any) -> ToolCaller:
    run = level.scope.run
    call_id = getattr(context, "tool_call_id", None)
    return ToolCaller(
        principal=run.principal,
        request_id=run.request_id,
        source="sdk",
        agent=run.model,
        agent_name=getattr(getattr(context, "agent", None), "name", None),
        run_id=run.id.hex,
        session_id=run.session_id,
        user=run.end_user,
        headers=run.headers,
        caller=run.caller,
        call_id=f"{run.id.hex}-{call_id}" if call_id else None,
    )


def _output(result: ToolResult) -> Any:
    """Return a result as the SDK gives it to the model: text, with pictures beside it where there are any."""
    images = [part for part in result.parts if part.kind == "image"]
    others = [f"[{part.kind} {part.media_type}{f' {part.uri}' if part.uri else ''}]" for part in result.parts]
    text = result.text or ("" if images else " ".join(others))
    if not images:
        return text
    shown = [ToolOutputImage(image_url=part.uri or f"data:{part.media_type};base64,{part.data}") for part in images]
    return [ToolOutputText(text=text), *shown] if text else shown
