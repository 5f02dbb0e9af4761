"""RunEvent: the one stream that every executor yields and every surface encodes.

An executor yields zero or more deltas and calls, then exactly one `RunFinished` (or, for a relayed upstream, a
`RelayedHead` first and `RelayedBody` / `RelayEnded` last); a failure is a raised `GatewayError`. Whoever matches on
`RunEvent` ends with `assert_never`, so that a new event is a type error until every surface says what it does with it.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Usage(Struct, frozen=True):
    """Tokens of a run, summed over all its model calls; ``estimated`` when an upstream gave no numbers.

    Cached, cache-writing and audio tokens are among the input's, reasoning and audio tokens among the output's.
    ``cost`` is in picodollars (1e-12 USD), None where that of any call is not known; ``cost_reported`` when it is, at
    least in part, what upstreams reported themselves. ``cached``: the answer came from the gateway's own cache, or from
    a call that another run is charged for; then nothing was used.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    requests: int = 0
    estimated: bool = False
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    cost: int | None = None
    cost_reported: bool = False
    cached: bool = False
    cache_write_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Input plus output."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.requests + other.requests,
            self.estimated or other.estimated,
            self.audio_input_tokens + other.audio_input_tokens,
            self.audio_output_tokens + other.audio_output_tokens,
            _sum_of_costs(self, other),
            self.cost_reported or other.cost_reported,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
        )


def _sum_of_costs(one: Usage, other: Usage) -> int | None:
    if not one.requests:
        return other.cost
    if not other.requests:
        return one.cost
    return None if one.cost is None or other.cost is None else one.cost + other.cost


class TextDelta(Struct, frozen=True):
    """A piece of the answer's text."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """A piece of the model's visible reasoning."""

    text: str


class RefusalDelta(Struct, frozen=True):
    """A piece of a refusal."""

    text: str


class ToolCallRequested(Struct, frozen=True):
    """A call of a tool that the *client* sent: the client runs it and comes back with the result."""

    index: int
    call_id: str
    name: str
    arguments: str


class ToolStarted(Struct, frozen=True):
    """A tool of the gateway or the agent began; never shown as a tool call to a strict client."""

    call_id: str
    name: str
    agent: str


class ToolFinished(Struct, frozen=True):
    """A tool of the gateway or the agent ended."""

    call_id: str
    name: str
    agent: str


class AgentSwitched(Struct, frozen=True):
    """A handoff: another agent of the same drop-in goes on."""

    agent: str


class Routed(Struct, frozen=True):
    """A model call is being served by this upstream; comes before the answer's first event.

    Of an agent's several calls it is the latest. ``attempts`` counts the requests that went out for it, to whomever;
    ``hedged``: one of them because another was slow.
    """

    upstream: str
    attempts: int
    hedged: bool = False


class RunFinished(Struct, frozen=True):
    """The answer is complete. ``usage`` is None only where no model was called."""

    finish_reason: FinishReason
    usage: Usage | None


class RelayedHead(Struct, frozen=True):
    """A raw upstream model has begun to answer; comes before anything else of a relayed run.

    ``headers`` are for the client (``x-upstream-…``). The rest counts where the answer is bytes: ``usage`` is what it
    used, where that is known this early.
    """

    headers: tuple[tuple[bytes, bytes], ...] = ()
    status: int = 200
    content_type: bytes | None = None
    usage: Usage | None = None


class RelayedChunk(Struct, frozen=True):
    """One judged stream event of a raw upstream model (the JSON after ``data: ``), or a piece of an answer in bytes."""

    data: bytes


class RelayEnded(Struct, frozen=True):
    """A relayed stream came to its proper end."""

    finish_reason: str
    usage: Usage | None


class RelayedBody(Struct, frozen=True):
    """The whole JSON answer of a raw upstream model, ready to send."""

    data: bytes
    finish_reason: str
    usage: Usage | None


RunEvent = (
    TextDelta
    | ReasoningDelta
    | RefusalDelta
    | ToolCallRequested
    | ToolStarted
    | ToolFinished
    | AgentSwitched
    | Routed
    | RunFinished
    | RelayedHead
    | RelayedChunk
    | RelayEnded
    | RelayedBody
)
