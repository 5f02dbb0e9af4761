"""`gateway tools list|approve`: the tools of the running gateway, and those that wait for somebody to accept them."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from gateway_cli.client import get_json, send_json
from gateway_cli.credentials import find_key
from gateway_cli.errors import CliError
from gateway_cli.settings import find_served, read_settings
from gateway_cli.state import find_running
from gateway_cli.terminal import printable

_STATES = {"ready": "ready", "unavailable": "down"}
_WAITS = "approval"


def run(arguments: argparse.Namespace) -> int:
    """Do what ``arguments.action`` says; return 1 where tools are down, wait, or were not accepted."""
    asking = _Asking(arguments)
    return _approve(asking, arguments) if arguments.action == "approve" else _list(asking, arguments)


class _Asking:
    """A running gateway, asked with an admin key."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        settings = read_settings(arguments.path)
        running = find_running(settings)
        url = arguments.url or (running.url if running else None)
        if url is None:
            served = find_served(settings)
            if served is not None:
                raise CliError(f"`gateway serve` answers at {served.url}; name it with --url.")
            raise CliError("No gateway runs here; start one with `gateway dev`, or name one with --url.")
        self.url: str = url
        try:
            self._key = arguments.key or find_key(settings, url)
        except OSError as error:
            raise self._silent(error) from error

    def get(self, path: str) -> Any:
        """Return what a GET answers."""
        return self._answer(path, None)

    def post(self, path: str, body: object) -> Any:
        """Return what a POST answers."""
        return self._answer(path, body)

    def _answer(self, path: str, body: object) -> Any:
        try:
            if body is None:
                status, answer = get_json(self.url, path, self._key)
            else:
                status, answer = send_json("POST", self.url, path, self._key, body, timeout_s=60.0)
        except OSError as error:
            raise self._silent(error) from error
        if status in (401, 403):
            raise CliError(f"{self.url} wants an admin key; give one with --key or GATEWAY_API_KEY.")
        if status != 200:
            shown = answer.get("error") if isinstance(answer, dict) else None
            said = shown.get("message") if isinstance(shown, dict) else None
            raise CliError(str(said or f"{self.url}{path} answers {status}."))
        return answer

    def _silent(self, error: OSError) -> CliError:
        return CliError(f"Nothing answers at {self.url} ({error}); start it with `gateway dev`.")


def _list(asking: _Asking, arguments: argparse.Namespace) -> int:
    answer = asking.get("/tools")
    tools: list[dict[str, Any]] = answer["data"]
    entries: list[dict[str, Any]] = answer.get("entries", [])
    down = [item for item in entries if item["health"]["status"] == "down"]
    connecting = [item for item in entries if _is_connecting(item)]
    offering = {tool["entry"] for tool in tools}
    waiting = {f"{item['server']}/{item['tool']}": item for item in _waiting(asking, tools)}
    states = [_state(tool, waiting) for tool in tools]
    if arguments.json:
        print(
            json.dumps(
                {
                    "source": asking.url,
                    "tools": tools,
                    "down": down,
                    "connecting": connecting,
                    "waiting": list(waiting.values()),
                },
                indent=2,
            )
        )
    elif not entries:
        print(f"Served at {asking.url}: no tools; they stand in tools.yaml.")
    else:
        print(f"Served at {asking.url}:")
        rows = [
            (state, tool["name"], tool["provider"], tool["digest"][:12], tool["url"] or tool["module"] or "")
            for state, tool in zip(states, tools, strict=True)
        ]
        for line in _lines(rows, tools):
            print(line)
        for item in entries:
            if item in down or item in connecting or item["entry"] not in offering:
                print(f"  {_trouble(item)}")
        if waiting:
            servers = sorted({item["server"] for item in waiting.values()})
            print(
                "\nWhat waits is shown, and accepted, by:", *(f"  gateway tools approve {s}" for s in servers), sep="\n"
            )
    return int(bool(down or connecting) or any(state != _STATES["ready"] for state in states))


def _is_connecting(entry: Mapping[str, Any]) -> bool:
    return bool(entry["provider"] == "mcp" and entry["health"]["status"] == "unknown")


def _trouble(entry: Mapping[str, Any]) -> str:
    name, detail = entry["entry"], entry["health"]["detail"]
    why = f": {printable(detail)}" if detail else ""
    if entry["health"]["status"] == "down":
        return f"The entry '{name}' is down{why}"
    if _is_connecting(entry):
        return f"The MCP server '{name}' is not connected yet{why}; ask again in a moment."
    return f"The entry '{name}' offers no tools{why}"


def _lines(rows: Sequence[tuple[str, ...]], tools: list[dict[str, Any]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, tool in zip(rows, tools, strict=True):
        cells = (printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
        problem = tool["problem"]
        if problem:
            yield f"  {'':<{widths[0]}}  {printable(problem)}"


def _approve(asking: _Asking, arguments: argparse.Namespace) -> int:
    server, names = arguments.server, arguments.tools
    found = {item["tool"]: item for item in asking.get(f"/tools/mcp/{quote(server, safe='')}")["waiting"]}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise CliError(f"No tool '{unknown[0]}' of '{server}' waits for approval; it waits: {', '.join(found) or '-'}.")
    chosen = {name: found[name] for name in names} if names else found
    if not chosen:
        entry = next((item for item in asking.get("/tools").get("entries", ()) if item["entry"] == server), None)
        if entry is not None and (_is_connecting(entry) or entry["health"]["status"] == "down"):
            print(_trouble(entry))
            return 1
        print(f"No tool of '{server}' waits for approval.")
        return 0
    if not (arguments.json and arguments.yes):
        for name, item in chosen.items():
            print(*_shown(name, item), sep="\n")
    if not arguments.yes and not _agrees(len(chosen)):
        print("Nothing was accepted.")
        return 1
    seen = {name: item["digest"] for name, item in chosen.items()}
    answer = asking.post(f"/tools/mcp/{quote(server, safe='')}/approve", {"tools": list(chosen), "digests": seen})
    if arguments.json:
        print(json.dumps(answer, indent=2))
    else:
        print(f"Accepted: {', '.join(answer['approved'])}.")
    return 0


def _waiting(asking: _Asking, tools: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for server in dict.fromkeys(tool["entry"] for tool in tools if tool["provider"] == "mcp"):
        for item in asking.get(f"/tools/mcp/{quote(server, safe='')}")["waiting"]:
            yield {"server": server, **item}


def _state(tool: Mapping[str, Any], waiting: Mapping[str, Any]) -> str:
    remote = tool["name"].removeprefix(f"{tool['entry']}__")
    if f"{tool['entry']}/{remote}" in waiting:
        return _WAITS
    return _STATES.get(tool["status"], str(tool["status"]))


def _shown(name: str, item: Mapping[str, Any]) -> Iterator[str]:
    """Say how a tool's definition differs from the one that was accepted; for a new one, what it is."""
    before, after = _pretty(item["accepted"]), _pretty(item["listed"])
    if not before:
        yield f"{name} is new:"
        yield from (f"    {printable(line)}" for line in after)
        return
    yield f"{name} has changed:"
    for line in difflib.unified_diff(before, after, lineterm="", n=2):
        if not line.startswith(("---", "+++", "@@")):
            yield f"  {printable(line)}"


def _pretty(definition: str | None) -> list[str]:
    if definition is None:
        return []
    return json.dumps(json.loads(definition), indent=2, ensure_ascii=True).splitlines()


def _agrees(number: int) -> bool:
    try:
        answer = input(f"Accept {'this definition' if number == 1 else f'these {number} definitions'}? [y/N] ")
    except EOFError:
        print()
        raise CliError("Nobody is there to ask; --yes accepts without a question.", status=2) from None
    return answer.strip().lower() in ("y", "yes")
