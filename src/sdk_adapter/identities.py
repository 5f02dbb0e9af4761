"""The SDK's names for the agents of a run, without the part that costs a sixth of a run.

Twice in each run the SDK maps every reachable agent to a name that is its own. Agents that share a name are told apart
by a digest of all their fields and tools, which SDK 0.24 makes even where no two share one; here it is made only then.
The result is the same mapping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agents import Agent
from agents import _run_state_agent_identity as identities


@contextmanager
def quick_identities() -> Iterator[None]:
    """Let the SDK compare agents only where two have the same name; undone at the end."""
    thorough = identities._build_agent_identity_map

    def quick(initial_agent: Agent[Any]) -> dict[str, Agent[Any]]:
        reached = list(identities._iter_agent_graph(initial_agent))
        by_name = {agent.name: agent for agent in reached}
        return by_name if len(by_name) == len(reached) else thorough(initial_agent)

    identities._build_agent_identity_map = quick
    try:
        yield
    finally:
        identities._build_agent_identity_map = thorough
