"""Exceptions of the SDK, of openai clients and of author code, as the caller is told of them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx2
import openai
import pytest
from agents import Agent, MCPToolCancellationError, ModelBehaviorError, UserError, function_tool
from agents.exceptions import ModelTimeoutError
from agents.testing import ModelStep, ScriptedModel

from gateway.errors import (
    AgentFailed,
    AgentMisconfigured,
    GatewayError,
    ModelBehaviorFailed,
    UpstreamAuthFailed,
    UpstreamError,
    UpstreamModelNotFound,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from gateway.registry.entry import AgentOptions
from sdk_adapter.executor import prepare_agent
from sdk_adapter.failures import as_gateway_error, early_end, root_cause
from tests.unit.sdk_fakes import Reply, World, run_async

_REQUEST = httpx2.Request("POST", "http://upstream.example/v1/chat/completions")


def status_error(kind: type[openai.APIStatusError], status: int, **headers: str) -> openai.APIStatusError:
    response = httpx2.Response(status, request=_REQUEST, headers=headers)
    return kind("secret-ish upstream text", response=response, body={"code": "some_code", "param": "messages"})


@pytest.mark.parametrize(
    ("raised", "shown", "status"),
    [
        (status_error(openai.BadRequestError, 400), UpstreamRejected, 400),
        (status_error(openai.UnprocessableEntityError, 422), UpstreamRejected, 422),
        (status_error(openai.AuthenticationError, 401), UpstreamAuthFailed, 502),
        (status_error(openai.PermissionDeniedError, 403), UpstreamAuthFailed, 502),
        (status_error(openai.NotFoundError, 404), UpstreamModelNotFound, 502),
        (status_error(openai.APIStatusError, 408), UpstreamTimeout, 504),
        (status_error(openai.ConflictError, 409), UpstreamError, 502),
        (status_error(openai.RateLimitError, 429), UpstreamRateLimited, 429),
        (status_error(openai.InternalServerError, 500), UpstreamError, 502),
        (status_error(openai.InternalServerError, 503), UpstreamUnavailable, 503),
        (openai.APIConnectionError(request=_REQUEST), UpstreamUnreachable, 502),
        (openai.APITimeoutError(request=_REQUEST), UpstreamTimeout, 504),
        (openai.OpenAIError("The api_key client option must be set"), AgentMisconfigured, 500),
        (ModelTimeoutError(3), UpstreamTimeout, 504),
        (MCPToolCancellationError("x"), AgentFailed, 502),
        (ModelBehaviorError("x"), ModelBehaviorFailed, 502),
        (UserError("x"), AgentMisconfigured, 500),
        (RuntimeError("x"), AgentFailed, 502),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_failure_of_an_own_model_has_its_class(
    raised: Exception, shown: type[GatewayError], status: int, streamed: bool
) -> None:
    model = ScriptedModel([ModelStep(error=raised)])
    world = World()
    with world.installed(), pytest.raises(GatewayError) as caught:
        run_async(world.ask(Agent(name="a", model=model), streamed=streamed))
    assert (type(caught.value), caught.value.status) == (shown, status)


def test_a_rate_limit_keeps_a_sane_retry_after() -> None:
    for value, expected in (("7", 7.0), ("86400", None), ("soon", None)):
        error = as_gateway_error(status_error(openai.RateLimitError, 429, **{"retry-after": value}), "a")
        assert error.retry_after_s == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_that_raises_ends_the_run_without_its_text(streamed: bool, caplog: pytest.LogCaptureFixture) -> None:
    @function_tool(failure_error_function=None)
    def hard() -> str:
        raise ValueError("canary-hard-detail")

    world = World(Reply(calls=(("hard", {}),)))
    with world.installed(), caplog.at_level(logging.INFO), pytest.raises(AgentFailed) as caught:
        run_async(world.ask(Agent(name="a", tools=[hard]), streamed=streamed))
    assert "canary" not in caught.value.message
    assert caught.value.should_retry is False
    assert world.metrics.snapshot()["tool_failures"] == 1
    event = "sdk_agent.stream.failure" if streamed else "sdk_agent.failure"
    record = next(record for record in caplog.records if record.getMessage() == event)
    assert record.exc_info is not None
    assert "canary-hard-detail" in str(record.exc_info[1])


def test_a_tool_that_fails_softly_is_counted_and_the_model_told() -> None:
    @function_tool
    def soft() -> str:
        raise ValueError("detail")

    world = World(Reply(calls=(("soft", {}),)), "sorry")
    with world.installed():
        assert run_async(world.ask(Agent(name="a", tools=[soft]))).text == "sorry"
    assert world.metrics.snapshot()["tool_failures"] == 1


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_timeout_that_raises_is_a_504(streamed: bool) -> None:
    @function_tool(timeout=0.01, timeout_behavior="raise_exception")
    async def slow() -> str:
        await asyncio.Event().wait()
        return ""

    world = World(Reply(calls=(("slow", {}),)))
    with world.installed(), pytest.raises(AgentFailed, match="slow") as caught:
        run_async(world.ask(Agent(name="a", tools=[slow]), streamed=streamed))
    assert (caught.value.status, caught.value.code) == (504, "tool_timeout")


def test_a_tool_the_model_invented_is_answered_to_the_model() -> None:
    world = World(Reply(calls=(("invented", {}),)), "I have no such tool.")
    with world.installed():
        assert run_async(world.ask(Agent(name="a"))).text == "I have no such tool."


@pytest.mark.parametrize("streamed", [False, True])
def test_a_final_answer_that_does_not_fit_its_schema(streamed: bool) -> None:
    world = World("not json")
    with world.installed(), pytest.raises(ModelBehaviorFailed):
        run_async(world.ask(Agent(name="a", output_type=list[int]), streamed=streamed))


def test_an_output_type_without_a_strict_schema_is_the_authors_mistake() -> None:
    world = World()
    agent = Agent(name="a", output_type=dict[str, int])
    prepared = prepare_agent(agent, agent_id="default/a", options=AgentOptions(), services=world.services)
    assert prepared.problems == (("a", "its output_type has no strict JSON schema; use AgentOutputSchema(..., "
                                       "strict_json_schema=False)"),)  # fmt: skip
    with world.installed(), pytest.raises(AgentMisconfigured):
        run_async(world.ask(prepared.executor))


def test_instructions_that_raise_fail_the_run() -> None:
    def instructions(context: Any, agent: Any) -> str:
        raise RuntimeError("canary")

    world = World()
    with world.installed(), pytest.raises(AgentFailed) as caught:
        run_async(world.ask(Agent(name="a", instructions=instructions)))
    assert "canary" not in caught.value.message


def test_a_gateway_error_deep_in_a_chain_is_the_one_shown() -> None:
    inner = UpstreamTimeout("slow")
    error = UserError("Error running tool x: slow")
    error.__cause__ = inner
    assert as_gateway_error(error, "a") is inner
    assert root_cause(error) is inner


def test_what_is_an_error_is_no_early_end() -> None:
    assert early_end(ModelBehaviorError("x")) is None
    assert early_end(RuntimeError()) is None


def test_logs_hold_no_prompts_and_no_arguments(caplog: pytest.LogCaptureFixture) -> None:
    @function_tool
    def look(what: str) -> str:
        return "canary-result"

    world = World(Reply(calls=(("look", {"what": "canary-argument"}),)), "canary-answer")
    with world.installed(), caplog.at_level(logging.DEBUG):
        run_async(
            world.ask(Agent(name="a", instructions="canary-instructions", tools=[look]), messages="canary-prompt")
        )
    names = [record.getMessage() for record in caplog.records if record.name == "gateway.sdk_agent"]
    assert names == ["sdk_agent.start", "tool.invoke", "sdk_agent.success"]
    assert not [record for record in caplog.records if "canary" in str(record.__dict__)]
