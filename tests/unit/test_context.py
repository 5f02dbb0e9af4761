"""The context object that author code sees."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from agents import Agent, RunContextWrapper, function_tool

from sdk_adapter.context import GatewayContext
from tests.unit.sdk_fakes import Reply, World, make_run, run_async


def test_every_documented_name_answers() -> None:
    context = GatewayContext.of(make_run())
    assert context.run_id
    assert (context.request_id, context.model, context.session_id) == ("req-1", "default/test", None)
    assert (context.principal.id, context.principal.key_id) == ("someone", "key")
    assert (context.principal.namespace, context.principal.scopes) == ("default", ["chat"])
    assert (context.metadata, context.headers, context.state) == ({}, {}, {})


def test_it_is_a_mapping_and_survives_json() -> None:
    run = make_run(metadata={"ticket": "7"}, session_id="s", headers={"user-agent": "x"})
    context = GatewayContext.of(run)
    context.state["n"] = 1
    again = json.loads(json.dumps(context))
    assert again == context
    assert (again["metadata"], again["session_id"], again["run_id"]) == ({"ticket": "7"}, "s", run.id.hex)
    assert copy.deepcopy(context) == context
    assert dict(**context) == context


def test_an_agent_with_a_context_class_of_its_own_finds_what_it_sets() -> None:
    context = GatewayContext.of(make_run())
    context.seat_number = "12A"
    assert context.seat_number == "12A"
    assert context.state == {"seat_number": "12A"}
    del context.seat_number
    assert not hasattr(context, "seat_number")
    context.session_id = "other"
    assert context["session_id"] == "other"
    with pytest.raises(AttributeError, match="'state'"):
        _ = context.passenger
    with pytest.raises(AttributeError):
        del context.passenger
    with pytest.raises(AttributeError):
        _ = context.principal.password


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_and_instructions_see_it(streamed: bool) -> None:
    async def instructions(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
        run = context.context
        return f"You serve {run.principal.id} as {run.model} ({run.metadata['ticket']})."

    @function_tool
    def whoami(context: RunContextWrapper[Any]) -> str:
        return json.dumps(context.context)

    world = World(Reply(calls=(("whoami", {}),)), "done")
    agent = Agent(name="a", instructions=instructions, tools=[whoami])
    with world.installed():
        run_async(world.ask(agent, streamed=streamed, metadata={"ticket": "7"}))
    messages = world.upstream.bodies[1]["messages"]
    assert messages[0]["content"] == "You serve someone as default/test (7)."
    assert json.loads(messages[-1]["content"])["principal"]["key_id"] == "key"
