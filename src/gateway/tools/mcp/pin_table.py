"""The table of pins. Importing this module imports SQLAlchemy: the store does, and whoever has it open."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy import Column, Float, String, Table, Text, delete, insert, select

from gateway.store.connection import StoreConnection
from gateway.store.schema import METADATA, Schema
from gateway.tools.mcp.pins import Pin

PINS = Table(
    "mcp_pins",
    METADATA,
    Column("server", String(256), primary_key=True),
    Column("tool", String(64), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("definition", Text, nullable=False),
    Column("accepted_by", String(128), nullable=False),
    Column("accepted_at", Float, nullable=False),
)

SCHEMA = Schema("mcp_pins", tables=(PINS,))


async def load(connection: StoreConnection, server: str) -> dict[str, Pin]:
    """Return the server's pins by tool."""
    rows = await connection.execute(select(PINS).where(PINS.c.server == server))
    return {row.tool: Pin(row.digest, row.definition, row.accepted_by) for row in rows}


async def save(connection: StoreConnection, server: str, pins: Mapping[str, Pin]) -> None:
    """Add or replace the pins of tools."""
    if not pins:
        return
    await connection.execute(delete(PINS).where(PINS.c.server == server, PINS.c.tool.in_(list(pins))))
    rows = [
        {
            "server": server,
            "tool": tool,
            "digest": pin.digest,
            "definition": pin.definition,
            "accepted_by": pin.by[:128],
            "accepted_at": time.time(),
        }
        for tool, pin in pins.items()
    ]
    await connection.execute(insert(PINS), rows)
