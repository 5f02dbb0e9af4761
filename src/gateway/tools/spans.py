"""The span of one tool call that no agent made: ``execute_tool {tool}``; of an agent's calls its SDK tells itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec

from gateway.observability.traces import TOOL_ARGUMENTS, current_span
from gateway.tools.port import ToolSource


def tool_span(name: str, source: ToolSource, arguments: Mapping[str, Any]) -> AbstractContextManager[object]:
    """Return what to make the call in."""
    above = current_span()
    if above is None or source == "sdk":
        return nullcontext()
    span = above.child(
        f"execute_tool {name}",
        {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name, "gen_ai.tool.type": "function"},
    )
    if span.with_content:
        span.say(TOOL_ARGUMENTS, msgspec.json.encode(arguments).decode())
    return span
