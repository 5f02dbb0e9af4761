"""`gateway validate [PATH]`: import every agent in a throw-away process, and say what is wrong with which file."""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from gateway.config import Settings
from gateway_cli.errors import CliError
from gateway_cli.offline import Inspected, inspect_folder
from gateway_cli.settings import read_settings


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 when an agent would not be served."""
    settings, only = _choose(arguments.path)
    found = [agent for agent in inspect_folder(settings) if _is_chosen(agent, only)]
    if only is not None and not found:
        raise CliError(f"{arguments.path} holds no agent; it needs an agent.py.")
    broken = [agent for agent in found if agent.status != "ready"]
    if arguments.json:
        print(json.dumps({"ok": not broken, "agents": [msgspec.to_builtins(agent) for agent in found]}, indent=2))
    else:
        print(render(found, settings.agents_root()))
    return 1 if broken else 0


def render(agents: Sequence[Inspected], root: Path) -> str:
    """Return the findings as text: one line per agent, and under it where, what, and what mends it."""
    if not agents:
        return f"No agents in {root}; `gateway new Hello` makes one."
    width = max(len(agent.name) for agent in agents)
    lines = []
    for agent in agents:
        word = "ok" if agent.status == "ready" else "error"
        lines.append(f"{word:<6} {agent.name:<{width}}  {agent.file or 'agents.yaml'}")
        for item in agent.diagnostics:
            where = f"{item.file}:{item.line}" if item.line else item.file
            lines.append(f"       {item.severity}: {where}: {item.message} [{item.code}]")
            if item.cause:
                lines.append(f"       cause: {item.cause}")
            lines.append(f"       fix: {item.fix}")
    broken = sum(agent.status != "ready" for agent in agents)
    lines.append(f"{len(agents)} agent{'s'[: len(agents) != 1]}, {broken} broken.")
    return "\n".join(lines)


def _choose(path: Path | None) -> tuple[Settings, str | None]:
    """Return the settings, and the file to report (a folder of files: its prefix) when only a part is meant."""
    if path is None:
        return read_settings(), None
    settings = read_settings()
    root, target = settings.agents_root().resolve(), path.resolve()
    if not target.exists():
        raise CliError(f"{path} does not exist.", status=2)
    if target == root:
        return settings, None
    if target.is_relative_to(root):
        label = target.relative_to(root).as_posix()
        return settings, label if target.is_file() else f"{label}/"
    single = target if target.is_file() else target / "agent.py"
    if not single.is_file():
        return read_settings(path), None
    # One agent elsewhere: its neighbours are none of our business, so only its own name may load.
    root = single.parent.parent if single.name == "agent.py" else single.parent
    label = single.relative_to(root).as_posix()
    return replace(settings, agent_path=root, agent_allowlist=(glob.escape(label),)), label


def _is_chosen(agent: Inspected, only: str | None) -> bool:
    if only is None:
        return True
    return agent.file is not None and (agent.file == only or (only.endswith("/") and agent.file.startswith(only)))
