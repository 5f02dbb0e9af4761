"""From an agent of `agents.yaml` to an SDK agent: instructions, model, limits; no code of anybody's."""

from __future__ import annotations

from typing import Any

from agents import Agent, ModelSettings

from gateway.registry.loading import Declaration
from sdk_adapter.gateway_tools import gateway_tool


def build_declared(declaration: Declaration) -> Agent[Any]:
    """Return the SDK agent that a ``kind: declarative`` entry describes."""
    options = declaration.options
    return Agent(
        name=options.display_name or declaration.name,
        handoff_description=options.description,
        instructions=declaration.instructions,
        model=options.model,
        tools=[gateway_tool(name) for name in declaration.tools],
        model_settings=ModelSettings(tool_choice=declaration.tool_choice),
    )
