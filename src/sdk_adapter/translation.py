"""SDK stream events and results → RunEvents: the only file that touches the SDK's raw unions.

Tools that run in the gateway become `ToolStarted` / `ToolFinished`, never tool calls of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from agents import Agent, RunResult, RunResultStreaming
from agents.items import (
    HandoffOutputItem,
    MessageOutputItem,
    ReasoningItem,
    RunItem,
    ToolApprovalItem,
    ToolCallItem,
    ToolCallOutputItem,
)
from agents.stream_events import StreamEvent
from pydantic import BaseModel, TypeAdapter

from gateway.errors import ApprovalRequired
from gateway.events import (
    AgentSwitched,
    ReasoningDelta,
    RefusalDelta,
    RunEvent,
    TextDelta,
    ToolCallRequested,
    ToolFinished,
    ToolStarted,
)

_BETWEEN_MESSAGES = "\n\n"
"""Stands between what an agent says before a tool call and what it says after."""


@dataclass(slots=True)
class EventTranslator:
    """Translates one SDK run, streamed (`feed`, then `rest`) or not (`whole`)."""

    client_tools: frozenset[str]
    refused: bool = False
    _agent: Agent[Any] | None = None
    _said_something: bool = False
    _in_message: bool = False
    _calls: dict[str, tuple[str, str]] = field(default_factory=dict)

    def feed(self, event: StreamEvent) -> Iterator[RunEvent]:
        """Translate one stream event."""
        if event.type == "raw_response_event":
            yield from self._raw(event.data)
        elif event.type == "agent_updated_stream_event":
            if self._agent is not None:
                yield AgentSwitched(event.new_agent.name)
            self._agent = event.new_agent
        elif isinstance(event.item, MessageOutputItem):
            if not self._in_message:
                # A model that the author brought may send its answer without deltas.
                yield from self._message(event.item)
            self._in_message = False
        elif not isinstance(event.item, HandoffOutputItem | ReasoningItem):
            yield from self._tool(event.item)

    def rest(self, result: RunResultStreaming) -> Iterator[RunEvent]:
        """Translate what only the finished run knows."""
        yield from self._outcome(result)

    def whole(self, result: RunResult) -> Iterator[RunEvent]:
        """Translate a finished run that nobody watched."""
        items = result.new_items
        structured = _is_structured(result.last_agent)
        last = next((item for item in reversed(items) if isinstance(item, MessageOutputItem)), None)
        for item in items:
            if isinstance(item, MessageOutputItem):
                if not structured or item is last:
                    yield from self._message(item)
                self._in_message = False
            elif isinstance(item, HandoffOutputItem):
                yield AgentSwitched(item.target_agent.name)
            elif isinstance(item, ReasoningItem):
                yield from _reasoning(item)
            else:
                yield from self._tool(item)
        yield from self._outcome(result)

    def partial(self, items: list[RunItem]) -> Iterator[RunEvent]:
        """Translate what was said before a run was ended by its turn limit."""
        for item in items:
            if isinstance(item, MessageOutputItem):
                yield from self._message(item)
                self._in_message = False

    def text(self, text: str) -> Iterator[RunEvent]:
        """Say ``text`` as a message of its own, if it is not empty."""
        if text:
            yield from self._delta(text)

    def refusal(self, text: str) -> RefusalDelta:
        """Say (a part of) a refusal."""
        self.refused = True
        return RefusalDelta(text)

    def _raw(self, data: Any) -> Iterator[RunEvent]:
        kind = data.type
        if kind == "response.output_text.delta":
            if data.delta:
                yield from self._delta(data.delta)
        elif kind == "response.refusal.delta":
            self._in_message = True
            yield self.refusal(data.delta)
        elif kind in ("response.reasoning_text.delta", "response.reasoning_summary_text.delta") and data.delta:
            yield ReasoningDelta(data.delta)

    def _delta(self, text: str) -> Iterator[RunEvent]:
        if not self._in_message and self._said_something:
            yield TextDelta(_BETWEEN_MESSAGES)
        self._in_message = self._said_something = True
        yield TextDelta(text)

    def _message(self, item: MessageOutputItem) -> Iterator[RunEvent]:
        for part in item.raw_item.content:
            if part.type == "refusal":
                yield self.refusal(part.refusal)
            elif part.text:
                yield from self._delta(part.text)

    def _tool(self, item: RunItem) -> Iterator[RunEvent]:
        if isinstance(item, ToolCallItem):
            call_id, name = item.call_id or "", item.tool_name or _kind(item.raw_item)
            if name not in self.client_tools:
                self._calls[call_id] = (name, item.agent.name)
                yield ToolStarted(call_id, name, item.agent.name)
        elif isinstance(item, ToolCallOutputItem):
            call_id = _call_id(item.raw_item)
            name, agent = self._calls.pop(call_id, ("", item.agent.name))
            yield ToolFinished(call_id, name, agent)

    def _outcome(self, result: RunResult | RunResultStreaming) -> Iterator[RunEvent]:
        if result.interruptions:
            yield from self._requested(result.interruptions)
        elif result.new_items and isinstance(result.new_items[-1], ToolCallOutputItem):
            # `tool_use_behavior` made a tool's result the answer.
            self._in_message = False
            yield from self.text("" if result.final_output is None else as_text(result.final_output))

    def _requested(self, interruptions: list[ToolApprovalItem]) -> Iterator[RunEvent]:
        waiting = [item.name or "" for item in interruptions if not self.is_client_call(item)]
        if waiting:
            raise ApprovalRequired(
                f"The agent's tool '{waiting[0]}' needs a person's approval, and a run cannot wait for one here yet. "
                "The tool did not run."
            )
        for index, item in enumerate(interruptions):
            raw = item.raw_item
            arguments = raw["arguments"] if isinstance(raw, dict) else getattr(raw, "arguments", None)
            yield ToolCallRequested(index, _call_id(raw), item.name or "", arguments or "{}")

    def is_client_call(self, item: ToolApprovalItem) -> bool:
        """Return whether the call waits for the client, not for a person's approval."""
        own = {tool.name for tool in item.agent.tools if not getattr(tool, "is_client_tool", False)}
        return item.name in self.client_tools and item.name not in own


def as_text(value: Any) -> str:
    """Return a final output as the text of an answer: strings as they are, everything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    try:
        return TypeAdapter(Any).dump_json(value).decode()
    except ValueError:
        return str(value)


def _is_structured(agent: Agent[Any]) -> bool:
    return agent.output_type is not None and agent.output_type is not str


def _reasoning(item: ReasoningItem) -> Iterator[RunEvent]:
    raw = item.raw_item
    parts = raw.content or raw.summary or []
    text = "\n".join(part.text for part in parts)
    if text:
        yield ReasoningDelta(text)


def _kind(raw: Any) -> str:
    kind = raw.get("type") if isinstance(raw, dict) else getattr(raw, "type", None)
    return str(kind or "tool").removesuffix("_call")


def _call_id(raw: Any) -> str:
    if isinstance(raw, dict):
        return str(raw.get("call_id") or raw.get("id") or "")
    return str(getattr(raw, "call_id", None) or getattr(raw, "id", None) or "")
