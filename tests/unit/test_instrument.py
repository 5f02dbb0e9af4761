"""What is found out about an agent, and the contract tests of the SDK's private fields."""

from __future__ import annotations

import asyncio
import copy
import threading
from typing import Any

import pytest
from agents import (
    Agent,
    ApplyPatchTool,
    CodeInterpreterTool,
    FunctionTool,
    HostedMCPTool,
    LocalShellTool,
    MultiProvider,
    OpenAIProvider,
    ShellTool,
    WebSearchTool,
    function_tool,
    handoff,
)
from agents.mcp import MCPServerStdio
from agents.models.multi_provider import MultiProviderMap
from agents.sandbox import SandboxAgent
from agents.testing import ModelStep, ScriptedModel, assistant_message
from openai import AsyncOpenAI

from gateway.registry.entry import AgentOptions
from sdk_adapter.cloning import RunClones, off_the_loop
from sdk_adapter.executor import prepare_agent
from sdk_adapter.instrument import is_default_provider, observe_tools, reachable_agents, survey
from tests.unit.sdk_fakes import Reply, World, run_async


@function_tool
def ping() -> str:
    """Ping."""
    return "pong"


def names(agent: Agent[Any]) -> list[str]:
    return [reached.name for reached in reachable_agents(agent)]


def test_everything_reachable_is_found_once_cycles_included() -> None:
    leaf = Agent(name="leaf")
    helper = Agent(name="helper", tools=[leaf.as_tool("leaf", "x")])
    target = Agent(name="target", tools=[helper.as_tool("helper", "x")])
    entry = Agent(name="entry", handoffs=[target, handoff(leaf)], tools=[helper.as_tool("h", "x")])
    target.handoffs.append(entry)
    helper.tools.append(helper.as_tool("self", "x"))
    assert sorted(names(entry)) == ["entry", "helper", "leaf", "target"]


def test_two_agents_of_one_name_are_two() -> None:
    a, b = Agent(name="Assistant"), Agent(name="Assistant", model="m")
    entry = Agent(
        name="Assistant", handoffs=[handoff(a, tool_name_override="to_a"), handoff(b, tool_name_override="to_b")]
    )
    assert survey(entry).models == (("Assistant", None), ("Assistant", None), ("Assistant", "m"))
    world = World(Reply(calls=(("to_b", {}),)), "b says", known={"m": "model-b"})
    with world.installed():
        assert run_async(world.ask(entry)).text == "b says"
    assert [body["model"] for body in world.upstream.bodies] == ["default-model", "model-b"]


@pytest.mark.parametrize("streamed", [False, True])
def test_agents_of_one_name_keep_their_tools_apart(streamed: bool) -> None:
    mine = {"type": "function", "function": {"name": "locate", "parameters": {"type": "object", "properties": {}}}}
    b = Agent(name="Assistant", tools=[ping])
    entry = Agent(name="Assistant", handoffs=[handoff(b, tool_name_override="to_b")])
    b.handoffs.append(handoff(entry, tool_name_override="to_a"))
    world = World(
        Reply(calls=(("to_b", {}),)),
        Reply(calls=(("ping", {}),)),
        Reply(calls=(("to_a", {}),)),
        Reply(calls=(("to_b", {}),)),
        Reply(calls=(("ping", {}), ("locate", {}))),
    )
    with world.installed():
        answer = run_async(world.ask(entry, streamed=streamed, tools=[mine]))
    assert [call.name for call in answer.calls] == ["locate"]
    offered = [[tool["function"]["name"] for tool in body["tools"]] for body in world.upstream.bodies]
    in_entry, in_b = ["locate", "to_b"], ["ping", "locate", "to_a"]
    assert offered == [in_entry, in_b, in_b, in_entry, in_b]


def test_what_the_loader_judges_is_reported() -> None:
    server = MCPServerStdio(name="files", params={"command": "true"})
    inner = Agent(
        name="inner",
        model=ScriptedModel([ModelStep(output=[assistant_message("x")])]),
        tools=[
            WebSearchTool(),
            HostedMCPTool(tool_config={"type": "mcp", "server_label": "x"}),
            LocalShellTool(lambda r: ""),
        ],
    )
    agent = Agent(
        name="a",
        model="gpt-5-mini",
        tools=[
            ping,
            copy.copy(ping),
            inner.as_tool("ask", "x"),
            CodeInterpreterTool(tool_config={"type": "code_interpreter", "container": "c"}),
            ShellTool(executor=lambda r: ""),
            ShellTool(environment={"type": "container_reference", "container_id": "c"}),
            ApplyPatchTool(editor=None),  # type: ignore[arg-type]
        ],
        mcp_servers=[server],
        prompt={"id": "p"},
    )
    prepared = prepare_agent(agent, agent_id="default/a", options=AgentOptions(), services=World().services)
    assert prepared.models == (("a", "gpt-5-mini"),)
    assert prepared.brings_own_model == ("inner",)
    assert prepared.hosted_tools == (
        ("a", "code_interpreter"),
        ("a", "shell"),
        ("a", "prompt"),
        ("inner", "web_search"),
        ("inner", "mcp"),
    )
    assert prepared.host_tools == (("a", "shell"), ("a", "apply_patch"), ("inner", "local_shell"))
    assert prepared.duplicate_tools[0] == ("a", "ping")
    assert prepared.mcp_servers == ("files",)
    assert prepared.tools[:3] == ("ping", "ping", "ask")
    assert not prepared.output_guardrails


def test_what_is_no_agent_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an agents\.Agent, got str"):
        prepare_agent("x", agent_id="a", options=AgentOptions(), services=World().services)


def test_tools_are_instrumented_once_however_often_they_are_prepared() -> None:
    agent = Agent(name="a", tools=[ping])
    world = World(Reply(calls=(("ping", {}),)), "x")
    with world.installed():
        world.prepare(agent)
        run_async(world.ask(world.prepare(agent)))
    assert world.metrics.snapshot()["tool_invocations"] == 1


def test_a_plain_function_as_a_tool_runs_in_a_thread() -> None:
    threads = []

    @function_tool
    def where() -> str:
        threads.append(threading.current_thread())
        return "here"

    world = World(Reply(calls=(("where", {}),)), "x")
    with world.installed():
        run_async(world.ask(Agent(name="a", tools=[where])))
    assert threads[0] is not threading.main_thread()


def test_a_tool_built_by_hand_is_observed_too() -> None:
    async def invoke(context: Any, arguments: str) -> str:
        return arguments

    tool = FunctionTool(
        name="raw", description="", params_json_schema={"type": "object", "properties": {}}, on_invoke_tool=invoke
    )
    world = World(Reply(calls=(("raw", {}),)), "x")
    with world.installed():
        run_async(world.ask(Agent(name="a", tools=[tool])))
    assert world.metrics.snapshot()["tool_breakdown"]["raw"]["sdk"]["count"] == 1


def test_contract_function_tools_keep_their_call_behind_the_failure_handling() -> None:
    @function_tool
    def fresh(n: int) -> str:
        return str(n)

    invoker: Any = fresh.on_invoke_tool
    before = invoker._invoke_tool_impl
    observe_tools(Agent(name="a", tools=[fresh]))
    assert invoker._invoke_tool_impl is not before
    assert fresh.on_invoke_tool is invoker
    assert invoker._invoke_tool_impl.__agents_prepare_arguments__ is before.__agents_prepare_arguments__
    assert copy.copy(fresh).on_invoke_tool._invoke_tool_impl is invoker._invoke_tool_impl  # type: ignore[attr-defined]
    assert fresh.__wrapped__ is not None


def test_contract_agent_tools_and_handoffs_name_their_agents() -> None:
    agent = Agent(name="a")
    tool = agent.as_tool("t", "x")
    assert tool._agent_instance is agent
    assert tool._is_agent_tool is True
    assert ping._is_agent_tool is False
    reference = handoff(agent)._agent_ref
    assert reference is not None
    assert reference() is agent


def test_contract_a_provider_that_nobody_configured_is_recognised() -> None:
    assert is_default_provider(MultiProvider())
    assert is_default_provider(OpenAIProvider())
    client = AsyncOpenAI(api_key="x", base_url="http://127.0.0.1:1")
    for provider in (
        MultiProvider(openai_client=client),
        MultiProvider(openai_api_key="x"),
        MultiProvider(provider_map=MultiProviderMap()),
        OpenAIProvider(base_url="http://127.0.0.1:1"),
        World().prepare(Agent(name="a"))._provider,
    ):
        assert not is_default_provider(provider)


def test_a_run_gets_one_clone_per_agent_and_the_original_stays() -> None:
    target = Agent(name="target")
    agent = Agent(name="a", handoffs=[handoff(target), target])
    target.handoffs.append(agent)
    clones = RunClones(None)
    clone = clones.clone_of(agent)
    assert clone is not agent
    assert clones.clone_of(clone) is clone
    first, second = (asyncio.run(item.on_invoke_handoff(None, "")) for item in clone.handoffs)  # type: ignore[union-attr,arg-type]
    assert first is second is clones.clone_of(target)
    assert first is not target
    assert asyncio.run(first.handoffs[0].on_invoke_handoff(None, "")) is clone
    assert agent.handoffs[1] is target
    assert RunClones(None).clone_of(agent) is not clone


def test_a_subclass_with_a_constructor_of_its_own_is_cloned_too() -> None:
    class Guide(Agent[Any]):
        def __init__(self, city: str) -> None:
            super().__init__(name=f"Guide to {city}", instructions="Guide.")
            self.city = city

    world = World("a", "b")
    with world.installed():
        agent = Guide("Rome")
        assert run_async(world.ask(agent)).text == "a"
        assert run_async(world.ask(agent, options={"model": "m"})).text == "b"
    clone = RunClones(None).clone_of(agent)
    assert isinstance(clone, Guide)
    assert (clone.city, clone.tools is agent.tools) == ("Rome", False)
    assert [body["model"] for body in world.upstream.bodies] == ["default-model", "m"]


def test_a_sandbox_agent_stays_one() -> None:
    agent = SandboxAgent(name="s", instructions="x")
    assert type(RunClones(None).clone_of(agent)) is SandboxAgent


def test_only_plain_instructions_move_to_a_thread() -> None:
    async def async_function(context: Any, agent: Any) -> str:
        return "x"

    class AsyncCallable:
        async def __call__(self, context: Any, agent: Any) -> str:
            return "x"

    for instructions in ("text", None, async_function, AsyncCallable()):
        assert off_the_loop(instructions) is instructions
    assert asyncio.run(off_the_loop(lambda context, agent: async_function(context, agent))(None, None)) == "x"
