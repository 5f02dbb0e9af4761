"""A runner that starts no run while a drop-in is imported: no check and no reload may cost a model call."""

from __future__ import annotations

from typing import Any

from agents import Agent, RunResult, RunResultStreaming
from agents.run import AgentRunner

from sdk_adapter.importing import refuse_run_at_import


class StoppingRunner(AgentRunner):
    """The SDK's runner; a run that is asked for during an import raises `RunAtImport` instead."""

    async def run(self, starting_agent: Agent[Any], input: Any, **kwargs: Any) -> RunResult:
        """See ``Runner.run``."""
        refuse_run_at_import()
        return await super().run(starting_agent, input, **kwargs)

    def run_sync(self, starting_agent: Agent[Any], input: Any, **kwargs: Any) -> RunResult:
        """See ``Runner.run_sync``."""
        refuse_run_at_import()
        return super().run_sync(starting_agent, input, **kwargs)

    def run_streamed(self, starting_agent: Agent[Any], input: Any, **kwargs: Any) -> RunResultStreaming:
        """See ``Runner.run_streamed``."""
        refuse_run_at_import()
        return super().run_streamed(starting_agent, input, **kwargs)
