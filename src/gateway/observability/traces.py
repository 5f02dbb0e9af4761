"""Spans: what a request did and how long each part took, as OpenTelemetry tells it; off unless `GATEWAY_TRACES` is set.

The current span travels in a contextvar, so that whoever does a part of a request adds a span below it without being
handed anything. Where nothing is traced it is None, and looking at it is all that a request pays. OpenTelemetry itself
is imported by `gateway.observability.otlp` alone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Literal, Protocol

from gateway.errors import GatewayError
from gateway.events import Usage
from gateway.observability.logs import without_secrets

SpanKind = Literal["internal", "server", "client"]
Value = str | bool | int | float | tuple[str, ...]
Attributes = Mapping[str, Value | None]

LONGEST_CONTENT = 8_000
"""Characters of a prompt or an answer that a span holds, where it holds any."""
INPUT_MESSAGES, OUTPUT_MESSAGES = "gen_ai.input.messages", "gen_ai.output.messages"
TOOL_ARGUMENTS, TOOL_RESULT = "gen_ai.tool.call.arguments", "gen_ai.tool.call.result"

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")


class OpenSpan(Protocol):
    """What the maker of spans gives: one that has begun. Attributes that are None are left out."""

    @property
    def traceparent(self) -> str:
        """The span as the W3C header names it."""
        ...

    @property
    def is_recording(self) -> bool:
        """Whether it will be sent anywhere."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        ...

    def rename(self, name: str) -> None:
        """Give it another name."""
        ...

    def end(self, error_type: str | None) -> None:
        """End it now, as failed where there is a type of error; a second time does nothing."""
        ...


class Tracer(Protocol):
    """Makes spans. ``with_content``: prompts, answers and arguments of tools are asked for."""

    with_content: bool

    def begin(self, name: str, kind: SpanKind, attributes: Attributes, parent: OpenSpan | RemoteParent | None) -> Any:
        """Return an `OpenSpan` that has begun."""
        ...


class RemoteParent:
    """The ids of a caller's span: all that is believed of its ``traceparent``."""

    __slots__ = ("span_id", "trace_id")

    def __init__(self, trace_id: int, span_id: int) -> None:
        self.trace_id, self.span_id = trace_id, span_id


def remote_parent(traceparent: str | None) -> RemoteParent | None:
    """Read the header ``traceparent``; None where it is absent or odd."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
    return RemoteParent(int(found[1], 16), int(found[2], 16)) if found is not None else None


class Span:
    """One part of a request. Inside ``with`` it is the current one of this task and of the tasks it starts.

    Leaving ``with`` ends it, with ``error.type`` where an exception left.
    """

    __slots__ = ("_is_served", "_open", "_started", "_token", "_tracer", "name", "traceparent")
    _token: Token[Span | None]

    def __init__(
        self,
        tracer: Tracer,
        name: str,
        attributes: Attributes,
        *,
        kind: SpanKind = "internal",
        parent: Span | RemoteParent | None = None,
    ) -> None:
        self.name = name
        self._is_served = False
        self._tracer = tracer
        above = parent._open if isinstance(parent, Span) else parent
        self._open: OpenSpan = tracer.begin(name, kind, attributes, above)
        self._started = time.perf_counter()
        self.traceparent = self._open.traceparent

    def __enter__(self) -> Span:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _CURRENT.reset(self._token)
        self.end(error_type_of(error))

    @property
    def is_recording(self) -> bool:
        """Whether it will be sent anywhere: a share of the requests is."""
        return self._open.is_recording

    @property
    def with_content(self) -> bool:
        """Whether it may hold prompts, answers and arguments of tools."""
        return self._tracer.with_content and self._open.is_recording

    @property
    def seconds(self) -> float:
        """How long it has been open."""
        return time.perf_counter() - self._started

    def child(self, name: str, attributes: Attributes, *, kind: SpanKind = "internal") -> Span:
        """Begin a span below this one."""
        return Span(self._tracer, name, attributes, kind=kind, parent=self)

    def set(self, attributes: Attributes) -> None:
        """Add attributes; those that are None are left out."""
        self._open.set(attributes)

    def say(self, name: str, text: str) -> None:
        """Add a text that people wrote, or a model, where that is asked for."""
        if self.with_content:
            self._open.set({name: without_secrets(text)[:LONGEST_CONTENT]})

    def rename(self, name: str) -> None:
        """Give it another name."""
        self.name = name
        self._open.rename(name)

    def served(self, upstream: str, model: str) -> None:
        """Note which upstream and model answered; the first word counts."""
        if self._is_served:
            return
        self._is_served = True
        if self.name == "chat":
            self.rename(f"chat {model}")
            self._open.set({"gen_ai.request.model": model})
        self._open.set({"gen_ai.provider.name": upstream, "gen_ai.response.model": model})

    def spent(self, usage: Usage) -> None:
        """Note what was used."""
        self._open.set(
            {
                "gen_ai.usage.input_tokens": usage.input_tokens,
                "gen_ai.usage.output_tokens": usage.output_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_input_tokens or None,
                "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
                "gateway.usage.estimated": usage.estimated or None,
            }
        )

    def discard(self) -> None:
        """End it without sending it."""
        self._open = _DISCARDED

    def end(self, error_type: str | None = None) -> None:
        """End it; a second time does nothing."""
        self._open.end(error_type)


class _Discarded:
    """An open span that nobody will see."""

    traceparent = ""
    is_recording = False

    def set(self, attributes: Attributes) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def end(self, error_type: str | None) -> None:
        pass


_DISCARDED = _Discarded()

_CURRENT: ContextVar[Span | None] = ContextVar("gateway_span", default=None)
current_span = _CURRENT.get


def make_current(span: Span | None) -> None:
    """Make a span the current one from here on: for parts that begin and end in calls of their own."""
    _CURRENT.set(span)


def error_type_of(error: BaseException | None) -> str | None:
    """Return the low-cardinality word for how something failed; never its text."""
    if error is None:
        return None
    if isinstance(error, GatewayError):
        return error.code if error.code and error.code == type(error).code else error.type
    return "cancelled" if isinstance(error, asyncio.CancelledError | GeneratorExit) else type(error).__name__
