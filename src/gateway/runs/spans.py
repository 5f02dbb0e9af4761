"""The span of one run, by OpenTelemetry's names: ``chat {model}`` for a raw model, ``invoke_agent {agent}`` else."""

from __future__ import annotations

from gateway.chat import RelayRequest
from gateway.events import Usage
from gateway.observability.traces import INPUT_MESSAGES, Span, Value, error_type_of
from gateway.run import Run
from gateway.usage.meter import OPERATIONS


class RunSpan:
    """Is the current span from here to `ended`, which comes in the same task."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span
        span.__enter__()

    def began(self) -> None:
        """Note the first event."""
        self._span.set({"gen_ai.response.time_to_first_chunk": round(self._span.seconds, 6)})

    def ended(self, error: BaseException | None, usage: Usage | None, finish_reason: str | None) -> None:
        """End the span."""
        self._span.set({"gen_ai.response.finish_reasons": (finish_reason,) if finish_reason else None})
        if usage is not None:
            self._span.spent(usage)
            self._span.set({"gateway.cached": usage.cached or None})
        self._span.end(error_type_of(error))
        self._span.__exit__(None, None, None)


def run_span(above: Span, run: Run) -> RunSpan:
    """Begin the span of a run below the one of its request."""
    request = run.request
    attributes: dict[str, Value | None] = {
        "gen_ai.request.model": run.model,
        "gen_ai.request.stream": run.streamed,
        "gen_ai.conversation.id": run.session_id,
        "gateway.run_id": run.id.hex,
        "gateway.request_id": run.request_id,
        "gateway.key_id": run.principal.key_id,
    }
    if isinstance(request, RelayRequest):
        attributes["gen_ai.operation.name"] = operation = OPERATIONS.get(request.path, "other")
        span = above.child(f"{operation} {run.model}", attributes, kind="client")
        messages = request.fields.get("messages")
        if messages is not None and span.with_content:
            span.say(INPUT_MESSAGES, bytes(messages).decode())
        return RunSpan(span)
    attributes["gen_ai.operation.name"] = "invoke_agent"
    attributes["gen_ai.agent.name"] = attributes["gen_ai.agent.id"] = run.model
    return RunSpan(above.child(f"invoke_agent {run.model}", attributes))
