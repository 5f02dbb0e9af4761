"""The settings a command works with: the environment's, with what the command line says on top."""

from __future__ import annotations

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
