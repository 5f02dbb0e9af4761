"""The process's default agent runner: every ``Runner.run`` of author code goes through the gateway's upstreams.

Without it, a guardrail or a tool that starts a run of its own would use the SDK's default provider: OpenAI directly,
past upstreams, limits and metrics.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agents import Agent, RunConfig, RunResult, RunResultStreaming, RunState
from agents.exceptions import AgentsException
from agents.run import get_default_agent_runner, set_default_agent_runner

from sdk_adapter.cloning import RunClones
from sdk_adapter.failures import mark_inner
from sdk_adapter.identities import quick_identities
from sdk_adapter.instrument import is_default_provider
from sdk_adapter.model_choice import PLACEHOLDER_MODEL
from sdk_adapter.models import GatewayProvider
from sdk_adapter.scope import Level, current_level, enter_level
from sdk_adapter.services import AdapterServices
from sdk_adapter.stopping import StoppingRunner
from sdk_adapter.tracing import nobody_listens, tracing_at_home

if TYPE_CHECKING:
    from gateway.routing.targets import ModelTable

_ENVIRONMENT = {
    "OPENAI_DEFAULT_MODEL": PLACEHOLDER_MODEL,
    "OPENAI_AGENTS_DONT_LOG_MODEL_DATA": "1",
    "OPENAI_AGENTS_DONT_LOG_TOOL_DATA": "1",
}


class GatewayRunner(StoppingRunner):
    """Clones each starting agent and fills in the gateway's model provider where the author named none."""

    def __init__(self, upstreams: Callable[[], ModelTable]) -> None:
        self._provider = GatewayProvider(upstreams)

    async def run(self, starting_agent: Agent[Any], input: Any, **kwargs: Any) -> RunResult:
        """See ``Runner.run``."""
        level, agent, arguments = self._prepare(starting_agent, input, kwargs)
        with enter_level(level) if level is not None else nullcontext():
            try:
                return await super().run(agent, input, **arguments)
            except AgentsException as error:
                if level is not None and level.depth:
                    mark_inner(error)
                raise

    def run_streamed(self, starting_agent: Agent[Any], input: Any, **kwargs: Any) -> RunResultStreaming:
        """See ``Runner.run_streamed``; the tasks it starts inherit the level."""
        level, agent, arguments = self._prepare(starting_agent, input, kwargs)
        with enter_level(level) if level is not None else nullcontext():
            return super().run_streamed(agent, input, **arguments)

    def _prepare(
        self, agent: Agent[Any], input: Any, kwargs: dict[str, Any]
    ) -> tuple[Level | None, Agent[Any], dict[str, Any]]:
        arguments = {**kwargs, "run_config": self._configured(kwargs.get("run_config"))}
        level = current_level()
        if level is not None and not level.started:
            level.started = True
            return level, agent, arguments
        level = level.child() if level is not None else None
        if level is not None:
            level.started = True
            level.scope.authorize(agent)
        if isinstance(input, RunState) or not isinstance(agent, Agent):
            return level, agent, arguments
        return level, RunClones(level).clone_of(agent), arguments

    def _configured(self, config: RunConfig | dict[str, Any] | None) -> RunConfig | dict[str, Any]:
        if config is None:
            return RunConfig(
                model_provider=self._provider, trace_include_sensitive_data=False, tracing_disabled=nobody_listens()
            )
        if isinstance(config, dict):
            return config if "model_provider" in config else {**config, "model_provider": self._provider}
        return replace(config, model_provider=self._provider) if is_default_provider(config.model_provider) else config


@contextmanager
def install(services: AdapterServices) -> Iterator[None]:
    """Prepare the process for drop-ins, before the first of them is imported; undo it at the end.

    The default runner and the trace provider become the gateway's, and an agent without a model no longer means a
    GPT-5 model with settings that local models refuse.
    """
    runner = get_default_agent_runner()
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    os.environ["OPENAI_DEFAULT_MODEL"] = PLACEHOLDER_MODEL
    set_default_agent_runner(GatewayRunner(services.upstreams))
    try:
        with tracing_at_home(), quick_identities():
            yield
    finally:
        set_default_agent_runner(runner)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
