"""Who may call a tool: key ∩ agent ∩ tool, denied unless all of them say yes."""

from __future__ import annotations

from fnmatch import fnmatchcase

from gateway.principal import Principal
from gateway.tools.config import AllowedFor
from gateway.tools.port import ToolSource


def reaches(name: str, allowed_for: AllowedFor, principal: Principal) -> bool:
    """Return whether a key may call the tool in one way or another: what it may know of."""
    return any(fnmatchcase(name, pattern) for pattern in principal.allow_tools) and any(
        fnmatchcase(principal.key_id, pattern) for pattern in allowed_for.keys
    )


def why_not(
    name: str, allowed_for: AllowedFor, principal: Principal, agent: str | None, source: ToolSource
) -> str | None:
    """Return what stands against a call, as a sentence for its caller; None where nothing does.

    ``agent`` is the canonical id of the agent the client named; a call without one is direct.
    """
    if not any(fnmatchcase(name, pattern) for pattern in principal.allow_tools):
        return (
            f"The key '{principal.key_id}' does not reach the tool '{name}'. Its owner can add a pattern that matches "
            "it to allow_tools in security.yaml."
        )
    if not any(fnmatchcase(principal.key_id, pattern) for pattern in allowed_for.keys):
        return f"The tool '{name}' is not for the key '{principal.key_id}'; see allowed_for.keys in tools.yaml."
    if source == "sdk" and agent is not None:
        if not any(fnmatchcase(agent, pattern) for pattern in allowed_for.agents):
            return f"The tool '{name}' is not for the agent '{agent}'; see allowed_for.agents in tools.yaml."
    elif not allowed_for.direct:
        return f"The tool '{name}' is for agents alone; see allowed_for.direct in tools.yaml."
    return None
