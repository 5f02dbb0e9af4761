"""gateway_tool(): an ordinary tool of the SDK that finds its run by itself."""

from __future__ import annotations

from typing import Any

import pytest
from agents import Agent, FunctionTool, RunContextWrapper, UserError

from gateway.tools.port import ToolPart, ToolResult
from sdk_adapter.gateway_tools import _output, bound_tools, gateway_tool, gateway_tool_names, use_gateway_tool


def test_it_is_made_without_looking_anything_up() -> None:
    tool = gateway_tool("no_such_tool", description="What I say.")
    assert type(tool) is FunctionTool
    assert (tool.name, tool.description, tool.strict_json_schema) == ("no_such_tool", "What I say.", False)
    assert gateway_tool_names(Agent(name="A", tools=[tool, use_gateway_tool("b")])) == ("no_such_tool", "b")
    assert bound_tools([tool], None) == [tool]


def test_two_descriptions_are_two_tools() -> None:
    first, second = gateway_tool("a", description="one"), gateway_tool("a", description="two")
    assert (first.description, second.description) == ("one", "two")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 65, "a\n"])
def test_what_can_be_no_name_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a tool"):
        gateway_tool(name)


@pytest.mark.anyio
async def test_outside_of_a_run_it_says_so() -> None:
    context: Any = RunContextWrapper(None)
    with pytest.raises(UserError, match="outside of a run of the gateway"):
        await gateway_tool("weather").on_invoke_tool(context, "{}")


def test_pictures_stay_pictures() -> None:
    picture = ToolPart(kind="image", media_type="image/png", data="AAAA")
    text, image = _output(ToolResult(text="Here.", parts=(picture,)))
    assert (text.text, image.image_url) == ("Here.", "data:image/png;base64,AAAA")
    assert _output(ToolResult(text="", parts=(ToolPart(kind="audio", media_type="audio/wav", data="A"),))) == (
        "[audio audio/wav]"
    )
