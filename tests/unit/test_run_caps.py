"""Caps that an agent's author sets: the lower of the setting and the option holds, and every kind of tool counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agents import Agent, function_tool
from agents.mcp import MCPServer

from gateway.errors import RunBudgetExceeded
from gateway.limits.rules import NANO
from gateway.limits.run_budget import RunCaps
from tests.unit.sdk_fakes import Reply, World, run_async
from tests.unit.test_mcp_servers import OfMyOwn, script, stdio

__all__ = ["script"]


@function_tool
def note() -> str:
    """Note it."""
    return "noted"


def looping() -> list[Reply]:
    return [Reply(calls=(("note", {}),)) for _ in range(40)]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("options", "settings", "named", "calls"),
    [
        ({"max_model_calls": 2}, {}, "model calls over all its agents: 2 (max_model_calls of the agent)", 2),
        ({"max_tool_calls": 2}, {}, "tool calls over all its agents: 2 (max_tool_calls of the agent)", 3),
        ({"max_tool_calls": 0}, {}, "tool calls over all its agents: 0 (max_tool_calls of the agent)", 1),
        ({"max_total_tokens": 31}, {}, "tokens over all its agents: 31 (max_total_tokens of the agent)", 3),
        ({"max_model_calls": 9}, {"run_max_model_calls": 3}, "calls over all its agents: 3 (GATEWAY_RUN_MAX_MODEL", 3),
        ({"max_tool_calls": 9}, {"run_max_tool_calls": 1}, "calls over all its agents: 1 (GATEWAY_RUN_MAX_TOOL", 2),
    ],
)
def test_the_lower_of_setting_and_option_stops_the_run_and_is_named(
    options: dict[str, Any], settings: dict[str, Any], named: str, calls: int, streamed: bool
) -> None:
    world = World(*looping(), **settings)
    agent = Agent(name="a", tools=[note])
    with world.installed(), pytest.raises(RunBudgetExceeded) as caught:
        run_async(world.ask(agent, streamed=streamed, options={"max_turns": 30, **options}))
    assert named in caught.value.message
    assert len(world.upstream.bodies) == calls


@pytest.mark.parametrize(
    ("own", "setting", "most"), [(None, None, 10), (30, None, 30), (30, 20, 20), (5, 20, 5), (None, 40, 40)]
)
def test_model_calls_are_ten_for_each_turn_where_nobody_says_how_many(
    own: int | None, setting: int | None, most: int
) -> None:
    executor = World(run_max_model_calls=setting).prepare(Agent(name="a"), max_turns=1, max_model_calls=own)
    assert executor._caps.model_calls == most


def test_an_agent_that_is_its_own_tool_stops_at_its_own_depth() -> None:
    agent = Agent(name="a")
    agent.tools.append(agent.as_tool("again", "Again."))
    world = World(*[Reply(calls=(("again", {"input": "x"}),)) for _ in range(50)])
    with world.installed(), pytest.raises(RunBudgetExceeded, match=r"each other: 2 \(max_depth of the agent\)"):
        run_async(world.ask(agent, options={"max_depth": 2}))
    assert len(world.upstream.bodies) == 3


def test_the_cap_of_cost_is_of_money() -> None:
    caps = RunCaps().lowered(nanodollars=5 * NANO // 10, tokens=None)
    assert (caps.nanodollars, caps.tokens, caps.source("nanodollars")) == (
        NANO // 2,
        RunCaps().tokens,
        "max_cost_usd of the agent",
    )
    higher = RunCaps().lowered(nanodollars=101 * NANO)
    assert (higher.nanodollars, higher.source("nanodollars")) == (100 * NANO, "GATEWAY_RUN_MAX_COST_USD")


@pytest.mark.parametrize("kind", ["pooled", "of its author"])
def test_calls_of_the_agents_own_mcp_servers_count(script: Path, kind: str) -> None:
    world = World(*[Reply(calls=(("time_in", {"city": "Rome"}),)) for _ in range(9)])

    async def main() -> None:
        server: MCPServer = stdio(script) if kind == "pooled" else OfMyOwn()
        executor = world.prepare(Agent(name="a", mcp_servers=[server]), max_tool_calls=2)
        await executor.open()
        try:
            with pytest.raises(RunBudgetExceeded, match="max_tool_calls of the agent"):
                await world.ask(executor)
        finally:
            await executor.aclose()

    with world.installed():
        run_async(main())
    assert len(world.upstream.bodies) == 3
