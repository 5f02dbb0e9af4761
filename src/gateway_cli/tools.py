"""What `gateway doctor` says of `tools.yaml`."""

from __future__ import annotations

import asyncio
import importlib

from gateway.config import Settings
from gateway.tools.config import load_tools


def check_tools(settings: Settings) -> str:
    """Return what the file holds, in one line; raise `ConfigError` for what is wrong with it.

    Nothing is connected to and no tool imported: a local tool that `local_tools_allowlist` does not allow, or that
    cannot be imported, shows in `GET /tools`.
    """
    config = load_tools(settings)
    if not config.tools:
        return "none configured"
    # Late on purpose: JSON Schema and HTTP are needed where there are tools alone.
    building = importlib.import_module("gateway.tools.building")
    asyncio.run(building.check_entries(config, settings))
    return ", ".join(f"{entry.name} ({entry.__struct_config__.tag})" for entry in config.tools)
