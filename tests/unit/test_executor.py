"""An agent run through the executor: its events, settings, limits, and that it stops when told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from agents import Agent, AgentHooks, ModelSettings, RunContextWrapper, StopAtTools, function_tool
from agents.testing import ModelStep, ScriptedModel, assistant_message
from pydantic import BaseModel

from gateway.errors import (
    AgentFailed,
    ApprovalRequired,
    ConfigError,
    GatewayError,
    ServiceUnavailable,
    UpstreamRateLimited,
)
from gateway.events import (
    AgentSwitched,
    ReasoningDelta,
    RunEvent,
    RunFinished,
    TextDelta,
    ToolFinished,
    ToolStarted,
    Usage,
)
from tests.unit.sdk_fakes import Reply, World, make_run, run_async


@function_tool
def get_weather(city: str) -> str:
    """The weather."""
    return f"The weather in {city} is sunny"


def weather_agent(**fields: Any) -> Agent[Any]:
    return Agent(name="Weather Agent", instructions="Always respond with weather.", tools=[get_weather], **fields)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_runs_and_the_answer_comes_as_text(streamed: bool) -> None:
    world = World(Reply(calls=(("get_weather", {"city": "Paris"}),)), "It is sunny.")
    with world.installed():
        answer = run_async(world.ask(weather_agent(), streamed=streamed, messages="Weather in Paris?"))
    assert answer.text == "It is sunny."
    assert answer.events[:2] == [
        ToolStarted("call_1", "get_weather", "Weather Agent"),
        ToolFinished("call_1", "get_weather", "Weather Agent"),
    ]
    assert answer.end == RunFinished("stop", Usage(20, 10, requests=2))
    assert not answer.calls
    assert world.upstream.bodies[0]["messages"] == [
        {"role": "system", "content": "Always respond with weather."},
        {"role": "user", "content": "Weather in Paris?"},
    ]
    assert world.upstream.bodies[1]["messages"][-1]["content"] == "The weather in Paris is sunny"


def test_streamed_text_comes_word_by_word_and_equals_the_plain_answer() -> None:
    script = [Reply("Let me look.", calls=(("get_weather", {"city": "Rome"}),)), Reply("Sunny in Rome.")]
    texts = []
    for streamed in (False, True):
        world = World(*script)
        with world.installed():
            answer = run_async(world.ask(weather_agent(), streamed=streamed))
        texts.append(answer.text)
        if streamed:
            assert [event.text for event in answer.events if isinstance(event, TextDelta)][:3] == [
                "Let ",
                "me ",
                "look.",
            ]
    assert texts == ["Let me look.\n\nSunny in Rome."] * 2


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_says_nothing_gives_an_empty_answer(streamed: bool) -> None:
    world = World("")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert answer.events == [RunFinished("stop", Usage(10, 5, requests=1))]


@pytest.mark.parametrize("streamed", [False, True])
def test_reasoning_is_shown_as_reasoning(streamed: bool) -> None:
    world = World(Reply("42", reasoning="hmm"))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert ReasoningDelta("hmm") in answer.events
    assert answer.text == "42"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("finish", "text"), [("length", "cut of"), ("length", ""), ("content_filter", "half"), ("content_filter", "")]
)
def test_the_true_finish_reason_is_told(streamed: bool, finish: str, text: str) -> None:
    world = World(Reply(text, finish=finish))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert (answer.end.finish_reason, answer.text, answer.refusal) == (finish, text, "")


class Event(BaseModel):
    title: str


@pytest.mark.parametrize("streamed", [False, True])
def test_a_structured_answer_is_json_and_carries_its_schema(streamed: bool) -> None:
    world = World('{"title": "Party"}')
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", output_type=Event), streamed=streamed))
    assert answer.text == '{"title": "Party"}'
    assert world.upstream.bodies[0]["response_format"]["json_schema"]["name"] == "final_output"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("text", ['{"title": "Par', ""])
def test_a_structured_answer_that_was_cut_is_shown_with_finish_reason_length(streamed: bool, text: str) -> None:
    world = World(Reply(text, finish="length"))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", output_type=Event), streamed=streamed))
    assert (answer.text, answer.end) == (text, RunFinished("length", Usage(10, 5, requests=1)))
    assert len(world.upstream.bodies) == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tools_result_as_final_output_is_the_answer(streamed: bool) -> None:
    world = World(Reply(calls=(("get_weather", {"city": "Oslo"}),)))
    agent = weather_agent(tool_use_behavior=StopAtTools(stop_at_tool_names=["get_weather"]))
    with world.installed():
        answer = run_async(world.ask(agent, streamed=streamed))
    assert (answer.text, answer.end.finish_reason) == ("The weather in Oslo is sunny", "stop")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_handoff_switches_agents_and_both_work_on_clones(streamed: bool) -> None:
    seen: list[Any] = []

    def instructions(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
        seen.append(agent)
        return "You are billing."

    billing = Agent(name="Billing", instructions=instructions, tools=[get_weather])
    triage = Agent(name="Triage", instructions="You are triage.", handoffs=[billing])
    billing.handoffs.append(triage)
    world = World(
        Reply(calls=(("transfer_to_billing", {}),)),
        Reply(calls=(("transfer_to_triage", {}),)),
        Reply(calls=(("transfer_to_billing", {}),)),
        "You owe 42.",
    )
    with world.installed():
        answer = run_async(world.ask(triage, streamed=streamed, temperature=0.5))
    assert [event for event in answer.events if isinstance(event, AgentSwitched)] == [
        AgentSwitched("Billing"),
        AgentSwitched("Triage"),
        AgentSwitched("Billing"),
    ]
    assert answer.text == "You owe 42."
    assert not any(isinstance(event, ToolStarted) for event in answer.events)
    assert [body["temperature"] for body in world.upstream.bodies] == [0.5] * 4
    assert seen[0] is not billing
    assert seen[0] is seen[1]


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_summed_over_agents_used_as_tools(streamed: bool) -> None:
    inner = Agent(name="inner", tools=[get_weather])
    outer = Agent(name="outer", tools=[inner.as_tool("ask_inner", "Ask.")])
    world = World(
        Reply(calls=(("ask_inner", {"input": "x"}),)),
        Reply(calls=(("get_weather", {"city": "Bonn"}),)),
        "inner says",
        "outer says",
    )
    with world.installed():
        answer = run_async(world.ask(outer, streamed=streamed, temperature=0.3, max_tokens=7))
    assert answer.end.usage == Usage(40, 20, requests=4)
    assert answer.text == "outer says"
    assert [event.name for event in answer.events if isinstance(event, ToolStarted)] == ["ask_inner"]
    assert [body.get("temperature") for body in world.upstream.bodies] == [0.3, None, None, 0.3]
    assert [body.get("max_tokens") for body in world.upstream.bodies] == [7, None, None, 7]


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_estimated_and_flagged_when_the_upstream_gives_none(streamed: bool) -> None:
    world = World(Reply("12345678", usage=None))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a"), streamed=streamed))
    usage = answer.end.usage
    assert usage is not None
    assert usage.estimated
    assert usage.output_tokens == 2
    assert usage.input_tokens > 5


@pytest.mark.parametrize("streamed", [False, True])
def test_the_turn_limit_ends_the_answer_with_length(streamed: bool) -> None:
    world = World(*[Reply("On it.", calls=(("get_weather", {"city": "x"}),)) for _ in range(2)])
    with world.installed():
        answer = run_async(world.ask(weather_agent(), streamed=streamed, options={"max_turns": 2}))
    assert answer.end == RunFinished("length", Usage(20, 10, requests=2))
    assert answer.text == "On it.\n\nOn it."


@pytest.mark.parametrize("streamed", [False, True])
def test_no_tool_runs_where_the_limit_of_hops_is_zero(streamed: bool) -> None:
    world = World("No tools here.")
    with world.installed():
        answer = run_async(world.ask(weather_agent(), streamed=streamed, options={"max_tool_hops": 0}))
    assert answer.text == "No tools here."
    assert "tools" not in world.upstream.bodies[0]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("hops", [0, 1])
def test_more_tool_hops_than_allowed_is_an_error_that_says_so(streamed: bool, hops: int) -> None:
    ran = []

    @function_tool
    def count() -> str:
        ran.append(1)
        return "x"

    world = World(*[Reply(calls=(("count", {}),)) for _ in range(hops + 1)])
    with world.installed(), pytest.raises(AgentFailed, match=f"limit of {hops}") as caught:
        run_async(world.ask(Agent(name="a", tools=[count]), streamed=streamed, options={"max_tool_hops": hops}))
    assert caught.value.status == 502
    assert len(ran) == hops


def test_an_agent_that_is_its_own_tool_is_stopped() -> None:
    agent = Agent(name="a")
    agent.tools.append(agent.as_tool("again", "Again."))
    world = World(*[Reply(calls=(("again", {"input": "x"}),)) for _ in range(500)])
    with world.installed(), pytest.raises(AgentFailed, match="GATEWAY_RUN_MAX_DEPTH"):
        run_async(world.ask(agent, options={"max_turns": 2}))
    assert len(world.upstream.bodies) <= 20


@pytest.mark.parametrize("streamed", [False, True])
def test_an_upstream_error_comes_out_unchanged(streamed: bool) -> None:
    error = UpstreamRateLimited("Too many.", retry_after_s=7)
    world = World(Reply(error=error))
    with world.installed(), pytest.raises(UpstreamRateLimited) as caught:
        run_async(world.ask(Agent(name="a"), streamed=streamed))
    assert caught.value is error


def test_an_upstream_error_after_text_comes_after_the_text() -> None:
    world = World(Reply("one two three", error=UpstreamRateLimited("Too many."), error_after=3))

    async def main() -> list[RunEvent]:
        stream = world.prepare(Agent(name="a")).execute(make_run(streamed=True))
        events = [await anext(stream), await anext(stream)]
        with pytest.raises(UpstreamRateLimited):
            await anext(stream)
        return events

    with world.installed():
        assert run_async(main()) == [TextDelta("one "), TextDelta("two ")]


def test_an_unknown_model_is_refused_with_the_tables_sentence() -> None:
    world = World(known={})
    with world.installed(), pytest.raises(ConfigError, match="add it to 'aliases'"):
        run_async(world.ask(Agent(name="a", model="gpt-99")))


@pytest.mark.parametrize("streamed", [False, True])
def test_closing_the_events_closes_the_upstream_stream(streamed: bool) -> None:
    """Plain runs are cancelled; streamed ones are closed between two events."""

    async def main() -> None:
        world = World(Reply("one two three four", hold=asyncio.Event()))
        with world.installed():
            events = world.prepare(Agent(name="a")).execute(make_run(streamed=streamed))
            if streamed:
                assert await anext(events) == TextDelta("one ")
                await asyncio.wait_for(events.aclose(), 30)
            else:
                task = asyncio.ensure_future(anext(events))
                await world.upstream.started.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, 30)
            assert world.upstream.closed.is_set()

    run_async(main())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["async", "thread"])
def test_a_run_is_cancelled_while_a_tool_runs(streamed: bool, kind: str) -> None:
    release = threading.Event()

    async def main() -> None:
        running, cancelled = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        @function_tool
        async def slow() -> str:
            running.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return "never"

        @function_tool
        def blocking() -> str:
            loop.call_soon_threadsafe(running.set)
            release.wait(60)
            return "late"

        tool = slow if kind == "async" else blocking
        world = World(Reply("one", calls=((tool.name, {}),)))
        with world.installed():

            async def consume() -> None:
                async for _ in world.prepare(Agent(name="a", tools=[tool])).execute(make_run(streamed=streamed)):
                    pass

            task = asyncio.create_task(consume())
            await running.wait()
            started = loop.time()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert loop.time() - started < 20, "long before the tool ends"
            assert kind == "thread" or cancelled.is_set()
            release.set()

    run_async(main())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_sync_instructions_callable_does_not_run_on_the_loop(streamed: bool) -> None:
    threads = []

    def instructions(context: RunContextWrapper[Any], agent: Agent[Any]) -> str:
        threads.append(threading.current_thread())
        return f"You serve {context.context.principal.id}."

    world = World("hi")
    with world.installed():
        run_async(world.ask(Agent(name="a", instructions=instructions), streamed=streamed))
    assert threads[0] is not threading.main_thread()
    assert world.upstream.bodies[0]["messages"][0]["content"] == "You serve someone."


@pytest.mark.parametrize("streamed", [False, True])
def test_the_tool_of_an_author_who_wants_approval_answers_409(streamed: bool) -> None:
    @function_tool(needs_approval=True)
    def delete_account(name: str) -> str:
        raise AssertionError("it ran")

    world = World(Reply(calls=(("delete_account", {"name": "x"}),)))
    with world.installed(), pytest.raises(ApprovalRequired, match="delete_account") as caught:
        run_async(world.ask(Agent(name="a", tools=[delete_account]), streamed=streamed))
    assert (caught.value.status, caught.value.should_retry) == (409, False)


def test_approval_wanted_inside_an_agent_used_as_a_tool_names_the_inner_tool() -> None:
    @function_tool(needs_approval=True)
    def delete_account(name: str) -> str:
        raise AssertionError("it ran")

    inner = Agent(name="inner", tools=[delete_account])
    outer = Agent(name="outer", tools=[inner.as_tool("ask_inner", "Ask.")])
    world = World(Reply(calls=(("ask_inner", {"input": "x"}),)), Reply(calls=(("delete_account", {"name": "x"}),)))
    with world.installed(), pytest.raises(ApprovalRequired, match="delete_account"):
        run_async(world.ask(outer))


@pytest.mark.parametrize("streamed", [False, True])
def test_hooks_of_the_author_are_called(streamed: bool) -> None:
    class Recorder(AgentHooks[Any]):
        async def on_start(self, context: Any, agent: Any) -> None:
            context.context.state.setdefault("seen", []).append("start")

        async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
            context.context.state["seen"].append(tool.name)

        async def on_end(self, context: Any, agent: Any, output: Any) -> None:
            ends.append(context.context.state["seen"])

    ends: list[Any] = []
    world = World(Reply(calls=(("get_weather", {"city": "x"}),)), "done")
    with world.installed():
        run_async(world.ask(weather_agent(hooks=Recorder()), streamed=streamed))
    assert ends == [["start", "get_weather"]]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_the_author_brought_is_used_and_counted(streamed: bool) -> None:
    model = ScriptedModel([ModelStep(output=[assistant_message("mine")])])
    world = World()
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", model=model), streamed=streamed))
    assert answer.text == "mine"
    assert answer.end.usage is not None
    assert answer.end.usage.requests == 1
    assert not world.upstream.bodies


def test_the_gateways_model_replaces_the_authors_and_its_upstream_is_asked() -> None:
    world = World("hi")
    with world.installed():
        agent = Agent(name="a", model="gpt-5-mini")
        run_async(world.ask(agent, options={"model": "local-model", "upstream": "lab"}))
    assert world.table.asked == [("local-model", "lab", "local-model")]
    assert agent.model == "gpt-5-mini"
    assert "reasoning_effort" not in world.upstream.bodies[0]
    assert "verbosity" not in world.upstream.bodies[0]


def test_a_handoff_back_to_the_entry_agent_keeps_the_gateways_model() -> None:
    other = Agent(name="other", model="others-model")
    entry = Agent(name="entry", model="gpt-5-mini", handoffs=[other])
    other.handoffs.append(entry)
    world = World(Reply(calls=(("transfer_to_other", {}),)), Reply(calls=(("transfer_to_entry", {}),)), "back")
    with world.installed():
        assert run_async(world.ask(entry, options={"model": "local-model"})).text == "back"
    assert [body["model"] for body in world.upstream.bodies] == ["local-model", "others-model", "local-model"]


def test_the_authors_agent_is_not_changed_by_a_request() -> None:
    agent = weather_agent(model_settings=ModelSettings(temperature=0.25))
    world = World("a", "b")
    with world.installed():
        executor = world.prepare(agent)
        run_async(world.ask(executor, temperature=1, tools=[_tool("mine")]))
        run_async(world.ask(executor))
    assert agent.tools == [get_weather]
    assert [body["temperature"] for body in world.upstream.bodies] == [1, 0.25]


def test_fifty_runs_at_once_of_one_agent_keep_apart() -> None:
    @function_tool
    async def who(context: RunContextWrapper[Any]) -> str:
        await asyncio.sleep(0)
        return str(context.context.metadata["n"])

    def last(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "tool":
            return Reply(body["messages"][-1]["content"])
        return Reply(calls=(("who", {}),))

    world = World(*[last] * 100)

    async def main() -> None:
        executor = world.prepare(Agent(name="a", tools=[who]))
        answers = await asyncio.gather(
            *(world.ask(executor, streamed=n % 2 == 0, metadata={"n": str(n)}) for n in range(50))
        )
        assert [answer.text for answer in answers] == [str(n) for n in range(50)]

    with world.installed():
        run_async(main())


def test_closing_waits_for_the_last_run() -> None:
    async def main() -> None:
        hold = asyncio.Event()
        world = World(Reply("one two three", hold=hold))
        with world.installed():
            executor = world.prepare(Agent(name="a"))
            events = cast("AsyncGenerator[RunEvent, None]", executor.execute(make_run(streamed=True)))
            await anext(events)
            closing = asyncio.create_task(executor.aclose())
            await asyncio.sleep(0)
            assert not closing.done()
            hold.set()
            rest = [event async for event in events]
            assert isinstance(rest[-1], RunFinished)
            await closing
            with pytest.raises(ServiceUnavailable):
                await anext(executor.execute(make_run()))

    run_async(main())


def test_a_failed_runs_usage_is_still_counted() -> None:
    world = World(Reply(calls=(("get_weather", {"city": "x"}),)), Reply(error=UpstreamRateLimited("no")))

    async def main() -> bytes:
        with pytest.raises(GatewayError):
            await world.ask(weather_agent())
        return b"".join([piece async for piece in world.metrics.render()])

    with world.installed():
        text = run_async(main()).decode()
    assert (
        'gen_ai_client_token_usage_sum{operation_name="chat",request_model="default/test",token_type="input"} 10.0'
        in text
    )


def test_tools_inside_an_agent_used_as_a_tool_are_counted_too() -> None:
    inner = Agent(name="inner", tools=[get_weather])
    outer = Agent(name="outer", tools=[inner.as_tool("ask_inner", "Ask.")])
    world = World(
        Reply(calls=(("ask_inner", {"input": "x"}),)), Reply(calls=(("get_weather", {"city": "x"}),)), "a", "b"
    )
    with world.installed():
        run_async(world.ask(outer))
    breakdown = world.metrics.snapshot()["tool_breakdown"]
    assert breakdown["get_weather"]["sdk"]["provider"] == "native"
    assert breakdown["ask_inner"]["sdk"]["provider"] == "agent"


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
