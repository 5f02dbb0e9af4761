"""The settings a command works with: the environment's, with what the command line says on top."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from gateway.config import Settings
from gateway_cli.errors import CliError


def read_settings(path: Path | None = None) -> Settings:
    """Read the environment; ``path`` replaces the folder of agents and must exist."""
    settings = Settings.from_env()
    if path is None:
        return settings
    if not path.is_dir():
        raise CliError(f"{path} is not a folder; name the folder that holds the agents.", status=2)
    return replace(settings, agent_path=path.resolve())


def path_option(settings: Settings) -> str:
    """Return what a command needs so that it looks at the same folder of agents; empty where it does so by itself."""
    folder = settings.agents_root().resolve()
    if folder == Settings.from_env().agents_root().resolve():
        return ""
    return f" --path {shlex.quote(str(relative(folder)))}"


def relative(path: Path) -> Path:
    """Return ``path`` as somebody in the current folder would write it."""
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved
