"""Guardrails: what they refuse is refused, and what they have not judged is not shown."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    ToolGuardrailFunctionOutput,
    function_tool,
    input_guardrail,
    output_guardrail,
    tool_input_guardrail,
    tool_output_guardrail,
)

from gateway.errors import AgentFailed, ContentPolicyViolation, ToolDenied
from gateway.events import RunEvent, RunFinished, TextDelta, Usage
from tests.unit.sdk_fakes import Reply, World, make_run, run_async


def input_check(trip: bool, wait: asyncio.Event | None = None, **options: Any) -> Any:
    @input_guardrail(name="no_homework", **options)
    async def check(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        if wait is not None:
            await wait.wait()
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=trip)

    return check


@output_guardrail
async def no_codewords(context: Any, agent: Any, output: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="codeword" in str(output))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_refused_input_is_a_400_before_any_event(streamed: bool, parallel: bool) -> None:
    world = World("one two three")
    agent = Agent(name="a", input_guardrails=[input_check(True, run_in_parallel=parallel)])
    with world.installed(), pytest.raises(ContentPolicyViolation, match="no_homework") as caught:
        run_async(world.ask(agent, streamed=streamed))
    assert (caught.value.status, caught.value.code) == (400, "content_policy_violation")
    if not parallel:
        assert not world.upstream.bodies


def test_text_waits_for_an_input_guardrail_that_runs_beside_the_model() -> None:
    async def main() -> list[RunEvent]:
        verdict = asyncio.Event()
        hold = asyncio.Event()
        world = World(Reply("one two three", hold=hold))
        agent = Agent(name="a", input_guardrails=[input_check(False, verdict)])
        with world.installed():
            events = world.prepare(agent).execute(make_run(streamed=True))
            first = asyncio.ensure_future(anext(events))
            await world.upstream.started.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not first.done()
            verdict.set()
            hold.set()
            return [await first, *[event async for event in events]]

    assert run_async(main())[:3] == [TextDelta("one "), TextDelta("two "), TextDelta("three")]


def test_live_does_not_wait() -> None:
    async def main() -> None:
        verdict = asyncio.Event()
        world = World(Reply("one two three", hold=asyncio.Event()))
        agent = Agent(name="a", input_guardrails=[input_check(False, verdict)])
        with world.installed():
            events = world.prepare(agent, stream_mode="live").execute(make_run(streamed=True))
            assert await anext(events) == TextDelta("one ")
            await events.aclose()

    run_async(main())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_withheld_answer_ends_with_content_filter_and_shows_nothing(streamed: bool) -> None:
    world = World("the codeword is blue")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", output_guardrails=[no_codewords]), streamed=streamed))
    assert answer.events == [RunFinished("content_filter", Usage(10, 5, requests=1))]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_approved_answer_comes_whole_after_the_verdict(streamed: bool) -> None:
    world = World("nothing to hide")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", output_guardrails=[no_codewords]), streamed=streamed))
    assert (answer.text, answer.end.finish_reason) == ("nothing to hide", "stop")


def test_a_handoff_target_with_output_guardrails_makes_the_run_guarded() -> None:
    target = Agent(name="target", output_guardrails=[no_codewords])
    world = World(Reply("Moment.", calls=(("transfer_to_target", {}),)), "codeword")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", handoffs=[target]), streamed=True))
    assert (answer.text, answer.end.finish_reason) == ("", "content_filter")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_answer_that_no_guardrail_judged_is_not_shown(streamed: bool) -> None:
    @function_tool
    def ping() -> str:
        return "pong"

    world = World(Reply("codeword", calls=(("ping", {}),)))
    agent = Agent(name="a", tools=[ping], output_guardrails=[no_codewords])
    with world.installed():
        answer = run_async(world.ask(agent, streamed=streamed, options={"max_turns": 1}))
    assert (answer.text, answer.end.finish_reason) == ("", "length")


@pytest.mark.parametrize("streamed", [False, True])
def test_plain_guardrail_functions_run_beside_the_loop(streamed: bool) -> None:
    threads: list[str] = []

    def judge(*_: Any) -> GuardrailFunctionOutput:
        threads.append(threading.current_thread().name)
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)

    def judge_tool(_: Any) -> ToolGuardrailFunctionOutput:
        threads.append(threading.current_thread().name)
        return ToolGuardrailFunctionOutput.allow()

    @function_tool(
        tool_input_guardrails=[tool_input_guardrail(judge_tool)],
        tool_output_guardrails=[tool_output_guardrail(judge_tool)],
    )
    def look() -> str:
        return "seen"

    world = World(Reply(calls=(("look", {}),)), "done")
    agent = Agent(
        name="a", tools=[look], input_guardrails=[input_guardrail(judge)], output_guardrails=[output_guardrail(judge)]
    )
    with world.installed():
        run_async(world.ask(agent, streamed=streamed))
    assert len(threads) == 4
    assert "MainThread" not in threads


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_guardrails_may_end_the_run(streamed: bool) -> None:
    @tool_input_guardrail
    def before(data: Any) -> ToolGuardrailFunctionOutput:
        return ToolGuardrailFunctionOutput.raise_exception()

    @tool_output_guardrail
    def after(data: Any) -> ToolGuardrailFunctionOutput:
        return ToolGuardrailFunctionOutput.raise_exception()

    for guardrails in ({"tool_input_guardrails": [before]}, {"tool_output_guardrails": [after]}):

        @function_tool(**guardrails)  # type: ignore[call-overload,untyped-decorator]
        def ping() -> str:
            return "pong"

        world = World(Reply(calls=(("ping", {}),)))
        with world.installed(), pytest.raises(ToolDenied) as caught:
            run_async(world.ask(Agent(name="a", tools=[ping]), streamed=streamed))
        assert (caught.value.status, caught.value.code) == (403, "tool_denied")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_guardrail_that_fails_fails_the_run_without_its_text(streamed: bool) -> None:
    @input_guardrail
    async def broken(context: Any, agent: Any, input: Any) -> GuardrailFunctionOutput:
        raise ValueError("canary")

    world = World("one two three")
    with world.installed(), pytest.raises(AgentFailed) as caught:
        run_async(world.ask(Agent(name="a", input_guardrails=[broken]), streamed=streamed))
    assert "canary" not in caught.value.message
