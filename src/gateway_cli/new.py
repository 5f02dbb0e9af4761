"""`gateway new NAME`: a folder with a working agent."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from gateway.config import Settings
from gateway.registry.registry import slugify
from gateway_cli.errors import CliError
from gateway_cli.settings import path_option, read_settings
from gateway_cli.state import find_running

_TEMPLATE = '''"""{title}: what this agent is for."""

from agents import Agent, function_tool


@function_tool
def get_weather(city: str) -> str:
    """Say what the weather is like in a city."""
    return f"The weather in {{city}} is sunny."


agent = Agent(
    name="{title}",
    instructions="You are a helpful assistant. Use get_weather for questions about the weather.",
    tools=[get_weather],
)
'''


def run(arguments: argparse.Namespace) -> int:
    """Write ``NAME/agent.py``, and say which model it is; an existing agent is never touched."""
    if arguments.path is not None:
        _make_root(arguments.path)
    settings = read_settings(arguments.path)
    *namespace, name = _parts(arguments.name)
    root = settings.agents_root()
    folder = root.joinpath(*namespace, name)
    model = _model_id(folder.relative_to(root), settings)
    _refuse_existing(root, folder, model, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "agent.py").write_text(_TEMPLATE.format(title=_title(name)), encoding="utf-8")
    except OSError as error:
        raise CliError(f"{folder} cannot be written: {error.strerror or error}.") from error
    print(f"Made {folder / 'agent.py'}: the model {model}.")
    if find_running(settings):
        print(
            f"A gateway runs: if it watches the folder it serves it now; `gateway list{path_option(settings)}` tells."
        )
    else:
        command = "dev" if settings.is_development else "serve"  # which of the two runs in this environment
        print(" ".join(["Next: gateway", command, *([str(arguments.path)] if arguments.path else [])]))
    return 0


def _make_root(path: Path) -> None:
    """Make the folder of agents that is named; a first agent is what it is made for."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"{path} cannot be made: {error.strerror or error}.") from error


def _parts(text: str) -> list[str]:
    parts = text.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", part) for part in parts):
        near = re.sub(r"[^A-Za-z0-9_-]", "", text.title()).lstrip("0123456789_-")
        hint = f", for example {near}" if near else ""
        raise CliError(
            f"{text!r} cannot name an agent's folder; use letters, digits, '-' and '_', a letter first{hint}.",
            status=2,
        )
    return parts


def _refuse_existing(root: Path, folder: Path, model: str, settings: Settings) -> None:
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise CliError(f"{folder} exists already; choose another name.")
    for known in sorted(root.rglob("agent.py")) if root.is_dir() else ():
        if _model_id(known.relative_to(root).parent, settings) == model:
            raise CliError(f"{known} is the model {model} already; choose another name.")


def _model_id(folder: Path, settings: Settings) -> str:
    """Return the model of a drop-in's folder: the first folder is the namespace where there are two."""
    *above, name = folder.parts or ("",)
    return f"{slugify(above[0]) if above else settings.default_namespace}/{slugify(name)}"


def _title(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_-]+", " ", name).strip()
