"""The table of tool entries made at run time. Importing this imports SQLAlchemy."""

from __future__ import annotations

import logging
import time

import msgspec
from sqlalchemy import BigInteger, Column, Float, Index, String, Table, Text, delete, func, insert, select, update

from gateway.observability.logs import log_event
from gateway.store.connection import StoreConnection
from gateway.store.schema import METADATA, Schema
from gateway.tools.registered import Registered, Registrable

_log = logging.getLogger("gateway.tools")

ENTRIES = Table(
    "registered_tools",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("entry", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("deleted_at", Float),
    Column("changed", BigInteger, nullable=False),
    Index("registered_tools_by_change", "changed"),
)
SCHEMA = Schema("registered_tools", (ENTRIES,))


async def revision(connection: StoreConnection) -> int:
    """Return a number that grows with every change of any entry."""
    return await connection.scalar(select(func.coalesce(func.max(ENTRIES.c.changed), 0))) or 0


async def load(connection: StoreConnection) -> tuple[Registered, ...]:
    """Return every entry, in the order in which they were made."""
    rows = await connection.execute(
        select(ENTRIES).where(ENTRIES.c.deleted_at.is_(None)).order_by(ENTRIES.c.created_at, ENTRIES.c.name)
    )
    return tuple(
        Registered(entry=entry, created_at=row.created_at, created_by=row.created_by)
        for row in rows
        if (entry := _entry(row.name, row.entry)) is not None
    )


def _entry(name: str, text: str) -> Registrable | None:
    """Return an entry; None for one that a gateway of another version wrote, and this one cannot read."""
    try:
        entry: Registrable = msgspec.json.decode(text, type=Registrable)
    except msgspec.ValidationError as error:
        log_event(_log, "tool.entry.unserved", level=logging.WARNING, entry=name, message=f"unreadable: {error}")
        return None
    return entry


async def lock(connection: StoreConnection) -> None:
    """Keep others from changing entries until this transaction ends."""
    if connection.backend == "postgresql":  # SQLite has one writer at a time anyway
        await connection.exec_driver_sql("LOCK TABLE registered_tools IN SHARE ROW EXCLUSIVE MODE")


async def write(connection: StoreConnection, made: Registered) -> None:
    """Add an entry, and let every process know."""
    changed = await revision(connection) + 1
    await connection.execute(delete(ENTRIES).where(ENTRIES.c.name == made.entry.name))
    await connection.execute(
        insert(ENTRIES).values(
            name=made.entry.name,
            entry=msgspec.json.encode(made.entry).decode(),
            created_at=made.created_at,
            created_by=made.created_by[:128],
            changed=changed,
        )
    )


async def erase(connection: StoreConnection, name: str) -> None:
    """Take an entry out; its row stays without it, so that every process learns of the change."""
    await connection.execute(
        update(ENTRIES)
        .where(ENTRIES.c.name == name)
        .values(entry="", deleted_at=time.time(), changed=await revision(connection) + 1)
    )
