"""The settings a command works with: the environment's, with what the command line says on top."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from gateway.config import Settings
from gateway_cli.errors import CliError
from gateway_cli.state import Running, find_running


def read_settings(path: Path | None = None) -> Settings:
    """Read the environment; ``path`` replaces the folder of agents and must exist."""
    settings = Settings.from_env()
    if path is None:
        return settings
    if not path.is_dir():
        raise CliError(f"{path} is not a folder; name the folder that holds the agents.", status=2)
    return replace(settings, agent_path=path.resolve())


def read_store_settings(path: Path | None = None) -> Settings:
    """Read the settings of the gateway whose database is meant.

    Where the environment names none (`GATEWAY_ENV`, `GATEWAY_STATE_DIR`, `GATEWAY_DATABASE_URL`) it is the one that
    runs: that of `gateway serve`, in production, unless one runs in development here. Where none runs: development.
    """
    settings = read_settings(path)
    named = ("GATEWAY_ENV", "GATEWAY_STATE_DIR", "GATEWAY_DATABASE_URL")
    if any(os.environ.get(name, "").strip() for name in named) or find_running(settings) is not None:
        return settings
    served = replace(settings, environment="production")
    return served if find_running(served) is not None else settings


def find_served(settings: Settings) -> Running | None:
    """Return the gateway of `gateway serve` on this machine, where the settings are those of development."""
    if not settings.is_development or settings.state_dir is not None:
        return None
    return find_running(replace(settings, environment="production"))


def database_words(settings: Settings) -> str:
    """Say which database is meant, without its password, and how another one is chosen."""
    if settings.database_url is not None and not settings.database_url.startswith("sqlite"):
        parts = urlsplit(settings.database_url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path} (GATEWAY_DATABASE_URL)"
    if settings.database_url is not None or settings.state_dir is not None:
        return settings.database_url or str(settings.state_folder())
    other = "production" if settings.is_development else "development"
    return f"{settings.state_folder()} ({settings.environment}; GATEWAY_ENV={other} chooses the other one)"


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
