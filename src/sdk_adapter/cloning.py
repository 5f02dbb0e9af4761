"""One run's own copies of the agents it uses.

Concurrent runs that share an SDK agent scan each other's state on every turn, so each run works on clones: of its
first agent, of every handoff target, and of the first agent of every run inside it. A clone is a shallow copy, so
that fields this file does not know, and subclasses with a constructor of their own, pass through untouched. (The
SDK's `Agent.clone` constructs anew: the same fields, a tenth of the speed, and no such subclasses.)
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agents import Agent, Handoff, Model, handoff
from agents.models.default_models import get_default_model_settings

from gateway.registry.entry import AgentOptions, ModelConfig
from sdk_adapter.gateway_tools import bound_tools
from sdk_adapter.guarding import judged_off_the_loop
from sdk_adapter.instrument import rebound_handoff
from sdk_adapter.model_choice import ChosenModel, changes_model, plain_name
from sdk_adapter.models import GatewayModel
from sdk_adapter.scope import Level

Customise = Callable[[Agent[Any]], dict[str, Any]]
"""Returns further fields to change on the clone of one agent of the run."""


class RunClones:
    """The clones of one SDK run; asking twice for one agent gives the same clone."""

    def __init__(self, level: Level | None, customise: Customise | None = None) -> None:
        self._level = level
        self._customise = customise
        self._clones: dict[int, tuple[Agent[Any], Agent[Any]]] = {}

    def treat_alike(self, agent: Agent[Any], clone: Agent[Any]) -> None:
        """Make ``clone`` the copy of ``agent`` too."""
        self._clones[id(agent)] = (agent, clone)

    def clone_of(self, agent: Agent[Any]) -> Agent[Any]:
        """Return this run's copy of an author's agent."""
        known = self._clones.get(id(agent))
        if known is not None:
            return known[1]
        original, agent = agent, self._configured(agent)
        changes: dict[str, Any] = {
            "tools": bound_tools(agent.tools, self._level),
            "handoffs": [self._bind(item) for item in agent.handoffs],
            "instructions": off_the_loop(agent.instructions),
            "input_guardrails": [judged_off_the_loop(item) for item in agent.input_guardrails],
            "output_guardrails": [judged_off_the_loop(item) for item in agent.output_guardrails],
        }
        if isinstance(agent.model, Model) and not isinstance(agent.model, GatewayModel):
            changes["model"] = GatewayModel(agent.model, self._level)
        if self._customise is not None:
            changes |= self._customise(agent)
        clone = copied(agent, **changes)
        self._clones[id(original)] = (original, clone)
        self._clones[id(clone)] = (clone, clone)
        return clone

    def _configured(self, agent: Agent[Any]) -> Agent[Any]:
        found = self._level.scope.configured.get(id(agent)) if self._level is not None else None
        return found if isinstance(found, Agent) else agent

    def _bind(self, item: Agent[Any] | Handoff[Any, Any]) -> Handoff[Any, Any]:
        original = handoff(item) if isinstance(item, Agent) else item
        invoke = original.on_invoke_handoff

        async def on_invoke(context: Any, arguments: str) -> Any:
            target = await invoke(context, arguments)
            if self._level is not None:
                self._level.scope.authorize(target)
            return self.clone_of(target) if isinstance(target, Agent) else target

        return rebound_handoff(original, on_invoke)


def copied(agent: Agent[Any], **changes: Any) -> Agent[Any]:
    """Return a shallow copy of an agent with some fields changed."""
    clone = copy.copy(agent)
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone


def with_model(agent: Agent[Any], model: str) -> Agent[Any]:
    """Return a copy of the agent that names another model, without settings the SDK chose for the one it named."""
    changes: dict[str, Any] = {"model": model}
    if agent.model_settings == get_default_model_settings(agent.model if isinstance(agent.model, str) else None):
        changes["model_settings"] = get_default_model_settings(model)
    return copied(agent, **changes)


def as_configured(agent: Agent[Any], options: AgentOptions, config: ModelConfig | None) -> Agent[Any]:
    """Return an agent as ``__gateway__`` (``options``) and then the operator's ``config`` want its model.

    A copy: it may come from an installed package, which outlives the load that used it.
    """
    if options.model and not isinstance(agent.model, Model):
        agent = with_model(agent, options.model)
    if config is None:
        return agent
    if config.model or (changes_model(config) and not isinstance(agent.model, Model)):
        named = config.model or (agent.model if isinstance(agent.model, str) else None)
        upstream = config.upstream if config.model or config.upstream else options.upstream
        agent = with_model(agent, ChosenModel(plain_name(named), upstream, config.fallbacks))
    given: dict[str, Any] = config.given()
    return copied(agent, model_settings=replace(agent.model_settings, **given)) if given else agent


def off_the_loop(instructions: Any) -> Any:
    """Return instructions whose plain (not async) callable runs in a worker thread; anything else as it is."""
    if instructions is None or isinstance(instructions, str) or not callable(instructions):
        return instructions
    if inspect.iscoroutinefunction(instructions) or inspect.iscoroutinefunction(type(instructions).__call__):
        return instructions

    async def threaded(context: Any, agent: Any) -> Any:
        text = await asyncio.to_thread(instructions, context, agent)
        return await text if inspect.isawaitable(text) else text

    return threaded
