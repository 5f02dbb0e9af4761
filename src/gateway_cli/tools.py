"""What `gateway doctor` says of `tools.yaml`."""

from __future__ import annotations

import asyncio
import importlib

from gateway.config import Settings
from gateway.tools.config import JailedTool, JailLimits, load_tools
from gateway_cli.errors import CliError


def check_tools(settings: Settings) -> str:
    """Return what the file holds, in one line; raise an error for what is wrong with it.

    Nothing is connected to and no tool imported, but a jail is tried where a tool needs one: a local tool that
    `local_tools_allowlist` does not allow, or that cannot be imported, shows in `GET /tools`.
    """
    config = load_tools(settings)
    if not config.tools:
        return "none configured"
    # Late on purpose: JSON Schema and HTTP are needed where there are tools alone.
    building = importlib.import_module("gateway.tools.building")
    asyncio.run(building.check_entries(config, settings))
    jailed = [entry.name for entry in config.tools if isinstance(entry, JailedTool) and entry.enabled]
    if jailed:
        jail = importlib.import_module("gateway.tools.builtin.jail")
        try:
            asyncio.run(jail.Jail(JailLimits()).probe())
        except jail.JailUnavailable as error:
            raise CliError(f"{', '.join(jailed)}: {error}") from error
    return ", ".join(f"{entry.name} ({entry.__struct_config__.tag})" for entry in config.tools)
