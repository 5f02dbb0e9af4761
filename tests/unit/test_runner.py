"""Runs that author code starts itself, and what `install` changes and puts back."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    ModelProvider,
    ModelSettings,
    MultiProvider,
    RunConfig,
    RunContextWrapper,
    Runner,
    function_tool,
    input_guardrail,
)
from agents.models.default_models import get_default_model_settings
from agents.run import get_default_agent_runner
from agents.run_internal.agent_tool_configuration import _resolutions
from agents.testing import ModelStep, ScriptedModel, assistant_message
from agents.tracing import setup

from gateway.errors import AgentFailed, ContentPolicyViolation
from gateway.events import Usage
from sdk_adapter.models import GatewayModel
from sdk_adapter.runner import PLACEHOLDER_MODEL, GatewayRunner
from tests.unit.sdk_fakes import FakeTable, FakeUpstream, Reply, World, run_async

judge = Agent(name="judge", instructions="You are the judge.")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_guardrail_that_asks_a_model_asks_the_gateways(streamed: bool) -> None:
    @input_guardrail(run_in_parallel=False)
    async def ask_judge(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        result = await Runner.run(judge, "Is it fine?", context=context.context)
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered="no" in result.final_output)

    world = World("no")
    agent = Agent(name="a", input_guardrails=[ask_judge])
    with world.installed(), pytest.raises(ContentPolicyViolation):
        run_async(world.ask(agent, streamed=streamed, temperature=0.1))
    assert world.upstream.bodies[0]["messages"][0]["content"] == "You are the judge."
    assert "temperature" not in world.upstream.bodies[0]
    world = World("fine", "answer")
    with world.installed():
        answer = run_async(world.ask(agent, streamed=streamed))
    assert (answer.text, answer.end.usage) == ("answer", Usage(20, 10, requests=2))


@pytest.mark.parametrize("how", ["plain", "streamed", "config", "dict", "default provider"])
def test_a_tool_that_starts_a_run_is_routed_however_it_does_it(how: str) -> None:
    @function_tool
    async def consult(context: RunContextWrapper[Any]) -> str:
        configs: dict[str, Any] = {
            "config": RunConfig(model_settings=ModelSettings(temperature=0.7)),
            "dict": {"workflow_name": "x"},
            "default provider": RunConfig(model_provider=MultiProvider()),
        }
        if how == "streamed":
            result = Runner.run_streamed(judge, "q")
            async for _ in result.stream_events():
                pass
            return str(result.final_output)
        return str((await Runner.run(judge, "q", run_config=configs.get(how))).final_output)

    world = World(Reply(calls=(("consult", {}),)), "the verdict", "done")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", tools=[consult])))
    assert answer.text == "done"
    assert world.upstream.bodies[2]["messages"][-1]["content"] == "the verdict"
    assert world.upstream.bodies[1].get("temperature") == (0.7 if how == "config" else None)
    assert answer.end.usage == Usage(30, 15, requests=3)


def test_a_provider_that_the_author_brought_is_left_alone() -> None:
    class Own(ModelProvider):
        def get_model(self, model_name: str | None) -> Any:
            return ScriptedModel([ModelStep(output=[assistant_message("own")])])

    @function_tool
    async def consult() -> str:
        return str((await Runner.run(judge, "q", run_config=RunConfig(model_provider=Own()))).final_output)

    world = World(Reply(calls=(("consult", {}),)), "done")
    with world.installed():
        run_async(world.ask(Agent(name="a", tools=[consult])))
    assert world.upstream.bodies[1]["messages"][-1]["content"] == "own"


def test_a_run_outside_of_any_request_uses_the_current_upstreams() -> None:
    world = World("hi")
    with world.installed():
        result = run_async(Runner.run(judge, "q"))
    assert result.final_output == "hi"
    assert result.last_agent is not judge
    assert world.table.asked == [(None, None, None)]


def test_what_goes_on_after_its_request_uses_the_upstreams_of_then() -> None:
    async def main() -> None:
        world = World(Reply(calls=(("later", {}),)), "done")
        finished = asyncio.Event()
        tasks: list[asyncio.Task[Any]] = []

        async def background() -> str:
            await finished.wait()
            return str((await Runner.run(judge, "q")).final_output)

        @function_tool
        async def later() -> str:
            tasks.append(asyncio.create_task(background()))
            return "started"

        with world.installed():
            answer = await world.ask(Agent(name="a", tools=[later]))
            world.upstream, retired = FakeUpstream(), world.upstream
            world.upstream.replies = [Reply("from the new one")]
            world.table = FakeTable(world.upstream)
            finished.set()
            assert await tasks[0] == "from the new one"
        assert answer.end.usage == Usage(20, 10, requests=2)
        assert len(retired.bodies) == 2

    run_async(main())


def test_runs_inside_runs_end_at_a_depth() -> None:
    async def again() -> str:
        await Runner.run(deep, "q")
        return ""

    deep = Agent(name="deep")
    deep.tools.append(function_tool(again, failure_error_function=None))
    world = World(*[Reply(calls=(("again", {}),)) for _ in range(20)])
    with world.installed(), pytest.raises(AgentFailed, match="GATEWAY_RUN_MAX_DEPTH"):
        run_async(world.ask(deep))
    assert len(world.upstream.bodies) == 9


@pytest.mark.parametrize("streamed", [False, True])
def test_the_turn_limit_of_a_guardrails_own_run_is_not_the_answers(streamed: bool) -> None:
    @function_tool
    def ping() -> str:
        return "pong"

    @input_guardrail(run_in_parallel=False)
    async def endless(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        await Runner.run(Agent(name="busy", tools=[ping]), "q", max_turns=1)
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

    world = World(Reply(calls=(("ping", {}),)))
    with world.installed(), pytest.raises(AgentFailed):
        run_async(world.ask(Agent(name="a", input_guardrails=[endless]), streamed=streamed))


def test_inner_agents_are_cloned_and_share_the_context() -> None:
    seen: list[Any] = []

    @function_tool
    def note(context: RunContextWrapper[Any]) -> str:
        context.context.state.setdefault("notes", []).append("inner")
        return "noted"

    def instructions(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
        seen.append((agent, context.context))
        return "x"

    inner = Agent(name="inner", tools=[note], instructions=instructions)
    outer = Agent(name="outer", tools=[inner.as_tool("ask", "Ask.")], instructions=instructions)
    world = World(Reply(calls=(("ask", {"input": "x"}),)), Reply(calls=(("note", {}),)), "a", "b")
    with world.installed():
        run_async(world.ask(outer))
    assert all(agent is not inner and agent is not outer for agent, _ in seen)
    assert len({id(context) for _, context in seen}) == 1
    assert seen[0][1].state == {"notes": ["inner"]}


def test_contract_runs_do_not_register_the_authors_agents_in_the_sdks_table() -> None:
    """What makes concurrent runs of one shared agent quadratic in the SDK (see `sdk_adapter.cloning`)."""
    seen: set[int] = set()

    @function_tool
    def look() -> str:
        seen.update(_resolutions)
        return "x"

    target = Agent(name="target", tools=[look])
    inner = Agent(name="inner", tools=[look], handoffs=[target])
    entry = Agent(name="entry", tools=[inner.as_tool("ask", "Ask.")], handoffs=[target])
    world = World(
        Reply(calls=(("ask", {"input": "x"}),)),
        Reply(calls=(("look", {}),)),
        Reply(calls=(("transfer_to_target", {}),)),
        Reply(calls=(("look", {}),)),
        "inner",
        "done",
    )
    with world.installed():
        run_async(world.ask(entry))
    assert seen
    assert not seen & {id(agent) for agent in (entry, inner, target)}
    assert not _resolutions


def test_an_own_model_of_an_inner_agent_is_counted() -> None:
    inner = Agent(name="inner", model=ScriptedModel([ModelStep(output=[assistant_message("x")])]))
    world = World(Reply(calls=(("ask", {"input": "x"}),)), "done")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", tools=[inner.as_tool("ask", "Ask.")])))
    assert answer.end.usage is not None
    assert answer.end.usage.requests == 3
    assert not isinstance(inner.model, GatewayModel)


def test_install_changes_the_process_and_puts_everything_back() -> None:
    os.environ["OPENAI_DEFAULT_MODEL"] = "gpt-5.1"
    runner, provider = get_default_agent_runner(), setup.GLOBAL_TRACE_PROVIDER
    world = World()
    with world.installed():
        assert isinstance(get_default_agent_runner(), GatewayRunner)
        assert os.environ["OPENAI_DEFAULT_MODEL"] == PLACEHOLDER_MODEL
        assert os.environ["OPENAI_AGENTS_DONT_LOG_MODEL_DATA"] == "1"
        assert get_default_model_settings() == ModelSettings()
        assert setup.GLOBAL_TRACE_PROVIDER is not provider
    assert get_default_agent_runner() is runner
    assert os.environ["OPENAI_DEFAULT_MODEL"] == "gpt-5.1"
    assert "OPENAI_AGENTS_DONT_LOG_MODEL_DATA" not in os.environ
    assert setup.GLOBAL_TRACE_PROVIDER is provider
