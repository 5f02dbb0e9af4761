"""What the SDK raises → what the caller is told.

A guardrail's refusal of the answer, a refusal of the model and the turn limit are ends of an answer, not errors. The
text of an author's exception stays in the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import openai
from agents import (
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    MCPToolCancellationError,
    ModelBehaviorError,
    ModelRefusalError,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
    ToolTimeoutError,
    UserError,
)
from agents.exceptions import AgentsException, ModelTimeoutError
from agents.items import RunItem

from gateway.errors import (
    AgentFailed,
    AgentMisconfigured,
    ContentPolicyViolation,
    GatewayError,
    ModelBehaviorFailed,
    ToolDenied,
    UpstreamAuthFailed,
    UpstreamError,
    UpstreamModelNotFound,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from gateway.events import FinishReason
from sdk_adapter.models import AnswerCut

_INNER = "__gateway_inner__"


@dataclass(frozen=True, slots=True)
class EarlyEnd:
    """An answer that ended before the agent meant it to; ``items`` is what was said until then."""

    finish_reason: FinishReason
    refusal: str | None = None
    text: str | None = None
    items: tuple[RunItem, ...] = ()


def mark_inner(error: AgentsException) -> None:
    """Note that it was a run inside the run that ended: for the run itself this is an error like any other."""
    setattr(error, _INNER, True)


def early_end(error: BaseException) -> EarlyEnd | None:
    """Return how the answer ended, for exceptions that end it without being an error."""
    if hasattr(error, _INNER):
        return None
    match error:
        case MaxTurnsExceeded():
            data = error.run_data
            return EarlyEnd("length", items=tuple(data.new_items) if data is not None else ())
        case OutputGuardrailTripwireTriggered():
            return EarlyEnd("content_filter")
        case ModelRefusalError():
            return EarlyEnd("stop", refusal=error.refusal)
        case AnswerCut():
            return EarlyEnd(error.finish_reason, text=error.text)
    return None


def as_gateway_error(error: BaseException, agent_id: str) -> GatewayError:
    """Return the error to show for an exception of the SDK, an openai client, or the author's code."""
    for cause in _chain(error):
        if isinstance(cause, GatewayError):
            return cause
    match error:
        case InputGuardrailTripwireTriggered():
            name = error.guardrail_result.guardrail.get_name()
            return ContentPolicyViolation(
                f"The agent's input guardrail '{name}' refused this request.", param="messages"
            )
        case ToolInputGuardrailTripwireTriggered() | ToolOutputGuardrailTripwireTriggered():
            return ToolDenied(f"The agent's tool guardrail '{error.guardrail.get_name()}' ended the run.")
        case ToolTimeoutError():
            limit = f"{error.timeout_seconds:g} s"
            return AgentFailed(
                f"The agent's tool '{error.tool_name}' took longer than its limit of {limit}.",
                status=504,
                code="tool_timeout",
            )
        case MCPToolCancellationError():
            return AgentFailed("A tool of one of the agent's MCP servers was cancelled by that server.")
        case ModelTimeoutError():
            return UpstreamTimeout(f"The model did not answer within the agent's limit of {error.timeout_seconds:g} s.")
        case ModelBehaviorError():
            return ModelBehaviorFailed(
                "The model answered with something the agent cannot use: a tool it does not have, arguments or a final "
                "answer that do not fit their schema. Try again, or use another model."
            )
        case UserError() if error.__cause__ is None or isinstance(error.__cause__, UserError):
            return AgentMisconfigured(
                f"The agent '{agent_id}' is set up in a way that cannot run. Its author finds the reason in the "
                "gateway's log under this request's id."
            )
        case openai.OpenAIError():
            return _of_openai(error)
    return AgentFailed(
        f"The agent '{agent_id}' failed: its own code raised an error. Its author finds the details in the gateway's "
        "log under this request's id."
    )


def root_cause(error: BaseException) -> BaseException:
    """Return the exception at the bottom of a chain, for the log."""
    return list(_chain(error))[-1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        nested = current.exceptions[0] if isinstance(current, BaseExceptionGroup) else None
        hidden = isinstance(current, AgentsException) and not current.__suppress_context__
        current = current.__cause__ or nested or (current.__context__ if hidden else None)


def _of_openai(error: openai.OpenAIError) -> GatewayError:
    """Map what the client of an agent that brings its own model raised."""
    match error:
        case openai.APITimeoutError():
            return UpstreamTimeout("The agent's own model server did not answer in time.")
        case openai.APIConnectionError():
            return UpstreamUnreachable("The agent's own model server cannot be reached.")
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return UpstreamAuthFailed("The agent's own model server refused the agent's key.")
        case openai.NotFoundError():
            return UpstreamModelNotFound("The agent's own model server does not have the agent's model.")
        case openai.RateLimitError():
            return UpstreamRateLimited(
                "The agent's own model server is limiting requests; try again later.",
                retry_after_s=_retry_after(error),
            )
        case openai.BadRequestError() | openai.UnprocessableEntityError():
            return UpstreamRejected(
                f"The agent's own model server refused the request: {error.message}",
                param=error.param,
                code=error.code,
                status=error.status_code,
            )
        case openai.APIStatusError() if error.status_code == 503:
            return UpstreamUnavailable("The agent's own model server is overloaded or down.")
        case openai.APIStatusError() if error.status_code in (408, 504):
            return UpstreamTimeout("The agent's own model server did not answer in time.")
        case openai.APIError():
            return UpstreamError("The agent's own model server failed.")
    return AgentMisconfigured("The agent's own model client is not set up: it has no key or no address.")


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= 3600 else None
