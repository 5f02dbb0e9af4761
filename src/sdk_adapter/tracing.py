"""Tracing that stays in the house.

The SDK's default exports every run, inputs included, to OpenAI as soon as a key is in the environment. While the
gateway is up, traces go to processors that an author has added, and, where the request is traced, below the span of
its run to the gateway's own collector; without either, runs are not traced at all.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from agents.tracing import TracingProcessor, set_trace_provider, setup
from agents.tracing.provider import DefaultTraceProvider

from gateway.observability.traces import (
    INPUT_MESSAGES,
    OUTPUT_MESSAGES,
    TOOL_ARGUMENTS,
    TOOL_RESULT,
    Span,
    Value,
    current_span,
    make_current,
)

_MOST_OPEN = 10_000
_LONGEST_NAME = 128


class SpanFeeder(TracingProcessor):
    """Makes a span of the gateway's of each span of the SDK's, below the one of its run.

    The SDK calls it where its own span begins and ends, so that the new one can be the current span in between.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, tuple[Span, Span]] = OrderedDict()
        self._lock = threading.Lock()  # sync tools that start a run have loops of their own, in threads

    def on_trace_start(self, trace: Any) -> None:
        """See the SDK; the run has its span already."""

    def on_trace_end(self, trace: Any) -> None:
        """See the SDK."""

    def on_span_start(self, span: Any) -> None:
        """Begin a span below the current one."""
        above = current_span()
        if above is None or not above.is_recording:
            return
        named = _begun(span.span_data)
        if named is None:
            return
        name, attributes = named
        is_call = name.startswith("chat")
        ours = above.child(name[:_LONGEST_NAME], attributes, kind="client" if is_call else "internal")
        with self._lock:
            self._open[span.span_id] = (ours, above)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        make_current(ours)

    def on_span_end(self, span: Any) -> None:
        """End it, with what is known by now."""
        with self._lock:
            found = self._open.pop(span.span_id, None)
        if found is None:
            return
        ours, above = found
        _finish(ours, span.span_data)
        ours.end(f"{span.span_data.type}_error" if span.error is not None else None)
        if current_span() is ours:
            make_current(above)

    def shutdown(self) -> None:
        """See the SDK."""

    def force_flush(self) -> None:
        """See the SDK."""


class HomeTraceProvider(DefaultTraceProvider):
    """A trace provider without the exporter to OpenAI; ``listening`` says whether an author wants traces."""

    def __init__(self) -> None:
        super().__init__()
        self._feeder = SpanFeeder()
        super().register_processor(self._feeder)
        self.listening = False

    def register_processor(self, processor: TracingProcessor) -> None:
        """Add a processor (an author's ``add_trace_processor``)."""
        super().register_processor(processor)
        self.listening = True

    def set_processors(self, processors: list[TracingProcessor]) -> None:
        """Replace the processors (an author's ``set_trace_processors``); the gateway's own stays."""
        super().set_processors([self._feeder, *processors])
        self.listening = bool(processors)


@contextmanager
def tracing_at_home() -> Iterator[None]:
    """Replace the process's trace provider; put the old one back at the end."""
    before = setup.GLOBAL_TRACE_PROVIDER
    set_trace_provider(HomeTraceProvider())
    try:
        yield
    finally:
        setup.GLOBAL_TRACE_PROVIDER = before


def nobody_listens() -> bool:
    """Return whether a run that begins now need not be traced."""
    span = current_span()
    if span is not None and span.is_recording:
        return False
    provider = setup.GLOBAL_TRACE_PROVIDER
    return isinstance(provider, HomeTraceProvider) and not provider.listening


def content_is_wanted() -> bool:
    """Return whether the run that begins now may leave prompts and answers in its trace."""
    span = current_span()
    return span is not None and span.with_content


def _begun(data: Any) -> tuple[str, dict[str, Value | None]] | None:
    """Return name and attributes of a span; None for the SDK's own bookkeeping (tasks, turns)."""
    match data.type:
        case "agent":
            return f"invoke_agent {data.name}", {
                "gen_ai.operation.name": "invoke_agent",
                "gen_ai.agent.name": str(data.name),
            }
        case "function":
            return f"execute_tool {data.name}", {
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": str(data.name),
                "gen_ai.tool.type": "function",
            }
        case "generation" | "response":
            model = getattr(data, "model", None)
            return f"chat {model}" if model else "chat", {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": model,
            }
        case "handoff":
            return "handoff", {"gateway.handoff.from": data.from_agent}
        case "guardrail":
            return f"guardrail {data.name}", {"gateway.guardrail.name": str(data.name)}
        case "mcp_tools":
            return "mcp.list_tools", {"gateway.mcp.server": data.server}
        case "task" | "turn":
            return None
        case "custom":
            return str(data.name), {}
        case other:
            return str(other), {}


def _finish(span: Span, data: Any) -> None:
    match data.type:
        case "handoff":
            span.set({"gateway.handoff.to": data.to_agent})
        case "guardrail":
            span.set({"gateway.guardrail.triggered": bool(data.triggered)})
        case "mcp_tools":
            span.set({"gateway.mcp.server": data.server})
        case "function" if span.with_content:
            _say(span, TOOL_ARGUMENTS, data.input)
            _say(span, TOOL_RESULT, data.output)
        case "generation" if span.with_content:
            _say(span, INPUT_MESSAGES, data.input)
            _say(span, OUTPUT_MESSAGES, data.output)
        case "response" if span.with_content:
            _say(span, INPUT_MESSAGES, data.input)
            _say(span, OUTPUT_MESSAGES, getattr(data.response, "output", None))


def _say(span: Span, name: str, value: Any) -> None:
    if value is not None:
        span.say(name, value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=_plain).decode())


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)
