"""What all model calls of one run share: who asked, what was used, how the last answer ended, when to stop.

A `Level` is one SDK run. Level 0 is the run of the request; an agent used as a tool, or author code that calls
``Runner.run``, opens a level below it. The current level travels in a contextvar, which the SDK's tasks and worker
threads inherit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gateway.errors import AgentFailed
from gateway.events import FinishReason, Usage
from gateway.run import Run
from gateway.usage.meter import Meter

if TYPE_CHECKING:
    from gateway.routing.targets import ModelTable, Target

ToolStatus = Literal["success", "error", "timeout"]
Observe = Callable[[str, str, str, ToolStatus, float], None]
"""Told of a tool call: tool, provider (``native``, ``agent``, ``mcp``), agent, status, seconds."""

DEEPEST_LEVEL = 8
"""Runs inside runs; an agent that is its own tool ends here."""

MODEL_CALLS_PER_TURN = 10
"""A run may make this many model calls, over all its levels, for each turn it is allowed."""


@dataclass(slots=True)
class RunScope:
    """Shared by every level of one run.

    ``call_ids`` are those of all tool calls so far. ``finished`` turns True when the answer is complete: author code
    that goes on in the background from then on uses the current upstreams instead of this run's. ``served_by`` is what
    the latest model was bound to.
    """

    run: Run
    table: ModelTable
    loop: asyncio.AbstractEventLoop
    model_call_limit: int
    observe: Observe
    upstream: str | None = None
    default_model: str | None = None
    max_tool_hops: int | None = None
    meter: Meter = field(default_factory=Meter)
    usage: Usage = field(default_factory=Usage)
    call_ids: set[str] = field(default_factory=set)
    model_calls: int = 0
    finished: bool = False
    served_by: Target | None = None

    def add_usage(self, usage: Usage) -> None:
        """Add what one model call used."""
        self.usage = self.usage + usage

    def charge(self, usage: Usage, upstream: str, model: str) -> None:
        """Add what one model call used, with its cost at the upstream and model that answered it."""
        self.add_usage(self.meter.charge(usage, run_model=self.run.model, upstream=upstream, model=model))

    def count_model_call(self) -> None:
        """Count one model call; raise `AgentFailed` when the run has made too many."""
        self.model_calls += 1
        if self.model_calls > self.model_call_limit:
            raise AgentFailed(
                f"The run was stopped after {self.model_call_limit} model calls over all its agents. An agent that "
                "calls itself, directly or through others, is the usual cause; its author can raise 'max_turns'."
            )


@dataclass(slots=True)
class Level:
    """One SDK run.

    ``finish_reason`` is that of its latest model call. ``client_tools`` are the names of tools that the client sent.
    ``started`` turns True when the SDK has been given the level's first agent.
    """

    scope: RunScope
    depth: int = 0
    finish_reason: FinishReason | None = None
    tool_hops: int = 0
    client_tools: frozenset[str] = frozenset()
    started: bool = False

    def child(self) -> Level:
        """Open the level of a run inside this one; raise `AgentFailed` below the deepest."""
        if self.depth >= DEEPEST_LEVEL:
            raise AgentFailed(
                f"Agents called each other more than {DEEPEST_LEVEL} levels deep, so the run was stopped."
            )
        return Level(self.scope, self.depth + 1)


_CURRENT: ContextVar[Level | None] = ContextVar("sdk_adapter_level", default=None)


def current_level() -> Level | None:
    """Return the level of the SDK run this code belongs to; None outside of any run and after its end."""
    level = _CURRENT.get()
    return None if level is None or level.scope.finished else level


@contextmanager
def enter_level(level: Level) -> Iterator[None]:
    """Make ``level`` the current one for this task and whatever it starts."""
    token = _CURRENT.set(level)
    try:
        yield
    finally:
        _CURRENT.reset(token)
