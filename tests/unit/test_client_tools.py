"""Tools that the client sent: merged, ignored or refused; called, and continued on the next request."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent, function_tool

from gateway.errors import ApprovalRequired, InvalidRequest, UnsupportedParameter, UnsupportedValue
from gateway.events import ToolCallRequested, ToolStarted
from sdk_adapter.client_tools import TurnMemory
from tests.unit.sdk_fakes import Answer, Reply, World, run_async


@function_tool
def stock(item: str) -> str:
    """The stock."""
    return f"7 of {item}"


def tool(name: str, **extra: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"place": {"type": "string", "x-mine": 1}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters} | extra}


def continued(first: Answer, *results: str, before: str = "hello") -> list[dict[str, Any]]:
    """The history a client sends back after it ran the calls."""
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in first.calls
    ]
    return [
        {"role": "user", "content": before},
        {"role": "assistant", "content": first.text or None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": c.call_id, "content": r} for c, r in zip(first.calls, results, strict=True)),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_tool_is_offered_as_written_and_its_call_returned(streamed: bool) -> None:
    world = World(Reply(calls=(("locate", {"place": "x"}), ("ping", {}))))
    with world.installed():
        answer = run_async(
            world.ask(
                Agent(name="a", tools=[stock]), streamed=streamed, tools=[tool("locate", strict=True), tool("ping")]
            )
        )
    assert answer.calls == [
        ToolCallRequested(0, "call_1", "locate", '{"place": "x"}'),
        ToolCallRequested(1, "call_2", "ping", "{}"),
    ]
    assert answer.end.finish_reason == "tool_calls"
    assert not [event for event in answer.events if isinstance(event, ToolStarted)]
    offered = [item["function"] for item in world.upstream.bodies[0]["tools"]]
    assert [item["name"] for item in offered] == ["stock", "locate", "ping"]
    assert offered[1] == tool("locate", strict=True)["function"]
    assert offered[2]["strict"] is False


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_is_continued_on_the_next_request(streamed: bool) -> None:
    world = World(Reply("Wait.", calls=(("locate", {"place": "x"}),)), "Found it.")
    agent = Agent(name="a")
    with world.installed():
        first = run_async(world.ask(agent, streamed=streamed, tools=[tool("locate")]))
        second = run_async(
            world.ask(agent, streamed=streamed, tools=[tool("locate")], messages=continued(first, "there"))
        )
    assert second.text == "Found it."
    assert [m["role"] for m in world.upstream.bodies[1]["messages"]] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_mixed_turn_returns_the_clients_call_and_restores_the_servers_result(streamed: bool) -> None:
    world = World(
        Reply("First the stock.", calls=(("stock", {"item": "tea"}),)),
        Reply(calls=(("stock", {"item": "milk"}), ("locate", {"place": "x"}))),
        "All known.",
    )

    async def main() -> Answer:
        executor = world.prepare(Agent(name="a", tools=[stock]))
        first = await world.ask(executor, streamed=streamed, tools=[tool("locate")])
        assert [call.name for call in first.calls] == ["locate"]
        return await world.ask(executor, streamed=streamed, tools=[tool("locate")], messages=continued(first, "there"))

    with world.installed():
        assert run_async(main()).text == "All known."
    seen = world.upstream.bodies[2]["messages"]
    assert [m["role"] for m in seen] == ["user", "assistant", "tool", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in seen[3]["tool_calls"]] == ["stock", "locate"]
    assert [m["content"] for m in seen if m["role"] == "tool"] == ["7 of tea", "7 of milk", "there"]
    assert next(m["content"] for m in seen if m["role"] == "assistant") == "First the stock."


def test_another_key_does_not_get_the_kept_results() -> None:
    world = World(Reply(calls=(("stock", {"item": "milk"}), ("locate", {"place": "x"}))), "ok")

    async def main() -> None:
        executor = world.prepare(Agent(name="a", tools=[stock]))
        first = await world.ask(executor, tools=[tool("locate")], key_id="one")
        await world.ask(executor, tools=[tool("locate")], key_id="two", messages=continued(first, "there"))

    with world.installed():
        run_async(main())
    assert "7 of milk" not in str(world.upstream.bodies[1]["messages"])


def test_a_handoff_target_is_offered_the_clients_tools_too() -> None:
    target = Agent(name="target", tools=[stock])
    world = World(Reply(calls=(("transfer_to_target", {}),)), Reply(calls=(("locate", {"place": "x"}),)))
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", handoffs=[target]), tools=[tool("locate"), tool("stock")]))
    assert [call.name for call in answer.calls] == ["locate"]
    offered = [item["function"]["name"] for item in world.upstream.bodies[1]["tools"]]
    assert offered == ["stock", "locate"]


def test_a_client_tool_never_replaces_the_agents_own() -> None:
    world = World(Reply(calls=(("stock", {"item": "tea"}),)), "7.")
    with world.installed():
        answer = run_async(world.ask(Agent(name="a", tools=[stock]), tools=[tool("stock"), tool("transfer_to_b")]))
    assert answer.text == "7."
    assert not answer.calls


def test_an_own_tool_that_wants_approval_is_not_taken_for_the_clients() -> None:
    @function_tool(needs_approval=True)
    def danger() -> str:
        raise AssertionError("it ran")

    target = Agent(name="target", tools=[danger])
    world = World(Reply(calls=(("transfer_to_target", {}),)), Reply(calls=(("danger", {}),)))
    with world.installed(), pytest.raises(ApprovalRequired):
        run_async(world.ask(Agent(name="a", handoffs=[target]), tools=[tool("danger")]))


def test_open_webui_sends_its_tools_in_vain_unless_the_agent_merges_them() -> None:
    for options, expected in (({}, 0), ({"client_tools": "merge"}, 1)):
        world = World("ok")
        with world.installed():
            run_async(world.ask(Agent(name="a"), profile="openwebui", tools=[tool("ask_user")], options=options))
        assert len(world.upstream.bodies[0].get("tools", [])) == expected


def test_refused_tools_are_refused_by_name() -> None:
    world = World()
    with world.installed(), pytest.raises(UnsupportedParameter) as caught:
        run_async(world.ask(Agent(name="a"), tools=[tool("x")], options={"client_tools": "refuse"}))
    assert caught.value.param == "tools"


def test_ignored_tools_cannot_be_chosen() -> None:
    choice = {"type": "function", "function": {"name": "x"}}
    world = World()
    with world.installed(), pytest.raises(UnsupportedValue) as caught:
        run_async(world.ask(Agent(name="a"), tools=[tool("x")], tool_choice=choice, options={"client_tools": "ignore"}))
    assert caught.value.param == "tool_choice"


def test_two_client_tools_of_one_name_are_refused() -> None:
    world = World()
    with world.installed(), pytest.raises(InvalidRequest) as caught:
        run_async(world.ask(Agent(name="a"), tools=[tool("x"), tool("x")]))
    assert caught.value.param == "tools[1].function.name"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("required", "required"),
        ("none", "none"),
        ({"type": "function", "function": {"name": "x"}}, {"type": "function", "function": {"name": "x"}}),
    ],
)
def test_a_tool_choice_reaches_the_entry_agent_only_once(choice: Any, expected: Any) -> None:
    inner = Agent(name="inner")
    agent = Agent(name="a", tools=[stock, inner.as_tool("ask", "Ask.")], reset_tool_choice=False)
    world = World(Reply(calls=(("ask", {"input": "q"}),)), "inner", "done")
    with world.installed():
        run_async(world.ask(agent, tools=[tool("x")], tool_choice=choice))
    assert [body.get("tool_choice") for body in world.upstream.bodies] == [expected, None, None]


def test_the_memory_is_bounded_in_number_bytes_and_time() -> None:
    now = [0.0]
    memory = TurnMemory(ttl_s=10, most_turns=2, most_bytes=4_000, clock=lambda: now[0])

    def items(call_id: str, size: int = 10) -> list[dict[str, Any]]:
        return [
            {"type": "function_call", "call_id": call_id, "name": "x", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "other", "output": "x" * size},
            {"type": "function_call", "call_id": "other", "name": "x", "arguments": "{}"},
        ]

    for name in ("a", "b", "c"):
        memory.keep("key", [name], items(name))
    assert memory.recall("key", ["a"]) is None
    assert memory.recall("key", ["b"]) == items("b")
    assert memory.recall("other key", ["b"]) is None
    assert memory.recall("key", ["b", "unknown"]) is None
    memory.keep("key", ["huge"], items("huge", 5_000))
    assert memory.recall("key", ["huge"]) is None
    now[0] = 11
    assert memory.recall("key", ["b"]) is None
