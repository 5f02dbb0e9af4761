"""What all model calls of one run share: who asked, what was used, how the last answer ended, when to stop.

A `Level` is one SDK run. Level 0 is the run of the request; an agent used as a tool, or author code that calls
``Runner.run``, opens a level below it. The current level travels in a contextvar, which the SDK's tasks and worker
threads inherit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gateway.errors import ModelNotAllowed
from gateway.events import FinishReason, Usage
from gateway.limits.run_budget import OpenCall, RunBudget
from gateway.run import Run
from gateway.security.acl import AccessList
from gateway.usage.estimate import estimate_usage
from gateway.usage.meter import Meter

if TYPE_CHECKING:
    from gateway.routing.routed import LostHedge
    from gateway.routing.targets import ModelTable, Target
    from gateway.tools.manager import ToolManager

ToolStatus = Literal["success", "error", "timeout"]
Observe = Callable[[str, str, str, ToolStatus, float], None]
"""Told of a tool call: tool, provider (``native``, ``agent``, ``mcp``), agent, status, seconds."""

MODEL_CALLS_PER_TURN = 10
"""A run may make this many model calls, over all its levels, for each turn it is allowed."""


@dataclass(slots=True)
class RunScope:
    """Shared by every level of one run.

    ``decided`` is told of decisions on agents that are reached. ``call_ids`` are those of all tool calls so far.
    ``finished`` turns True when the answer is complete: author code that goes on in the background from then on uses
    the current upstreams instead of this run's. ``served_by`` is what the latest model was bound to. ``published`` has
    the model ids of the drop-in's agents, by the `id` of the object, ``configured`` those of them that the operator
    says something of, as they are to run.
    """

    run: Run
    table: ModelTable
    loop: asyncio.AbstractEventLoop
    observe: Observe
    upstream: str | None = None
    default_model: str | None = None
    max_tool_hops: int | None = None
    meter: Meter = field(default_factory=Meter)
    access: AccessList = field(default_factory=AccessList)
    published: Mapping[int, str] = field(default_factory=dict)
    configured: Mapping[int, object] = field(default_factory=dict)
    hides_foreign_models: bool = False
    decided: Callable[[str, bool], None] = lambda kind, allowed: None
    tools: ToolManager | None = None
    budget: RunBudget = field(default_factory=RunBudget)
    usage: Usage = field(default_factory=Usage)
    call_ids: set[str] = field(default_factory=set)
    finished: bool = False
    served_by: Target | None = None

    def add_usage(self, usage: Usage) -> None:
        """Add what one model call used."""
        self.usage = self.usage + usage

    def charge(
        self,
        usage: Usage,
        upstream: str,
        model: str,
        call: OpenCall | None = None,
        lost: LostHedge | None = None,
        *,
        byok: bool = False,
    ) -> None:
        """Add what one model call used, with its cost at the upstream and model that answered it; settle ``call``.

        ``lost`` is who was asked too and given up: its input is estimated. ``byok``: the caller brought the key.
        """
        agent = self.run.model
        usage = self.meter.charge(usage, self.run, upstream=upstream, model=model, agent=agent, byok=byok)
        if lost is not None:
            spent = estimate_usage(lost.body_bytes, 0)
            usage += self.meter.charge(
                spent, self.run, upstream=lost.upstream, model=lost.model, agent=agent, byok=lost.is_lent
            )
        self.add_usage(usage)
        if call is not None:
            self.at_home(lambda: call.settle(usage))

    def at_home(self, action: Callable[[], None]) -> None:
        """Do something on the gateway's loop: a sync tool that starts a run has a loop of its own in its thread."""
        if asyncio.get_running_loop() is self.loop:
            action()
        else:
            self.loop.call_soon_threadsafe(action)

    def authorize(self, agent: object) -> None:
        """Raise `ModelNotAllowed` for an agent that is a model of its own and that the run's caller does not reach."""
        model_id = self.published.get(id(agent))
        if model_id is None or model_id == self.run.model:
            return
        allowed = self.access.allows(self.run.principal, model_id)
        self.decided("model", allowed)
        if allowed:
            return
        if self.hides_foreign_models:
            raise ModelNotAllowed(
                f"'{self.run.model}' passed the conversation to an agent that the key '{self.run.principal.key_id}' "
                "does not reach. Ask the gateway's operator which keys may go there.",
                param="model",
            )
        raise ModelNotAllowed(
            f"The key '{self.run.principal.key_id}' does not reach the agent '{model_id}', to which '{self.run.model}' "
            "passed the conversation. Its owner adds a pattern that matches it to allow_agents.",
            param="model",
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
        """Open the level of a run inside this one; raise `RunBudgetExceeded` below the deepest."""
        self.scope.budget.check_depth(self.depth + 1)
        return Level(self.scope, self.depth + 1)


_CURRENT: ContextVar[Level | None] = ContextVar("sdk_adapter_level", default=None)


def current_level() -> Level | None:
    """Return the level of the SDK run this code belongs to; None outside of any run and after its end."""
    level = _CURRENT.get()
    return None if level is None or level.scope.finished else level


def count_tool_call() -> None:
    """Count a tool call of the run this code belongs to; raise `RunBudgetExceeded` past its cap."""
    level = current_level()
    if level is not None:
        level.scope.budget.count_tool_call()


def belongs_to_a_run(context: Context | None = None) -> bool:
    """Return whether code in ``context``, by default the current one, was started by a run, ended or not."""
    return (_CURRENT.get() if context is None else context.get(_CURRENT)) is not None


@contextmanager
def enter_level(level: Level) -> Iterator[None]:
    """Make ``level`` the current one for this task and whatever it starts."""
    token = _CURRENT.set(level)
    try:
        yield
    finally:
        _CURRENT.reset(token)
