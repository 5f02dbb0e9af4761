"""Makes providers of MCP servers; `mcp` itself, a second and 50 MB, is imported when there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.tools.config import McpTools
from gateway.tools.mcp.pins import SqlPins
from gateway.tools.port import OnChange, ToolProvider
from gateway.tools.table import OpenMcp

if TYPE_CHECKING:
    from gateway.store.store import Store

_RESULT_BYTES = 256 * 1024


def open_mcp(store: Store) -> OpenMcp:
    """Return what makes providers whose pins are kept in ``store``."""
    pins = SqlPins(store)

    def make(entry: McpTools, on_change: OnChange) -> ToolProvider:
        from gateway.tools.mcp.provider import McpProvider  # noqa: PLC0415 - `mcp`: see above

        sizes = [entry.max_result_bytes, *(item.max_result_bytes for item in entry.overrides.values())]
        largest = max((size for size in sizes if size is not None), default=_RESULT_BYTES)
        return McpProvider(entry, max_result_bytes=largest, pins=pins, on_change=on_change)

    return make
