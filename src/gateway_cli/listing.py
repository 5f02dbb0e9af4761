"""`gateway list`: the agents of the running gateway, or of the folder when none runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gateway.config import Settings
from gateway_cli.client import get_json
from gateway_cli.credentials import find_key
from gateway_cli.errors import CliError
from gateway_cli.offline import Inspected, inspect_folder
from gateway_cli.settings import find_served, read_settings
from gateway_cli.state import find_running
from gateway_cli.terminal import printable


@dataclass(frozen=True, slots=True)
class Row:
    """One agent of the list."""

    name: str
    status: str
    model: str | None
    upstream: str | None
    tools: tuple[str, ...]
    file: str | None
    line: int | None
    error: str | None


def run(arguments: argparse.Namespace) -> int:
    """Print the list; return 1 when an agent is broken."""
    settings = read_settings(arguments.path)
    running = find_running(settings)
    url = arguments.url or (running.url if running else None)
    if url is not None:
        source, rows = url, _ask(settings, url, arguments.key)
        if not rows and not arguments.json and _is_loading(url):
            print(f"The gateway at {url} is still loading its agents; ask again in a moment.")
            return 0
    else:
        source, rows = str(settings.agents_root()), _look(settings)
    if arguments.json:
        print(json.dumps({"source": source, "running": url is not None, "agents": [asdict(r) for r in rows]}, indent=2))
    else:
        served = None if url is not None else find_served(settings)
        print(render(source, rows, running=url is not None, served=served.url if served else None))
    return 1 if any(row.status == "error" for row in rows) else 0


def render(source: str, rows: Sequence[Row], *, running: bool, served: str | None = None) -> str:
    """Return the list as text; ``served`` is where `gateway serve` answers, which was not asked."""
    other = f"not asked: `gateway serve` at {served}; --url asks it" if served else None
    lines = [
        f"Served at {source}:" if running else f"In {source} ({other or 'no gateway runs; `gateway dev` starts one'}):"
    ]
    if not rows:
        return f"{lines[0]}\n  no agents; `gateway new Hello` makes one."
    width = max(len(row.name) for row in rows)
    for row in rows:
        binding = f"{row.upstream}/{row.model}" if row.upstream and row.model else row.model or "–"
        lines.append(f"  {row.status:<6} {row.name:<{width}}  {binding}  {', '.join(row.tools)}".rstrip())
        if row.error:
            where = f"{row.file}:{row.line}: " if row.line else f"{row.file}: " if row.file else ""
            lines += [f"         {printable(line)}" for line in f"{where}{row.error}".splitlines()]
    return "\n".join(lines)


def _ask(settings: Settings, url: str, key: str | None) -> list[Row]:
    try:
        key = key or find_key(settings, url)
        status, answer = get_json(url, "/agents", key)
    except OSError as error:
        raise CliError(f"Nothing answers at {url} ({error}); start it with `gateway dev`.") from error
    if status in (401, 403):
        raise CliError(f"{url} wants an admin key; give one with --key or GATEWAY_API_KEY.")
    if status != 200 or not isinstance(answer, list):
        raise CliError(f"{url} answered {status} to GET /agents; it is not an Agent Gateway, or not well.")
    return [_row(item) for item in answer]


def _is_loading(url: str) -> bool:
    """Whether a gateway that lists no agents has not looked at them all yet."""
    _, answer = get_json(url, "/readyz", None)
    return isinstance(answer, dict) and answer.get("status") == "starting"


def _row(item: dict[str, Any]) -> Row:
    return Row(
        name=item["qualified_name"],
        status=item["status"],
        model=item["model"],
        upstream=item["upstream"],
        tools=tuple(item["tools"]),
        file=item["metadata"].get("file"),
        line=item["metadata"].get("line"),
        error=item["error"],
    )


def _look(settings: Settings) -> list[Row]:
    return [_inspected(agent) for agent in inspect_folder(settings)]


def _inspected(agent: Inspected) -> Row:
    found = next((item for item in agent.diagnostics if item.severity == "error"), None)
    return Row(
        name=agent.name,
        status=agent.status,
        model=agent.model,
        upstream=agent.upstream,
        tools=agent.tools,
        file=found.file if found else agent.file,
        line=found.line if found else None,
        error=f"{found.message} {found.fix}" if found else None,
    )
