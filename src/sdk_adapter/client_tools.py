"""Tools that the client sent: offered to the model, run by the client, continued on its next request.

A client tool is an SDK tool that always needs approval, so that a call of it ends the run with its name and
arguments. What the agent's own tools did in that run is kept under the call's id and restored when the client comes
back with the result: its history only has its own calls.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from agents import Agent, FunctionTool

from gateway.chat import ChatRequest, FunctionDefinition, FunctionToolParam
from gateway.errors import InvalidRequest, UnsupportedParameter, UnsupportedValue
from gateway.principal import Principal
from gateway.registry.entry import ClientTools
from sdk_adapter.instrument import own_tool_names
from sdk_adapter.mcp_servers import known_tool_names
from sdk_adapter.messages import Item


class ClientTool(FunctionTool):
    """A tool that is never run here."""

    is_client_tool = True


def client_tools_of(request: ChatRequest, mode: ClientTools | None, principal: Principal) -> tuple[ClientTool, ...]:
    """Return the request's tools as the agent's policy has it (``merge``, ``ignore`` or ``refuse``).

    Without a policy, tools are merged, except for Open WebUI, which sends its own with every chat. Raises
    `UnsupportedParameter` where they are refused, `InvalidRequest` for two of one name.
    """
    mode = mode or ("ignore" if principal.profile == "openwebui" else "merge")
    definitions = [tool.function for tool in request.tools or () if isinstance(tool, FunctionToolParam)]
    if not definitions:
        return ()
    if mode == "refuse":
        raise UnsupportedParameter("This agent takes no tools from clients. Leave 'tools' out.", param="tools")
    seen: set[str] = set()
    for index, definition in enumerate(definitions):
        if definition.name in seen:
            raise InvalidRequest(
                f"Two tools are named '{definition.name}'; give each its own name.",
                param=f"tools[{index}].function.name",
            )
        seen.add(definition.name)
    if mode == "ignore":
        if request.tool_choice is not None and not isinstance(request.tool_choice, str):
            raise UnsupportedValue(
                "This agent does not take tools from clients, so tool_choice cannot name one of them.",
                param="tool_choice",
            )
        return ()
    return tuple(_tool(definition) for definition in definitions)


def fitting_tools(tools: Sequence[ClientTool], agent: Agent[Any]) -> list[ClientTool]:
    """Return the tools whose names the agent does not have itself: a client never replaces an agent's own tool."""
    if not tools:
        return []
    taken = set(own_tool_names(agent))
    return [tool for tool in tools if tool.name not in taken]


async def _never(context: Any, arguments: str) -> str:
    raise AssertionError("a client's tool was run in the gateway")


def _tool(definition: FunctionDefinition) -> ClientTool:
    name = definition.name
    tool = ClientTool(
        name=name,
        description=definition.description or "",
        params_json_schema=definition.parameters or {"type": "object", "properties": {}},
        on_invoke_tool=_never,
        strict_json_schema=False,
        # Asked each turn, after the agent's MCP servers have listed their tools: those come first, too.
        is_enabled=lambda context, agent: not isinstance(agent, Agent) or name not in known_tool_names(agent),
        needs_approval=True,
    )
    # Set afterwards: the client's schema goes to the model as it was written.
    tool.strict_json_schema = bool(definition.strict)
    return tool


@dataclass(frozen=True, slots=True)
class _Kept:
    key_id: str
    items: bytes
    until: float


class TurnMemory:
    """Keeps what a run did before it returned a client tool's call; bounded in number, bytes and time."""

    def __init__(
        self,
        *,
        ttl_s: float = 3600.0,
        most_turns: int = 1_000,
        most_bytes: int = 32_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s, self._most_turns, self._most_bytes, self._clock = ttl_s, most_turns, most_bytes, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0

    def keep(self, key_id: str, call_ids: Sequence[str], items: list[Item]) -> None:
        """Keep the items of a run under the first of the calls it returned."""
        kept = _Kept(key_id, msgspec.json.encode(items), self._clock() + self._ttl_s)
        if len(kept.items) > self._most_bytes // 8:
            return
        self._drop(call_ids[0])
        self._kept[call_ids[0]] = kept
        self._bytes += len(kept.items)
        while len(self._kept) > self._most_turns or self._bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def recall(self, key_id: str, call_ids: Sequence[str]) -> list[Item] | None:
        """Return the items kept under a call, if it was this key's and the calls are the same."""
        kept = self._kept.get(call_ids[0]) if call_ids else None
        if kept is None or kept.key_id != key_id:
            return None
        if kept.until < self._clock():
            self._drop(call_ids[0])
            return None
        items: list[Item] = msgspec.json.decode(kept.items)
        answered = {item.get("call_id") for item in items if item.get("type") == "function_call_output"}
        asked = {item.get("call_id") for item in items if item.get("type") == "function_call"}
        return items if asked - answered == set(call_ids) else None

    def of(self, key_id: str) -> KeyMemory:
        """Return the memory as one key sees it."""
        return KeyMemory(self, key_id)

    def _drop(self, call_id: str) -> None:
        dropped = self._kept.pop(call_id, None)
        if dropped is not None:
            self._bytes -= len(dropped.items)


@dataclass(frozen=True, slots=True)
class KeyMemory:
    """A `TurnMemory` bound to the key that asks."""

    memory: TurnMemory
    key_id: str

    def recall(self, call_ids: Sequence[str]) -> list[Item] | None:
        """See `TurnMemory.recall`."""
        return self.memory.recall(self.key_id, call_ids)
