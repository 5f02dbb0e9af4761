"""RunBudget: the caps of one run, over all its agents, and the reservation of its caller; asked before each call."""

from __future__ import annotations

import time
from typing import NoReturn

import msgspec
from msgspec import Struct

from gateway.errors import RateLimited, RunBudgetExceeded
from gateway.events import Usage
from gateway.limits.reservation import CallHold, Estimate, Reservation
from gateway.limits.rules import NANO, nanodollars_of_pico

_SETTINGS = {
    "depth": "GATEWAY_RUN_MAX_DEPTH",
    "model_calls": "GATEWAY_RUN_MAX_MODEL_CALLS",
    "tool_calls": "GATEWAY_RUN_MAX_TOOL_CALLS",
    "tokens": "GATEWAY_RUN_MAX_TOKENS",
    "nanodollars": "GATEWAY_RUN_MAX_COST_USD",
}
_OPTIONS = {
    "depth": "max_depth",
    "model_calls": "max_model_calls",
    "tool_calls": "max_tool_calls",
    "tokens": "max_total_tokens",
    "nanodollars": "max_cost_usd",
}


class RunCaps(Struct, frozen=True):
    """What one run may do at the most. ``depth`` counts runs inside runs; time is the run's deadline.

    ``own`` names the caps that the agent's author set, for the words of a refusal.
    """

    depth: int = 8
    model_calls: int = 100
    tool_calls: int = 500
    tokens: int = 5_000_000
    nanodollars: int = 100 * NANO
    own: frozenset[str] = frozenset()

    def lowered(self, **author: int | None) -> RunCaps:
        """Return the caps with those of the agent's author that are lower; None sets none."""
        lower = {name: cap for name, cap in author.items() if cap is not None and cap < getattr(self, name)}
        return msgspec.structs.replace(self, **lower, own=frozenset(lower))

    def source(self, name: str) -> str:
        """Return what whoever wants another cap changes: a setting, or an option of the agent."""
        return f"{_OPTIONS[name]} of the agent" if name in self.own else _SETTINGS[name]


class RunBudget:
    """Counts for one run; used from the event loop that the run was admitted in.

    What is refused once ends the run: a tool's error may be words to the model, so its next call is refused, too.
    ``output_tokens`` is what a call without a limit of its own is taken to write.
    """

    def __init__(
        self,
        caps: RunCaps | None = None,
        reservation: Reservation | None = None,
        *,
        output_tokens: int = 4_096,
        deadline_s: float = 600.0,
    ) -> None:
        self.caps = caps or RunCaps()
        self.output_tokens = output_tokens
        self.model_calls = self.tool_calls = self.tokens = self.nanodollars = 0
        self._reservation = reservation
        self._ends_at = time.monotonic() + deadline_s
        self._exceeded: RunBudgetExceeded | None = None

    def check_depth(self, depth: int) -> None:
        """Raise `RunBudgetExceeded` for a run that would be deeper inside others than the cap."""
        if depth > self.caps.depth:
            self._exceed("levels of agents that call each other", "depth")

    def count_model_call(self) -> None:
        """Count one; raise `RunBudgetExceeded` when the run has made too many, or was refused before."""
        self._check()
        self.model_calls += 1
        if self.model_calls > self.caps.model_calls:
            self._exceed("model calls over all its agents", "model_calls")

    def count_tool_call(self) -> None:
        """Count one; raise `RunBudgetExceeded` when the run has made too many, or was refused before."""
        self._check()
        self.tool_calls += 1
        if self.tool_calls > self.caps.tool_calls:
            self._exceed("tool calls over all its agents", "tool_calls")

    async def begin_call(self, estimate: Estimate) -> OpenCall:
        """Reserve what a model call may use at the most; waits for tokens, while the run has time, not for money.

        Raises `RunBudgetExceeded`, or as `Reservation.reserve_call` does.
        """
        self._check()
        tokens, nanodollars = estimate.tokens, estimate.nanodollars
        if not estimate.is_promised:
            tokens = min(tokens, max(self.caps.tokens - self.tokens, 1))
            nanodollars = min(nanodollars, max(self.caps.nanodollars - self.nanodollars, 1))
        if self.tokens + tokens > self.caps.tokens:
            self._exceed("tokens over all its agents", "tokens")
        if self.nanodollars + nanodollars > self.caps.nanodollars:
            self._exceed("USD over all its agents", "nanodollars")
        self.tokens += tokens
        self.nanodollars += nanodollars
        call = OpenCall(self, tokens, nanodollars)
        if self._reservation is not None:
            try:
                patience_s = self._ends_at - time.monotonic()
                call.hold = await self._reservation.reserve_call(estimate, patience_s=patience_s)
            except BaseException as error:
                call.release()
                if isinstance(error, RateLimited):
                    error.should_retry = False  # the run may have acted
                raise
        return call

    def _check(self) -> None:
        if self._exceeded is not None:
            raise self._exceeded

    def _exceed(self, what: str, name: str) -> NoReturn:
        cap = getattr(self.caps, name) / (NANO if name == "nanodollars" else 1)
        self._exceeded = RunBudgetExceeded(
            f"The run was stopped at its cap of {what}: {cap:.12g} ({self.caps.source(name)}). An agent that calls "
            "itself, directly or through others, is the usual cause."
        )
        raise self._exceeded


class OpenCall:
    """One model call of a run: `settle` or `release` it once."""

    __slots__ = ("_budget", "_is_open", "_nanodollars", "_tokens", "hold")

    def __init__(self, budget: RunBudget, tokens: int, nanodollars: int) -> None:
        self._budget, self._tokens, self._nanodollars = budget, tokens, nanodollars
        self._is_open = True
        self.hold: CallHold | None = None

    def settle(self, usage: Usage) -> None:
        """Replace the worst case by what was used."""
        if self._close():
            self._budget.tokens += usage.total_tokens
            self._budget.nanodollars += nanodollars_of_pico(usage.cost or 0)
            if self.hold is not None:
                self.hold.settle(usage)

    def release(self) -> None:
        """Give back everything; nothing happens after `settle`."""
        if self._close() and self.hold is not None:
            self.hold.release()

    def _close(self) -> bool:
        was_open, self._is_open = self._is_open, False
        if was_open:
            self._budget.tokens -= self._tokens
            self._budget.nanodollars -= self._nanodollars
        return was_open
